# SPDX-License-Identifier: Apache-2.0
"""The options of a dataset, and what each kind of dataset takes where nothing is chosen."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .transforms import PREPROCESS_MODES

DATASETS = ("coco", "ade20k", "ade20k-outdoor", "cityscapes", "flickr", "folder", "synthetic")
PHASES = ("train", "val")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field whose metadata holds the help text and the allowed values of its command-line option."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class DataOptions:
    """Which data to read and how to prepare it. None stands for the default of the dataset, see `default_options`.

    The metadata of each field holds the help text and the choices of its command-line option.
    """

    dataset: str = option("synthetic", "kind of dataset", DATASETS)
    dataroot: str | None = option(None, "root directory of the dataset")
    image_dir: str | None = option(None, "directory of images, instead of the one below dataroot")
    label_dir: str | None = option(None, "directory of label maps, instead of the one below dataroot")
    instance_dir: str | None = option(None, "directory of instance maps, instead of the one below dataroot")
    file_list: str | None = option(None, "text file naming the samples to use, one a line")
    num_classes: int | None = option(None, "number of label classes (dataset folder)")
    ignore_value: int | None = option(None, "label value that contributes nothing")
    shift_labels: bool = option(False, "ADE20K: label v becomes class v - 1 and 0 class 150; the default is as stored")
    use_edges: bool | None = option(None, "add the instance-edge channel where there are instance maps")
    crop_size: int | None = option(None, "width of the synthesized image in pixels")
    load_size: int | None = option(None, "size images are resized to before the crop")
    aspect_ratio: float | None = option(None, "width / height of the synthesized image")
    preprocess: str | None = option(None, "how images are resized and cropped", PREPROCESS_MODES)
    flip: bool = option(True, "mirror half of the training samples")
    synthetic_size: int | None = option(None, "samples in an epoch of the synthetic dataset")
    seed: int = option(0, "seed of the augmentation and of the synthetic scenes")

    def folder(self, name: str) -> Path | None:
        """The directory that an option names, with ~ expanded; None where it is not given."""
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
