# SPDX-License-Identifier: Apache-2.0
"""statistics: the mean and the sum of squared deviations of each channel, of the batch or of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _register


def statistics_torch(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    acc = _register.accumulation_dtype(x.dtype)
    count = h * w if per_sample else n * h * w
    groups = n if per_sample else 1
    if count == 0 or groups * c == 0:
        zeros = torch.zeros(groups, c, dtype=acc, device=x.device)
        return zeros, zeros.clone()
    if _register.memory_format(x) == torch.contiguous_format:
        x = x.contiguous()
        if per_sample:  # Each channel of each sample is a plane of its own.
            mean, var = _mean_var(x.view(1, n * c, h, w), acc)
            return mean.view(n, c), var.view(n, c) * count
        mean, var = _mean_var(x, acc)
        return mean[None], (var * count)[None]
    if per_sample:
        pairs = [_mean_var(sample, acc) for sample in x.contiguous(memory_format=torch.channels_last).split(1)]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]) * count
    mean, var = _mean_var(x.contiguous(memory_format=torch.channels_last), acc)
    return mean[None], (var * count)[None]


def _mean_var(x: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of x [N, C, H, W]: in two passes on a CPU, by Welford's method on a GPU."""
    if x.device.type == "cpu":
        return torch.batch_norm_update_stats(x.to(acc), None, None, 0.0)
    var, mean = torch.var_mean(x.to(acc), dim=(0, 2, 3), correction=0)
    return mean, var


def _statistics_fake(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0] if per_sample else 1, x.shape[1])
    acc = _register.accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=acc), x.new_empty(shape, dtype=acc)


_statistics = _register.register(
    "statistics(Tensor x, bool per_sample) -> (Tensor, Tensor)", statistics_torch, _statistics_fake
)
_register.register_first_order_only("statistics", of="statistics")


def statistics(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """Mean and M2, the sum of squared deviations from the mean, of each channel.

    A large mean costs no digits, because M2 is not computed as E[x²] - E[x]². Not differentiable:
    ``modulation(..., stats_from_x=True)`` accounts for the dependence on x.

    Args:
        x: [N, C, H, W].
        per_sample: whether each sample has its own statistics.

    Returns:
        mean and M2 [G, C] in float32 (float64 for float64 x); G = N if per_sample, else 1. Zeros if x is empty.

    Example:
        >>> statistics(torch.tensor([[[[1.0, 3.0]]]]), per_sample=False)
        (tensor([[2.]]), tensor([[2.]]))
    """
    return _statistics(x.detach(), per_sample)
