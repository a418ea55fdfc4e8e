# SPDX-License-Identifier: Apache-2.0
"""The distinct label patches of a batch at one resolution, as LabelMap keeps, slices and concatenates them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spade_fast import _moved
from spade_fast.ops.pattern_params import tap_segments
from spade_fast.ops.patterns import patterns
from spade_fast.ops.segments import segments


@dataclasses.dataclass
class PatternTables:
    """The distinct patches and patterns of N label maps of h×w pixels, for kernels of k×k = T taps.

    A hidden value of the layer depends on a k×k patch of labels. There are Q distinct patches, numbered image after
    image. Gamma and beta depend on a k×k pattern of patches. There are P distinct patterns, numbered image after image.

    The counts are host integers: slicing and concatenation never wait for a GPU. Nothing else reads the counts in a
    traced graph.
    """

    patch_of_pixel: Tensor  # [N, h, w] int32: the number of the pixel's patch, 0..Q-1
    patch_codes: Tensor  # [Q, T] int32: the label codes of a patch, -1 outside the image
    pattern_of_pixel: Tensor  # [N, h, w] int32: the number of the pixel's pattern, 0..P-1
    pattern_patches: Tensor  # [P, T] int32: the patches of a pattern, -1 outside the image
    patch_counts: tuple[int, ...]  # patches of each image; their sum is Q
    pattern_counts: tuple[int, ...]  # patterns of each image; their sum is P
    # What only backward needs; None until `add_segments`.
    outside_counts: tuple[int, ...] | None = None  # entries -1 in the pattern_patches of each image
    pixels_by_pattern: Tensor | None = None  # segments(pattern_of_pixel, P)
    pattern_offsets: Tensor | None = None
    taps_by_patch: Tensor | None = None  # tap_segments(pattern_patches, Q)
    patch_offsets: Tensor | None = None

    @staticmethod
    def find(codes: Tensor, kernel_size: int, traced: bool = False, padding: str = "zeros") -> PatternTables:
        """The tables of codes [N, h, w] int32. Waits for the device, because Q and P decide the tables' sizes.

        Args:
            codes: label codes, as :attr:`spade_fast.LabelMap.codes`.
            kernel_size: k.
            traced: whether a graph is traced. The counts are unknown there and stay empty.
            padding: ``zeros``, or ``reflect``, where taps beyond a border are those of the pixels mirrored at it.
        """
        search = _patterns_reflected if padding == "reflect" else patterns
        patch_of_pixel, patch_codes, patch_counts = search(codes, kernel_size)
        pattern_of_pixel, pattern_patches, pattern_counts = search(patch_of_pixel, kernel_size)
        tables = (patch_of_pixel, patch_codes, pattern_of_pixel, pattern_patches)
        if traced:
            return PatternTables(*tables, (), ())
        return PatternTables(*tables, tuple(patch_counts.tolist()), tuple(pattern_counts.tolist()))

    def add_segments(self) -> None:
        """Adds what only backward needs. Waits for the device."""
        if self.outside_counts is not None:
            return
        self.pixels_by_pattern, self.pattern_offsets = segments(self.pattern_of_pixel, self.pattern_patches.shape[0])
        self.taps_by_patch, self.patch_offsets = tap_segments(self.pattern_patches, self.patch_codes.shape[0])
        outside = (self.pattern_patches < 0).sum(1, dtype=torch.int64).cpu()
        self.outside_counts = tuple(int(of_image.sum()) for of_image in outside.split(self.pattern_counts))

    @functools.cached_property
    def pixel_codes(self) -> Tensor:
        """[N·h·w, T] int32: the label codes of every pixel's patch."""
        return self.patch_codes.index_select(0, self.patch_of_pixel.view(-1))

    @property
    def density(self) -> float:
        """Distinct patterns per pixel, 0 to 1."""
        return sum(self.pattern_counts) / max(1, self.pattern_of_pixel.numel())

    @property
    def kernel_size(self) -> int:
        """k, the side of a patch."""
        return round(self.pattern_patches.shape[1] ** 0.5)

    def tensors(self) -> list[Tensor | None]:
        """The tensors, in the order of `with_tensors`."""
        return [getattr(self, name) for name in _TENSORS]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> PatternTables:
        """A copy with other tensors and the same counts."""
        changes: dict[str, Any] = dict(zip(_TENSORS, tensors, strict=True))
        return dataclasses.replace(self, **changes)

    def images(self, start: int, stop: int) -> PatternTables:
        """The tables of images start..stop-1 alone. Only views and additions: no search, no synchronization."""
        q, p = (_Range(c, start, stop) for c in (self.patch_counts, self.pattern_counts))
        part = PatternTables(
            patch_of_pixel=self.patch_of_pixel[start:stop] - q.before,
            patch_codes=self.patch_codes[q.before : q.end],
            pattern_of_pixel=self.pattern_of_pixel[start:stop] - p.before,
            pattern_patches=_shift(self.pattern_patches[p.before : p.end], -q.before),
            patch_counts=self.patch_counts[start:stop],
            pattern_counts=self.pattern_counts[start:stop],
        )
        if self.outside_counts is None:
            return part
        pixels_by_pattern, pattern_offsets, taps_by_patch, patch_offsets = self._segments()
        t = self.pattern_patches.shape[1]
        pixels = self.pattern_of_pixel[0].numel() if len(self.pattern_of_pixel) else 0
        part.pixels_by_pattern = pixels_by_pattern[start * pixels : stop * pixels] - start * pixels
        part.pattern_offsets = pattern_offsets[p.before : p.end + 1] - start * pixels
        # taps_by_patch lists the taps outside the image first and then the others by patch, both in order of images.
        out, total = _Range(self.outside_counts, start, stop), sum(self.outside_counts)
        first = total + p.before * t - out.before
        last = first + p.count * t - out.count
        part.taps_by_patch = torch.cat([taps_by_patch[out.before : out.end], taps_by_patch[first:last]]) - p.before * t
        part.patch_offsets = patch_offsets[q.before * t : q.end * t + 1] - (first - out.count)
        part.outside_counts = self.outside_counts[start:stop]
        return part

    @staticmethod
    def cat(parts: Sequence[PatternTables]) -> PatternTables:
        """The tables of the batch of all parts' images, by offset: no search, no synchronization."""
        t = parts[0].pattern_patches.shape[1]
        q = _starts([sum(part.patch_counts) for part in parts])
        p = _starts([sum(part.pattern_counts) for part in parts])
        none: tuple[int, ...] = ()
        whole = PatternTables(
            patch_of_pixel=torch.cat([part.patch_of_pixel + base for part, base in zip(parts, q, strict=True)]),
            patch_codes=torch.cat([part.patch_codes for part in parts]),
            pattern_of_pixel=torch.cat([part.pattern_of_pixel + base for part, base in zip(parts, p, strict=True)]),
            pattern_patches=torch.cat(
                [_shift(part.pattern_patches, base) for part, base in zip(parts, q, strict=True)]
            ),
            patch_counts=sum((part.patch_counts for part in parts), none),
            pattern_counts=sum((part.pattern_counts for part in parts), none),
        )
        outside = [part.outside_counts for part in parts if part.outside_counts is not None]
        if len(outside) < len(parts):
            return whole
        pixels_by_pattern, pattern_offsets, taps_by_patch, patch_offsets = zip(
            *(part._segments() for part in parts), strict=True
        )
        pixels = _starts([part.pattern_of_pixel.numel() for part in parts])
        whole.outside_counts = sum(outside, none)
        whole.pixels_by_pattern = torch.cat([t + base for t, base in zip(pixels_by_pattern, pixels, strict=True)])
        whole.pattern_offsets = _chain(pattern_offsets, pixels)
        out = [sum(counts) for counts in outside]
        shifted = [taps + base * t for taps, base in zip(taps_by_patch, p, strict=True)]
        heads = [taps[:n] for taps, n in zip(shifted, out, strict=True)]
        tails = [taps[n:] for taps, n in zip(shifted, out, strict=True)]
        whole.taps_by_patch = torch.cat([*heads, *tails])
        inside = _starts([part.pattern_patches.numel() - n for part, n in zip(parts, out, strict=True)])
        bases = [sum(out) - n + base for n, base in zip(out, inside, strict=True)]
        whole.patch_offsets = _chain(patch_offsets, bases)
        return whole

    def _segments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """pixels_by_pattern, pattern_offsets, taps_by_patch and patch_offsets, once they were added."""
        assert self.pixels_by_pattern is not None and self.pattern_offsets is not None
        assert self.taps_by_patch is not None and self.patch_offsets is not None
        return self.pixels_by_pattern, self.pattern_offsets, self.taps_by_patch, self.patch_offsets

    def map(self, function: Callable[[Tensor], Tensor]) -> PatternTables:
        """A copy with function(t) for every tensor t."""
        return self.with_tensors([None if t is None else function(t) for t in self.tensors()])


