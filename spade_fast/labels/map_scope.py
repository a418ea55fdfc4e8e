# SPDX-License-Identifier: Apache-2.0
"""One answer a map and model call: which tensors stand for label maps, remembered by identity while a call lasts."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor

Found = TypeVar("Found")


class _Open(threading.local):
    # (question, id(tensor)) -> (weak reference to the tensor, version, answer): ids of dead tensors are given again
    known: dict | None = None


_open = _Open()


@contextlib.contextmanager
def map_scope() -> Iterator[None]:
    """Inside, :func:`recognized` asks once about each tensor. Of nested scopes of a thread, the outermost counts."""
    if _open.known is not None:
        yield
        return
    _open.known = {}
    try:
        yield
    finally:
        _open.known = None


def recognized(tensor: Tensor, find: Callable[[Tensor], Found]) -> Found:
    """find(tensor), asked anew outside a scope, after the tensor was written to, and for another tensor."""
    known = _open.known
    if known is None:
        return find(tensor)
    version = None if tensor.is_inference() else tensor._version  # an inference tensor has none
    entry = known.get((find, id(tensor)))
    if entry is None or entry[0]() is not tensor or entry[1] != version:
        entry = known[find, id(tensor)] = (weakref.ref(tensor), version, find(tensor))
    return entry[2]
