# SPDX-License-Identifier: Apache-2.0
"""What fuse() did with each layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

HEADINGS = ("layer", "class", "", "how, or why not", "eval", "train", "gradients", "ms before", "ms fused")


@dataclasses.dataclass
class FusedLayer:
    """One layer of the report.

    A difference is the largest over all comparisons, computed in the parameters' dtype. It is relative to the largest
    value of the output, or of all gradients. Milliseconds are those of a forward in evaluation mode on this device,
    once the patterns of the map are known.
    """

    name: str
    cls: str
    fused: bool
    how: str  # how it is evaluated, or why it was left
    eval_difference: float = math.nan
    train_difference: float = math.nan
    gradient_difference: float = math.nan
    old_ms: float = math.nan
    new_ms: float = math.nan


@dataclasses.dataclass
class FuseReport:
    """The layers that look like SPADE, in the order of the model's modules. It prints as a table."""

    layers: list[FusedLayer]

    @property
    def fused(self) -> list[FusedLayer]:
        """The layers that run fused."""
        return [layer for layer in self.layers if layer.fused]

    @property
    def left(self) -> list[FusedLayer]:
        """The layers that run as before."""
        return [layer for layer in self.layers if not layer.fused]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[FusedLayer]:
        return iter(self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "no layer looks like SPADE"
        rows = [HEADINGS, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self.fused)} of {len(self.layers)} fused"])


def _row(layer: FusedLayer) -> tuple[str, ...]:
    numbers = (layer.eval_difference, layer.train_difference, layer.gradient_difference)
    times = (layer.old_ms, layer.new_ms)
    return (
        layer.name or "(the model)",
        layer.cls,
        "fused" if layer.fused else "left",
        layer.how,
        *("" if math.isnan(v) else f"{v:.1e}" for v in numbers),
        *("" if math.isnan(v) else f"{v:.2f}" for v in times),
    )