_TENSORS = [field.name for field in dataclasses.fields(PatternTables) if "Tensor" in str(field.type)]


def _patterns_reflected(codes: Tensor, kernel_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`patterns` with reflection at the borders: found on the padded map, then cropped.

    The list may hold patches of the padded map's rim that no pixel has.
    """
    pad = kernel_size // 2
    if pad == 0:
        return patterns(codes, kernel_size)
    for dim in (1, 2):
        size = codes.shape[dim]
        index = torch.arange(-pad, size + pad, device=codes.device).abs()
        codes = codes.index_select(dim, (size - 1) - (size - 1 - index).abs())
    numbers, patches, counts = patterns(codes.contiguous(), kernel_size)
    return numbers[:, pad:-pad, pad:-pad].contiguous(), patches, counts


class _Range:
    """Of images start..stop-1, from counts per image: rows before them, their rows, and the end of their rows."""

    def __init__(self, counts: tuple[int, ...], start: int, stop: int) -> None:
        self.before = sum(counts[:start])
        self.count = sum(counts[start:stop])
        self.end = self.before + self.count


def _shift(pattern_patches: Tensor, by: int) -> Tensor:
    return torch.where(pattern_patches < 0, pattern_patches, pattern_patches + by)


def _starts(sizes: list[int]) -> list[int]:
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


def _chain(offsets: Sequence[Tensor], bases: list[int]) -> Tensor:
    """Joins CSR offsets: the end of one is the start of the next."""
    return torch.cat(
        [o[: None if i == len(bases) - 1 else -1] + b for i, (o, b) in enumerate(zip(offsets, bases, strict=True))]
    )


def nearest_index(size: int, to: int, device: torch.device | str = "cpu") -> Tensor:
    """[to] int64: the source positions that F.interpolate(mode="nearest", size=to) picks along an axis of `size`.

    min(floor(i * scale), size - 1) with scale = size / to, all in float32, as ATen computes it for float32 maps.
    """
    one, other = (torch.tensor(n, dtype=torch.float32, device="cpu") for n in (size, to))  # not the default device
    scale = (one / other).item()
    index = (torch.arange(to, dtype=torch.float32, device=device) * scale).floor().to(torch.int64)
    return index.clamp_(max=size - 1)


if not TYPE_CHECKING:  # a type checker must not take every name for an attribute
    __getattr__ = _moved.attributes(__name__, {"Patterns": f"{__name__}.PatternTables"})
