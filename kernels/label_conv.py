# SPDX-License-Identifier: Apache-2.0
"""label_conv: the convolution of a one-hot label map and its edges, or of the pooled map, as a gather."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import segments as csr
from .common import autotune, on_device
from .embedding_sum import add_row, rows_of
from .segments import segment_add, segment_rows

_CONFIGS = [
    triton.Config({"TILE": 2048}, num_warps=4),
    triton.Config({"TILE": 1024}, num_warps=4),
]


@triton.jit
def _pool_weight(y, x, H, W):
    """1 / the number of positions [R, 1] inside the image, of the 3×3 under pooled position (y, x)."""
    rows = tl.minimum(2 * y + 1, H - 1) - tl.maximum(2 * y - 1, 0) + 1
    columns = tl.minimum(2 * x + 1, W - 1) - tl.maximum(2 * x - 1, 0) + 1
    # At least 1: positions outside are masked to zero, but infinity times zero is not zero.
    return (1.0 / (tl.maximum(rows, 1) * tl.maximum(columns, 1)).to(tl.float32))[:, None]


@triton.jit
def _forward_kernel(
    codes,  # int32 [N, H, W] contiguous
    table,  # [K * K, L, O], any strides
    bias,  # [O] (BIAS)
    out,  # [N, Ho, Wo, O]
    H, W, HIN, WIN,  # of the codes, and of what is convolved (the pooled size)
    HWo, Wo, st, sl, so,
    L, WIDTH: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, POOLED: tl.constexpr,
    EDGES: tl.constexpr, BIAS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TILE // BLOCK_C
    tiles = tl.cdiv(HWo, ROWS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    row_mask = p < HWo
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < WIDTH
    codes += n * H * W
    acc = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for t in range(K * K):
        y = p // Wo * STRIDE - PAD + t // K
        x = p % Wo * STRIDE - PAD + t % K
        inside = row_mask & (y >= 0) & (y < HIN) & (x >= 0) & (x < WIN)
        if POOLED:
            total = tl.zeros([ROWS, BLOCK_C], tl.float32)
            for j in range(9):
                cy = 2 * y - 1 + j // 3
                cx = 2 * x - 1 + j % 3
                known = inside & (cy >= 0) & (cy < H) & (cx >= 0) & (cx < W)
                code = tl.load(codes + cy.to(tl.int64) * W + cx, mask=known, other=-1)
                total = add_row(total, code, known, table, cols, col_mask, sl, so, L, EDGES)
            acc += _pool_weight(y, x, H, W) * total
        else:
            code = tl.load(codes + y.to(tl.int64) * W + x, mask=inside, other=-1)
            acc = add_row(acc, code, inside, table, cols, col_mask, sl, so, L, EDGES)
        table += st
    if BIAS:
        acc += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    at = (n * HWo + p)[:, None] * WIDTH + cols[None, :]
    tl.store(out + at, acc, mask=row_mask[:, None] & col_mask[None, :])


_forward = autotune(_CONFIGS, key=["WIDTH", "K", "POOLED", "EDGES"])(_forward_kernel)


@triton.jit
def _add_dout(value, dout, n, py, px, known, ky, kx, cols, col_mask, weight, Ho, Wo, sn, sc, sh, sw, STRIDE, PAD):
    """value + weight · dout of the output where tap (ky, kx) of the convolution reads input position (py, px)."""
    ty = py + PAD - ky
    tx = px + PAD - kx
    known = known & (ty >= 0) & (tx >= 0) & (ty % STRIDE == 0) & (tx % STRIDE == 0)
    ty = ty // STRIDE
    tx = tx // STRIDE
    known = known & (ty < Ho) & (tx < Wo)
    at = n * sn + ty.to(tl.int64) * sh + tx.to(tl.int64) * sw
    at = at[:, None] + (cols.to(tl.int64) * sc)[None, :]
    return value + weight * tl.load(dout + at, mask=known[:, None] & col_mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _backward_kernel(
    dout,  # [N, O, Ho, Wo], any strides
    keys,  # int32 [N * H * W * PER]: label row (and edge row, or -1) of every pixel
    order, offsets,  # their segments
    out,  # fp32 [K * K, L, O]
    scratch,  # fp32 [K * K, chunks, 2, O]
    total, H, W, HIN, WIN, Ho, Wo, sn, sc, sh, sw, L,
    WIDTH: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, POOLED: tl.constexpr,
    PER: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    t = tl.program_id(2)
    ky = t // K
    kx = t % K
    out += t.to(tl.int64) * L * WIDTH
    scratch += t.to(tl.int64) * (2 * tl.num_programs(0)) * WIDTH
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < WIDTH
    rows = tl.arange(0, R)
    carry = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, CHUNK, R):
        i = chunk * CHUNK + start + rows
        entry, key, valid, head, end, slot = segment_rows(i, order, keys, offsets, total, chunk, CHUNK)
        pixel = entry // PER
        n = (pixel // (H * W)).to(tl.int64)
        y = pixel % (H * W) // W
        x = pixel % W
        value = tl.zeros([R, BLOCK_C], tl.float32)
        if POOLED:  # An odd row or column lies under two pooled positions.
            for j in tl.static_range(4):
                py = y // 2 + j // 2
                px = x // 2 + j % 2
                known = valid & (py < HIN) & (px < WIN) & (2 * py - 1 <= y) & (2 * px - 1 <= x)
                weight = _pool_weight(py, px, H, W)
                value = _add_dout(
                    value, dout, n, py, px, known, ky, kx, cols, col_mask, weight, Ho, Wo, sn, sc, sh, sw, STRIDE, PAD
                )
        else:
            value = _add_dout(
                value, dout, n, y, x, valid, ky, kx, cols, col_mask, 1.0, Ho, Wo, sn, sc, sh, sw, STRIDE, PAD
            )
        carry = segment_add(value, carry, rows, key, head, end, slot, out, scratch, WIDTH, cols, col_mask, R)


def _input_size(h: int, w: int, pooled: bool) -> tuple[int, int]:
    return ((h - 1) // 2 + 1, (w - 1) // 2 + 1) if pooled else (h, w)


def label_conv(
    codes: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    edges: bool,
    kernel_size: int,
    stride: int,
    padding: int,
    pooled: bool = False,
) -> torch.Tensor:
    """codes int32 [N,H,W], table [k·k,L,O] of any strides -> [N,O,Ho,Wo] in channels-last memory, table's dtype."""
    n, h, w = codes.shape
    num_rows, width = table.shape[1:]
    h_in, w_in = _input_size(h, w, pooled)
    ho, wo = ((s + 2 * padding - kernel_size) // stride + 1 for s in (h_in, w_in))
    shape = (n, width, ho, wo)
    out = torch.empty(shape, dtype=table.dtype, device=table.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    block = min(triton.next_power_of_2(width), 128)
    with on_device(table):
        _forward[lambda meta: (n * triton.cdiv(ho * wo, meta["TILE"] // block), triton.cdiv(width, block))](
            codes.contiguous(), table, table if bias is None else bias.contiguous(), out,
            h, w, h_in, w_in, ho * wo, wo, *table.stride(), num_rows,
            WIDTH=width, K=kernel_size, STRIDE=stride, PAD=padding, POOLED=pooled, EDGES=int(edges),
            BIAS=bias is not None, BLOCK_C=block,
        )  # fmt: skip
    return out


def label_conv_backward(
    dout: torch.Tensor,
    codes: torch.Tensor,
    num_rows: int,
    edges: bool,
    kernel_size: int,
    stride: int,
    padding: int,
    pooled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dout [N,O,Ho,Wo] -> (dtable [k·k,num_rows,O], dbias [O]) in dout's dtype. Pixels are sorted by label."""
    width, (ho, wo), (_, h, w), taps = dout.shape[1], dout.shape[2:], codes.shape, kernel_size * kernel_size
    dbias = dout.sum((0, 2, 3), dtype=torch.float32).to(dout.dtype)
    dtable = torch.zeros(taps, num_rows, width, dtype=torch.float32, device=dout.device)
    if dout.numel() == 0:
        return dtable.to(dout.dtype), dbias
    keys = torch.stack(rows_of(codes.reshape(-1), num_rows, edges), 1)  # [pixels, 1 or 2]
    order, offsets = csr.segments(keys, num_rows)
    h_in, w_in = _input_size(h, w, pooled)
    total = keys.numel()
    chunk = csr.chunk_of(total)
    chunks = triton.cdiv(total, chunk)
    block = min(triton.next_power_of_2(width), 128)
    scratch = torch.empty(taps, chunks, 2, width, dtype=torch.float32, device=dout.device)
    with on_device(dout):
        _backward_kernel[(chunks, triton.cdiv(width, block), taps)](
            dout, keys, order, offsets, dtable, scratch, total, h, w, h_in, w_in, ho, wo, *dout.stride(), num_rows,
            WIDTH=width, K=kernel_size, STRIDE=stride, PAD=padding, POOLED=pooled, PER=keys.shape[1],
            CHUNK=chunk, R=csr.tile_rows(block, 2 if pooled else 1), BLOCK_C=block, num_warps=1,
        )  # fmt: skip
        csr.combine(order, keys, offsets, scratch, dtable, width, chunk, taps)
    return dtable.to(dout.dtype), dbias
