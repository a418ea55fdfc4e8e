# SPDX-License-Identifier: Apache-2.0
"""LabelMap: a batch of label maps, checked once, kept as one small integer per pixel instead of a one-hot tensor."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spade_fast.labels.pattern_tables import Patterns, nearest_index
from spade_fast.ops.recognize import recognize

_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_ALIGNMENT = 16  # int32 elements: 64 bytes


class LabelMap:
    """Semantic label maps of one batch, with an optional instance-edge channel.

    ids: [N, H, W] labels 0..num_classes-1, any integer dtype.
    edges: [N, H, W] 0/1 (bool or integers), or None when the conditioning has no edge channel.
    ignore_index: a label value whose pixels contribute nothing to the label channels (all zeros in the one-hot map).
    validate: raise ValueError on a label out of range, naming value and position (on a GPU: one host
        synchronization, no device assert). With False nothing is checked and labels out of range count as ignored.

    The map is kept as `codes` [N, H, W] int32: the label, or label * 2 + edge when there are edges; an ignored
    pixel has the label num_classes. Its sizes and patterns at other resolutions are found when asked for and kept: a
    LabelMap is a copy of the labels as they were, and its tensors are not to be written to.
    """

    def __init__(
        self,
        ids: Tensor,
        num_classes: int,
        edges: Tensor | None = None,
        ignore_index: int | None = None,
        validate: bool = True,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not isinstance(ids, Tensor) or ids.dim() != 3:
            shape = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"ids must be a tensor of shape [N, H, W], got {shape}")
        if ids.dtype in _WIDE_UNSIGNED:
            ids = ids.to(torch.int64)
        if ids.dtype not in _INTEGERS:
            raise TypeError(f"ids must have an integer dtype, got {ids.dtype}")
        if edges is not None:
            if edges.shape != ids.shape:
                raise ValueError(f"edges must have the shape of ids, {list(ids.shape)}, got {list(edges.shape)}")
            if edges.dtype not in _INTEGERS:
                raise TypeError(f"edges must be bool or integer 0/1, got {edges.dtype}")
            edges = edges.to(ids.device)
        labels = ids.to(torch.int64) if ids.dtype == torch.int64 else ids.to(torch.int32)
        inside = (labels >= 0) & (labels < num_classes)
        if ignore_index is not None:
            ignored = labels == ignore_index
            inside = inside & ~ignored
        if validate:
            wrong = ~inside if ignore_index is None else ~(inside | ignored)
            wrong_edge = None if edges is None or edges.dtype == torch.bool else (edges != 0) & (edges != 1)
            any_wrong = wrong.any() if wrong_edge is None else (wrong | wrong_edge).any()
            if any_wrong:
                _raise_out_of_range(labels, wrong, edges, wrong_edge, num_classes, ignore_index)
        codes = torch.where(inside, labels, num_classes).to(torch.int32)
        if edges is not None:
            codes = codes * 2 + (edges != 0).to(torch.int32)
        self._set(codes, num_classes, edges is not None)

    def _set(self, codes: Tensor, num_classes: int, has_edges: bool) -> None:
        self.codes = codes
        self.num_classes = num_classes
        self.has_edges = has_edges
        self._resized: dict[tuple[int, int], Tensor] = {}
        self._patterns: dict[tuple, Patterns] = {}

    @classmethod
    def from_codes(cls, codes: Tensor, num_classes: int, has_edges: bool) -> LabelMap:
        """Wraps codes [N, H, W] int32 that are known to be right; nothing is checked."""
        self = cls.__new__(cls)
        self._set(codes, num_classes, has_edges)
        return self

    @classmethod
    def from_segmap(cls, segmap: Tensor) -> LabelMap | None:
        """The LabelMap whose `one_hot()` equals segmap [N, L, H, W] exactly, or None when there is none.

        Recognized: one-hot over all L channels; or one-hot over the first L-1 with 0/1 edges in the last. A pixel
        whose label channels are all zero counts as ignored. One host synchronization on a GPU.
        """
        if segmap.dim() != 4:
            raise ValueError(f"segmap must have shape [N, L, H, W], got {list(segmap.shape)}")
        channels = segmap.shape[1]
        if channels < 1 or segmap.is_complex():
            return None
        codes, kind = recognize(segmap)
        edges = int(kind) - 1  # of kinds 1 and 2: channels of edges
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
        return self.codes.device

    @property
    def ids(self) -> Tensor:
        """Labels [N, H, W] int32, a copy; ignored pixels have the value num_classes."""
        return self.codes >> 1 if self.has_edges else self.codes.clone()

    @property
    def edges(self) -> Tensor | None:
        """Edges [N, H, W] bool, or None."""
        return (self.codes & 1).bool() if self.has_edges else None

    def one_hot(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The conditioning as the original layer takes it: [N, label_nc, H, W]."""
        out = torch.zeros(len(self), self.label_nc, *self.size, dtype=dtype, device=self.device)
        labels = self.ids.to(torch.int64).unsqueeze(1)
        present = (labels < self.num_classes).to(dtype)  # an ignored pixel has no channel
        out.scatter_(1, labels.clamp(max=self.num_classes - 1), present)
        if self.has_edges:
            out[:, -1] = (self.codes & 1).to(dtype)
        return out

    def resized(self, h: int, w: int) -> Tensor:
        """Codes [N, h, w] int32: of each pixel, the one F.interpolate(one_hot, (h, w), mode="nearest") picks."""
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
    ) -> Patterns:
        """The patterns at h×w for k×k kernels; with what backward needs, if asked. Found once, then kept.

        padding: of the convolutions, ``zeros`` or ``reflect``.

        Finding them waits for the device; `build` does it ahead, in a data-loader worker say.
        """
        key = (h, w, kernel_size) if padding == "zeros" else (h, w, kernel_size, padding)
        found = self._patterns.get(key)
        # Asked once: with graph breaks, what this calls may be compiled where this is not.
        traced = torch.compiler.is_compiling()
        if found is None:
            found = Patterns.find(self.resized(h, w), kernel_size, traced, padding)
            if traced:
                return found
            self._patterns[key] = found
            _mark_dynamic(found)
        if backward and found.outside is None and not traced:
            found.add_segments()
            _mark_dynamic(found)
        return found

    def build(self, sizes: Iterable[tuple[int, int]], kernel_size: int = 3, backward: bool = False) -> LabelMap:
        """Finds the patterns of these (h, w) now. backward: with what training needs. Returns self."""
        for h, w in sizes:
            self.patterns(h, w, kernel_size, backward)
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelMap:
        """A copy on device (itself when it is there already), with all that was found, in one transfer."""
        if torch.empty(0, device=device).device == self.device:
            return self
        buffer, layout = self._pack()
        return LabelMap._unpack(buffer.to(device, non_blocking=non_blocking), layout)

    def pin_memory(self) -> LabelMap:
        """A copy in page-locked host memory, for `to(device, non_blocking=True)`."""
        buffer, layout = self._pack()
        return LabelMap._unpack(buffer.pin_memory(), layout)

    def _pack(self) -> tuple[Tensor, tuple]:
        """All tensors in one int32 buffer, each aligned to 64 bytes, and what is needed to take it apart."""
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
        views: list[Tensor | None] = []
        for shape in shapes:
            if shape is None:
                views.append(None)
                continue
            first = next(start)
            views.append(buffer[first : first + torch.Size(shape).numel()].view(shape))
        self = LabelMap.from_codes(views[0], num_classes, has_edges)
        self._resized = dict(zip(sizes, views[1:], strict=False))
        at = 1 + len(sizes)
        for key, patterns in empty:
            count = len(patterns.tensors())
            self._patterns[key] = patterns.with_tensors(views[at : at + count])
            _mark_dynamic(self._patterns[key])
            at += count
        return self

    def __reduce__(self):
        # One tensor to pass between processes, not fifty: each would take a file descriptor.
        return LabelMap._unpack, self._pack()

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, index: int | slice) -> LabelMap:
        """The maps of one image (an int keeps the batch dimension) or of a slice of the batch."""
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
        """One batch of several of the same size, classes and edge channel.

        What all of them have found is kept, joined by offset: nothing is searched again, nothing waits for the device.
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
                whole._patterns[key] = Patterns.cat([m._patterns[key] for m in maps])
                _mark_dynamic(whole._patterns[key])
        return whole

    def __repr__(self) -> str:
        edges = ", edges" if self.has_edges else ""
        return f"LabelMap({list(self.codes.shape)}, num_classes={self.num_classes}{edges}, device={self.device})"


def _mark_dynamic(patterns: Patterns) -> None:
    """Tells torch.compile that the numbers of patterns vary, so that a new label map does not compile anew.

    Only once it is loaded: importing it takes seconds that a data-loader worker need not spend.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or torch.compiler.is_compiling():
        return
    for t in (patterns.codes, patterns.taps, patterns.offsets, patterns.tap_order, patterns.tap_offsets):
        if t is not None:
            dynamo.maybe_mark_dynamic(t, 0)


def _raise_out_of_range(
    labels: Tensor,
    wrong: Tensor,
    edges: Tensor | None,
    wrong_edge: Tensor | None,
    num_classes: int,
    ignore_index: int | None,
) -> None:
    """Raises the ValueError for the first wrong pixel."""
    if wrong.any():
        n, y, x = wrong.nonzero()[0].tolist()
        ignore = "no ignore_index was given" if ignore_index is None else f"ignore_index is {ignore_index}"
        raise ValueError(
            f"ids[{n}, {y}, {x}] is {labels[n, y, x].item()}; labels must be in 0..{num_classes - 1} "
            f"(num_classes = {num_classes}; {ignore}); {int(wrong.sum())} pixels are out of range"
        )
    n, y, x = wrong_edge.nonzero()[0].tolist()
    raise ValueError(f"edges[{n}, {y}, {x}] is {edges[n, y, x].item()}; edges must be 0 or 1")
