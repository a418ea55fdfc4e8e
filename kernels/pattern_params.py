# SPDX-License-Identifier: Apache-2.0
"""pattern_params: gamma and beta of every pattern, by a GEMM that gathers its rows or by the factored method."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import autotune, on_device
from .embedding_sum import embedding_sum
from .segments import segment_sum, segments

# Floating-point operations in the time that a byte of gathered rows takes. On an H200, by its data sheet, gathers move
# about 3 TB/s, and a GEMM reaches 500 (half precision), 250 (TF32) or 40 TFLOP/s (fp32). Only the ratios matter.
FLOPS_PER_BYTE = {"half": 160.0, "tf32": 80.0, "ieee": 13.0}

# All configs have the same K step, so the choice does not change the order of the sums. The index is read before the
# row, which takes half of the stages: five stages leave two or three buffers of operands.
_CONFIGS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=5),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=5),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=5),
]


@triton.jit
def _gather_gemm_kernel(
    a,  # [Q, HD] contiguous
    taps,  # int32 [P, T] contiguous
    w_gamma, w_beta,  # [C, T * HD] contiguous
    b_gamma, b_beta,  # [C]
    out,  # [P, 2C] contiguous
    P,
    HD: tl.constexpr, T: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    half = tl.program_id(1) // blocks
    cols = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < P
    col_mask = cols < C
    w = w_gamma
    b = b_gamma
    if half == 1:
        w = w_beta
        b = b_beta
    at_taps = taps + rows.to(tl.int64) * T
    at_w = w + cols.to(tl.int64)[None, :] * (T * HD)
    steps: tl.constexpr = (HD + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(T * steps):
        t = step // steps
        k = (step % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        index = tl.load(at_taps + t, mask=row_mask, other=-1)
        mask_a = (index >= 0)[:, None]
        mask_w = col_mask[None, :]
        if HD % BLOCK_K != 0:
            mask_a = mask_a & (k < HD)[None, :]
            mask_w = mask_w & (k < HD)[:, None]
        left = tl.load(a + index.to(tl.int64)[:, None] * HD + k[None, :], mask=mask_a, other=0.0)
        right = tl.load(at_w + (t * HD + k)[:, None], mask=mask_w, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    acc += tl.load(b + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * (2 * C) + half * C + cols[None, :]
    tl.store(out + at, acc, mask=row_mask[:, None] & col_mask[None, :])


_gather_gemm = autotune(_CONFIGS, key=["C", "HD", "T"])(_gather_gemm_kernel)


def _precision(dtype: torch.dtype) -> str:
    """The precision of the products, the same as in torch's GEMMs."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def choose_method(num_hidden: int, num_patterns: int, taps: int, width: int, channels: int, dtype: torch.dtype) -> str:
    """The cheaper of "gather" and "factored", by counted arithmetic and moved bytes."""
    flops = 4.0 * taps * width * channels  # of one row through both weights
    moved = 2.0 * taps * channels * dtype.itemsize  # of one row of the factored table
    rate = FLOPS_PER_BYTE[_precision(dtype)]
    factored = num_hidden * (flops + rate * moved) + num_patterns * rate * moved
    return "gather" if num_patterns * flops <= factored else "factored"


def _matrix(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[C, Hd, k, k] -> [C, T, Hd] contiguous: a view when the weight is stored channels-last."""
    return weight.to(dtype).permute(0, 2, 3, 1).reshape(weight.shape[0], -1, weight.shape[1]).contiguous()


def pattern_params(
    a: torch.Tensor,
    taps: torch.Tensor,
    w_gamma: torch.Tensor,
    b_gamma: torch.Tensor,
    w_beta: torch.Tensor,
    b_beta: torch.Tensor,
    tap_order: torch.Tensor | None = None,
    tap_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """a [Q,Hd], taps int32 [P,T], weights [C,Hd,k,k] -> params [P,2C] = [gamma | beta] in a's dtype."""
    (q, width), (p, t), c = a.shape, taps.shape, w_gamma.shape[0]
    out = torch.empty(p, 2 * c, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    gamma, beta = _matrix(w_gamma, a.dtype), _matrix(w_beta, a.dtype)
    if choose_method(q, p, t, width, c, a.dtype) == "factored":
        merged = torch.cat([gamma, beta]).transpose(0, 1).reshape(t * 2 * c, width)  # [(t, c), Hd]
        values = torch.mm(a, merged.t()).view(q, t, 2 * c)
        return embedding_sum(values.transpose(0, 1), torch.cat([b_gamma, b_beta]), taps, False, False)
    precision = _precision(a.dtype)
    with on_device(a):
        _gather_gemm[
            lambda meta: (triton.cdiv(p, meta["BLOCK_M"]), 2 * triton.cdiv(c, meta["BLOCK_N"]))
        ](
            a.contiguous(), taps.contiguous(), gamma, beta, b_gamma.contiguous(), b_beta.contiguous(), out, p,
            HD=width, T=t, C=c, PRECISION="ieee" if precision == "half" else precision,
            BLOCK_K=min(128 // a.element_size(), max(16, triton.next_power_of_2(width))),
        )  # fmt: skip
    return out


def pattern_params_backward(
    dparams: torch.Tensor,
    a: torch.Tensor,
    taps: torch.Tensor,
    w_gamma: torch.Tensor,
    w_beta: torch.Tensor,
    tap_order: torch.Tensor | None = None,
    tap_offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(da, dw_gamma, db_gamma, dw_beta, db_beta): sums of dparams by (hidden row, tap), then two GEMMs."""
    (q, width), (_, t), (c, _, k, _) = a.shape, taps.shape, w_gamma.shape
    keys = torch.where(taps < 0, -1, taps * t + torch.arange(t, dtype=taps.dtype, device=taps.device))
    if tap_order is None or tap_offsets is None:
        tap_order, tap_offsets = segments(keys, q * t)
    # [Q, T·2C]: for each hidden row and tap, the sum of dparams of the patterns that use it.
    sums = segment_sum(dparams, keys.view(-1), tap_order, tap_offsets, per_row=t, dtype=a.dtype).view(q, t * 2 * c)
    merged = torch.cat([_matrix(w_gamma, a.dtype), _matrix(w_beta, a.dtype)]).transpose(0, 1).reshape(t * 2 * c, width)
    da = torch.mm(sums, merged)
    dw = torch.mm(sums.t(), a).view(k, k, 2, c, width).to(w_gamma.dtype)
    dw_gamma, dw_beta = (dw[:, :, half].permute(2, 3, 0, 1) for half in range(2))
    dw_gamma, dw_beta = (d.contiguous(memory_format=torch.channels_last) for d in (dw_gamma, dw_beta))
    db = dparams.sum(0, dtype=torch.float32).to(w_gamma.dtype)
    return da, dw_gamma, db[:c].clone(), dw_beta, db[c:].clone()
