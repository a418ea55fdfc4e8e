# SPDX-License-Identifier: Apache-2.0
"""The normalization of a SPADE layer: statistics of x, running statistics, and the modulation that applies them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spade_fast.labels.pattern_tables import PatternTables
from spade_fast.layers.spectral import hold_power_iteration
from spade_fast.ops.modulation import modulation
from spade_fast.ops.statistics import statistics
from spade_fast.ops.sync_modulation import Group, combine_statistics, sync_modulation


@dataclasses.dataclass(frozen=True)
class Normalization:
    """How x is normalized: (x - mean) * rstd. Without mean and rstd, x stays as it is."""

    mean: Tensor | None = None  # [G, C], with G = 1 for the batch or N for each sample
    rstd: Tensor | None = None  # [G, C], 1 / sqrt(variance + eps)
    stats_from_x: bool = False  # the gradient goes through mean and rstd, which were computed from this x
    count: Tensor | None = None  # [1] values a channel over all processes of `group`
    group: Group | None = None  # the processes that share the statistics; None: this process alone


def normalizations(
    x: Tensor, norms: Sequence[nn.Module], upsample: int = 1, group: Group | None = None
) -> list[Normalization]:
    """How each norm normalizes x, as its own forward would; updates running statistics.

    Enlarging x by nearest neighbor changes neither mean nor biased variance, only the count behind the unbiased one.

    Args:
        x: [N, C, h, w].
        norms: norms of one kind without affine parameters, see :func:`spade_fast.layers.as_built.changed_norm`.
        upsample: the factor by which x is enlarged afterwards.
        group: the processes over which a batch norm in training mode takes its statistics.

    Returns:
        One entry that holds for all norms. Where running statistics normalize x, an entry for each norm.

    Raises:
        ValueError: a single value has no variance.
    """
    norm = norms[0]
    if isinstance(norm, nn.Identity):
        return [Normalization()]
    n, _, h, w = x.shape
    if isinstance(norm, nn.InstanceNorm2d):
        if h * w * upsample**2 == 1:
            raise ValueError(f"instance norm needs more than 1 spatial element, got x of shape {list(x.shape)}")
        mean, m2 = statistics(x, True)
        return [Normalization(mean, torch.rsqrt(m2 / max(h * w, 1) + norm.eps), stats_from_x=True)]
    batch_norms = [one for one in norms if isinstance(one, _BatchNorm)]
    norm = batch_norms[0]
    if not norm.training and norm.running_mean is not None:
        return [_running(one, x) for one in batch_norms]
    count = n * h * w
    if group is None and count * upsample**2 == 1:
        raise ValueError(f"batch norm needs more than 1 value per channel when training, got x of {list(x.shape)}")
    mean, m2 = statistics(x, False)
    if group is None:
        variance = m2 / max(count, 1)
        unbiased = variance * (count * upsample**2 / max(count * upsample**2 - 1, 1)) if count else None
        total = None
    else:
        mean, m2, total = combine_statistics(mean, m2, count, group)
        variance = m2 / total.clamp(min=1)
        unbiased = variance * (total * upsample**2 / (total * upsample**2 - 1).clamp(min=1))
    for one in batch_norms:
        _update_running(one, mean[0], None if unbiased is None else unbiased[0])
    return [Normalization(mean, torch.rsqrt(variance + norm.eps), True, total, group)]


def _running(norm: _BatchNorm, x: Tensor) -> Normalization:
    """By running statistics, which are each norm's own."""
    assert norm.running_mean is not None and norm.running_var is not None
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, variance = norm.running_mean[None].to(dtype), norm.running_var[None].to(dtype)
    return Normalization(mean, torch.rsqrt(variance + norm.eps))


@torch.no_grad()
def _update_running(norm: _BatchNorm, mean: Tensor, unbiased: Tensor | None) -> None:
    """As BatchNorm2d does. mean [C] and unbiased variance [C] of this batch; None: the batch is empty."""
    if not norm.training or norm.running_mean is None:
        return
    assert norm.running_var is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    if unbiased is None:
        return
    momentum: float | Tensor | None = norm.momentum
    if momentum is None:  # cumulative average
        momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        if running.dtype == new.dtype:
            running.lerp_(new, momentum)
        else:
            running.copy_(torch.lerp(running.to(new.dtype), new, momentum))


def modulated(
    x: Tensor,
    normalization: Normalization,
    params: list[Tensor],
    patterns: PatternTables | None,
    slopes: list[float],
    upsample: int = 1,
) -> list[Tensor]:
    """Normalizes, modulates and activates x (Park et al., CVPR 2019, equation 1).

    Args:
        x: [N, C, h, w].
        normalization: how x is normalized.
        params: [gamma | beta] of each output: [P, 2·C] by pattern, or [N, 2·C, h·upsample, w·upsample] by pixel.
        patterns: the tables that say which pattern a pixel has; None: params are by pixel.
        slopes: of each output, the negative slope of its LeakyReLU; 1 for none.
        upsample: 1, or 2 to enlarge x twice by nearest neighbor.

    Returns:
        For each entry of params, [N, C, h·upsample, w·upsample].
    """
    mean, rstd, count, group = normalization.mean, normalization.rstd, normalization.count, normalization.group
    index: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if patterns is not None:
        index = (patterns.pattern_of_pixel, patterns.pixels_by_pattern, patterns.pattern_offsets)
    if group is None:
        return modulation(x, mean, rstd, params, *index, slopes, upsample, normalization.stats_from_x)
    assert mean is not None and rstd is not None and count is not None
    return sync_modulation(x, mean, rstd, params, *index, slopes, upsample, count, group)


class recomputing(contextlib.AbstractContextManager):
    """Inside, a module's forward in training mode repeats its last one and leaves no trace.

    The module's buffers are copies, and so running statistics are not updated twice. Spectral norm's vectors stay.
    It can be entered again, because a second derivative computes a forward more than once.

    Args:
        module: the module whose forward is repeated.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(hold_power_iteration())
            for part in self._module.modules():
                for name, buffer in part._buffers.items():
                    if buffer is not None:
                        stack.callback(part._buffers.__setitem__, name, buffer)
                        part._buffers[name] = buffer.clone()
            self._entered.append(stack.pop_all())

    def __exit__(self, *raised: object) -> None:
        self._entered.pop().close()
