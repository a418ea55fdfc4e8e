# SPDX-License-Identifier: Apache-2.0
"""Cityscapes as downloaded.

    dataroot/leftImg8bit/train/CITY/*_leftImg8bit.png
    dataroot/gtFine/train/CITY/*_gtFine_labelIds.png      0..33
    dataroot/gtFine/train/CITY/*_gtFine_instanceIds.png   16 bits: label, or label * 1000 + number

35 classes as in the authors' options: ids 0..33, and 34 for the license plate, whose id -1 the label maps do not hold.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .palettes import distinct_colors
from .spec import Defaults, Key, Request, Spec

NUM_CLASSES = 35
DEFAULTS = Defaults(NUM_CLASSES, use_edges=True, crop_size=512, preprocess="fixed", aspect_ratio=2.0)

# Names and colors of the Cityscapes label definitions, by id.
_CLASSES = [
    ("unlabeled", None), ("ego vehicle", None), ("rectification border", None), ("out of roi", None),
    ("static", None), ("dynamic", (111, 74, 0)), ("ground", (81, 0, 81)), ("road", (128, 64, 128)),
    ("sidewalk", (244, 35, 232)), ("parking", (250, 170, 160)), ("rail track", (230, 150, 140)),
    ("building", (70, 70, 70)), ("wall", (102, 102, 156)), ("fence", (190, 153, 153)), ("guard rail", (180, 165, 180)),
    ("bridge", (150, 100, 100)), ("tunnel", (150, 120, 90)), ("pole", (153, 153, 153)), ("polegroup", None),
    ("traffic light", (250, 170, 30)), ("traffic sign", (220, 220, 0)), ("vegetation", (107, 142, 35)),
    ("terrain", (152, 251, 152)), ("sky", (70, 130, 180)), ("person", (220, 20, 60)), ("rider", (255, 0, 0)),
    ("car", (0, 0, 142)), ("truck", (0, 0, 70)), ("bus", (0, 60, 100)), ("caravan", (0, 0, 90)),
    ("trailer", (0, 0, 110)), ("train", (0, 80, 100)), ("motorcycle", (0, 0, 230)), ("bicycle", (119, 11, 32)),
    ("license plate", None),
]  # fmt: skip
CLASS_NAMES = [name for name, _ in _CLASSES]


def palette() -> np.ndarray:
    """uint8 [35, 3]; classes that are black or alike in Cityscapes get a color of their own."""
    colors = distinct_colors(len(_CLASSES)) // 4  # dark, and unlike any color above
    for number, (_, color) in enumerate(_CLASSES):
        if color is not None:
            colors[number] = color
    return colors


def _without(ending: str) -> Key:
    """A key: the name without its ending, which files of the kind have."""
    return lambda stem: stem[: -len(ending)] if stem.endswith(ending) else None


def spec(request: Request, phase: str) -> Spec:
    """Files of "cityscapes"."""
    root = request.folder("dataroot") or Path()
    return Spec(
        name=request.dataset,
        num_classes=NUM_CLASSES,
        palette=palette(),
        class_names=list(CLASS_NAMES),
        classes={value: value for value in range(34)},
        image_dir=request.folder("image_dir") or root / "leftImg8bit" / phase,
        label_dir=request.folder("label_dir") or root / "gtFine" / phase,
        instance_dir=request.folder("instance_dir") or root / "gtFine" / phase,
        image_key=_without("_leftImg8bit"),
        label_key=_without("_gtFine_labelIds"),
        instance_key=_without("_gtFine_instanceIds"),
    )
