# SPDX-License-Identifier: Apache-2.0
"""normalization_gradient: dx += x·scale + shift by channel, in place: the share of synchronized statistics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import block_channels, grid_of, on_device, pixel_tile

TILE = 1024  # Not tuned: the tuner would run the kernel many times, and each run adds to dx.


@triton.jit
def _add_kernel(
    dx, x,  # [N, C, H, W], any strides
    scale, shift,  # fp32 [C]
    HW, W,
    sdn, sdc, sdh, sdw,
    sxn, sxc, sxh, sxw,
    C: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n, row_mask, y, xx = pixel_tile(tl.program_id(0), HW, W, TILE // BLOCK_C)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    mask = row_mask[:, None] & col_mask[None, :]
    wide = cols.to(tl.int64)[None, :]
    k1 = tl.load(scale + cols, mask=col_mask, other=0.0)
    k0 = tl.load(shift + cols, mask=col_mask, other=0.0)
    at = n * sxn + y.to(tl.int64) * sxh + xx.to(tl.int64) * sxw
    value = tl.load(x + at[:, None] + wide * sxc, mask=mask, other=0.0).to(tl.float32)
    at = n * sdn + y.to(tl.int64) * sdh + xx.to(tl.int64) * sdw
    ptr = dx + at[:, None] + wide * sdc
    grad = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptr, grad + value * k1[None, :] + k0[None, :], mask=mask)


def normalization_gradient(dx: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """In place on dx; each element is read and written once."""
    if dx.numel() == 0:
        return None
    n, c, h, w = x.shape
    block = block_channels(c, x.stride(1))
    with on_device(x):
        _add_kernel[grid_of(n, h * w, c, block)({"TILE": TILE})](
            dx, x, scale.contiguous(), shift.contiguous(), h * w, w, *dx.stride(), *x.stride(),
            C=c, BLOCK_C=block, TILE=TILE,
        )  # fmt: skip
    return None
