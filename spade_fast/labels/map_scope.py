# SPDX-License-Identifier: Apache-2.0
"""Tensors that stand for label maps: recognized by content, and remembered by identity while a call lasts."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spade_fast.labels.label_map import LabelMap

Found = TypeVar("Found")


class _Open(threading.local):
    # (question, id(tensor)) -> (weak reference to the tensor, its version, answer). Python may give the id of a dead
    # tensor to a new one, and so an entry counts only while its weak reference is alive.
    known: dict[tuple[Callable, int], tuple[weakref.ref, int | None, Any]] | None = None


_open = _Open()


@contextlib.contextmanager
def map_scope() -> Iterator[None]:
    """Inside, each map is recognized once, however many layers ask. Of nested scopes of a thread the outermost counts.

    Examples:
        >>> with map_scope():
        ...     pass  # calls of layers with the same one-hot tensor
    """
    if _open.known is not None:
        yield
        return
    _open.known = {}
    try:
        yield
    finally:
        _open.known = None


def recognized(tensor: Tensor, find: Callable[[Tensor], Found]) -> Found:
    """find(tensor), remembered inside a scope until the tensor is written to."""
    known = _open.known
    if known is None:
        return find(tensor)
    version = None if tensor.is_inference() else tensor._version  # an inference tensor has none
    entry = known.get((find, id(tensor)))
    if entry is None or entry[0]() is not tensor or entry[1] != version:
        entry = known[find, id(tensor)] = (weakref.ref(tensor), version, find(tensor))
    return entry[2]


def as_label_map(labels: LabelMap | Tensor) -> LabelMap | Tensor:
    """The LabelMap that an exactly one-hot tensor stands for, or labels itself.

    A tensor that requires a gradient stays a tensor. So does every tensor in a traced graph, where its values are
    unknown. On a GPU this waits for the device, inside a :func:`map_scope` once for each tensor.

    Args:
        labels: LabelMap, or a map [N, L, h, w].
    """
    if not isinstance(labels, Tensor) or labels.requires_grad or labels.is_meta or torch.compiler.is_compiling():
        return labels
    if type(labels) not in (Tensor, nn.Parameter):  # a fake or distributed tensor has no values to look at
        return labels
    found = recognized(labels, LabelMap.from_segmap)
    return labels if found is None else found
