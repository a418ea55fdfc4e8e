# SPDX-License-Identifier: Apache-2.0
"""recognize: whether a map is exactly one-hot, and its label codes."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _register

# Few operations take the wide unsigned dtypes. A signed view keeps which elements are 0 and which are 1.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def recognize_torch(segmap: Tensor) -> tuple[Tensor, Tensor]:
    segmap = segmap.view(_SIGNED.get(segmap.dtype, segmap.dtype))
    order = sorted(range(4), key=segmap.stride, reverse=True)
    if segmap.device.type == "cpu" and segmap.numel() and segmap.permute(order).is_contiguous():
        counted = _count_nonzero(segmap, order)
    else:
        counted = _count_planes(segmap)
    if counted is None:
        return segmap.new_zeros((len(segmap), *segmap.shape[2:]), dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    count, label, binary = counted
    channels = segmap.shape[1]
    last = (segmap[:, -1] == 1).to(torch.int32)
    single = (count <= 1).all()
    one_hot = torch.where(count == 1, label, channels)
    labeled = torch.where(count - last == 1, label - last * (channels - 1), channels - 1)
    kind = torch.where(single, 1, torch.where((count - last <= 1).all(), 2, 0))
    codes = torch.where(single, one_hot, labeled * 2 + last)
    return codes.to(torch.int32), torch.where(binary, kind, 0).to(torch.int32)


# At each pixel [N, H, W] int32, the number of channels that hold a 1 and the sum of their numbers. Then [] bool,
# whether all values are 0 or 1.
_Counted = tuple[Tensor, Tensor, Tensor]


def _count_nonzero(segmap: Tensor, order: list[int]) -> _Counted | None:
    """Counts the elements of a dense map that are not 0. Returns None if the map is not one-hot.

    order: the dimensions in the order of memory.
    """
    n, _, h, w = segmap.shape
    flat = segmap.permute(order).reshape(-1)
    if torch.count_nonzero(flat) > 2 * n * h * w:  # A pixel has at most a label and an edge.
        return None
    where = flat.nonzero().squeeze(1)
    if not (flat[where] == 1).all():
        return None
    at = {}
    for dim in reversed(order):
        at[dim] = where % segmap.shape[dim]
        where = where // segmap.shape[dim]
    pixel, channel = (at[0] * h + at[2]) * w + at[3], at[1].to(torch.int32)
    count = torch.zeros(n * h * w, dtype=torch.int32).index_add_(0, pixel, torch.ones_like(channel))
    label = torch.zeros(n * h * w, dtype=torch.int32).index_add_(0, pixel, channel)
    return count.view(n, h, w), label.view(n, h, w), torch.ones((), dtype=torch.bool)


def _count_planes(segmap: Tensor) -> _Counted | None:
    """Counts channel by channel, which needs little memory in any layout. Returns None if a value is not 0 or 1."""
    n, _, h, w = segmap.shape
    count = torch.zeros(n, h, w, dtype=torch.int32, device=segmap.device)
    label = torch.zeros_like(count)
    binary = torch.ones((), dtype=torch.bool, device=segmap.device)
    for number, plane in enumerate(segmap.unbind(1)):
        present = plane == 1
        binary &= (present | (plane == 0)).all()
        if segmap.device.type == "cpu" and not binary:
            return None
        count += present
        label.add_(present, alpha=number)
    return count, label, binary


def _recognize_fake(segmap: Tensor) -> tuple[Tensor, Tensor]:
    n, _, h, w = segmap.shape
    return segmap.new_empty((n, h, w), dtype=torch.int32), segmap.new_empty((), dtype=torch.int32)


_recognize = _register.register("recognize(Tensor segmap) -> (Tensor, Tensor)", recognize_torch, _recognize_fake)


def recognize(segmap: Tensor) -> tuple[Tensor, Tensor]:
    """Tells whether a map is exactly one-hot, and converts it to codes. The host does not wait for the device.

    Args:
        segmap: [N, L, H, W], any real dtype and strides.

    Returns:
        codes [N, H, W] int32, and kind [] int32:

        - kind 1: the map is one-hot. Codes are labels, and L where all channels are 0.
        - kind 2: the last channel holds 0/1 edges and the others are one-hot. Codes are 2·label + edge; the label is
          L - 1 where all other channels are 0.
        - kind 0: any other map. Codes mean nothing.

    Example:
        >>> codes, kind = recognize(torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]))
        >>> codes.tolist(), kind.item()
        ([[[0, 1]]], 1)
    """
    if segmap.is_floating_point() and segmap.element_size() == 1:
        segmap = segmap.to(torch.float16)  # float16 holds every 8-bit float, and can be compared.
    return _recognize(segmap.detach())
