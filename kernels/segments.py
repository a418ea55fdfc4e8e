# SPDX-License-Identifier: Apache-2.0
"""Sums of rows by segment, balanced and deterministic: the backward of every gather.

Positions are sorted by segment, as `order` and `offsets`. A program takes CHUNK consecutive sorted positions, whatever
the lengths of their segments. A segment inside a chunk is finished there. The first and the last segment of a chunk may
reach beyond it: their parts go to a scratch buffer [chunks, 2 (head, tail), width], and a second kernel adds the parts
of a segment in order. There are no atomics, so results are bitwise equal from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import on_device

ELEMENTS = 1024  # Elements of all tiles that a program of one warp holds at once.


def segments(keys: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of keys (any shape, int32, < num) sorted by key, stably: (order int32 [numel], offsets int32 [num+1]).

    Negative keys come first and belong to no segment: offsets[0] is their number.
    """
    if keys.numel() >= 2**31:
        raise ValueError(f"segments: keys must have fewer than 2**31 elements, got {keys.numel()}")
    ordered, order = torch.sort(keys.reshape(-1), stable=True)
    edges = torch.arange(num + 1, device=keys.device, dtype=ordered.dtype)
    return order.int(), torch.searchsorted(ordered, edges, out_int32=True)


def chunk_of(total: int) -> int:
    """Sorted positions of a program: few in small problems, to fill the GPU; many in large ones, to save scratch."""
    return 256 if total >= 1 << 17 else 64


