# SPDX-License-Identifier: Apache-2.0
"""Batch statistics over several processes, and a modulation whose backward accounts for them.

The forward has one collective, of every process's mean, M2 and count. The backward has one, of two sums a channel.
Both are functional collectives: compiled graphs contain them, and the host does not wait for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spade_fast.ops import _register
from spade_fast.ops.modulation import check_arguments, modulation_fake, modulation_op
from spade_fast.ops.modulation_backward import modulation_backward_op
from spade_fast.ops.normalization_gradient import normalization_gradient

# The name of a process group, as torch.ops._c10d_functional takes it, and the group's size.
Group = tuple[str, int]


def combine_statistics(mean: Tensor, m2: Tensor, count: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the values of all processes together, with one all-gather.

    Args:
        mean: [1, C], from ``statistics(x, False)`` of this process.
        m2: [1, C], likewise.
        count: number of values of a channel on this process. It may be 0, and differ between processes.
        group: the processes.

    Returns:
        mean [1, C], M2 [1, C] and the number of values of a channel [1], the same on every process.
    """
    name, size = group
    packed = torch.cat([mean[0], m2[0], mean.new_full((1,), float(count))])
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(packed, size, name)
    return merge_statistics(torch.ops._c10d_functional.wait_tensor(gathered).view(size, -1))


def merge_statistics(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of several sets of values together, as in Chan et al. 1979.

    n = Σ n_i, mean = Σ n_i mean_i / n and M2 = Σ M2_i + n_i (mean_i - mean)².

    Args:
        parts: [R, 2C + 1], a row (mean_i, M2_i, n_i) a set.

    Returns:
        mean [1, C], M2 [1, C] and n [1].

    Example:
        >>> mean, m2, n = merge_statistics(torch.tensor([[1.0, 0.0, 1.0], [4.0, 0.0, 2.0]]))  # {1} and {4, 4}
        >>> mean.item(), m2.item(), n.item()
        (3.0, 6.0, 3.0)
    """
    c = parts.shape[1] // 2
    means, m2s, counts = parts[:, :c], parts[:, c:-1], parts[:, -1:]
    total = counts.sum(0)
    # The weights are computed first: n_i · mean_i would round more where n_i is large.
    mean = (counts / total.clamp(min=1) * means).sum(0, keepdim=True)
    m2 = (m2s + counts * (means - mean).square()).sum(0, keepdim=True)
    return mean, m2, total


def _sync_modulation(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    params: list[Tensor],
    pattern_ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int,
    count: Tensor,
    group: str,
) -> list[Tensor]:
    return modulation_op(x, mean, rstd, params, pattern_ids, order, offsets, slopes, upsample, False)


def _sync_modulation_fake(x: Tensor, mean: Tensor, rstd: Tensor, params: list[Tensor], *rest: Any) -> list[Tensor]:
    pattern_ids, order, offsets, slopes, upsample, _, _ = rest
    return modulation_fake(x, mean, rstd, params, pattern_ids, order, offsets, slopes, upsample, False)


_sync = _register.register_composed(
    "sync_modulation(Tensor x, Tensor mean, Tensor rstd, Tensor[] params, Tensor? pattern_ids, Tensor? order,"
    " Tensor? offsets, float[] slopes, int upsample, Tensor count, str group) -> Tensor[]",
    _sync_modulation,
    _sync_modulation_fake,
)


def _setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, mean, rstd, params, pattern_ids, order, offsets, ctx.slopes, ctx.upsample, count, ctx.group = inputs
    ctx.save_for_backward(x, mean, rstd, pattern_ids, order, offsets, count, *params)
    ctx.shape = output[0].shape


def _backward(ctx: Any, douts: list[Tensor | None]) -> tuple:
    x, mean, rstd, pattern_ids, order, offsets, count, *params = ctx.saved_tensors
    whole = [x.new_zeros(ctx.shape) if dout is None else dout for dout in douts]
    dx, *dparams = modulation_backward_op(
        whole, x, mean, rstd, params, pattern_ids, order, offsets, ctx.slopes, ctx.upsample, False
    )
    if pattern_ids is not None and params[0].dtype == mean.dtype:
        sums = _sums_over_patterns(params, dparams)
    else:  # Sums over parameters would cost more where they are by pixel, and lose digits in half precision.
        sums = _sums_over_pixels(dx, x, mean, rstd)
    sums = torch.ops._c10d_functional.all_reduce(sums, "sum", ctx.group)
    s1, s2 = torch.ops._c10d_functional.wait_tensor(sums)
    scale = -rstd[0] * rstd[0] * s2 / count
    shift = -rstd[0] * s1 / count - mean[0] * scale
    normalization_gradient(dx, x, scale, shift)
    return dx, None, None, dparams, None, None, None, None, None, None, None


def _sums_over_patterns(params: list[Tensor], dparams: list[Tensor]) -> Tensor:
    """s1 = Σ dxhat and s2 = Σ dxhat·xhat [2, C] over this process's pixels, as sums over patterns."""
    c = params[0].shape[1] // 2
    total = params[0].new_zeros(2, c)
    for p, d in zip(params, dparams, strict=True):
        weighted = d.reshape(-1, 2, c) * (p[:, None, :c] + 1)
        total = total + weighted.sum(0).flip(0)
    return total


def _sums_over_pixels(dx: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The same from dx = rstd·dxhat: s1 = Σ dx / rstd and s2 = Σ dx (x - mean)."""
    gradient = dx.to(mean.dtype)
    centered = x.to(mean.dtype) - mean.view(1, -1, 1, 1)
    return torch.stack([gradient.sum((0, 2, 3)) / rstd[0], (gradient * centered).sum((0, 2, 3))])


_register.register_gradient("sync_modulation", _backward, _setup)


def sync_modulation(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    params: list[Tensor],
    pattern_ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int,
    count: Tensor,
    group: Group,
) -> list[Tensor]:
    """`modulation` with statistics of the x of several processes. dx takes into account that they depend on x.

    The gradient is that of the sum of all processes' losses. The backward calls that of modulation with constant
    statistics, sums s1 = Σ dxhat and s2 = Σ dxhat·xhat over the processes, and adds -rstd (s1 + xhat·s2) / count to dx.
    Compared with a single process's backward, it reads x and dx once more and writes dx once more.

    Args:
        x: [N, C, H, W].
        mean: [1, C], from `combine_statistics`.
        rstd: [1, C].
        params: as in `modulation`, like pattern_ids, order, offsets, slopes and upsample.
        pattern_ids: see params.
        order: see params.
        offsets: see params.
        slopes: see params.
        upsample: see params.
        count: [1], the number of values of a channel on all processes.
        group: the processes.

    Returns:
        As `modulation`.

    Raises:
        ValueError: an argument has a wrong shape; the message names it.
    """
    check_arguments(x, params, pattern_ids, slopes, upsample)
    return _sync(x, mean, rstd, params, pattern_ids, order, offsets, slopes, upsample, count, group[0])
