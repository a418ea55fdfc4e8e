# SPDX-License-Identifier: Apache-2.0
"""Any images and label maps: folders whose files have the same names but for their suffixes."""

from __future__ import annotations

from .palettes import distinct_colors
from .reading import DataError
from .spec import Defaults, Request, Spec

DEFAULTS = Defaults(num_classes=None, use_edges=True)
MAX_CLASSES = 65536  # values of a 16-bit label map


def spec(request: Request, phase: str) -> Spec:
    """Files of "folder": the folders given, or dataroot/{phase}_img, {phase}_label and, if there, {phase}_inst.

    Raises:
        DataError: the number of classes or the folder of label maps is not given, or the number is out of range.
    """
    num_classes = request.num_classes
    if num_classes is None:
        raise DataError("dataset folder: the number of classes is not given (--num-classes); labels are 0..N-1")
    if not 1 <= num_classes <= MAX_CLASSES:
        raise DataError(f"dataset folder: num_classes must be 1..{MAX_CLASSES}, got {num_classes}")
    root = request.folder("dataroot")
    image_dir, label_dir, instance_dir = (request.folder(f"{kind}_dir") for kind in ("image", "label", "instance"))
    if root is not None:
        image_dir = image_dir or root / f"{phase}_img"
        label_dir = label_dir or root / f"{phase}_label"
        if instance_dir is None and (root / f"{phase}_inst").is_dir():
            instance_dir = root / f"{phase}_inst"
    if label_dir is None:
        raise DataError("dataset folder: no folder of label maps is given (--label-dir, or --dataroot)")
    return Spec(
        name=request.dataset,
        num_classes=num_classes,
        palette=distinct_colors(num_classes),
        class_names=None,
        classes={value: value for value in range(num_classes)},
        image_dir=image_dir,
        label_dir=label_dir,
        instance_dir=instance_dir,
    )
