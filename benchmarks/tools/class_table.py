# SPDX-License-Identifier: Apache-2.0
"""The floor: gamma and beta are looked up by class, as in CLADE (Tan et al., 2021); another function than SPADE's."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from spade_fast import FusedSPADE, LabelMap
from spade_fast.labels.pattern_tables import Patterns
from spade_fast.ops.segments import segments


class ClassLabels(LabelMap):
    """Labels whose "pattern" at a pixel is its code alone. Nothing has to be found."""

    def patterns(
        self, h: int, w: int, kernel_size: int = 3, backward: bool = False, padding: str = "zeros"
    ) -> Patterns:
        codes = self.resized(h, w)
        number = (self.num_classes + 1) * (2 if self.has_edges else 1)
        found = Patterns(codes, codes.new_empty(number, 1), codes, codes.new_empty(number, 1), (1,), (1,))
        if backward:
            found.order, found.offsets = segments(codes, number)
        return found


def replace_spade(net: nn.Module) -> nn.Module:
    """Every FusedSPADE in net, or net itself, takes gamma and beta from a table [codes, 2·norm_nc], in place.

    The layers then take :class:`ClassLabels`.
    """
    for layer in net.modules():
        if type(layer) is FusedSPADE:
            layer.table = nn.Parameter(0.1 * torch.randn(2 * layer.label_nc, 2 * layer.norm_nc))
            setattr(layer, "pattern_params", functools.partial(_look_up, layer.table))  # noqa: B010
    return net


def _look_up(table: Tensor, patterns: Patterns, edges: bool) -> Tensor:
    """In the place of :meth:`FusedSPADE.pattern_params`."""
    return table
