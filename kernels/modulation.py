# SPDX-License-Identifier: Apache-2.0
"""modulation: normalize, scale and shift by pattern or per pixel, LeakyReLU, nearest ×2 of the input, in one pass.

Programs tile the pixels of the *small* x, so each element of x is read once also when it is upsampled and when there
are two outputs; the up² output positions of a pixel are a compile-time loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    TILES,
    autotune,
    block_channels,
    empty_activation,
    grid_of,
    load_norm,
    load_params,
    on_device,
    param_strides,
    pixel_tile,
)
from .modulation_backward import modulation_backward

__all__ = ["modulation", "modulation_backward"]


@triton.jit
def _store_output(out, z, slope, at, mask):
    tl.store(out + at, tl.where(z > 0, z, z * slope), mask=mask)


@triton.jit
def _forward_kernel(
    x,  # [N, C, H, W], any strides
    mean, rstd,  # fp32 [G, C] (NORM)
    ids,  # int32 [N, Ho, Wo] (not DENSE)
    params0, params1,  # [P, 2C], or [N, 2C, Ho, Wo] (DENSE)
    out0, out1,  # [N, C, Ho, Wo], equal strides
    slope0, slope1,
    HW, W, group_step,
    sxn, sxc, sxh, sxw,
    son, soc, soh, sow,
    sp0n, sp0c, sp0h, sp0w,
    sp1n, sp1c, sp1h, sp1w,
    C: tl.constexpr, M: tl.constexpr, UP: tl.constexpr, DENSE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n, row_mask, y, xx = pixel_tile(tl.program_id(0), HW, W, TILE // BLOCK_C)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    mask = row_mask[:, None] & col_mask[None, :]
    wide = cols.to(tl.int64)
    at_x = n * sxn + y.to(tl.int64) * sxh + xx.to(tl.int64) * sxw
    xhat = tl.load(x + at_x[:, None] + (wide * sxc)[None, :], mask=mask, other=0.0).to(tl.float32)
    m, r = load_norm(mean, rstd, n * group_step, cols, col_mask, C, NORM)
    if NORM:
        xhat = (xhat - m[None, :]) * r[None, :]
    for k in range(UP * UP):  # not unrolled: four positions at once would cost the registers of four
        oy = y * UP + k // UP
        ox = xx * UP + k % UP
        if DENSE:
            pattern = oy
            known = mask
        else:
            pattern = tl.load(ids + n * (HW * UP * UP) + oy * (W * UP) + ox, mask=row_mask, other=-1)
            known = mask & (pattern >= 0)[:, None]
        at = n * son + oy.to(tl.int64) * soh + ox.to(tl.int64) * sow
        at = at[:, None] + (wide * soc)[None, :]
        gamma, beta = load_params(params0, pattern, n, oy, ox, cols, known, sp0n, sp0c, sp0h, sp0w, C, DENSE)
        _store_output(out0, xhat * (1.0 + gamma) + beta, slope0, at, mask)
        if M == 2:
            gamma, beta = load_params(params1, pattern, n, oy, ox, cols, known, sp1n, sp1c, sp1h, sp1w, C, DENSE)
            _store_output(out1, xhat * (1.0 + gamma) + beta, slope1, at, mask)


_forward = autotune(TILES, key=["C", "M", "UP", "DENSE", "BLOCK_C"])(_forward_kernel)


def modulation(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    params: list[torch.Tensor],
    ids: torch.Tensor | None,
    order: torch.Tensor | None,
    offsets: torch.Tensor | None,
    slopes: list[float],
    upsample: int,
    stats: bool,
) -> list[torch.Tensor]:
    """x [N,C,H,W] -> len(params) tensors [N, C, H·upsample, W·upsample] in x's dtype and layout."""
    if x.dtype == torch.float64:
        from spade_fast.ops.modulation import modulation_torch

        return modulation_torch(x, mean, rstd, params, ids, order, offsets, slopes, upsample, stats)
    n, c, h, w = x.shape
    outs = [empty_activation(x, (n, c, h * upsample, w * upsample)) for _ in params]
    if x.numel() == 0:
        return outs
    if ids is not None:
        ids = ids.contiguous()
    block = block_channels(c, x.stride(1))
    p0, p1, o0, o1 = params[0], params[-1], outs[0], outs[-1]
    with on_device(x):
        _forward[grid_of(n, h * w, c, block)](
            x, mean if mean is not None else x, rstd if rstd is not None else x, ids if ids is not None else x,
            p0, p1, o0, o1, slopes[0], slopes[-1],
            h * w, w, int(mean is not None and mean.shape[0] > 1),
            *x.stride(), *o0.stride(), *param_strides(p0), *param_strides(p1),
            C=c, M=len(params), UP=upsample, DENSE=ids is None, NORM=mean is not None, BLOCK_C=block,
        )  # fmt: skip
    return outs
