# SPDX-License-Identifier: Apache-2.0
"""The distinct label patches of a batch at one resolution, as LabelMap keeps, slices and concatenates them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spade_fast.ops.pattern_params import tap_segments
from spade_fast.ops.patterns import patterns
from spade_fast.ops.segments import segments


@dataclasses.dataclass
class Patterns:
    """What a SPADE layer with k×k kernels needs to know of N label maps [h, w]; T = k·k taps.

    A hidden value of the layer depends on a k×k patch of labels (Q distinct ones, numbered image after image), gamma
    and beta on a k×k patch of hidden values (P distinct). The counts are host integers, so that slicing and
    concatenation never wait for a GPU; nothing else looks at them in a traced graph.
    """

    hidden_ids: Tensor  # [N, h, w] int32: which of the Q patches a pixel has
    codes: Tensor  # [Q, T] int32: its label codes, -1 outside the image
    ids: Tensor  # [N, h, w] int32: which of the P patches
    taps: Tensor  # [P, T] int32: indices into the Q rows, -1 outside the image
    hidden_counts: tuple[int, ...]  # Q of each image
    counts: tuple[int, ...]  # P of each image
    outside: tuple[int, ...] | None = None  # taps outside the image, of each image; None: not built for backward
    order: Tensor | None = None  # segments(ids, P)
    offsets: Tensor | None = None
    tap_order: Tensor | None = None  # tap_segments(taps, Q)
    tap_offsets: Tensor | None = None

    @staticmethod
    def find(codes: Tensor, kernel_size: int, traced: bool = False, padding: str = "zeros") -> Patterns:
        """The patterns of codes [N, h, w] int32. Waits for the device: how many there are decides the sizes.

        traced: in a traced graph, where the counts are not known; they stay empty.
        padding: ``zeros``, or ``reflect``: taps beyond a border are those of the pixels mirrored at it.
        """
        search = _patterns_reflected if padding == "reflect" else patterns
        hidden_ids, hidden_codes, hidden_counts = search(codes, kernel_size)
        ids, taps, counts = search(hidden_ids, kernel_size)
        if traced:
            return Patterns(hidden_ids, hidden_codes, ids, taps, (), ())
        return Patterns(hidden_ids, hidden_codes, ids, taps, tuple(hidden_counts.tolist()), tuple(counts.tolist()))

    def add_segments(self) -> None:
        """Adds what only backward needs. Waits for the device."""
        if self.outside is not None:
            return
        self.order, self.offsets = segments(self.ids, self.taps.shape[0])
        self.tap_order, self.tap_offsets = tap_segments(self.taps, self.codes.shape[0])
        parts = (self.taps < 0).sum(1, dtype=torch.int64).cpu().split(self.counts)
        self.outside = tuple(int(p.sum()) for p in parts)

    @functools.cached_property
    def pixel_codes(self) -> Tensor:
        """[N·h·w, T] int32: the label codes of every pixel's patch."""
        return self.codes.index_select(0, self.hidden_ids.view(-1))

    @property
    def density(self) -> float:
        """Distinct patterns a pixel."""
        return sum(self.counts) / max(1, self.ids.numel())

    @property
    def kernel_size(self) -> int:
        return round(self.taps.shape[1] ** 0.5)

    def tensors(self) -> list[Tensor | None]:
        """The tensors, in the order of `with_tensors`."""
        return [getattr(self, name) for name in _TENSORS]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Patterns:
        return dataclasses.replace(self, **dict(zip(_TENSORS, tensors, strict=True)))

    def images(self, start: int, stop: int) -> Patterns:
        """The patterns of images start..stop-1 alone. Views and offset additions: no search, no synchronization."""
        q, p = (_Range(c, start, stop) for c in (self.hidden_counts, self.counts))
        part = Patterns(
            hidden_ids=self.hidden_ids[start:stop] - q.before,
            codes=self.codes[q.before : q.end],
            ids=self.ids[start:stop] - p.before,
            taps=_shift(self.taps[p.before : p.end], -q.before),
            hidden_counts=self.hidden_counts[start:stop],
            counts=self.counts[start:stop],
        )
        if self.outside is None:
            return part
        t = self.taps.shape[1]
        pixels = self.ids[0].numel() if len(self.ids) else 0
        part.order = self.order[start * pixels : stop * pixels] - start * pixels
        part.offsets = self.offsets[p.before : p.end + 1] - start * pixels
        # tap_order lists the taps outside the image first, then the others by hidden row: both in order of images.
        out, total = _Range(self.outside, start, stop), sum(self.outside)
        first = total + p.before * t - out.before
        last = first + p.count * t - out.count
        order = torch.cat([self.tap_order[out.before : out.end], self.tap_order[first:last]])
        part.tap_order = order - p.before * t
        part.tap_offsets = self.tap_offsets[q.before * t : q.end * t + 1] - (first - out.count)
        part.outside = self.outside[start:stop]
        return part

    @staticmethod
    def cat(parts: Sequence[Patterns]) -> Patterns:
        """The patterns of the batch of all parts' images, by offset: no search, no synchronization."""
        t = parts[0].taps.shape[1]
        q = _starts([sum(part.hidden_counts) for part in parts])
        p = _starts([sum(part.counts) for part in parts])
        whole = Patterns(
            hidden_ids=torch.cat([part.hidden_ids + base for part, base in zip(parts, q, strict=True)]),
            codes=torch.cat([part.codes for part in parts]),
            ids=torch.cat([part.ids + base for part, base in zip(parts, p, strict=True)]),
            taps=torch.cat([_shift(part.taps, base) for part, base in zip(parts, q, strict=True)]),
            hidden_counts=sum((part.hidden_counts for part in parts), ()),
            counts=sum((part.counts for part in parts), ()),
        )
        if any(part.outside is None for part in parts):
            return whole
        pixels = _starts([part.ids.numel() for part in parts])
        whole.outside = sum((part.outside for part in parts), ())
        whole.order = torch.cat([part.order + base for part, base in zip(parts, pixels, strict=True)])
        whole.offsets = _chain([part.offsets for part in parts], pixels)
        out = [sum(part.outside) for part in parts]
        shifted = [part.tap_order + base * t for part, base in zip(parts, p, strict=True)]
        heads = [order[:n] for order, n in zip(shifted, out, strict=True)]
        tails = [order[n:] for order, n in zip(shifted, out, strict=True)]
        whole.tap_order = torch.cat([*heads, *tails])
        inside = _starts([part.taps.numel() - n for part, n in zip(parts, out, strict=True)])
        bases = [sum(out) - n + base for n, base in zip(out, inside, strict=True)]
        whole.tap_offsets = _chain([part.tap_offsets for part in parts], bases)
        return whole

    def map(self, function: Callable[[Tensor], Tensor]) -> Patterns:
        return self.with_tensors([None if t is None else function(t) for t in self.tensors()])


