# SPDX-License-Identifier: Apache-2.0
"""The LabelMap of a batch that a data loader collated."""

from __future__ import annotations

from typing import Any

import torch

from spade_fast.data.reading import IGNORE
from spade_fast.labels.label_map import LabelMap


def batch_labels(batch: dict[str, Any], num_classes: int, device: torch.device) -> LabelMap:
    """The conditioning of a collated batch. Label values are not checked: the dataset has done so.

    Args:
        batch: ``label`` [N, H, W], and ``edges`` [N, H, W] where the dataset has instances.
        num_classes: number of classes.
        device: where the LabelMap is to be.
    """
    edges = batch["edges"].to(device, non_blocking=True) if "edges" in batch else None
    label = batch["label"].to(device, non_blocking=True)
    return LabelMap(label, num_classes, edges=edges, ignore_index=IGNORE, validate=False)
