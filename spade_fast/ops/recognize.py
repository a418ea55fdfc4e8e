# SPDX-License-Identifier: Apache-2.0
"""recognize: whether a map is exactly one-hot, and its label codes."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _register

_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def recognize_torch(segmap: Tensor) -> tuple[Tensor, Tensor]:
    n, channels, h, w = segmap.shape
    device = segmap.device
    count = torch.zeros(n, h, w, dtype=torch.int32, device=device)
    label = torch.zeros_like(count)
    binary = torch.ones((), dtype=torch.bool, device=device)
    for number, plane in enumerate(segmap.unbind(1)):  # one at a time: little memory, whatever the layout
        if plane.dtype in _WIDE_UNSIGNED:
            plane = plane.to(torch.float32)
        present = plane == 1
        binary &= (present | (plane == 0)).all()
        if device.type == "cpu" and not binary:
            return count, torch.zeros((), dtype=torch.int32)
        count += present
        label.add_(present, alpha=number)
    last = (segmap[:, -1] == 1).to(torch.int32)
    single = (count <= 1).all()
    one_hot = torch.where(count == 1, label, channels)
    labeled = torch.where(count - last == 1, label - last * (channels - 1), channels - 1)
    kind = torch.where(single, 1, torch.where((count - last <= 1).all(), 2, 0))
    codes = torch.where(single, one_hot, labeled * 2 + last)
    return codes.to(torch.int32), torch.where(binary, kind, 0).to(torch.int32)


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
