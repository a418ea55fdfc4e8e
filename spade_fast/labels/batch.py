# SPDX-License-Identifier: Apache-2.0
"""The LabelMap of a batch that a data loader collated."""

from __future__ import annotations

from typing import Any

import torch

from spade_fast.data.reading import IGNORE
from spade_fast.labels.label_map import LabelMap


def batch_labels(batch: dict[str, Any], num_classes: int, device: torch.device) -> LabelMap:
    """The conditioning of a collated batch; the dataset has checked the label values."""
    edges = batch["edges"].to(device, non_blocking=True) if "edges" in batch else None
    label = batch["label"].to(device, non_blocking=True)
    return LabelMap(label, num_classes, edges=edges, ignore_index=IGNORE, validate=False)
