# SPDX-License-Identifier: Apache-2.0
"""The floor: gamma and beta looked up by class (what CLADE costs; another function than SPADE's)."""

from __future__ import annotations

import torch
from torch import nn

from spade_fast import FusedSPADE, LabelMap
from spade_fast.labels.pattern_tables import Patterns
from spade_fast.ops.segments import segments


class ClassLabels(LabelMap):
    """Labels whose "pattern" at a pixel is its code alone, so that nothing has to be found."""

    def patterns(self, h: int, w: int, kernel_size: int = 3, backward: bool = False) -> Patterns:
        codes = self.resized(h, w)
        number = (self.num_classes + 1) * (2 if self.has_edges else 1)
        found = Patterns(codes, codes.new_empty(number, 1), codes, codes.new_empty(number, 1), (1,), (1,))
        if backward:
            found.order, found.offsets = segments(codes, number)
        return found


def replace_spade(net: nn.Module) -> nn.Module:
    """Every FusedSPADE of a network takes its parameters from a class table [codes, 2·norm_nc] instead of from two
    convolutions, in place. It takes :class:`ClassLabels`."""
    for layer in net.modules():
        if type(layer) is FusedSPADE:
            layer.table = nn.Parameter(0.1 * torch.randn(2 * layer.label_nc, 2 * layer.norm_nc))
            layer.pattern_params = lambda patterns, edges, layer=layer: layer.table
    return net
