# SPDX-License-Identifier: Apache-2.0
"""Pass 1 of the backward of modulation: sums over the pixels of each pattern and of each channel.

The formulas are in modulation_backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import segments as csr
from .common import block_channels, group_step_of, load_norm, load_params, on_device, place
from .segments import segment_add, segment_rows, segment_sum, segments


class Output(NamedTuple):
    """What the kernels need of one output."""

    dout: torch.Tensor  # [N, C, Ho, Wo], any strides
    dout_strides: tuple[int, ...]
    params: torch.Tensor  # [P, 2C], or [N, 2C, Ho, Wo], any strides
    params_strides: tuple[int, ...]
    slope: float


def outputs_of(douts: list[torch.Tensor], params: list[torch.Tensor], slopes: list[float]) -> tuple[Output, ...]:
    triples = zip(douts, params, slopes, strict=True)
    return tuple(Output(dout, dout.stride(), p, p.stride(), slope) for dout, p, slope in triples)


@triton.jit
def _gate(dout, xhat, gamma, beta, slope):
    """dz: the gradient through LeakyReLU at z = xhat (1 + gamma) + beta."""
    return tl.where(xhat * (1.0 + gamma) + beta > 0, dout, dout * slope)


@triton.jit
def load_dz(output, xhat, pattern, n, y, x, cols, mask, known, C: tl.constexpr, DENSE: tl.constexpr):
    """dz of an output at pixels (n, y, x), and its gamma there."""
    dout = tl.load(output.dout + place(output.dout_strides, n, y, x, cols), mask=mask, other=0.0).to(tl.float32)
    gamma, beta = load_params(output.params, output.params_strides, pattern, n, y, x, cols, known, C, DENSE)
    return _gate(dout, xhat, gamma, beta, output.slope), gamma


@triton.jit
def _add_pattern_sums(
    output, sums, scratch, dgamma, dbeta, xhat, key, n, y, x, rows, head, end, slot, cols, col_mask, mask,
    C: tl.constexpr, ACT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Adds a tile's pixels to the sums of one output; returns the running dgamma and dbeta."""
    if ACT:
        dz, _ = load_dz(output, xhat, key, n, y, x, cols, mask, mask, C, False)
    else:
        dz = tl.load(output.dout + place(output.dout_strides, n, y, x, cols), mask=mask, other=0.0).to(tl.float32)
    dgamma = segment_add(dz * xhat, dgamma, rows, key, head, end, slot, sums, scratch, 2 * C, cols, col_mask, R)
    dbeta = segment_add(dz, dbeta, rows, key, head, end, slot, sums, scratch, 2 * C, cols + C, col_mask, R)
    return dgamma, dbeta


