# SPDX-License-Identifier: Apache-2.0
"""patterns: the distinct k×k patches of label maps. Patches are hashed, sorted, and compared with their pattern."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import on_device
from .segments import segments

__all__ = ["patterns", "segments"]

BLOCK = 256
HASH_BITS = 63  # Bits of a key. Tests force collisions with fewer.


@triton.jit
def _code_at(codes, n, y, x, dy, dx, H, W, mask):
    """Code of the neighbor (dy, dx), -1 outside the image."""
    y += dy
    x += dx
    mask = mask & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return tl.load(codes + (n * H + y) * W + x, mask=mask, other=-1)


@triton.jit
def _place(pixel, H, W):
    n = pixel // (H * W)
    y = pixel % (H * W) // W
    return n, y, pixel % W


@triton.jit
def _hash_kernel(
    codes,  # int32 [N, H, W]
    count, H, W,
    keys,  # int64 [N H W]: image, then hash of the patch
    hash_mask, hash_bits,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < count
    n, y, x = _place(pixel, H, W)
    h1 = tl.full([BLOCK], 0x3C6EF372, tl.uint32)
    h2 = tl.full([BLOCK], 0x1F83D9AB, tl.uint32)
    for t in tl.static_range(K * K):
        code = _code_at(codes, n, y, x, t // K - K // 2, t % K - K // 2, H, W, mask).to(tl.uint32)
        h1 = (h1 ^ code) * 0x5BD1E995
        h1 ^= h1 >> 15
        h2 = (h2 + code) * 0x2C1B3C6D
        h2 ^= h2 >> 13
    key = ((h1 * 0x297A2D39).to(tl.int64) << 32) | (h2 ^ (h2 >> 16)).to(tl.int64)
    tl.store(keys + pixel, (n << hash_bits) | (key & hash_mask), mask=mask)


@triton.jit
def _verify_kernel(
    codes,  # int32 [N, H, W]
    count, H, W,
    chosen,  # int64 [N H W]: for each pixel, one whose patch has the same hash
    wrong,  # int32 [N H W]
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < count
    n, y, x = _place(pixel, H, W)
    n2, y2, x2 = _place(tl.load(chosen + pixel, mask=mask, other=0), H, W)
    differs = (n != n2).to(tl.int32)
    for t in tl.static_range(K * K):
        mine = _code_at(codes, n, y, x, t // K - K // 2, t % K - K // 2, H, W, mask)
        differs |= (mine != _code_at(codes, n2, y2, x2, t // K - K // 2, t % K - K // 2, H, W, mask)).to(tl.int32)
    tl.store(wrong + pixel, differs, mask=mask)


@triton.jit
def _taps_kernel(
    codes,  # int32 [N, H, W]
    count, H, W,
    rank,  # int64 [N H W]: row of a pixel's patch in taps, -1 to skip the pixel
    taps,  # int32 [U, K * K]
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rank + pixel, mask=pixel < count, other=-1)
    mask = row >= 0
    n, y, x = _place(pixel, H, W)
    for t in tl.static_range(K * K):
        code = _code_at(codes, n, y, x, t // K - K // 2, t % K - K // 2, H, W, mask)
        tl.store(taps + row * (K * K) + t, code, mask=mask)


def _launch(kernel, codes: torch.Tensor, *args: torch.Tensor | int, k: int) -> None:
    count, (h, w) = codes.numel(), codes.shape[1:]
    with on_device(codes):
        kernel[(triton.cdiv(count, BLOCK),)](codes, count, h, w, *args, K=k, BLOCK=BLOCK, num_warps=4)


def _first_equal(keys: torch.Tensor) -> torch.Tensor:
    """For each position, the first position with the same key. The host does not wait."""
    ordered, order = torch.sort(keys, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=fresh[1:])
    start = torch.where(fresh, torch.arange(keys.numel(), device=keys.device), 0).cummax(0).values
    return torch.empty_like(order).scatter_(0, order, order[start])


def _first_equal_exact(codes: torch.Tensor, k: int) -> torch.Tensor:
    """The same by sorting whole patches. It is slow, and needed only when two patches have one hash."""
    count, pixel = codes.numel(), torch.arange(codes.numel(), device=codes.device)
    rows = torch.empty(count, k * k, dtype=torch.int32, device=codes.device)
    _launch(_taps_kernel, codes, pixel, rows, k=k)
    image = torch.div(pixel, codes[0].numel(), rounding_mode="floor").int()
    group = torch.unique(torch.cat([image[:, None], rows], 1), dim=0, return_inverse=True)[1]
    return _first_equal(group)


def _number(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pixel: whether its patch appears here first, and the patch's number by first appearance."""
    first = chosen == torch.arange(chosen.numel(), device=chosen.device)
    return first, (first.cumsum(0) - 1)[chosen]


def patterns(codes: torch.Tensor, kernel_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes int32 [N,H,W] -> ids int32 [N,H,W], taps int32 [U,k·k], counts int64 [N]. The host reads U."""
    n, k = codes.shape[0], kernel_size
    if codes.numel() == 0:
        taps = torch.empty(0, k * k, dtype=torch.int32, device=codes.device)
        return codes.clone(), taps, torch.zeros(n, dtype=torch.int64, device=codes.device)
    codes = codes.contiguous()
    keys = torch.empty(codes.numel(), dtype=torch.int64, device=codes.device)
    bits = min(HASH_BITS, 63 - (n - 1).bit_length())
    _launch(_hash_kernel, codes, keys, (1 << bits) - 1, bits, k=k)
    return finish(codes, keys, k)


def finish(codes: torch.Tensor, keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The second half of patterns(). keys [N·H·W]: equal patches have equal keys, and others nearly never have."""
    chosen = _first_equal(keys)
    wrong = torch.empty(codes.numel(), dtype=torch.int32, device=codes.device)
    _launch(_verify_kernel, codes, chosen, wrong, k=k)
    first, number = _number(chosen)
    collided, total = torch.stack([wrong.any().long(), first.sum()]).tolist()
    if collided:
        first, number = _number(_first_equal_exact(codes, k))
        total = int(first.sum())
    taps = torch.empty(total, k * k, dtype=torch.int32, device=codes.device)
    _launch(_taps_kernel, codes, torch.where(first, number, -1), taps, k=k)
    return number.int().view(codes.shape), taps, first.view(codes.shape[0], -1).sum(1)
