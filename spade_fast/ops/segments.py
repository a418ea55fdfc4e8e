# SPDX-License-Identifier: Apache-2.0
"""segments: the positions of each number, in compressed sparse rows."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _register


def segments_torch(keys: Tensor, num: int) -> tuple[Tensor, Tensor]:
    if keys.numel() >= 2**31:
        raise RuntimeError(f"spade_fast::segments: at most 2**31 - 1 positions, got {keys.numel()}")
    values, order = torch.sort(keys.reshape(-1), stable=True)
    limits = torch.arange(num + 1, dtype=values.dtype, device=keys.device)
    return order.to(torch.int32), torch.searchsorted(values, limits, out_int32=True)


def _segments_fake(keys: Tensor, num: int) -> tuple[Tensor, Tensor]:
    return keys.new_empty((keys.numel(),), dtype=torch.int32), keys.new_empty((num + 1,), dtype=torch.int32)


_segments = _register.register("segments(Tensor keys, SymInt num) -> (Tensor, Tensor)", segments_torch, _segments_fake)


def segments(keys: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Finds the positions of every number below num. The host does not wait for the device.

    Args:
        keys: integers below num, of any shape, at most 2**31 - 1 of them. Negative ones belong to no segment.
        num: number of segments.

    Returns:
        order [numel] int32, which sorts the flattened keys stably, and offsets [num + 1] int32. The number s is at the
        positions ``order[offsets[s]:offsets[s + 1]]``.

    Raises:
        RuntimeError: there are 2**31 keys or more.

    Example:
        >>> segments(torch.tensor([1, 0, 1], dtype=torch.int32), 2)
        (tensor([1, 0, 2], dtype=torch.int32), tensor([0, 1, 3], dtype=torch.int32))
    """
    return _segments(keys, num)