def tile_rows(block: int, tensors: int = 1) -> int:
    """Sorted positions in a tile of `block` columns, at most a chunk. tensors: tiles that are alive at once."""
    return max(1, min(64, ELEMENTS // (block * tensors)))


@triton.jit
def _segmented_add(a_head, a_sum, b_head, b_sum):
    return a_head | b_head, tl.where(b_head != 0, b_sum, a_sum + b_sum)


@triton.jit
def segment_rows(i, order, keys, offsets, total, chunk, CHUNK: tl.constexpr):
    """What segment_add needs of sorted positions i [R].

    Returns entry, key, whether it belongs to a segment, whether the segment starts here, whether it ends here or with
    the chunk, and slot: the sum's row in the scratch buffer, or -1 if the whole segment lies in the chunk.
    """
    inside = i < total
    entry = tl.load(order + i, mask=inside, other=0)
    key = tl.load(keys + entry, mask=inside, other=-1)
    valid = key >= 0
    lo = tl.load(offsets + key, mask=valid, other=-1)
    hi = tl.load(offsets + key + 1, mask=valid, other=-1)
    chunk_lo = chunk * CHUNK
    chunk_hi = tl.minimum(chunk_lo + CHUNK, total)
    head = (valid & (lo == i)).to(tl.int32)
    end = valid & ((hi == i + 1) | (i == chunk_hi - 1))
    whole = (lo >= chunk_lo) & (hi <= chunk_hi)
    slot = tl.where(whole, -1, 2 * chunk + (lo >= chunk_lo).to(tl.int32))
    return entry, key, valid, head, end, slot


@triton.jit
def segment_add(
    value,  # fp32 [R, BLOCK_C], zero where a row does not count
    carry,  # fp32 [BLOCK_C], sum so far of the segment the tile begins in
    rows,  # arange(R)
    key, head, end, slot,  # [R], of segment_rows
    out,  # [S, width]
    scratch,  # fp32 [chunks * 2, width]
    width, cols, col_mask,
    R: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the running sum, stores the sums of segments that end in it, and returns the new running sum."""
    if tl.max(head, 0) > 0:
        flags = tl.broadcast_to(head[:, None], value.shape)
        seen, sums = tl.associative_scan((flags, value), 0, _segmented_add)
        sums += tl.where(seen == 0, carry[None, :], 0.0)
        carry = tl.sum(tl.where(rows[:, None] == R - 1, sums, 0.0), 0)
    else:  # The tile lies in one long segment, which is the common case by pixels.
        carry = carry + tl.sum(value, 0)
        sums = tl.zeros_like(value) + carry[None, :]
    if tl.max(end.to(tl.int32), 0) > 0:
        mask = end[:, None] & col_mask[None, :]
        inner = slot[:, None] < 0
        tl.store(out + key.to(tl.int64)[:, None] * width + cols[None, :], sums, mask=mask & inner)
        tl.store(scratch + slot.to(tl.int64)[:, None] * width + cols[None, :], sums, mask=mask & (slot[:, None] >= 0))
    return carry


@triton.jit
def _combine_kernel(
    order, keys, offsets, scratch, out, total, width, segment_count,
    CHUNK: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a segment that reaches into later chunks, in the program of the chunk where it starts."""
    chunk = tl.program_id(0)
    layer = tl.program_id(2).to(
        tl.int64
    )  # Layers are sums over the same segments, one after another in out and scratch.
    out += layer * segment_count * width
    scratch += layer * (2 * tl.num_programs(0)) * width
    chunk_lo = chunk * CHUNK
    last = tl.minimum(chunk_lo + CHUNK, total) - 1
    key = tl.load(keys + tl.load(order + last))
    if key >= 0:
        lo = tl.load(offsets + key)
        hi = tl.load(offsets + key + 1)
        if (lo >= chunk_lo) & (hi > last + 1):
            cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
            mask = cols < width
            rows = tl.arange(0, R)
            acc = tl.load(scratch + (2 * chunk + 1).to(tl.int64) * width + cols, mask=mask, other=0.0)
            stop = (hi - 1) // CHUNK + 1
            for first in range(chunk + 1, stop, R):
                part = first + rows
                at = (2 * part).to(tl.int64)[:, None] * width + cols[None, :]
                acc += tl.sum(tl.load(scratch + at, mask=(part < stop)[:, None] & mask[None, :], other=0.0), 0)
            tl.store(out + key.to(tl.int64) * width + cols, acc, mask=mask)


def combine(order, keys, offsets, scratch, out, width: int, chunk: int, layers: int = 1) -> None:
    """Adds parts of segments: out [layers, S, width] and scratch [layers, chunks, 2, width] come from segment_add."""
    total, num = keys.numel(), offsets.numel() - 1
    chunks = triton.cdiv(total, chunk)
    if chunks > 1:
        grid = (chunks, triton.cdiv(width, 128), layers)
        _combine_kernel[grid](
            order, keys, offsets, scratch, out, total, width, num, CHUNK=chunk, R=16, BLOCK_C=128, num_warps=4
        )


@triton.jit
def _segment_sum_kernel(
    src,  # [rows, width], row stride src_stride
    order,  # [total]
    keys,  # [total], before sorting
    offsets,  # [S + 1]
    out,  # [S, width]
    scratch,  # fp32 [chunks, 2, width]
    total, src_stride,
    WIDTH: tl.constexpr, DIV: tl.constexpr,
    CHUNK: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < WIDTH
    rows = tl.arange(0, R)
    carry = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, CHUNK, R):
        i = chunk * CHUNK + start + rows
        entry, key, valid, head, end, slot = segment_rows(i, order, keys, offsets, total, chunk, CHUNK)
        row = (entry // DIV).to(tl.int64)
        mask = valid[:, None] & col_mask[None, :]
        value = tl.load(src + row[:, None] * src_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        carry = segment_add(value, carry, rows, key, head, end, slot, out, scratch, WIDTH, cols, col_mask, R)


def segment_sum(
    src: torch.Tensor,
    keys: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    *,
    per_row: int = 1,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """out[s] = Σ src[e // per_row] over the entries e with keys[e] == s, accumulated in fp32 -> [S, width] of dtype.

    src [rows, width]; keys int32 [rows * per_row], negative = nowhere; (order, offsets) = segments(keys, S).
    """
    total, width, num = keys.numel(), src.shape[1], offsets.numel() - 1
    out = torch.zeros(num, width, dtype=dtype, device=src.device)  # No program writes a segment without entries.
    if total == 0 or width == 0 or num == 0:
        return out
    if src.stride(1) != 1:
        src = src.contiguous()
    chunk = chunk_of(total)
    block = min(triton.next_power_of_2(width), 128)
    scratch = torch.empty(triton.cdiv(total, chunk), 2, width, dtype=torch.float32, device=src.device)
    with on_device(src):
        _segment_sum_kernel[(triton.cdiv(total, chunk), triton.cdiv(width, block))](
            src, order, keys, offsets, out, scratch, total, src.stride(0),
            WIDTH=width, DIV=per_row, CHUNK=chunk, R=tile_rows(block), BLOCK_C=block, num_warps=1,
        )  # fmt: skip
        combine(order, keys, offsets, scratch, out, width, chunk)
    return out
