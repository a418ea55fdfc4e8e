# SPDX-License-Identifier: Apache-2.0
"""Datasets of images and label maps."""

from __future__ import annotations

from .base import FileDataset, SegmentationDataset
from .opening import default_options, make_dataset
from .reading import IGNORE, DataError
from .spec import DATASETS, PHASES
from .synthetic.dataset import SyntheticDataset
from .transforms import PREPROCESS_MODES, Geometry, default_load_size, instances_to_edges

__all__ = [
    "DATASETS",
    "IGNORE",
    "PHASES",
    "PREPROCESS_MODES",
    "DataError",
    "FileDataset",
    "Geometry",
    "SegmentationDataset",
    "SyntheticDataset",
    "default_load_size",
    "default_options",
    "instances_to_edges",
    "make_dataset",
]
