# SPDX-License-Identifier: Apache-2.0
"""Any images and label maps: folders whose files have the same names but for their suffixes."""

from __future__ import annotations

from pathlib import Path

from .base import Spec
from .palettes import distinct_colors
from .reading import DataError

DEFAULTS = {"num_classes": None, "use_edges": True, "preprocess": "resize_and_crop", "crop_size": 256}


def spec(
    name: str,
    phase: str,
    root: Path | None,
    image_dir: Path | None,
    label_dir: Path | None,
    instance_dir: Path | None,
    num_classes: int | None,
) -> Spec:
    """Files of "folder": the folders given, or dataroot/{phase}_img, {phase}_label and, if there, {phase}_inst."""
    if num_classes is None:
        raise DataError("dataset folder: the number of classes is not given (--num-classes); labels are 0..N-1")
    if not 1 <= num_classes <= 65536:
        raise DataError(f"dataset folder: num_classes must be 1..65536, got {num_classes}")
    if root is not None:
        image_dir = image_dir or root / f"{phase}_img"
        label_dir = label_dir or root / f"{phase}_label"
        if instance_dir is None and (root / f"{phase}_inst").is_dir():
            instance_dir = root / f"{phase}_inst"
    if label_dir is None:
        raise DataError("dataset folder: no folder of label maps is given (--label-dir, or --dataroot)")
    return Spec(
        name=name,
        num_classes=num_classes,
        palette=distinct_colors(num_classes),
        class_names=None,
        classes={value: value for value in range(num_classes)},
        image_dir=image_dir,
        label_dir=label_dir,
        instance_dir=instance_dir,
    )
