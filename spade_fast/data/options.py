# SPDX-License-Identifier: Apache-2.0
"""The options of a dataset: what training, its check and its sample pictures read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spade_fast.cli import flag, option

from . import DATASETS, PREPROCESS_MODES, FileDataset, SegmentationDataset, make_dataset
from .reading import DataError

_data = functools.partial(option, "Data")
_held_out = functools.partial(option, "Held-out data, for sample pictures; training never sees it")
_images = functools.partial(option, "Size and augmentation")


@dataclass
class DataOptions:
    """Which samples there are, and how they are read. None takes the dataset's own default."""

    dataset: str = _data("synthetic", "kind of dataset", DATASETS)
    dataroot: str | None = _data(None, "root directory of the dataset")
    image_dir: str | None = _data(None, "directory of images, instead of the one below dataroot")
    label_dir: str | None = _data(None, "directory of label maps, instead of the one below dataroot")
    instance_dir: str | None = _data(None, "directory of instance maps, instead of the one below dataroot")
    file_list: str | None = _data(None, "text file naming the samples to use, one a line")
    num_classes: int | None = _data(None, "number of label classes (dataset folder)")
    ignore_value: int | None = _data(None, "label value that contributes nothing")
    shift_labels: bool = _data(False, "ADE20K: label v becomes class v - 1 and 0 class 150; the default is as stored")
    use_edges: bool | None = _data(None, "add the instance-edge channel where there are instance maps")
    synthetic_size: int | None = _data(None, "samples in an epoch of the synthetic dataset")
    workers: int = _data(2, "data-loading processes; 0 loads in the training process")
    seed: int = _data(0, "seed of weights, order, augmentation and noise")

    val_image_dir: str | None = _held_out(None, "directory of held-out images")
    val_label_dir: str | None = _held_out(None, "directory of held-out label maps")
    val_instance_dir: str | None = _held_out(None, "directory of held-out instance maps")
    val_split: float | None = _held_out(None, "share of the training samples to hold out, chosen by name and seed")

    crop_size: int | None = _images(None, "width of the synthesized image in pixels")
    load_size: int | None = _images(None, "size images are resized to before the crop")
    aspect_ratio: float | None = _images(None, "width / height of the synthesized image")
    preprocess: str | None = _images(None, "how images are resized and cropped", PREPROCESS_MODES)
    flip: bool = _images(True, "mirror half of the training samples")


_OF_MAKE_DATASET = (
    *("dataroot", "image_dir", "label_dir", "instance_dir", "num_classes", "ignore_value", "shift_labels"),
    *("file_list", "use_edges", "crop_size", "load_size", "aspect_ratio", "preprocess", "flip", "seed"),
)


def has_held_out(options: DataOptions) -> bool:
    """Whether the options name held-out data of their own."""
    return options.val_label_dir is not None or options.val_split is not None


def phases_are_one(options: DataOptions) -> bool:
    """Whether "train" and "val" would read the same files: a folder without held-out directories."""
    return options.dataset == "folder" and options.dataroot is None and options.val_label_dir is None


def open_dataset(options: DataOptions, phase: str, **changes: Any) -> SegmentationDataset:
    """The dataset of the options.

    Args:
        options: which samples.
        phase: "train", or "val" for held-out samples: those of the val directories or of `val_split` where the
            options name them, else the dataset's own.
        changes: arguments of `make_dataset` that differ from the options.

    Raises:
        DataError: see `make_dataset`.
    """
    given: dict[str, Any] = {name: getattr(options, name) for name in _OF_MAKE_DATASET}
    given["size"] = options.synthetic_size if phase == "train" else None
    if options.val_split is not None:
        dataset = make_dataset(options.dataset, "train", **{**given, **changes})
        assert isinstance(dataset, FileDataset)  # resolve_config refuses val_split for the synthetic dataset
        _split(dataset, options.val_split, options.seed, phase)
        return dataset
    if phase == "val" and options.val_label_dir is not None:
        given |= {"image_dir": options.val_image_dir, "label_dir": options.val_label_dir}
        given |= {"instance_dir": options.val_instance_dir, "file_list": None}
    return make_dataset(options.dataset, phase, **{**given, **changes})


def _split(dataset: FileDataset, fraction: float, seed: int, phase: str) -> None:
    """Leaves the samples of one phase. Their order by (seed, file name) decides, not their order in the folder."""
    if len(dataset) < 2:
        raise DataError(f"--val-split {fraction:g}: a sample is held out and one is left, but there is only one")

    def place(path: str | None) -> float:
        name = os.fsencode(Path(path or "").stem)
        return int.from_bytes(hashlib.sha256(b"%d/%s" % (seed, name)).digest()[:8], "big") / 2**64

    places = [place(sample.label) for sample in dataset.samples]
    count = min(max(round(fraction * len(places)), 1), len(places) - 1)  # neither part is empty
    held = set(sorted(range(len(places)), key=places.__getitem__)[:count])
    dataset.samples = [s for i, s in enumerate(dataset.samples) if (i in held) == (phase == "val")]
    if phase == "val":
        dataset.geometry = dataclasses.replace(dataset.geometry, train=False)


def check_command(options: DataOptions) -> str:
    """The command that lists every fault of the data.

    Examples:
        >>> check_command(DataOptions(dataset="folder", label_dir="my labels", num_classes=3))
        "python -m spade_fast.data check --dataset folder --label-dir 'my labels' --num-classes 3"
    """
    words = ["python", "-m", "spade_fast.data", "check", "--dataset", options.dataset]
    for field in dataclasses.fields(DataOptions):
        value = getattr(options, field.name)
        if field.metadata["group"] == "Size and augmentation" or field.name in ("dataset", "workers", "seed"):
            continue
        if value != field.default:
            no = f"--no-{field.name.replace('_', '-')}"
            words += [flag(field.name) if value else no] if isinstance(value, bool) else [flag(field.name), str(value)]
    return shlex.join(words)


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """Options that an earlier version wrote, in today's names: its raw_labels is the opposite of shift_labels."""
    values = dict(values)
    raw = values.get("raw_labels")
    if not isinstance(raw, bool):
        return values
    del values["raw_labels"]
    # The other datasets' configurations carried it too, where it meant nothing.
    if str(values.get("dataset") or values.get("preset")).startswith("ade20k"):
        values.setdefault("shift_labels", not raw)
    return values
