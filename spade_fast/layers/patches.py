# SPDX-License-Identifier: Apache-2.0
"""The hidden layer of a SPADE layer, evaluated once per distinct label patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.labels.pattern_tables import PatternTables
from spade_fast.ops.embedding_sum import embedding_sum

DENSE_ABOVE = 0.9  # distinct patterns per pixel; above this, one convolution over the pixels costs less


def few_repeats(patterns: PatternTables) -> bool:
    """Whether a map repeats so few patterns that gamma and beta by pixel cost less than by pattern.

    False in a traced graph, which must not depend on how many patterns this map has.
    """
    return not torch.compiler.is_compiling() and patterns.density > DENSE_ABOVE


def weight_table(weight: Tensor) -> Tensor:
    """A convolution's weight [out, L, k, k] as a table [k·k, L, out] that label codes index."""
    out, channels, kh, kw = weight.shape
    return weight.permute(2, 3, 1, 0).reshape(kh * kw, channels, out)


def hidden_of_patches(table: Tensor, bias: Tensor | None, codes: Tensor, edges: bool, slope: float = 0.0) -> Tensor:
    """The hidden layer at label patches.

    Args:
        table: :func:`weight_table` of the first convolution, [k·k, L, hidden].
        bias: [hidden] or None.
        codes: label codes of the patches, [Q, k·k] int32.
        edges: whether codes hold edges, see :class:`spade_fast.LabelMap`.
        slope: negative slope of the activation; 0 is ReLU, 1 is none.

    Returns:
        [Q, hidden].
    """
    hidden = embedding_sum(table, bias, codes, edges, relu=slope == 0.0)
    return hidden if slope in (0.0, 1.0) else F.leaky_relu(hidden, slope)


def by_pixel(rows: Tensor, patterns: PatternTables) -> Tensor:
    """Rows [N·h·w, C], one for each pixel, as a map [N, C, h, w]."""
    return rows.view(*patterns.patch_of_pixel.shape, -1).permute(0, 3, 1, 2)
