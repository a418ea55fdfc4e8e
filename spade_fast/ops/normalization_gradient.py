# SPDX-License-Identifier: Apache-2.0
"""normalization_gradient: dx += x * scale + shift by channel, in place: the share of synchronized statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _register


def normalization_gradient_torch(dx: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> None:
    if dx.numel() == 0:
        return
    scale, shift = scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
    if dx.device.type != "cpu":
        dx.copy_(torch.addcmul(dx + shift, x, scale))
        return
    rows = max(1, 2**19 // max(1, dx[0, :, 0].numel()))  # The rows of one step stay in cache.
    for image, source in zip(dx, x, strict=True):
        for start in range(0, dx.shape[2], rows):
            block, values = image[None, :, start : start + rows], source[None, :, start : start + rows]
            block.copy_(torch.addcmul(block + shift, values, scale))


normalization_gradient = _register.register(
    "normalization_gradient(Tensor(a!) dx, Tensor x, Tensor scale, Tensor shift) -> ()",
    normalization_gradient_torch,
    lambda dx, x, scale, shift: None,
)
