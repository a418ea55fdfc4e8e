# SPDX-License-Identifier: Apache-2.0
"""modulation: normalize, scale and shift by pattern or by pixel, activate and enlarge, in one pass.

A program has a tile of pixels of the small x. Each element of x is read once, also when x is enlarged and when there
are two outputs. A loop goes over the up² output positions of a pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import (
    TILES,
    autotune,
    block_channels,
    empty_activation,
    grid_of,
    group_step_of,
    load_norm,
    load_params,
    load_pattern,
    on_device,
    pixel_tile,
    place,
)


class _Output(NamedTuple):
    out: torch.Tensor  # [N, C, Ho, Wo]
    params: torch.Tensor  # [P, 2C], or [N, 2C, Ho, Wo] (DENSE)
    params_strides: tuple[int, ...]
    slope: float


@triton.jit
def _forward_kernel(
    x,  # [N, C, H, W], any strides
    x_strides,
    mean, rstd,  # fp32 [G, C], or None
    group_step,  # 0 where G = 1, else 1
    pattern_ids,  # int32 [N, Ho, Wo], or None (DENSE)
    outputs,  # an _Output each
    out_strides,  # of every output
    HW, W,
    C: tl.constexpr, M: tl.constexpr, UP: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n, row_mask, y, xx = pixel_tile(tl.program_id(0), HW, W, TILE // BLOCK_C)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    mask = row_mask[:, None] & col_mask[None, :]
    xhat = tl.load(x + place(x_strides, n, y, xx, cols), mask=mask, other=0.0).to(tl.float32)
    if mean is not None:
        center, scale = load_norm(mean, rstd, n * group_step, cols, col_mask, C)
        xhat = (xhat - center[None, :]) * scale[None, :]
    for k in range(UP * UP):  # Not unrolled: four positions at once take the registers of four.
        oy = y * UP + k // UP
        ox = xx * UP + k % UP
        pattern, known = load_pattern(pattern_ids, n, oy, ox, HW * UP * UP, W * UP, row_mask, mask)
        at = place(out_strides, n, oy, ox, cols)
        for m in tl.static_range(M):
            params, strides = outputs[m].params, outputs[m].params_strides
            gamma, beta = load_params(params, strides, pattern, n, oy, ox, cols, known, C, DENSE)
            z = xhat * (1.0 + gamma) + beta
            tl.store(outputs[m].out + at, tl.where(z > 0, z, z * outputs[m].slope), mask=mask)


_forward = autotune(TILES, key=["C", "M", "UP", "DENSE", "BLOCK_C"])(_forward_kernel)


def modulation(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    params: list[torch.Tensor],
    pattern_ids: torch.Tensor | None,
    order: torch.Tensor | None,
    offsets: torch.Tensor | None,
    slopes: list[float],
    upsample: int,
    stats_from_x: bool,
) -> list[torch.Tensor]:
    """x [N,C,H,W] -> len(params) tensors [N, C, H·upsample, W·upsample] in x's dtype and layout."""
    n, c, h, w = x.shape
    outs = [empty_activation(x, (n, c, h * upsample, w * upsample)) for _ in params]
    if x.numel() == 0:
        return outs
    outputs = tuple(_Output(out, p, p.stride(), slope) for out, p, slope in zip(outs, params, slopes, strict=True))
    block = block_channels(c, x.stride(1))
    with on_device(x):
        _forward[grid_of(n, h * w, c, block)](
            x, x.stride(), mean, rstd, group_step_of(mean),
            None if pattern_ids is None else pattern_ids.contiguous(), outputs, outs[0].stride(), h * w, w,
            C=c, M=len(params), UP=upsample, DENSE=pattern_ids is None, BLOCK_C=block,
        )  # fmt: skip
    return outs
