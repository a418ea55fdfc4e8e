# SPDX-License-Identifier: Apache-2.0
"""patterns: the distinct k×k patches of label maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.ops import _register

OUTSIDE = -1  # The code of a position outside the image.


def _hash(patches: list[Tensor], image: Tensor) -> Tensor:
    """An int64 hash of each patch and its image number. patches: a tensor of codes for each tap. May collide."""
    value = image * -0x61C8864680B583EB
    for codes in patches:
        value = ((value ^ (value >> 29)) + codes * 0x5851F42D4C957F2D) * -0x40A7B892E31B1A47
    return value ^ (value >> 32)


def _unique_exact(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each row among the distinct rows [R], and where each first occurs [U], by sorting whole rows."""
    _, inverse = torch.unique(rows, dim=0, return_inverse=True)
    position = torch.arange(rows.shape[0], device=rows.device)
    first = torch.full((int(inverse.max()) + 1,), rows.shape[0], device=rows.device)
    return inverse, first.scatter_reduce_(0, inverse, position, "amin")


def _unique_hashed(hashes: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each hash among the distinct hashes [R], and where each first occurs [U]."""
    values, order = torch.sort(hashes, stable=True)
    fresh = torch.ones_like(values, dtype=torch.bool)
    torch.ne(values[1:], values[:-1], out=fresh[1:])
    inverse = torch.empty_like(order)
    inverse[order] = fresh.cumsum(0) - 1
    return inverse, order[fresh]


def patterns_torch(codes: Tensor, kernel_size: int) -> tuple[Tensor, Tensor, Tensor]:
    n, h, w = codes.shape
    k, device = kernel_size, codes.device
    if codes.numel() == 0:
        taps = torch.empty(0, k * k, dtype=torch.int32, device=device)
        return codes.to(torch.int32), taps, torch.zeros(n, dtype=torch.int64, device=device)
    padded = F.pad(codes.to(torch.int32), (k // 2,) * 4, value=OUTSIDE)
    # Maps are piecewise constant, so most pixels have the patch of their left neighbor. Only the other pixels, here
    # called heads, are hashed and sorted.
    same = (padded[:, :, 1:] == padded[:, :, :-1]).to(torch.uint8)
    rows = same[:, :h].clone()
    for dy in range(1, k):
        rows &= same[:, dy : dy + h]
    head = torch.ones(n, h, w, dtype=torch.bool, device=device)
    if w > 1:
        repeated = rows[:, :, : w - 1].clone()
        for dx in range(1, k):
            repeated &= rows[:, :, dx : dx + w - 1]
        torch.eq(repeated, 0, out=head[:, :, 1:])
    heads = head.view(-1).nonzero().squeeze(1)
    image = torch.div(heads, h * w, rounding_mode="floor")
    pixel = heads - image * (h * w)
    y = torch.div(pixel, w, rounding_mode="floor")
    corner = image * ((h + k - 1) * (w + k - 1)) + y * (w + k - 1) + (pixel - y * w)
    flat = padded.view(-1)
    patches = [flat[corner + dy * (w + k - 1) + dx] for dy in range(k) for dx in range(k)]
    rows = torch.stack(patches, 1)  # [heads, k*k]

    inverse, first = _unique_hashed(_hash([p.to(torch.int64) for p in patches], image))
    chosen = first[inverse]
    if not (torch.equal(rows, rows[chosen]) and torch.equal(image, image[chosen])):  # Two patches have one hash.
        inverse, first = _unique_exact(torch.cat([image.to(torch.int32).unsqueeze(1), rows], 1))
    # Numbers by first appearance do not depend on the hash, go image by image, and keep neighbors near in memory.
    first, by_appearance = torch.sort(first)
    rank = torch.empty_like(by_appearance)
    rank[by_appearance] = torch.arange(rank.numel(), device=device)
    counts = torch.bincount(image[first], minlength=n)
    number = rank.to(torch.int32)[inverse]
    pattern_ids = number[head.view(-1).cumsum(0) - 1].view(n, h, w)
    return pattern_ids, rows[first], counts


def _patterns_fake(codes: Tensor, kernel_size: int) -> tuple[Tensor, Tensor, Tensor]:
    distinct = torch.library.get_ctx().new_dynamic_size()
    pattern_ids = codes.new_empty(codes.shape, dtype=torch.int32)
    taps = codes.new_empty((distinct, kernel_size * kernel_size), dtype=torch.int32)
    return pattern_ids, taps, codes.new_empty((codes.shape[0],), dtype=torch.int64)


_patterns = _register.register(
    "patterns(Tensor codes, int kernel_size) -> (Tensor, Tensor, Tensor)", patterns_torch, _patterns_fake
)


def patterns(codes: Tensor, kernel_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the distinct k×k patches of each image.

    Patterns are numbered by first appearance, image by image. No two images share a pattern. A hash finds the
    patterns. Each pixel's patch is then compared with its pattern, and whole patches are sorted if two had one hash.

    Args:
        codes: [N, H, W] int32, none negative.
        kernel_size: k, odd.

    Returns:
        pattern_ids [N, H, W] int32, the number of each pixel's patch; taps [U, k·k] int32, the patches row by row, -1
        outside the image; counts [N] int64, the number of patterns of each image.

    Raises:
        ValueError: codes has another dtype or shape, or kernel_size is even or not positive.

    Example:
        >>> pattern_ids, taps, counts = patterns(torch.tensor([[[5, 5, 7]]], dtype=torch.int32), 1)
        >>> pattern_ids.tolist(), taps.tolist(), counts.tolist()
        ([[[0, 0, 1]]], [[5], [7]], [2])
    """
    if codes.dim() != 3 or codes.dtype != torch.int32:
        raise ValueError(f"patterns: codes must be int32 [N, H, W], got {codes.dtype} {list(codes.shape)}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"patterns: kernel_size must be odd, got {kernel_size}")
    return _patterns(codes, kernel_size)
