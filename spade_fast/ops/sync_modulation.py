# SPDX-License-Identifier: Apache-2.0
"""Batch statistics over several processes: statistics combined exactly, and a modulation whose backward is, too.

One collective forward (every process's mean, M2 and count) and one backward (two sums a channel). Both are functional
collectives, so compiled graphs contain them; nothing waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _register
from spade_fast.ops.modulation import check_arguments, modulation_fake, modulation_op
from spade_fast.ops.modulation_backward import modulation_backward_op
from spade_fast.ops.normalization_gradient import normalization_gradient

Group = tuple[str, int]  # name of a process group, as torch.ops._c10d_functional takes it, and its size


def combine_statistics(mean: Tensor, m2: Tensor, count: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and M2 [1, C] of the union of every process's values, and their number (a tensor [1]), the same everywhere.

    mean, m2: `statistics(x, False)` of this process; count: how many values a channel that is, which may differ from
    process to process and be 0. They travel together, in one all-gather.
    """
    name, size = group
    packed = torch.cat([mean[0], m2[0], mean.new_full((1,), float(count))])
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(packed, size, name)
    return merge_statistics(torch.ops._c10d_functional.wait_tensor(gathered).view(size, -1))


def merge_statistics(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [1, C], M2 [1, C], n [1]) of the union of parts [R, 2C + 1], each (mean_i, M2_i, n_i).

    After Chan et al. 1979: n = Σ n_i, mean = Σ n_i mean_i / n, M2 = Σ M2_i + n_i (mean_i - mean)², in order.
    """
    c = parts.shape[1] // 2
    means, m2s, counts = parts[:, :c], parts[:, c:-1], parts[:, -1:]
    total = counts.sum(0)
    # Weights first: n_i · mean_i of a large count would round more.
    mean = (counts / total.clamp(min=1) * means).sum(0, keepdim=True)
    m2 = (m2s + counts * (means - mean).square()).sum(0, keepdim=True)
    return mean, m2, total


def _sync_modulation(x, mean, rstd, params, ids, order, offsets, slopes, upsample, count, group):
    return modulation_op(x, mean, rstd, params, ids, order, offsets, slopes, upsample, False)


def _sync_modulation_fake(x, mean, rstd, params, ids, order, offsets, slopes, upsample, count, group):
    return modulation_fake(x, mean, rstd, params, ids, order, offsets, slopes, upsample, False)


_sync = _register.register_composed(
    "sync_modulation(Tensor x, Tensor mean, Tensor rstd, Tensor[] params, Tensor? ids, Tensor? order, Tensor? offsets,"
    " float[] slopes, int upsample, Tensor count, str group) -> Tensor[]",
    _sync_modulation,
    _sync_modulation_fake,
)


def _setup(ctx, inputs, output) -> None:
    x, mean, rstd, params, ids, order, offsets, ctx.slopes, ctx.upsample, count, ctx.group = inputs
    ctx.save_for_backward(x, mean, rstd, ids, order, offsets, count, *params)
    ctx.shape = output[0].shape


def _backward(ctx, douts: list[Tensor | None]) -> tuple:
    x, mean, rstd, ids, order, offsets, count, *params = ctx.saved_tensors
    douts = [x.new_zeros(ctx.shape) if d is None else d for d in douts]
    dx, *dparams = modulation_backward_op(
        douts, x, mean, rstd, params, ids, order, offsets, ctx.slopes, ctx.upsample, False
    )
    if ids is not None and params[0].dtype == mean.dtype:
        sums = _sums_over_patterns(params, dparams)
    else:  # parameters by pixel, or rounded to half precision: their sums would cost more, or lose digits
        sums = _sums_over_pixels(dx, x, mean, rstd)
    sums = torch.ops._c10d_functional.all_reduce(sums, "sum", ctx.group)
    s1, s2 = torch.ops._c10d_functional.wait_tensor(sums)
    scale = -rstd[0] * rstd[0] * s2 / count
    shift = -rstd[0] * s1 / count - mean[0] * scale
    normalization_gradient(dx, x, scale, shift)
    return dx, None, None, dparams, None, None, None, None, None, None, None


def _sums_over_patterns(params: list[Tensor], dparams: list[Tensor]) -> Tensor:
    """[2, C]: s1 = Σ dxhat, s2 = Σ dxhat·xhat over this process's pixels, as sums over patterns."""
    c = params[0].shape[1] // 2
    total = params[0].new_zeros(2, c)
    for p, d in zip(params, dparams, strict=True):
        weighted = d.reshape(-1, 2, c) * (p[:, None, :c] + 1)
        total = total + weighted.sum(0).flip(0)
    return total


def _sums_over_pixels(dx: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The same from dx = rstd·dxhat: s1 = Σ dx / rstd, s2 = Σ dx (x - mean)."""
    g = dx.to(mean.dtype)
    centered = x.to(mean.dtype) - mean.view(1, -1, 1, 1)
    return torch.stack([g.sum((0, 2, 3)) / rstd[0], (g * centered).sum((0, 2, 3))])


_register.register_gradient("sync_modulation", _backward, _setup)


def sync_modulation(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    params: list[Tensor],
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int,
    count: Tensor,
    group: Group,
) -> list[Tensor]:
    """`modulation(..., stats=True)` with mean and rstd [1, C] of the x of every process in group: `count` [1] values.

    The gradient is that of the sum of every process's loss. Backward calls modulation's backward with constant
    statistics, sums s1 = Σ dxhat and s2 = Σ dxhat·xhat over the processes, and adds -rstd (s1 + xhat·s2) / count to dx:
    beyond a single process's backward, one read of x and one read and write of dx, the same for every backend.
    """
    check_arguments(x, params, ids, slopes, upsample)
    return _sync(x, mean, rstd, params, ids, order, offsets, slopes, upsample, count, group[0])