@triton.jit
def _pattern_sums_kernel(
    x,  # [N, C, H, W], any strides
    x_strides,
    mean, rstd,  # fp32 [G, C], or None
    group_step,  # 0 where G = 1, else 1
    outputs,  # an Output each
    sums,  # fp32 [P, 2C] each
    scratch,  # fp32 [chunks, 2, 2C] each
    pattern_ids, order, offsets,  # int32 [N, Ho, Wo], [N Ho Wo], [P + 1]
    total, HW_OUT, W_OUT,
    C: tl.constexpr, M: tl.constexpr, UP: tl.constexpr, ACT0: tl.constexpr, ACT1: tl.constexpr,
    CHUNK: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    rows = tl.arange(0, R)
    dgamma0 = tl.zeros([BLOCK_C], tl.float32)
    dbeta0 = tl.zeros([BLOCK_C], tl.float32)
    dgamma1 = tl.zeros([BLOCK_C], tl.float32)
    dbeta1 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, CHUNK, R):
        i = chunk * CHUNK + start + rows
        entry, key, valid, head, end, slot = segment_rows(i, order, pattern_ids, offsets, total, chunk, CHUNK)
        mask = valid[:, None] & col_mask[None, :]
        n = (entry // HW_OUT).to(tl.int64)
        y = (entry % HW_OUT) // W_OUT
        xx = entry % HW_OUT - y * W_OUT
        xhat = tl.load(x + place(x_strides, n, y // UP, xx // UP, cols), mask=mask, other=0.0).to(tl.float32)
        if mean is not None:
            at = (n * group_step)[:, None] * C + cols[None, :]
            shift = tl.load(mean + at, mask=mask, other=0.0)
            xhat = (xhat - shift) * tl.load(rstd + at, mask=mask, other=0.0)
        dgamma0, dbeta0 = _add_pattern_sums(
            outputs[0], sums[0], scratch[0], dgamma0, dbeta0, xhat, key, n, y, xx, rows, head, end, slot,
            cols, col_mask, mask, C, ACT0, R,
        )  # fmt: skip
        if M == 2:
            dgamma1, dbeta1 = _add_pattern_sums(
                outputs[1], sums[1], scratch[1], dgamma1, dbeta1, xhat, key, n, y, xx, rows, head, end, slot,
                cols, col_mask, mask, C, ACT1, R,
            )  # fmt: skip


@triton.jit
def _channel_sums_kernel(
    outputs,  # an Output each
    sums,  # fp32 [P, 2C] = [dgamma | dbeta] each, contiguous
    out,  # fp32 [splits, 2, C] = s1, s2 of a range of patterns
    P, span,
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
        for m in tl.static_range(M):
            strides = outputs[m].params_strides
            gamma = outputs[m].params + row * strides[0] + wide * strides[1]
            scale = 1.0 + tl.load(gamma, mask=mask, other=0.0).to(tl.float32)
            dgamma = sums[m] + row * (2 * C) + wide
            s1 += scale * tl.load(dgamma + C, mask=mask, other=0.0)
            s2 += scale * tl.load(dgamma, mask=mask, other=0.0)
    at = out + split.to(tl.int64) * (2 * C) + cols
    tl.store(at, tl.sum(s1, 0), mask=col_mask)
    tl.store(at + C, tl.sum(s2, 0), mask=col_mask)


@triton.jit
def _dense_sums_kernel(
    x,  # [N, C, H, W], any strides
    x_strides,
    mean, rstd,  # fp32 [G, C], or None
    group_step,  # 0 where G = 1, else 1
    outputs,  # an Output each
    dparams,  # [N, 2C, Ho, Wo] each
    dparams_strides,  # of every dparams
    out,  # fp32 [N * splits, 2, C] = s1, s2 of a range of pixels
    HW, W, splits, span,
    C: tl.constexpr, M: tl.constexpr, UP: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = (pid // splits).to(tl.int64)
    lo = (pid % splits) * span
    hi = tl.minimum(lo + span, HW)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    center, scale = load_norm(mean, rstd, n * group_step, cols, col_mask, C)
    s1 = tl.zeros([R, BLOCK_C], tl.float32)
    s2 = tl.zeros([R, BLOCK_C], tl.float32)
    for start in range(lo, hi, R):
        p = start + tl.arange(0, R)
        mask = (p < hi)[:, None] & col_mask[None, :]
        y = p // W
        xx = p - y * W
        xhat = tl.load(x + place(x_strides, n, y, xx, cols), mask=mask, other=0.0).to(tl.float32)
        if mean is not None:
            xhat = tl.where(mask, (xhat - center[None, :]) * scale[None, :], 0.0)
        for k in range(UP * UP):  # Not unrolled: four positions at once take the registers of four.
            oy = y * UP + k // UP
            ox = xx * UP + k % UP
            dxhat = tl.zeros(xhat.shape, tl.float32)
            for m in tl.static_range(M):
                dz, gamma = load_dz(outputs[m], xhat, oy, n, oy, ox, cols, mask, mask, C, True)
                dgamma = dparams[m] + place(dparams_strides, n, oy, ox, cols)
                tl.store(dgamma, dz * xhat, mask=mask)
                tl.store(dgamma + C * dparams_strides[1], dz, mask=mask)
                dxhat += dz * (1.0 + gamma)
            s1 += dxhat
            s2 += dxhat * xhat
    at = out + pid.to(tl.int64) * (2 * C) + cols
    tl.store(at, tl.sum(s1, 0), mask=col_mask)
    tl.store(at + C, tl.sum(s2, 0), mask=col_mask)


def pattern_sums(
    outputs: tuple[Output, ...],
    x: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    pattern_ids: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    upsample: int,
) -> list[torch.Tensor]:
    """Pass 1 with patterns: fp32 [P, 2C] = [dgamma | dbeta] for each output."""
    c, (h_out, w_out) = x.shape[1], pattern_ids.shape[1:]
    total, count = pattern_ids.numel(), len(outputs)
    chunk = csr.chunk_of(total)
    chunks = triton.cdiv(total, chunk)
    block = min(triton.next_power_of_2(c), 128)
    sums = [torch.zeros(output.params.shape, dtype=torch.float32, device=x.device) for output in outputs]
    scratch = torch.empty(count, chunks, 2, 2 * c, dtype=torch.float32, device=x.device)
    with on_device(x):
        _pattern_sums_kernel[(chunks, triton.cdiv(c, block))](
            x, x.stride(), mean, rstd, group_step_of(mean), outputs, tuple(sums), scratch.unbind(),
            pattern_ids, order, offsets, total, h_out * w_out, w_out,
            C=c, M=count, UP=upsample, ACT0=outputs[0].slope != 1.0, ACT1=outputs[-1].slope != 1.0,
            CHUNK=chunk, R=csr.tile_rows(block, 2 * count), BLOCK_C=block, num_warps=1,
        )  # fmt: skip
        for m in range(count):
            csr.combine(order, pattern_ids, offsets, scratch[m], sums[m], 2 * c, chunk)
    return sums


def channel_sums(
    outputs: tuple[Output, ...],
    sums: list[torch.Tensor],
    pattern_ids: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    groups: int,
) -> torch.Tensor:
    """s1 and s2, fp32 [G, 2, C], from the sums of pass 1. No two images share a pattern."""
    patterns, c = sums[0].shape[0], sums[0].shape[1] // 2
    if groups > 1:
        per_image = pattern_ids[0].numel()
        first = order[offsets[:-1].clamp(max=order.numel() - 1).long()].int()
        image = torch.where(offsets[1:] > offsets[:-1], first // per_image, -1).int()
        terms = torch.zeros(patterns, 2, c, dtype=torch.float32, device=order.device)
        for output, s in zip(outputs, sums, strict=True):
            terms += (1.0 + output.params[:, None, :c].float()) * s.view(patterns, 2, c).flip(1)
        terms = terms.view(patterns, 2 * c)
        return segment_sum(terms, image, *segments(image, groups)).view(groups, 2, c)
    span = max(64, triton.cdiv(patterns, 512))
    splits = triton.cdiv(patterns, span)
    out = torch.empty(splits, 2, c, dtype=torch.float32, device=order.device)
    with on_device(out):
        _channel_sums_kernel[(splits, triton.cdiv(c, 64))](
            outputs, tuple(sums), out, patterns, span, C=c, M=len(outputs), R=16, BLOCK_C=64, num_warps=4
        )
    return out.sum(0, keepdim=True)


def dense_sums(
    outputs: tuple[Output, ...],
    x: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    upsample: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pass 1 with dense parameters: their gradients, and s1 and s2, fp32 [G, 2, C]."""
    n, c, h, w = x.shape
    dparams = [torch.empty_like(output.params, memory_format=torch.channels_last) for output in outputs]
    block = block_channels(c, x.stride(1))
    rows = 1024 // block
    blocks = triton.cdiv(c, block)
    splits = min(triton.cdiv(2048, n * blocks), triton.cdiv(h * w, 2 * rows))
    span = triton.cdiv(triton.cdiv(h * w, splits), rows) * rows
    splits = triton.cdiv(h * w, span)
    out = torch.empty(n * splits, 2, c, dtype=torch.float32, device=x.device)
    with on_device(x):
        _dense_sums_kernel[(n * splits, blocks)](
            x, x.stride(), mean, rstd, group_step_of(mean), outputs, tuple(dparams), dparams[0].stride(), out,
            h * w, w, splits, span, C=c, M=len(outputs), UP=upsample, R=rows, BLOCK_C=block, num_warps=4,
        )  # fmt: skip
    return dparams, out.view(1 if mean is None else mean.shape[0], -1, 2, c).sum(1)
