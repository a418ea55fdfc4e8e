# SPDX-License-Identifier: Apache-2.0
"""Sums of rows over segments, by operations of torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def bag_sum(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums rows over bags: out[b] = sum of rows[indices[offsets[b]:offsets[b + 1]]]. Deterministic.

    Args:
        rows: [R, D].
        indices: rows of all bags, int32 or int64.
        offsets: [B + 1], of the dtype of indices; the first is 0.
        weights: a factor for each index, or None.

    Returns:
        [B, D].
    """
    bags = offsets.numel() - 1
    if bags <= 0 or rows.shape[0] == 0 or indices.numel() == 0:
        return rows.new_zeros(max(bags, 0), rows.shape[1])
    return torch.ops.aten._embedding_bag_forward_only(rows, indices, offsets, False, 0, False, weights, True)[0]


# Longer segments are summed in pieces of this many rows: that balances the work and rounds less.
LONGEST_BAG = 256


class SegmentPlan(NamedTuple):
    """What `segment_sum` computes from order and offsets alone."""

    order: Tensor  # without the entries before the first segment, on a CPU
    cuts: Tensor  # offsets of the pieces
    bags: Tensor | None  # offsets of the segments among the pieces; None: each segment is one piece
    left_out: int  # entries removed from the start of order
    skipped: int  # rows of the sums that belong to no segment


def segment_plan(order: Tensor, offsets: Tensor) -> SegmentPlan:
    """The plan of `segment_sum` for (order, offsets)."""
    left_out = skipped = 0
    if order.device.type == "cpu":
        left_out = int(offsets[0]) if order.numel() else 0
        if left_out:
            order, offsets = order[left_out:], offsets - left_out
    else:  # An extra bag takes the entries before the first segment, so the host need not read their number.
        offsets = torch.cat([torch.zeros_like(offsets[:1]), offsets])
        skipped = 1
    if order.numel() <= LONGEST_BAG:
        return SegmentPlan(order, offsets, None, left_out, skipped)
    # There is a cut at every multiple of LONGEST_BAG too, so the number of pieces does not depend on the offsets.
    multiples = torch.arange(0, order.numel(), LONGEST_BAG, dtype=offsets.dtype, device=offsets.device)
    cuts = torch.cat([offsets, multiples]).sort()[0]
    bags = torch.searchsorted(cuts, offsets, out_int32=offsets.dtype == torch.int32)
    bags[-1:].fill_(cuts.numel() - 1)  # Empty segments at the end repeat the last cut.
    return SegmentPlan(order, cuts, bags, left_out, skipped)


def segment_sum(
    rows: Tensor, order: Tensor, offsets: Tensor, weights: Tensor | None = None, plan: SegmentPlan | None = None
) -> Tensor:
    """Sums rows over segments of any length: out[s] = sum of rows[order[offsets[s]:offsets[s + 1]]]. Deterministic.

    Args:
        rows: [R, D].
        order: rows of all segments.
        offsets: [S + 1]. Entries of order before the first offset belong to no segment. The last is order.numel().
        weights: a factor for each entry of order, or None.
        plan: `segment_plan(order, offsets)`, if the caller has it.

    Returns:
        [S, D].
    """
    if offsets.numel() <= 1 or order.numel() == 0:
        return bag_sum(rows, order, offsets)
    order, cuts, bags, left_out, skipped = segment_plan(order, offsets) if plan is None else plan
    sums = bag_sum(rows, order, cuts, weights[left_out:] if weights is not None and left_out else weights)
    if bags is not None:
        positions = torch.arange(sums.shape[0], dtype=bags.dtype, device=bags.device)
        sums = bag_sum(sums, positions, bags)
    return sums[skipped:]
