# SPDX-License-Identifier: Apache-2.0
"""LabelMap: a batch of label maps, checked once, kept as one small integer per pixel instead of a one-hot tensor."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from spade_fast import _moved
from spade_fast.labels.pattern_tables import PatternTables, nearest_index
from spade_fast.ops.recognize import recognize

_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_ALIGNMENT = 16  # int32 elements: 64 bytes


class LabelMap:
    """Semantic label maps of one batch, with an optional channel of instance edges.

    The map is kept as `codes` [N, H, W] int32. A code is the label, or label * 2 + edge when there are edges. An
    ignored pixel has the label num_classes. A LabelMap is a copy of the labels as they were: do not write to its
    tensors. Its resized codes and its patterns are found on first use and kept.

    Examples:
        >>> labels = LabelMap(torch.tensor([[[0, 0, 1, 255]]]), num_classes=2, ignore_index=255)
        >>> labels
        LabelMap([1, 1, 4], num_classes=2, device=cpu)
        >>> labels.one_hot()[0, :, 0]
        tensor([[1., 1., 0., 0.],
                [0., 0., 1., 0.]])

    Args:
        labels: [N, H, W] label values 0..num_classes-1, of any integer dtype. ``ids=`` is its deprecated name.
        num_classes: number of classes, at least 1.
        edges: [N, H, W] 0/1, bool or integers. None when the conditioning has no edge channel.
        ignore_index: a label value. In the one-hot map, all label channels are zero at its pixels.
        validate: whether to check labels and edges. On a GPU the check waits for the device once. Without it, labels
            out of range count as ignored.

    Raises:
        TypeError: labels or edges are not integers.
        ValueError: num_classes, a shape, a label or an edge is out of range. Label and edge are named by value and
            position.
    """

    @_moved.argument("ids", "labels")
    def __init__(
        self,
        labels: Tensor,
        num_classes: int,
        edges: Tensor | None = None,
        ignore_index: int | None = None,
        validate: bool = True,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not isinstance(labels, Tensor) or labels.dim() != 3:
            shape = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels must be a tensor of shape [N, H, W], got {shape}")
        if labels.dtype in _WIDE_UNSIGNED:
            labels = labels.to(torch.int64)
        if labels.dtype not in _INTEGERS:
            raise TypeError(f"labels must have an integer dtype, got {labels.dtype}")
        if edges is not None:
            if edges.shape != labels.shape:
                raise ValueError(f"edges must have the shape of labels, {list(labels.shape)}, got {list(edges.shape)}")
            if edges.dtype not in _INTEGERS:
                raise TypeError(f"edges must be bool or integer 0/1, got {edges.dtype}")
            edges = edges.to(labels.device)
        labels = labels if labels.dtype == torch.int64 else labels.to(torch.int32)
        known = inside = (labels >= 0) & (labels < num_classes)
        if ignore_index is not None:
            ignored = labels == ignore_index
            known, inside = inside | ignored, inside & ~ignored
        if validate:
            _check(labels, known, edges, num_classes, ignore_index)
        codes = torch.where(inside, labels, num_classes).to(torch.int32)
        if edges is not None:
            codes = codes * 2 + (edges != 0).to(torch.int32)
        self._set(codes, num_classes, edges is not None)

    def _set(self, codes: Tensor, num_classes: int, has_edges: bool) -> None:
        self.codes = codes
        self.num_classes = num_classes
        self.has_edges = has_edges
        self._resized: dict[tuple[int, int], Tensor] = {}
        self._patterns: dict[tuple, PatternTables] = {}

    @classmethod
    def from_codes(cls, codes: Tensor, num_classes: int, has_edges: bool) -> LabelMap:
        """A LabelMap around codes [N, H, W] int32, which are not checked."""
        self = cls.__new__(cls)
        self._set(codes, num_classes, has_edges)
        return self

    @classmethod
    def from_segmap(cls, segmap: Tensor) -> LabelMap | None:
        """The LabelMap whose `one_hot()` equals segmap exactly, or None when there is none.

        A map is recognized when it is one-hot over all L channels, or one-hot over the first L-1 with 0/1 edges in the
        last. A pixel whose label channels are all zero counts as ignored. On a GPU this waits for the device once.

        Args:
            segmap: [N, L, H, W] of any dtype.

        Raises:
            ValueError: segmap has another number of dimensions.
        """
        if segmap.dim() != 4:
            raise ValueError(f"segmap must have shape [N, L, H, W], got {list(segmap.shape)}")
        channels = segmap.shape[1]
        if channels < 1 or segmap.is_complex():
            return None
        codes, kind = recognize(segmap)
        edges = int(kind) - 1  # kind 1 has no channel of edges, kind 2 has one
        return None if edges < 0 else cls.from_codes(codes, channels - edges, edges == 1)

    @property
    def label_nc(self) -> int:
        """Channels of the one-hot map: num_classes, + 1 with edges."""
        return self.num_classes + int(self.has_edges)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the map."""
        return self.codes.shape[1], self.codes.shape[2]

    @property
    def device(self) -> torch.device:
        """The device of all its tensors."""
        return self.codes.device

    @property
    def labels(self) -> Tensor:
        """Labels [N, H, W] int32, a copy. Ignored pixels have the value num_classes."""
        return self.codes >> 1 if self.has_edges else self.codes.clone()

    @property
    def ids(self) -> Tensor:
        """The deprecated name of `labels`."""
        warnings.warn("LabelMap.ids is now LabelMap.labels", FutureWarning, stacklevel=2)
        return self.labels

    @property
    def edges(self) -> Tensor | None:
        """Edges [N, H, W] bool, or None."""
        return (self.codes & 1).bool() if self.has_edges else None

    def one_hot(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The conditioning as the original layer takes it: [N, label_nc, H, W]."""
        out = torch.zeros(len(self), self.label_nc, *self.size, dtype=dtype, device=self.device)
        labels = self.labels.to(torch.int64).unsqueeze(1)
        present = (labels < self.num_classes).to(dtype)  # an ignored pixel has no channel
        out.scatter_(1, labels.clamp(max=self.num_classes - 1), present)
        if self.has_edges:
            out[:, -1] = (self.codes & 1).to(dtype)
        return out

    def resized(self, h: int, w: int) -> Tensor:
        """Codes [N, h, w] int32, resized as F.interpolate(one_hot, (h, w), mode="nearest") resizes the one-hot map."""
        if (h, w) == self.size:
            return self.codes
        found = self._resized.get((h, w))
        if found is None:
            rows, columns = (nearest_index(s, to, self.device) for s, to in zip(self.size, (h, w), strict=True))
            found = self.codes.index_select(1, rows).index_select(2, columns)
            if not torch.compiler.is_compiling():
                self._resized[h, w] = found
        return found

    def patterns(
        self, h: int, w: int, kernel_size: int = 3, backward: bool = False, padding: str = "zeros"
    ) -> PatternTables:
        """The distinct patches and patterns at h×w pixels, found on first use and kept.

        Finding them waits for the device. `build` finds them ahead of time, for example in a data-loader worker.

        Args:
            h, w: size of the layer's output in pixels.
            kernel_size: k of the layer's k×k kernels.
            backward: whether the tables that only backward needs are added.
            padding: of the convolutions, ``zeros`` or ``reflect``.
        """
        key = (h, w, kernel_size) if padding == "zeros" else (h, w, kernel_size, padding)
        found = self._patterns.get(key)
        # Read once: after a graph break, functions called below may be compiled although this one is not.
        traced = torch.compiler.is_compiling()
        if found is None:
            found = PatternTables.find(self.resized(h, w), kernel_size, traced, padding)
            if traced:
                return found
            self._patterns[key] = found
            _mark_dynamic(found)
        if backward and found.outside_counts is None and not traced:
            found.add_segments()
            _mark_dynamic(found)
        return found

    def build(self, sizes: Iterable[tuple[int, int]], kernel_size: int = 3, backward: bool = False) -> LabelMap:
        """Finds the patterns at all sizes now.

        Args:
            sizes: (h, w) of each, in pixels.
            kernel_size, backward: see :meth:`patterns`.

        Returns:
            self.
        """
        for h, w in sizes:
            self.patterns(h, w, kernel_size, backward)
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelMap:
        """A copy on device with all that was found, in one transfer; self when it is there already."""
        if torch.empty(0, device=device).device == self.device:
            return self
        buffer, layout = self._pack()
        return LabelMap._unpack(buffer.to(device, non_blocking=non_blocking), layout)

    def pin_memory(self) -> LabelMap:
        """A copy in page-locked host memory, for `to(device, non_blocking=True)`."""
        buffer, layout = self._pack()
        return LabelMap._unpack(buffer.pin_memory(), layout)

    def _pack(self) -> tuple[Tensor, tuple]:
        """All tensors in one int32 buffer, each aligned to 64 bytes, and the layout that takes the buffer apart."""
        found = list(self._patterns.items())
        tensors: list[Tensor | None] = [self.codes, *self._resized.values()]
        for _, patterns in found:
            tensors.extend(patterns.tensors())
        present = [t for t in tensors if t is not None]
        starts, total = [], 0
        for t in present:
            starts.append(total)
            total += -(-t.numel() // _ALIGNMENT) * _ALIGNMENT
        buffer = torch.empty(total, dtype=torch.int32, device=self.device)
        for t, start in zip(present, starts, strict=True):
            buffer[start : start + t.numel()].copy_(t.reshape(-1))
        shapes = [None if t is None else tuple(t.shape) for t in tensors]
        empty = [(key, p.with_tensors([None] * len(p.tensors()))) for key, p in found]
        return buffer, (self.num_classes, self.has_edges, list(self._resized), empty, shapes, starts)

    @staticmethod
    def _unpack(buffer: Tensor, layout: tuple) -> LabelMap:
        num_classes, has_edges, sizes, empty, shapes, starts = layout
        start = iter(starts)

        def view(shape: tuple[int, ...]) -> Tensor:
            first = next(start)
            return buffer[first : first + torch.Size(shape).numel()].view(shape)

        remaining = iter(shapes)
        self = LabelMap.from_codes(view(next(remaining)), num_classes, has_edges)
        self._resized = {size: view(next(remaining)) for size in sizes}
        for key, patterns in empty:
            tensors = [None if s is None else view(s) for s in itertools.islice(remaining, len(patterns.tensors()))]
            self._patterns[key] = patterns.with_tensors(tensors)
            _mark_dynamic(self._patterns[key])
        return self

    def __reduce__(self) -> tuple[Callable, tuple]:
        # Each tensor that passes between processes takes a file descriptor: pass one buffer, not fifty tensors.
        return LabelMap._unpack, self._pack()

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, index: int | slice) -> LabelMap:
        """The map of one image, or of a slice of the batch. An int keeps the batch dimension."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"image {index} of a LabelMap of {len(self)}")
            index = index % len(self)
            index = slice(index, index + 1)
        if not isinstance(index, slice):
            raise TypeError(f"a LabelMap is indexed by an int or a slice, got {type(index).__name__}")
        start, stop, step = index.indices(len(self))
        if step != 1:
            chosen = [self[i] for i in range(start, stop, step)]
            if chosen:
                return LabelMap.cat(chosen)
            start = stop = 0
        stop = max(start, stop)
        part = LabelMap.from_codes(self.codes[start:stop], self.num_classes, self.has_edges)
        part._resized = {size: codes[start:stop] for size, codes in self._resized.items()}
        part._patterns = {key: patterns.images(start, stop) for key, patterns in self._patterns.items()}
        for patterns in part._patterns.values():
            _mark_dynamic(patterns)
        return part

    @staticmethod
    def cat(maps: Sequence[LabelMap]) -> LabelMap:
        """One batch of several LabelMaps of the same size, number of classes and edge channel.

        Patterns that all of them have found are joined by offset. Nothing is searched again or waits for the device.

        Raises:
            ValueError: there is no map, or two maps differ in what must be the same.
        """
        if not maps:
            raise ValueError("LabelMap.cat needs at least one LabelMap")
        first = maps[0]
        for i, other in enumerate(maps):
            for name in ("num_classes", "has_edges", "size"):
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(
                        f"LabelMap.cat: {name} of item {i} is {getattr(other, name)}, of item 0 {getattr(first, name)}"
                    )
        whole = LabelMap.from_codes(torch.cat([m.codes for m in maps]), first.num_classes, first.has_edges)
        for size in first._resized:
            if all(size in m._resized for m in maps):
                whole._resized[size] = torch.cat([m._resized[size] for m in maps])
        for key in first._patterns:
            if all(key in m._patterns for m in maps):
                whole._patterns[key] = PatternTables.cat([m._patterns[key] for m in maps])
                _mark_dynamic(whole._patterns[key])
        return whole

    def __repr__(self) -> str:
        edges = ", edges" if self.has_edges else ""
        return f"LabelMap({list(self.codes.shape)}, num_classes={self.num_classes}{edges}, device={self.device})"


def _mark_dynamic(patterns: PatternTables) -> None:
    """Tells torch.compile that the numbers of patterns vary. A new label map then does not compile anew.

    This does not import dynamo, which takes seconds. Processes that never compile, such as data-loader workers, do
    without it.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or torch.compiler.is_compiling():
        return
    p = patterns
    for t in (p.patch_codes, p.pattern_patches, p.pattern_offsets, p.taps_by_patch, p.patch_offsets):
        if t is not None:
            dynamo.maybe_mark_dynamic(t, 0)


def _check(labels: Tensor, known: Tensor, edges: Tensor | None, num_classes: int, ignore_index: int | None) -> None:
    """Raises the ValueError for the first pixel whose label is not known or whose edge is neither 0 nor 1."""
    right = known
    if edges is not None and edges.dtype != torch.bool:
        right = known & ((edges == 0) | (edges == 1))
    if right.all():
        return
    if not known.all():
        n, y, x = (~known).nonzero()[0].tolist()
        ignore = "no ignore_index was given" if ignore_index is None else f"ignore_index is {ignore_index}"
        raise ValueError(
            f"labels[{n}, {y}, {x}] is {labels[n, y, x].item()}; labels must be in 0..{num_classes - 1} "
            f"(num_classes = {num_classes}; {ignore}); {int((~known).sum())} pixels are out of range"
        )
    assert edges is not None
    n, y, x = (~right).nonzero()[0].tolist()
    raise ValueError(f"edges[{n}, {y}, {x}] is {edges[n, y, x].item()}; edges must be 0 or 1")
