# SPDX-License-Identifier: Apache-2.0
"""statistics: the mean and the sum of squared deviations (M2) of each channel, or of each sample and channel, in fp32.

Each lane of a [pixels, channels] tile keeps Welford's running mean and M2 of its pixels. The lanes and then the
programs are merged by M2 = Σ m2_i + Σ n_i (mean_i - mean)² (Chan et al. 1979). The order is fixed, so the result is
deterministic. It is accurate whatever the ratio of mean to deviation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import block_channels, on_device

TILE = 2048


@triton.jit
def _partial_kernel(
    x,  # [N, C, H, W], any strides
    mean_out, m2_out,  # fp32 [N * splits, C]
    HW, W, splits, span,
    sxn, sxc, sxh, sxw,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = (pid // splits).to(tl.int64)
    lo = (pid % splits) * span
    hi = tl.minimum(lo + span, HW)
    rows = tl.arange(0, R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    col_at = cols.to(tl.int64) * sxc
    mean = tl.zeros([R, BLOCK_C], tl.float32)
    m2 = tl.zeros([R, BLOCK_C], tl.float32)
    seen = 0.0
    for start in range(lo, hi, R):
        p = start + rows
        valid = p < hi
        at = n * sxn + (p // W).to(tl.int64) * sxh + (p % W).to(tl.int64) * sxw
        v = tl.load(x + at[:, None] + col_at[None, :], mask=valid[:, None] & col_mask[None, :], other=0.0)
        v = v.to(tl.float32)
        seen += 1.0
        # Lanes outside keep their values. Only the last step has such lanes, so `seen` is right for all others.
        delta = tl.where(valid[:, None], v - mean, 0.0)
        mean += delta * (1.0 / seen)
        m2 += delta * (v - mean)
    count = ((tl.maximum(hi - lo - rows, 0) + R - 1) // R).to(tl.float32)[:, None]
    total = (hi - lo).to(tl.float32)
    center = tl.sum(count * mean, 0) / total
    # The deviations from the first result are averaged too: they repair its rounding where the mean is large.
    center += tl.sum(tl.where(count > 0, count * (mean - center[None, :]), 0.0), 0) / total
    delta = tl.where(count > 0, mean - center[None, :], 0.0)
    at = pid.to(tl.int64) * C + cols
    tl.store(mean_out + at, center, mask=col_mask)
    tl.store(m2_out + at, tl.sum(m2 + count * delta * delta, 0), mask=col_mask)


@triton.jit
def _merge_kernel(
    part_mean, part_m2,  # fp32 [N * splits, C]
    mean_out, m2_out,  # fp32 [G, C]
    parts,  # rows of a group
    HW, splits, span,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    rows = tl.arange(0, R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < C
    total = (parts // splits) * 1.0 * HW  # Not .to(): an argument equal to 1 is a constant in the kernel.
    acc = tl.zeros([R, BLOCK_C], tl.float32)
    for start in range(0, parts, R):
        k = start + rows
        mask = (k < parts)[:, None] & col_mask[None, :]
        weight = tl.minimum(span, HW - (k % splits) * span).to(tl.float32)[:, None] / total
        at = (group * parts + k).to(tl.int64)[:, None] * C + cols[None, :]
        acc += tl.where(mask, weight * tl.load(part_mean + at, mask=mask, other=0.0), 0.0)
    mean = tl.sum(acc, 0)
    acc = tl.zeros([R, BLOCK_C], tl.float32)
    shift = tl.zeros([R, BLOCK_C], tl.float32)
    for start in range(0, parts, R):
        k = start + rows
        mask = (k < parts)[:, None] & col_mask[None, :]
        count = tl.minimum(span, HW - (k % splits) * span).to(tl.float32)[:, None]
        at = (group * parts + k).to(tl.int64)[:, None] * C + cols[None, :]
        delta = tl.load(part_mean + at, mask=mask, other=0.0) - mean[None, :]
        acc += tl.where(mask, tl.load(part_m2 + at, mask=mask, other=0.0) + count * delta * delta, 0.0)
        shift += tl.where(mask, count / total * delta, 0.0)
    rest = tl.sum(shift, 0)  # The rounding error of the first pass's mean.
    at = group.to(tl.int64) * C + cols
    tl.store(mean_out + at, mean + rest, mask=col_mask)
    tl.store(m2_out + at, tl.maximum(tl.sum(acc, 0) - total * rest * rest, 0.0), mask=col_mask)


def statistics(x: torch.Tensor, per_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N,C,H,W] -> (mean, m2), fp32 [G,C], G = N if per_sample else 1."""
    n, c, h, w = x.shape
    hw, groups = h * w, n if per_sample else 1
    if x.numel() == 0:
        return x.new_zeros(groups, c, dtype=torch.float32), x.new_zeros(groups, c, dtype=torch.float32)
    mean = torch.empty(groups, c, dtype=torch.float32, device=x.device)
    m2 = torch.empty_like(mean)
    block = block_channels(c, x.stride(1))
    rows = TILE // block
    blocks = triton.cdiv(c, block)
    # About a thousand programs with several tiles each fill the GPU and leave few parts.
    splits = min(triton.cdiv(1024, n * blocks), triton.cdiv(hw, 4 * rows))
    span = triton.cdiv(triton.cdiv(hw, splits), rows) * rows
    splits = triton.cdiv(hw, span)
    parts = torch.empty(2, n * splits, c, dtype=torch.float32, device=x.device)
    with on_device(x):
        _partial_kernel[(n * splits, blocks)](
            x, parts[0], parts[1], hw, w, splits, span, *x.stride(), C=c, R=rows, BLOCK_C=block, num_warps=4
        )
        _merge_kernel[(groups, triton.cdiv(c, 16))](
            parts[0], parts[1], mean, m2, n * splits // groups, hw, splits, span, C=c, R=128, BLOCK_C=16, num_warps=4
        )
    return mean, m2
