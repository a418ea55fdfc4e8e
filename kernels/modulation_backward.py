# SPDX-License-Identifier: Apache-2.0
"""Backward of modulation, in two passes over x and dout with two small sums a channel between them.

    out = act(z), z = xhat (1 + gamma) + beta, xhat = (x - mean) rstd          (z is recomputed from x)
    pass 1  dz = dout act'(z);  dbeta_p = Σ dz, dgamma_p = Σ dz xhat            over the pixels of pattern p
    between s1 = Σ_p (1 + gamma_p) dbeta_p, s2 = Σ_p (1 + gamma_p) dgamma_p     per channel (and sample)
    pass 2  dx = rstd (Σ dz (1 + gamma) - s1/n - xhat s2/n)                     n elements of x a group

s1 and s2 are the sums over pixels of dxhat and dxhat·xhat, which batch normalization's backward needs. Between the
passes a synchronized norm adds them (and n) over its processes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import segments as csr
from .common import (
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
from .segments import segment_add, segment_rows, segment_sum, segments


@triton.jit
def _gate(dout, xhat, gamma, beta, slope):
    """dz: the gradient through LeakyReLU at z = xhat (1 + gamma) + beta."""
    return tl.where(xhat * (1.0 + gamma) + beta > 0, dout, dout * slope)


@triton.jit
def _pattern_sums_kernel(
    dout0, dout1,  # [N, C, Ho, Wo], any strides
    x,  # [N, C, H, W], any strides
    mean, rstd,  # fp32 [G, C] (NORM)
    params0, params1,  # [P, 2C]
    ids, order, offsets,  # int32 [N, Ho, Wo], [N Ho Wo], [P + 1]
    out0, out1,  # fp32 [P, 2C]
    scratch0, scratch1,  # fp32 [chunks, 2, 2C]
    slope0, slope1,
    total, HWo, Wo, group_step,
    sxn, sxc, sxh, sxw,
    sd0n, sd0c, sd0h, sd0w,
    sd1n, sd1c, sd1h, sd1w,
    sp0r, sp0c, sp1r, sp1c,
    C: tl.constexpr, M: tl.constexpr, UP: tl.constexpr, NORM: tl.constexpr,
    ACT0: tl.constexpr, ACT1: tl.constexpr,
    CHUNK: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    wide = cols.to(tl.int64)[None, :]
    rows = tl.arange(0, R)
    gamma0 = tl.zeros([BLOCK_C], tl.float32)
    beta0 = tl.zeros([BLOCK_C], tl.float32)
    gamma1 = tl.zeros([BLOCK_C], tl.float32)
    beta1 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, CHUNK, R):
        i = chunk * CHUNK + start + rows
        entry, key, valid, head, end, slot = segment_rows(i, order, ids, offsets, total, chunk, CHUNK)
        mask = valid[:, None] & col_mask[None, :]
        n = (entry // HWo).to(tl.int64)
        oy = (entry % HWo) // Wo
        ox = entry % HWo - oy * Wo
        at = n * sxn + (oy // UP).to(tl.int64) * sxh + (ox // UP).to(tl.int64) * sxw
        xhat = tl.load(x + at[:, None] + wide * sxc, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            at = (n * group_step)[:, None] * C + cols[None, :]
            shift = tl.load(mean + at, mask=mask, other=0.0)
            xhat = (xhat - shift) * tl.load(rstd + at, mask=mask, other=0.0)
        at = n * sd0n + oy.to(tl.int64) * sd0h + ox.to(tl.int64) * sd0w
        dz = tl.load(dout0 + at[:, None] + wide * sd0c, mask=mask, other=0.0).to(tl.float32)
        if ACT0:
            g, b = load_params(params0, key, n, oy, ox, cols, mask, sp0r, sp0c, 0, 0, C, False)
            dz = _gate(dz, xhat, g, b, slope0)
        gamma0 = segment_add(dz * xhat, gamma0, rows, key, head, end, slot, out0, scratch0, 2 * C, cols, col_mask, R)
        beta0 = segment_add(dz, beta0, rows, key, head, end, slot, out0, scratch0, 2 * C, cols + C, col_mask, R)
        if M == 2:
            at = n * sd1n + oy.to(tl.int64) * sd1h + ox.to(tl.int64) * sd1w
            dz = tl.load(dout1 + at[:, None] + wide * sd1c, mask=mask, other=0.0).to(tl.float32)
            if ACT1:
                g, b = load_params(params1, key, n, oy, ox, cols, mask, sp1r, sp1c, 0, 0, C, False)
                dz = _gate(dz, xhat, g, b, slope1)
            gamma1 = segment_add(
                dz * xhat, gamma1, rows, key, head, end, slot, out1, scratch1, 2 * C, cols, col_mask, R
            )
            beta1 = segment_add(dz, beta1, rows, key, head, end, slot, out1, scratch1, 2 * C, cols + C, col_mask, R)


@triton.jit
def _channel_sums_kernel(
    sums0, sums1,  # fp32 [P, 2C] = [dgamma | dbeta], contiguous
    params0, params1,  # [P, 2C]
    out,  # fp32 [splits, 2, C] = s1, s2 of a range of patterns
    P, span, sp0r, sp0c, sp1r, sp1c,
    C: tl.constexpr, M: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    wide = cols.to(tl.int64)[None, :]
    s1 = tl.zeros([R, BLOCK_C], tl.float32)
    s2 = tl.zeros([R, BLOCK_C], tl.float32)
    for start in range(0, span, R):
        row = split * span + start + tl.arange(0, R)
        mask = ((start + tl.arange(0, R) < span) & (row < P))[:, None] & col_mask[None, :]
        row = row.to(tl.int64)[:, None]
        scale = 1.0 + tl.load(params0 + row * sp0r + wide * sp0c, mask=mask, other=0.0).to(tl.float32)
        s1 += scale * tl.load(sums0 + row * (2 * C) + C + wide, mask=mask, other=0.0)
        s2 += scale * tl.load(sums0 + row * (2 * C) + wide, mask=mask, other=0.0)
        if M == 2:
            scale = 1.0 + tl.load(params1 + row * sp1r + wide * sp1c, mask=mask, other=0.0).to(tl.float32)
            s1 += scale * tl.load(sums1 + row * (2 * C) + C + wide, mask=mask, other=0.0)
            s2 += scale * tl.load(sums1 + row * (2 * C) + wide, mask=mask, other=0.0)
    at = out + split.to(tl.int64) * (2 * C) + cols
    tl.store(at, tl.sum(s1, 0), mask=col_mask)
    tl.store(at + C, tl.sum(s2, 0), mask=col_mask)


@triton.jit
def _dense_sums_kernel(
    dout0, dout1,  # [N, C, Ho, Wo], any strides
    x,  # [N, C, H, W], any strides
    mean, rstd,  # fp32 [G, C] (NORM)
    params0, params1,  # [N, 2C, Ho, Wo], any strides
    dparams0, dparams1,  # the same shape, any strides
    out,  # fp32 [N * splits, 2, C] = s1, s2 of a range of pixels
    slope0, slope1,
    HW, W, splits, span, group_step,
    sxn, sxc, sxh, sxw,
    sd0n, sd0c, sd0h, sd0w,
    sd1n, sd1c, sd1h, sd1w,
    sp0n, sp0c, sp0h, sp0w,
    sp1n, sp1c, sp1h, sp1w,
    sg0n, sg0c, sg0h, sg0w,
    sg1n, sg1c, sg1h, sg1w,
    C: tl.constexpr, M: tl.constexpr, UP: tl.constexpr, NORM: tl.constexpr,
    R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = (pid // splits).to(tl.int64)
    lo = (pid % splits) * span
    hi = tl.minimum(lo + span, HW)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    wide = cols.to(tl.int64)[None, :]
    m, r = load_norm(mean, rstd, n * group_step, cols, col_mask, C, NORM)
    s1 = tl.zeros([R, BLOCK_C], tl.float32)
    s2 = tl.zeros([R, BLOCK_C], tl.float32)
    for start in range(lo, hi, R):
        p = start + tl.arange(0, R)
        mask = (p < hi)[:, None] & col_mask[None, :]
        y = p // W
        xx = p - y * W
        at = n * sxn + y.to(tl.int64) * sxh + xx.to(tl.int64) * sxw
        xhat = tl.load(x + at[:, None] + wide * sxc, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            xhat = tl.where(mask, (xhat - m[None, :]) * r[None, :], 0.0)
        for k in range(UP * UP):  # not unrolled: four positions at once would cost the registers of four
            oy = y * UP + k // UP
            ox = xx * UP + k % UP
            at = n * sd0n + oy.to(tl.int64) * sd0h + ox.to(tl.int64) * sd0w
            dz = tl.load(dout0 + at[:, None] + wide * sd0c, mask=mask, other=0.0).to(tl.float32)
            g, b = load_params(params0, oy, n, oy, ox, cols, mask, sp0n, sp0c, sp0h, sp0w, C, True)
            dz = _gate(dz, xhat, g, b, slope0)
            at = n * sg0n + oy.to(tl.int64) * sg0h + ox.to(tl.int64) * sg0w
            ptr = dparams0 + at[:, None] + wide * sg0c
            tl.store(ptr, dz * xhat, mask=mask)
            tl.store(ptr + C * sg0c, dz, mask=mask)
            dxhat = dz * (1.0 + g)
            if M == 2:
                at = n * sd1n + oy.to(tl.int64) * sd1h + ox.to(tl.int64) * sd1w
                dz = tl.load(dout1 + at[:, None] + wide * sd1c, mask=mask, other=0.0).to(tl.float32)
                g, b = load_params(params1, oy, n, oy, ox, cols, mask, sp1n, sp1c, sp1h, sp1w, C, True)
                dz = _gate(dz, xhat, g, b, slope1)
                at = n * sg1n + oy.to(tl.int64) * sg1h + ox.to(tl.int64) * sg1w
                ptr = dparams1 + at[:, None] + wide * sg1c
                tl.store(ptr, dz * xhat, mask=mask)
                tl.store(ptr + C * sg1c, dz, mask=mask)
                dxhat += dz * (1.0 + g)
            s1 += dxhat
            s2 += dxhat * xhat
    at = out + pid.to(tl.int64) * (2 * C) + cols
    tl.store(at, tl.sum(s1, 0), mask=col_mask)
    tl.store(at + C, tl.sum(s2, 0), mask=col_mask)


@triton.jit
def _input_gradient_kernel(
    dout0, dout1,  # [N, C, Ho, Wo], any strides
    x,  # [N, C, H, W], any strides
    mean, rstd,  # fp32 [G, C] (NORM)
    ids,  # int32 [N, Ho, Wo] (not DENSE)
    params0, params1,  # [P, 2C], or [N, 2C, Ho, Wo] (DENSE)
    sums,  # fp32 [G, 2, C] = s1/n, s2/n (STATS)
    dx,  # [N, C, H, W]
    slope0, slope1,
    HW, W, group_step,
    sxn, sxc, sxh, sxw,
    sd0n, sd0c, sd0h, sd0w,
    sd1n, sd1c, sd1h, sd1w,
    sp0n, sp0c, sp0h, sp0w,
    sp1n, sp1c, sp1h, sp1w,
    sgn, sgc, sgh, sgw,
    C: tl.constexpr, M: tl.constexpr, UP: tl.constexpr, DENSE: tl.constexpr, NORM: tl.constexpr, STATS: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n, row_mask, y, xx = pixel_tile(tl.program_id(0), HW, W, TILE // BLOCK_C)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    mask = row_mask[:, None] & col_mask[None, :]
    wide = cols.to(tl.int64)[None, :]
    at_x = n * sxn + y.to(tl.int64) * sxh + xx.to(tl.int64) * sxw
    xhat = tl.load(x + at_x[:, None] + wide * sxc, mask=mask, other=0.0).to(tl.float32)
    group = n * group_step
    m, r = load_norm(mean, rstd, group, cols, col_mask, C, NORM)
    if NORM:
        xhat = (xhat - m[None, :]) * r[None, :]
    grad = tl.zeros(xhat.shape, tl.float32)
    for k in range(UP * UP):  # not unrolled: four positions at once would cost the registers of four
        oy = y * UP + k // UP
        ox = xx * UP + k % UP
        if DENSE:
            pattern = oy
            known = mask
        else:
            pattern = tl.load(ids + n * (HW * UP * UP) + oy * (W * UP) + ox, mask=row_mask, other=-1)
            known = mask & (pattern >= 0)[:, None]
        at = n * sd0n + oy.to(tl.int64) * sd0h + ox.to(tl.int64) * sd0w
        dout = tl.load(dout0 + at[:, None] + wide * sd0c, mask=mask, other=0.0).to(tl.float32)
        g, b = load_params(params0, pattern, n, oy, ox, cols, known, sp0n, sp0c, sp0h, sp0w, C, DENSE)
        grad += _gate(dout, xhat, g, b, slope0) * (1.0 + g)
        if M == 2:
            at = n * sd1n + oy.to(tl.int64) * sd1h + ox.to(tl.int64) * sd1w
            dout = tl.load(dout1 + at[:, None] + wide * sd1c, mask=mask, other=0.0).to(tl.float32)
            g, b = load_params(params1, pattern, n, oy, ox, cols, known, sp1n, sp1c, sp1h, sp1w, C, DENSE)
            grad += _gate(dout, xhat, g, b, slope1) * (1.0 + g)
    if STATS:
        at = sums + group * (2 * C) + cols
        s1 = tl.load(at, mask=col_mask, other=0.0)
        s2 = tl.load(at + C, mask=col_mask, other=0.0)
        grad -= s1[None, :] + xhat * s2[None, :]
    if NORM:
        grad *= r[None, :]
    at = n * sgn + y.to(tl.int64) * sgh + xx.to(tl.int64) * sgw
    tl.store(dx + at[:, None] + wide * sgc, grad, mask=mask)


# ptxas spills 8 bytes of 8 elements a thread with 4 warps (fp32, two outputs, ×2), for no lack of registers.
_TILES = [triton.Config({"TILE": 2048}, num_warps=8), triton.Config({"TILE": 1024}, num_warps=8)]
_input_gradient = autotune(_TILES, key=["C", "M", "UP", "DENSE", "BLOCK_C"])(_input_gradient_kernel)


def pattern_sums(douts, x, mean, rstd, params, ids, order, offsets, slopes, upsample) -> list[torch.Tensor]:
    """Pass 1 with patterns: fp32 [P, 2C] = [dgamma | dbeta] for each output."""
    c, (ho, wo) = x.shape[1], douts[0].shape[2:]
    total, count = ids.numel(), len(params)
    chunk = csr.chunk_of(total)
    chunks = triton.cdiv(total, chunk)
    block = min(triton.next_power_of_2(c), 128)
    sums = [torch.zeros(p.shape, dtype=torch.float32, device=x.device) for p in params]
    scratch = torch.empty(count, chunks, 2, 2 * c, dtype=torch.float32, device=x.device)
    p0, p1, d0, d1 = params[0], params[-1], douts[0], douts[-1]
    with on_device(x):
        _pattern_sums_kernel[(chunks, triton.cdiv(c, block))](
            d0, d1, x, mean if mean is not None else x, rstd if rstd is not None else x, p0, p1, ids, order, offsets,
            sums[0], sums[-1], scratch[0], scratch[-1], slopes[0], slopes[-1],
            total, ho * wo, wo, int(mean is not None and mean.shape[0] > 1),
            *x.stride(), *d0.stride(), *d1.stride(), *p0.stride(), *p1.stride(),
            C=c, M=count, UP=upsample, NORM=mean is not None, ACT0=slopes[0] != 1.0, ACT1=slopes[-1] != 1.0,
            CHUNK=chunk, R=csr.tile_rows(block, 2 * count), BLOCK_C=block, num_warps=1,
        )  # fmt: skip
        for m in range(count):
            csr.combine(order, ids, offsets, scratch[m], sums[m], 2 * c, chunk)
    return sums


def channel_sums(sums, params, ids, order, offsets, groups: int) -> torch.Tensor:
    """s1, s2 of pass 1's sums -> fp32 [G, 2, C]; with a group per sample, patterns belong to one image."""
    patterns, c = params[0].shape[0], params[0].shape[1] // 2
    if groups > 1:
        per_image = ids[0].numel()
        first = order[offsets[:-1].clamp(max=order.numel() - 1).long()].int()
        image = torch.where(offsets[1:] > offsets[:-1], first // per_image, -1).int()
        pairs = zip(params, sums, strict=True)
        terms = sum((1.0 + p.float()).view(-1, 2, c)[:, :1] * s.view(-1, 2, c) for p, s in pairs)
        terms = terms.flip(1).reshape(patterns, 2 * c)
        return segment_sum(terms, image, *segments(image, groups)).view(groups, 2, c)
    span = max(64, triton.cdiv(patterns, 512))
    splits = triton.cdiv(patterns, span)
    out = torch.empty(splits, 2, c, dtype=torch.float32, device=params[0].device)
    with on_device(out):
        _channel_sums_kernel[(splits, triton.cdiv(c, 64))](
            sums[0], sums[-1], params[0], params[-1], out, patterns, span, *params[0].stride(), *params[-1].stride(),
            C=c, M=len(params), R=16, BLOCK_C=64, num_warps=4,
        )  # fmt: skip
    return out.sum(0, keepdim=True)


def dense_sums(douts, x, mean, rstd, params, slopes, upsample, groups: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pass 1 with dense parameters: their gradients, and s1, s2 as fp32 [G, 2, C]."""
    n, c, h, w = x.shape
    dparams = [torch.empty_like(p, memory_format=torch.channels_last) for p in params]
    block = block_channels(c, x.stride(1))
    rows = 1024 // block
    blocks = triton.cdiv(c, block)
    splits = min(triton.cdiv(2048, n * blocks), triton.cdiv(h * w, 2 * rows))
    span = triton.cdiv(triton.cdiv(h * w, splits), rows) * rows
    splits = triton.cdiv(h * w, span)
    out = torch.empty(n * splits, 2, c, dtype=torch.float32, device=x.device)
    p0, p1, d0, d1, g0, g1 = params[0], params[-1], douts[0], douts[-1], dparams[0], dparams[-1]
    with on_device(x):
        _dense_sums_kernel[(n * splits, blocks)](
            d0, d1, x, mean if mean is not None else x, rstd if rstd is not None else x, p0, p1, g0, g1, out,
            slopes[0], slopes[-1], h * w, w, splits, span, int(mean is not None and mean.shape[0] > 1),
            *x.stride(), *d0.stride(), *d1.stride(), *p0.stride(), *p1.stride(), *g0.stride(), *g1.stride(),
            C=c, M=len(params), UP=upsample, NORM=mean is not None, R=rows, BLOCK_C=block, num_warps=4,
        )  # fmt: skip
    return dparams, out.view(groups, -1, 2, c).sum(1)


def input_gradient(douts, x, mean, rstd, params, ids, sums, slopes, upsample) -> torch.Tensor:
    """Pass 2: dx like x. sums: fp32 [G, 2, C] of s1/n and s2/n, or None when the statistics are constants."""
    n, c, h, w = x.shape
    dx = empty_activation(x, x.shape)
    block = block_channels(c, x.stride(1))
    p0, p1, d0, d1 = params[0], params[-1], douts[0], douts[-1]
    with on_device(x):
        _input_gradient[grid_of(n, h * w, c, block)](
            d0, d1, x, mean if mean is not None else x, rstd if rstd is not None else x, ids if ids is not None else x,
            p0, p1, sums if sums is not None else x, dx, slopes[0], slopes[-1],
            h * w, w, int(mean is not None and mean.shape[0] > 1),
            *x.stride(), *d0.stride(), *d1.stride(), *param_strides(p0), *param_strides(p1), *dx.stride(),
            C=c, M=len(params), UP=upsample, DENSE=ids is None, NORM=mean is not None, STATS=sums is not None,
            BLOCK_C=block,
        )  # fmt: skip
    return dx


def modulation_backward(
    douts: list[torch.Tensor],
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
    """[dx, dparams_0, (dparams_1)]: dx like x, dparams in params' dtype. Bitwise equal from run to run."""
    if x.dtype == torch.float64:
        from spade_fast.ops.modulation import modulation_backward_torch

        return modulation_backward_torch(douts, x, mean, rstd, params, ids, order, offsets, slopes, upsample, stats)
    n, _, h, w = x.shape
    if x.numel() == 0:
        return [torch.zeros_like(x), *(torch.zeros_like(p) for p in params)]
    groups = mean.shape[0] if mean is not None else 1
    stats = stats and mean is not None
    sums = None
    if ids is None:
        dparams, sums = dense_sums(douts, x, mean, rstd, params, slopes, upsample, groups)
    else:
        ids = ids.contiguous()
        if order is None:
            order, offsets = segments(ids, params[0].shape[0])
        totals = pattern_sums(douts, x, mean, rstd, params, ids, order, offsets, slopes, upsample)
        if stats:
            sums = channel_sums(totals, params, ids, order, offsets, groups)
        dparams = [t.to(p.dtype) for t, p in zip(totals, params, strict=True)]
    sums = sums * (groups / (n * h * w)) if stats else None
    return [input_gradient(douts, x, mean, rstd, params, ids, sums, slopes, upsample), *dparams]
