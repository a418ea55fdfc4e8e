# SPDX-License-Identifier: Apache-2.0
"""The floor: gamma and beta looked up by class (what CLADE costs; another function than SPADE's)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spade_fast import FusedSPADE, LabelMap, ops
from spade_fast.patterns import Patterns


class ClassLabels(LabelMap):
    """Labels whose "pattern" at a pixel is its code alone, so that nothing has to be found."""

    def patterns(self, h: int, w: int, kernel_size: int = 3, backward: bool = False) -> Patterns:
        codes = self.resized(h, w)
        number = (self.num_classes + 1) * (2 if self.has_edges else 1)
        found = Patterns(codes, codes.new_empty(number, 1), codes, codes.new_empty(number, 1), (1,), (1,))
        if backward:
            found.order, found.offsets = ops.segments(codes, number)
        return found


class ClassTableSPADE(FusedSPADE):
    """A FusedSPADE whose parameters are a table [codes, 2·norm_nc] instead of two convolutions."""

    def __init__(self, like: FusedSPADE) -> None:
        super().__init__(like.norm_nc, like.label_nc, like.norm, like.kernel_size)
        del self.mlp_shared, self.mlp_gamma, self.mlp_beta
        self.table = nn.Parameter(0.1 * torch.randn(2 * like.label_nc, 2 * like.norm_nc))

    def pattern_params(self, patterns: Patterns, edges: bool) -> Tensor:
        return self.table


def replace_spade(net: nn.Module) -> nn.Module:
    """Every FusedSPADE of a network by its class table, in place. It takes :class:`ClassLabels`."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is FusedSPADE:
                setattr(module, name, ClassTableSPADE(child))
    return net
