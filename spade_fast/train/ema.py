# SPDX-License-Identifier: Apache-2.0
"""Moving average of the generator's weights, which samples and synthesis use (Karras et al., ICLR 2018)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast.labels.label_map import LabelMap
from spade_fast.layers.spectral import SpectralConv2d, hold_power_iteration


class EMA:
    """A copy of a network whose weights follow it by w += (1 - decay)(source's w - w).

    Early on the decay is (1 + step) / (10 + step) where that is less. The average of a short run would be of its
    initial weights otherwise.

    Args:
        source: the network that is trained.
        decay: in [0, 1).

    Attributes:
        net: the copy, in evaluation mode. Its buffers mean nothing until `recalibrate`.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.source, self.decay = source, decay
        self.net = copy.deepcopy(source).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follows the source after its update number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([*self.net.parameters()], [*self.source.parameters()], 1 - decay)

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[tuple[LabelMap, Tensor | None]]) -> None:
        """Gives the averaged weights the buffers that belong to them.

        These are spectral norm's vectors, and batch norm's running statistics: their mean over the batches. The result
        depends on both networks' weights, on source's vectors and on the batches alone, not on earlier calls.

        Args:
            batches: labels and noise z [N, z_dim] or None. With synchronized norms every process calls this method
                with its share of each batch.
        """
        # FusedSPADE's and torch's norms: they have running_mean, momentum and reset_running_stats in common.
        norms: list[Any] = [m for m in self.net.modules() if getattr(m, "running_mean", None) is not None]
        for mine, theirs in zip(self.net.modules(), self.source.modules(), strict=True):
            if isinstance(mine, SpectralConv2d) and isinstance(theirs, SpectralConv2d):
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
