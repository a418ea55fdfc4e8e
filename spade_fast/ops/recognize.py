# SPDX-License-Identifier: Apache-2.0
"""recognize: whether a map is exactly one-hot, and its label codes."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _register

# What views of the wide unsigned dtypes, which few operations take, keep: which elements are 0, and which are 1.
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


# How many channels hold a 1 and the sum of their numbers, at each pixel [N, H, W] int32; whether all values are 0 or 1.
_Counted = tuple[Tensor, Tensor, Tensor]


def _count_nonzero(segmap: Tensor, order: list[int]) -> _Counted | None:
    """From the few elements of a dense map that are not 0. None: the map is not one-hot.

    order: the dimensions in the order of memory.
    """
    n, _, h, w = segmap.shape
    flat = segmap.permute(order).reshape(-1)
    if torch.count_nonzero(flat) > 2 * n * h * w:  # more than a label and an edge a pixel
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
    """From one channel after the other: little memory, whatever the layout. None: some value is neither 0 nor 1."""
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
    """Whether segmap [N, L, H, W] is exactly one-hot, and the codes [N, H, W] int32 that say the same.

    Returns codes and kind [], int32. kind is 1 for a one-hot map: codes are labels, L where all channels are 0. kind
    is 2 for a map which is one-hot but for 0/1 edges in the last channel: codes are 2·label + edge, with label L - 1
    where all other channels are 0. kind is 0 for any other map: codes mean nothing. Any real dtype and strides;
    nothing waits for the device.
    """
    if segmap.is_floating_point() and segmap.element_size() == 1:
        segmap = segmap.to(torch.float16)  # has every value of 8 bits, and comparisons
    return _recognize(segmap.detach())
