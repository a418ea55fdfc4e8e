# SPDX-License-Identifier: Apache-2.0
"""embedding_sum: the sum of one table row for each tap, with bias and ReLU, and its backward by segments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import TILES, autotune, on_device
from .segments import segment_sum, segments


@triton.jit
def add_row(acc, code, known, table, cols, col_mask, sl, so, L: tl.constexpr, EDGES: tl.constexpr):
    """acc [R, B] plus the rows that code [R] stands for in one tap's table [L, B]."""
    known = known & (code >= 0)
    label = code
    if EDGES:
        label = code >> 1
    at = table + label.to(tl.int64)[:, None] * sl + (cols.to(tl.int64) * so)[None, :]
    mask = (known & (label < L - EDGES))[:, None] & col_mask[None, :]
    row = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if EDGES:
        at = table + (cols.to(tl.int64) * so + (L - 1) * sl)[None, :] + 0 * label[:, None]
        mask = (known & ((code & 1) == 1))[:, None] & col_mask[None, :]
        row += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return acc + row


@triton.jit
def _gather_sum_kernel(
    table,  # [T, L, width], any strides
    bias,  # [width] (BIAS)
    codes,  # int32 [Q, T] contiguous
    out,  # [Q, width] contiguous
    Q, st, sl, so,
    L, WIDTH: tl.constexpr, T: tl.constexpr,
    EDGES: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TILE // BLOCK_C
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask = rows < Q
    col_mask = cols < WIDTH
    acc = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for t in range(T):
        code = tl.load(codes + rows.to(tl.int64) * T + t, mask=row_mask, other=-1)
        acc = add_row(acc, code, row_mask, table, cols, col_mask, sl, so, L, EDGES)
        table += st
    if BIAS:
        acc += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0)
    at = rows.to(tl.int64)[:, None] * WIDTH + cols[None, :]
    tl.store(out + at, acc, mask=row_mask[:, None] & col_mask[None, :])


_gather_sum = autotune(TILES, key=["WIDTH", "T", "EDGES"])(_gather_sum_kernel)


def embedding_sum(
    table: torch.Tensor, bias: torch.Tensor | None, codes: torch.Tensor, edges: bool, relu: bool
) -> torch.Tensor:
    """table [T,L,Hd] of any strides, codes int32 [Q,T] -> [Q,Hd] in table's dtype, summed in fp32."""
    taps, num_rows, width = table.shape
    q = codes.shape[0]
    out = torch.empty(q, width, dtype=table.dtype, device=table.device)
    if out.numel() == 0:
        return out
    block = min(triton.next_power_of_2(width), 128)
    with on_device(table):
        _gather_sum[lambda meta: (triton.cdiv(q, meta["TILE"] // block), triton.cdiv(width, block))](
            table, table if bias is None else bias.contiguous(), codes.contiguous(), out, q, *table.stride(), num_rows,
            WIDTH=width, T=taps, EDGES=int(edges), BIAS=bias is not None, RELU=relu, BLOCK_C=block,
        )  # fmt: skip
    return out


def rows_of(codes: torch.Tensor, num_rows: int, edges: bool) -> list[torch.Tensor]:
    """The rows that codes stand for in one tap's table: [label rows], or [label rows, edge rows]; -1 for no row."""
    if not edges:
        return [torch.where(codes < num_rows, codes, -1)]
    label = codes >> 1  # A code of -1 stays -1.
    edge = (codes >= 0) & ((codes & 1) == 1)
    return [torch.where(label < num_rows - 1, label, -1), torch.where(edge, num_rows - 1, -1).to(codes.dtype)]


def embedding_sum_backward(
    dout: torch.Tensor, out: torch.Tensor, codes: torch.Tensor, num_rows: int, edges: bool, relu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dout, out [Q,Hd], codes [Q,T] -> (dtable [T,num_rows,Hd], dbias [Hd]) in dout's dtype. Deterministic."""
    taps, width = codes.shape[1], dout.shape[1]
    if relu:
        dout = torch.where(out > 0, dout, 0)
    taps_at = torch.arange(taps, dtype=codes.dtype, device=codes.device) * num_rows
    numbers = torch.cat([torch.where(r < 0, -1, r + taps_at) for r in rows_of(codes, num_rows, edges)], 1)
    order, offsets = segments(numbers, taps * num_rows)
    per_row = numbers.shape[1]
    dtable = segment_sum(dout, numbers.reshape(-1), order, offsets, per_row=per_row, dtype=dout.dtype)
    return dtable.view(taps, num_rows, width), dout.sum(0, dtype=torch.float32).to(dout.dtype)
