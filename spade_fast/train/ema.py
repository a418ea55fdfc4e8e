# SPDX-License-Identifier: Apache-2.0
"""Moving average of the generator's weights: what samples and synthesis use (Karras et al., ICLR 2018)."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spade_fast.labels.label_map import LabelMap
from spade_fast.layers.spectral import SpectralConv2d, hold_power_iteration


class EMA:
    """`net`: a copy of `source` in evaluation mode whose weights follow by w += (1 - decay)(source's w - w).

    Early on the decay is (1 + step) / (10 + step), where that is less, so that a short run's average is of its own
    weights and not of the initial ones. Its buffers mean nothing until `recalibrate`.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.source, self.decay = source, decay
        self.net = copy.deepcopy(source).eval().requires_grad_(False)
        self._pairs = list(self.net.parameters()), list(source.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the source's update number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._pairs, 1 - decay)

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[tuple[LabelMap, Tensor | None]]) -> None:
        """Gives the averaged weights the buffers that belong to them: spectral norm's vectors, and batch norm's running
        statistics as the mean over the batches, (labels, z) each.

        A function of both networks' weights, source's vectors and the batches alone: it does not matter when, or how
        often, it was called before. With synchronized norms every process calls it, with its part of each batch.
        """
        norms = [m for m in self.net.modules() if getattr(m, "running_mean", None) is not None]
        for mine, theirs in zip(self.net.modules(), self.source.modules(), strict=True):
            if isinstance(mine, SpectralConv2d):
                mine.weight_u.copy_(theirs.weight_u)
                mine.weight_v.copy_(theirs.weight_v)
                mine.settle()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative
        self.net.train()
        with hold_power_iteration():
            for labels, z in batches if norms else ():
                self.net(labels, z)
        self.net.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
