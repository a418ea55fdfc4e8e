# SPDX-License-Identifier: Apache-2.0
"""The backward of modulation, in two passes over x and dout. Between them are two small sums of each channel.

    out = act(z), z = xhat (1 + gamma) + beta, xhat = (x - mean) rstd          (z is recomputed from x)
    pass 1  dz = dout act'(z);  dbeta_p = Σ dz, dgamma_p = Σ dz xhat            over the pixels of pattern p
    between s1 = Σ_p (1 + gamma_p) dbeta_p, s2 = Σ_p (1 + gamma_p) dgamma_p     per channel (and sample)
    pass 2  dx = rstd (Σ dz (1 + gamma) - s1/n - xhat s2/n)                     n elements of x a group

s1 and s2 are the sums over pixels of dxhat and dxhat·xhat, as in the backward of batch normalization.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    autotune,
    block_channels,
    empty_activation,
    grid_of,
    group_step_of,
    load_norm,
    load_pattern,
    on_device,
    pixel_tile,
    place,
)
from .modulation_sums import Output, channel_sums, dense_sums, load_dz, outputs_of, pattern_sums
from .segments import segments


@triton.jit
def _input_gradient_kernel(
    x,  # [N, C, H, W], any strides
    x_strides,
    mean, rstd,  # fp32 [G, C], or None
    group_step,  # 0 where G = 1, else 1
    pattern_ids,  # int32 [N, Ho, Wo], or None (DENSE)
    outputs,  # an Output each
    sums,  # fp32 [G, 2, C] = s1/n, s2/n where the statistics depend on x, else None
    dx,  # [N, C, H, W]
    dx_strides,
    HW, W,
    C: tl.constexpr, M: tl.constexpr, UP: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n, row_mask, y, xx = pixel_tile(tl.program_id(0), HW, W, TILE // BLOCK_C)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    mask = row_mask[:, None] & col_mask[None, :]
    xhat = tl.load(x + place(x_strides, n, y, xx, cols), mask=mask, other=0.0).to(tl.float32)
    group = n * group_step
    center, scale = load_norm(mean, rstd, group, cols, col_mask, C)
    if mean is not None:
        xhat = (xhat - center[None, :]) * scale[None, :]
    dxhat = tl.zeros(xhat.shape, tl.float32)
    for k in range(UP * UP):  # Not unrolled: four positions at once take the registers of four.
        oy = y * UP + k // UP
        ox = xx * UP + k % UP
        pattern, known = load_pattern(pattern_ids, n, oy, ox, HW * UP * UP, W * UP, row_mask, mask)
        for m in tl.static_range(M):
            dz, gamma = load_dz(outputs[m], xhat, pattern, n, oy, ox, cols, mask, known, C, DENSE)
            dxhat += dz * (1.0 + gamma)
    if sums is not None:
        at = sums + group * (2 * C) + cols
        s1 = tl.load(at, mask=col_mask, other=0.0)
        s2 = tl.load(at + C, mask=col_mask, other=0.0)
        dxhat -= s1[None, :] + xhat * s2[None, :]
    if mean is not None:
        dxhat *= scale[None, :]
    tl.store(dx + place(dx_strides, n, y, xx, cols), dxhat, mask=mask)


# With 4 warps a thread has 8 elements, and ptxas spills 8 bytes (fp32, two outputs, ×2) although registers are left.
_TILES = [triton.Config({"TILE": 2048}, num_warps=8), triton.Config({"TILE": 1024}, num_warps=8)]
_input_gradient = autotune(_TILES, key=["C", "M", "UP", "DENSE", "BLOCK_C"])(_input_gradient_kernel)


def input_gradient(
    outputs: tuple[Output, ...],
    x: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    pattern_ids: torch.Tensor | None,
    sums: torch.Tensor | None,
    upsample: int,
) -> torch.Tensor:
    """Pass 2: dx like x. sums: s1/n and s2/n, fp32 [G, 2, C], or None if the statistics are constants."""
    n, c, h, w = x.shape
    dx = empty_activation(x, x.shape)
    block = block_channels(c, x.stride(1))
    with on_device(x):
        _input_gradient[grid_of(n, h * w, c, block)](
            x, x.stride(), mean, rstd, group_step_of(mean), pattern_ids, outputs, sums, dx, dx.stride(), h * w, w,
            C=c, M=len(outputs), UP=upsample, DENSE=pattern_ids is None, BLOCK_C=block,
        )  # fmt: skip
    return dx


def modulation_backward(
    douts: list[torch.Tensor],
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
    """[dx, dparams_0, (dparams_1)]: dx like x, dparams in params' dtype. Bitwise equal from run to run."""
    n, _, h, w = x.shape
    if x.numel() == 0:
        return [torch.zeros_like(x), *(torch.zeros_like(p) for p in params)]
    groups = mean.shape[0] if mean is not None else 1
    stats_from_x = stats_from_x and mean is not None
    outputs = outputs_of(douts, params, slopes)
    sums = None
    if pattern_ids is None:
        dparams, sums = dense_sums(outputs, x, mean, rstd, upsample)
    else:
        pattern_ids = pattern_ids.contiguous()
        if order is None or offsets is None:
            order, offsets = segments(pattern_ids, params[0].shape[0])
        totals = pattern_sums(outputs, x, mean, rstd, pattern_ids, order, offsets, upsample)
        if stats_from_x:
            sums = channel_sums(outputs, totals, pattern_ids, order, offsets, groups)
        dparams = [t.to(p.dtype) for t, p in zip(totals, params, strict=True)]
    sums = sums * (groups / (n * h * w)) if stats_from_x else None
    return [input_gradient(outputs, x, mean, rstd, pattern_ids, sums, upsample), *dparams]
