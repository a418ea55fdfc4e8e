# SPDX-License-Identifier: Apache-2.0
"""Sums of rows over segments, by torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor


def bag_sum(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums of rows [R, D] over bags: out[b] = sum of rows[indices[offsets[b]:offsets[b + 1]]] -> [B, D].

    weights: a factor per index, or None. offsets has B + 1 entries, the first 0; indices and offsets are int32 or
    int64, alike. Deterministic: a bag is summed in order.
    """
    bags = offsets.numel() - 1
    if bags <= 0 or rows.shape[0] == 0 or indices.numel() == 0:
        return rows.new_zeros(max(bags, 0), rows.shape[1])
    return torch.ops.aten._embedding_bag_forward_only(rows, indices, offsets, False, 0, False, weights, True)[0]


LONGEST_BAG = 256  # rows summed in sequence; longer segments are summed in pieces, which is balanced and more accurate


def segment_plan(order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """What `segment_sum` works out from order and offsets alone: (order, cuts, bags, entries left out of order, bags
    left out of the result)."""
    left_out = skipped = 0
    if order.device.type == "cpu":
        left_out = int(offsets[0]) if order.numel() else 0
        if left_out:
            order, offsets = order[left_out:], offsets - left_out
    else:  # no host synchronization: an extra bag takes what comes before
        offsets = torch.cat([torch.zeros_like(offsets[:1]), offsets])
        skipped = 1
    if order.numel() <= LONGEST_BAG:
        return order, offsets, None, left_out, skipped
    # Cut at every multiple of LONGEST_BAG too: the number of pieces is known without looking at the offsets.
    multiples = torch.arange(0, order.numel(), LONGEST_BAG, dtype=offsets.dtype, device=offsets.device)
    cuts = torch.cat([offsets, multiples]).sort()[0]
    bags = torch.searchsorted(cuts, offsets, out_int32=offsets.dtype == torch.int32)
    bags[-1:].fill_(cuts.numel() - 1)  # empty segments at the end repeat the last cut
    return order, cuts, bags, left_out, skipped


def segment_sum(
    rows: Tensor, order: Tensor, offsets: Tensor, weights: Tensor | None = None, plan: tuple | None = None
) -> Tensor:
    """out[s] = sum of rows[order[offsets[s]:offsets[s + 1]]], for segments of any length -> [S, D]. Deterministic.

    offsets may start above 0 (what comes before belongs to no segment) and end at order.numel(). weights: a factor per
    entry of order, or None. plan: `segment_plan(order, offsets)` if it is at hand.
    """
    if offsets.numel() <= 1 or order.numel() == 0:
        return bag_sum(rows, order, offsets)
    order, cuts, bags, left_out, skipped = segment_plan(order, offsets) if plan is None else plan
    sums = bag_sum(rows, order, cuts, weights[left_out:] if weights is not None and left_out else weights)
    if bags is not None:
        positions = torch.arange(sums.shape[0], dtype=bags.dtype, device=bags.device)
        sums = bag_sum(sums, positions, bags)
    return sums[skipped:]
