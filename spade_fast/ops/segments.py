# SPDX-License-Identifier: Apache-2.0
"""segments: where each number occurs (CSR)."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _register


def segments_torch(ids: Tensor, num: int) -> tuple[Tensor, Tensor]:
    if ids.numel() >= 2**31:
        raise RuntimeError(f"spade_fast::segments: at most 2**31 - 1 positions, got {ids.numel()}")
    values, order = torch.sort(ids.reshape(-1), stable=True)
    limits = torch.arange(num + 1, dtype=values.dtype, device=ids.device)
    return order.to(torch.int32), torch.searchsorted(values, limits, out_int32=True)


def _segments_fake(ids: Tensor, num: int) -> tuple[Tensor, Tensor]:
    return ids.new_empty((ids.numel(),), dtype=torch.int32), ids.new_empty((num + 1,), dtype=torch.int32)


_segments = _register.register("segments(Tensor ids, SymInt num) -> (Tensor, Tensor)", segments_torch, _segments_fake)


def segments(ids: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Positions of every number: order [numel] int32 sorts the flattened ids (stable; negatives first), and number s
    is at order[offsets[s]:offsets[s + 1]], offsets [num + 1] int32. ids: integers below num. No host
    synchronization."""
    return _segments(ids, num)
