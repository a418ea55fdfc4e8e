# SPDX-License-Identifier: Apache-2.0
"""Datasets of images and label maps."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from . import ade20k, cityscapes, coco, folder
from .base import FileDataset, SegmentationDataset, Spec
from .matching import FileList
from .reading import IGNORE, DataError
from .synthetic.dataset import DEFAULTS as SYNTHETIC_DEFAULTS
from .synthetic.dataset import SyntheticDataset
from .transforms import PREPROCESS_MODES, Geometry, default_load_size, instances_to_edges

__all__ = [
    "DATASETS",
    "IGNORE",
    "PREPROCESS_MODES",
    "DataError",
    "FileDataset",
    "SegmentationDataset",
    "SyntheticDataset",
    "default_load_size",
    "default_options",
    "instances_to_edges",
    "make_dataset",
]

_DEFAULTS = {
    "coco": coco.DEFAULTS,
    "ade20k": ade20k.DEFAULTS,
    "ade20k-outdoor": ade20k.DEFAULTS,
    "cityscapes": cityscapes.DEFAULTS,
    "flickr": coco.FLICKR_DEFAULTS,
    "folder": folder.DEFAULTS,
    "synthetic": SYNTHETIC_DEFAULTS,
}
DATASETS = tuple(_DEFAULTS)
PHASES = ("train", "val")


def default_options(name: str) -> dict:
    """What a dataset takes when the caller chooses nothing.

    Keys: num_classes (None: must be given), use_edges, preprocess, crop_size, load_size, aspect_ratio, flip, and size
    (None but for synthetic: samples of a training set).
    """
    _known(name)
    options = {"aspect_ratio": 1.0, "flip": True, "size": None, **_DEFAULTS[name]}
    return {**options, "load_size": default_load_size(options["preprocess"], options["crop_size"])}


def make_dataset(
    name: str,
    phase: str = "train",
    *,
    dataroot: str | os.PathLike | None = None,
    image_dir: str | os.PathLike | None = None,
    label_dir: str | os.PathLike | None = None,
    instance_dir: str | os.PathLike | None = None,
    num_classes: int | None = None,
    ignore_value: int | None = None,
    shift_labels: bool = False,
    file_list: str | os.PathLike | None = None,
    use_edges: bool | None = None,
    crop_size: int | None = None,
    load_size: int | None = None,
    aspect_ratio: float | None = None,
    preprocess: str | None = None,
    flip: bool = True,
    seed: int = 0,
    need_images: bool = True,
    size: int | None = None,
    strict: bool = True,
) -> SegmentationDataset:
    """Open a dataset. What is None is the dataset's own default, see default_options.

    Args:
        name: one of DATASETS.
        phase: "train" (random crops and flips) or "val" (none).
        dataroot: the dataset's folder; see the module of each dataset for what lies in it.
        image_dir, label_dir, instance_dir: folders to use instead of those below dataroot.
        num_classes: for "folder"; the other datasets have theirs.
        ignore_value: stored label value whose pixels get no class (IGNORE); it may be negative.
        shift_labels: move ADE20K's labels down by one, so that 0 (unknown) becomes class 150; the default takes them
            as stored, as the authors' released weights were trained.
        file_list: a UTF-8 text file with the name of a sample a line; only those are used, and each must be there. A
            name may have its suffix, and folders before it.
        use_edges: instance edges as a further channel, where the dataset has instance maps.
        crop_size: width of the result in pixels.
        load_size: width (or short side) before the crop, by default 286/256 of it; in phase "val" resize_and_crop
            and scale_shortside_and_crop load at crop_size.
        aspect_ratio: width / height of the result.
        preprocess: one of PREPROCESS_MODES.
        flip: mirror half of the samples in phase "train".
        seed: of the augmentation, and of the synthetic scenes.
        need_images: False to use label maps alone; items then have no "image".
        size: number of synthetic samples.
        strict: False lists files without a partner in `dataset.faults` instead of raising, for the check.

    Raises:
        DataError: an option is impossible, a folder is missing or empty, or files have no partner.
    """
    _known(name)
    if phase not in PHASES:
        raise DataError(f"phase {phase!r} is unknown; expected one of {', '.join(PHASES)}")
    if seed < 0:
        raise DataError(f"seed must not be negative, got {seed}")
    defaults = default_options(name)
    expected = defaults["num_classes"]
    if expected is not None and num_classes not in (None, expected):
        raise DataError(
            f"dataset {name} has {expected} classes, got num_classes {num_classes}; for classes of your own use "
            "dataset folder"
        )
    if shift_labels and not name.startswith("ade20k"):
        raise DataError(f"shift_labels is an option of ade20k, not of {name}")
    preprocess = preprocess or defaults["preprocess"]
    crop_size = crop_size or defaults["crop_size"]
    geometry = Geometry(
        preprocess,
        crop_size,
        load_size or default_load_size(preprocess, crop_size),
        aspect_ratio or defaults["aspect_ratio"],
        flip,
        phase == "train",
    )
    edges = defaults["use_edges"] if use_edges is None else use_edges
    if name == "synthetic":
        return SyntheticDataset(phase, geometry, seed=seed, size=size, use_edges=edges, need_images=need_images)

    root = _folder(dataroot)
    given = {"image_dir": _folder(image_dir), "label_dir": _folder(label_dir), "instance_dir": _folder(instance_dir)}
    names = None if file_list is None else FileList(file_list)

    def open_phase(phase: str) -> FileDataset:
        return FileDataset(
            _spec(name, phase, root, given, num_classes, shift_labels, need_images, edges and defaults["use_edges"]),
            geometry,
            seed=seed,
            need_images=need_images,
            ignore_value=ignore_value,
            use_edges=edges or (use_edges is None and given["instance_dir"] is not None),
            keep=_chosen(name, root) if names is None else None,
            file_list=names,
            strict=False,
        )

    dataset = open_phase(phase)
    if dataset.absent:  # a list may be of both phases
        with contextlib.suppress(DataError):
            elsewhere = set(open_phase("val" if phase == "train" else "train").absent)
            dataset.absent = [fault for fault in dataset.absent if fault in elsewhere]
    if strict:
        dataset.require()
    return dataset


def _spec(
    name: str,
    phase: str,
    root: Path | None,
    given: dict[str, Path | None],
    num_classes: int | None,
    shift_labels: bool,
    need_images: bool,
    need_instances: bool,
) -> Spec:
    if name == "folder":
        return folder.spec(name, phase, root, *given.values(), num_classes)
    if root is None and given["label_dir"] is None:
        raise DataError(f"dataset {name}: its folder is not given (--dataroot)")
    if root is None and need_images and given["image_dir"] is None:
        raise DataError(f"dataset {name}: a folder of label maps but none of images is given (--image-dir)")
    if root is None and need_instances and given["instance_dir"] is None:
        raise DataError(
            f"dataset {name}: a folder of label maps but none of instance maps is given (--instance-dir); to go "
            "without, turn edges off"
        )
    if name.startswith("ade20k"):
        spec = ade20k.spec(name, phase, root, shift_labels)
    elif name == "cityscapes":
        spec = cityscapes.spec(name, phase, root)
    else:
        spec = coco.spec(name, phase, root)
    return dataclasses.replace(spec, **{key: value for key, value in given.items() if value is not None})


def _known(name: str) -> None:
    if name not in _DEFAULTS:
        raise DataError(f"dataset {name!r} is unknown; expected one of {', '.join(DATASETS)}")


def _folder(path: str | os.PathLike | None) -> Path | None:
    return None if path is None else Path(os.path.expanduser(path))


def _chosen(name: str, root: Path | None) -> Callable[[str], bool] | None:
    """Which samples to use without a file list, by the last part of their names; None for all."""
    if name != "ade20k-outdoor":
        return None
    if root is None:
        raise DataError("dataset ade20k-outdoor: needs --dataroot, for sceneCategories.txt, or --file-list")
    names = ade20k.outdoor_names(root)
    return lambda key: key.rsplit("/", 1)[-1] in names