_TENSORS = [field.name for field in dataclasses.fields(Patterns) if "Tensor" in field.type]


def _patterns_reflected(codes: Tensor, kernel_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`patterns` with reflection at the borders: found on the padded map, then cropped. Some patches of its rim may
    be listed that no pixel has."""
    pad = kernel_size // 2
    if pad == 0:
        return patterns(codes, kernel_size)
    for dim in (1, 2):
        size = codes.shape[dim]
        index = torch.arange(-pad, size + pad, device=codes.device).abs()
        codes = codes.index_select(dim, (size - 1) - (size - 1 - index).abs())
    ids, patches, counts = patterns(codes.contiguous(), kernel_size)
    return ids[:, pad:-pad, pad:-pad].contiguous(), patches, counts


class _Range:
    """Rows before, up to the end of, and in images start..stop-1, from counts per image."""

    def __init__(self, counts: tuple[int, ...], start: int, stop: int) -> None:
        self.before = sum(counts[:start])
        self.count = sum(counts[start:stop])
        self.end = self.before + self.count


def _shift(taps: Tensor, by: int) -> Tensor:
    return torch.where(taps < 0, taps, taps + by)


def _starts(sizes: list[int]) -> list[int]:
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


def _chain(offsets: list[Tensor], bases: list[int]) -> Tensor:
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
