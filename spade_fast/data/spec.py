# SPDX-License-Identifier: Apache-2.0
"""What a dataset is asked for, what each kind takes where nothing is chosen, and where its files lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DATASETS = ("coco", "ade20k", "ade20k-outdoor", "cityscapes", "flickr", "folder", "synthetic")
PHASES = ("train", "val")


@dataclass(frozen=True)
class Request:
    """The arguments of `make_dataset`, which explains each. None stands for the default of the dataset."""

    dataset: str
    dataroot: str | os.PathLike[str] | None = None
    image_dir: str | os.PathLike[str] | None = None
    label_dir: str | os.PathLike[str] | None = None
    instance_dir: str | os.PathLike[str] | None = None
    file_list: str | os.PathLike[str] | None = None
    num_classes: int | None = None
    ignore_value: int | None = None
    shift_labels: bool = False
    use_edges: bool | None = None
    crop_size: int | None = None
    load_size: int | None = None
    aspect_ratio: float | None = None
    preprocess: str | None = None
    flip: bool = True
    seed: int = 0
    size: int | None = None
    need_images: bool = True
    strict: bool = True

    def folder(self, name: str) -> Path | None:
        """The directory that an argument names, with ~ expanded; None where it is not given."""
        given = getattr(self, name)
        return None if given is None else Path(os.path.expanduser(given))


@dataclass(frozen=True)
class Defaults:
    """What one kind of dataset takes where nothing is chosen.

    Args:
        num_classes: number of classes, the unknown class included; None where the caller must give it.
        use_edges: whether instance edges are a further channel.
        crop_size: width of the result in pixels.
        preprocess: one of `PREPROCESS_MODES`.
        aspect_ratio: width / height of the result.
        size: number of samples of a training set; None where the files decide.
    """

    num_classes: int | None
    use_edges: bool
    crop_size: int = 256
    preprocess: str = "resize_and_crop"
    aspect_ratio: float = 1.0
    size: int | None = None


Key = Callable[[str], str | None]


def _same(stem: str) -> str | None:
    return stem


@dataclass(frozen=True)
class Spec:
    """A dataset made of files.

    A key function turns a relative path without suffix into the name that an image, its label map and its instance map
    have in common. It gives None for a file of another kind.

    Args:
        name: as given to `make_dataset`.
        num_classes: number of classes, the unknown class included.
        palette: uint8 [num_classes, 3], the color of each class.
        class_names: the name of each class, or None.
        classes: class of each stored value; a value that is not in it is an error.
        image_dir: directory of the images; None where none is given.
        label_dir: directory of the label maps.
        instance_dir: directory of the instance maps; None for a dataset without them.
        image_key: key of an image.
        label_key: key of a label map.
        instance_key: key of an instance map.
    """

    name: str
    num_classes: int
    palette: np.ndarray
    class_names: list[str] | None
    classes: dict[int, int]
    image_dir: Path | None
    label_dir: Path
    instance_dir: Path | None
    image_key: Key = field(default=_same)
    label_key: Key = field(default=_same)
    instance_key: Key = field(default=_same)
