# SPDX-License-Identifier: Apache-2.0
"""Opening a dataset of any kind from its options."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import ade20k, cityscapes, coco, folder
from .base import FileDataset, SegmentationDataset
from .matching import FileList
from .options import DATASETS, PHASES, DataOptions, Defaults
from .reading import DataError
from .spec import Spec
from .synthetic.dataset import DEFAULTS as SYNTHETIC_DEFAULTS
from .synthetic.dataset import SyntheticDataset
from .transforms import Geometry, default_load_size

_PATHS = ("dataroot", "image_dir", "label_dir", "instance_dir", "file_list")


@dataclass(frozen=True)
class _Kind:
    """A kind of dataset.

    Args:
        defaults: what it takes where nothing is chosen.
        spec: its files in a phase; None for a dataset without files.
        keep: which samples to use, by name, where no file list is given; None uses all.
    """

    defaults: Defaults
    spec: Callable[[DataOptions, str], Spec] | None = None
    keep: Callable[[DataOptions], Callable[[str], bool]] | None = None


_KINDS = {
    "coco": _Kind(coco.DEFAULTS, coco.spec),
    "ade20k": _Kind(ade20k.DEFAULTS, ade20k.spec),
    "ade20k-outdoor": _Kind(ade20k.DEFAULTS, ade20k.spec, ade20k.keep_outdoor),
    "cityscapes": _Kind(cityscapes.DEFAULTS, cityscapes.spec),
    "flickr": _Kind(coco.FLICKR_DEFAULTS, coco.spec),
    "folder": _Kind(folder.DEFAULTS, folder.spec),
    "synthetic": _Kind(SYNTHETIC_DEFAULTS),
}


def default_options(name: str) -> dict[str, Any]:
    """What a dataset takes where the caller chooses nothing.

    Args:
        name: one of DATASETS.

    Returns:
        A dict with the keys num_classes (None: must be given), use_edges, preprocess, crop_size, load_size,
        aspect_ratio, flip, and size (samples of a training set; None but for "synthetic").

    Raises:
        DataError: the dataset is unknown.

    >>> default_options("coco")["crop_size"]
    256
    """
    options = dataclasses.asdict(_kind(name).defaults)
    return {**options, "flip": True, "load_size": default_load_size(options["preprocess"], options["crop_size"])}


def make_dataset(
    name: str,
    phase: str = "train",
    *,
    size: int | None = None,
    need_images: bool = True,
    strict: bool = True,
    **options: Any,
) -> SegmentationDataset:
    """Open a dataset. An option that is None or not given is the dataset's own default, see `default_options`.

    Args:
        name: one of DATASETS.
        phase: "train" (random crops and flips) or "val" (none).
        size: number of synthetic samples.
        need_images: False to use label maps alone; items then have no "image".
        strict: False lists files without a partner in `dataset.faults` instead of raising.
        dataroot: the dataset's folder; the module of each dataset says what lies in it.
        image_dir, label_dir, instance_dir: folders to use instead of those below dataroot.
        num_classes: for "folder"; the other datasets have theirs.
        ignore_value: stored label value whose pixels get no class (IGNORE); it may be negative.
        shift_labels: move ADE20K's labels down by one: 0 (unknown) becomes class 150. The default takes them as stored,
            as the authors' released weights were trained.
        file_list: a UTF-8 text file with the name of one sample on each line; only those are used, and each must be
            there. A name may have its suffix, and folders before it.
        use_edges: instance edges as a further channel, where the dataset has instance maps.
        crop_size: width of the result in pixels.
        load_size: width (or short side) before the crop, by default 286/256 of it; in phase "val" resize_and_crop
            and scale_shortside_and_crop load at crop_size.
        aspect_ratio: width / height of the result.
        preprocess: one of PREPROCESS_MODES.
        flip: mirror half of the samples in phase "train".
        seed: of the augmentation, and of the synthetic scenes.

    Raises:
        DataError: an option is impossible, a folder is missing or empty, or files have no partner.
        TypeError: an option is unknown.
    """
    for path in _PATHS:
        if options.get(path) is not None:
            options[path] = os.fspath(options[path])
    chosen = DataOptions(dataset=name, synthetic_size=size, **options)
    return open_dataset(chosen, phase, need_images=need_images, strict=strict)


def open_dataset(
    options: DataOptions, phase: str, *, need_images: bool = True, strict: bool = True
) -> SegmentationDataset:
    """Open the dataset that the options describe.

    Args:
        options: what to open; `make_dataset` explains each. synthetic_size counts in both phases.
        phase: "train" (random crops and flips) or "val" (none).
        need_images: False to use label maps alone; items then have no "image".
        strict: False lists files without a partner in `dataset.faults` instead of raising.

    Raises:
        DataError: an option is impossible, a folder is missing or empty, or files have no partner.
    """
    kind = _kind(options.dataset)
    if phase not in PHASES:
        raise DataError(f"phase {phase!r} is unknown; expected one of {', '.join(PHASES)}")
    _check(options, kind.defaults)
    geometry = _geometry(options, kind.defaults, phase)
    use_edges = kind.defaults.use_edges if options.use_edges is None else options.use_edges
    if kind.spec is None:
        return SyntheticDataset(
            phase,
            geometry,
            seed=options.seed,
            size=options.synthetic_size,
            use_edges=use_edges,
            need_images=need_images,
        )
    if options.dataset != "folder":
        _require_folders(options, need_images, use_edges and kind.defaults.use_edges)
    dataset = _open_files(options, kind, phase, geometry, need_images)
    if strict:
        dataset.require()
    return dataset


def _kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise DataError(f"dataset {name!r} is unknown; expected one of {', '.join(DATASETS)}")
    return _KINDS[name]


def _check(options: DataOptions, defaults: Defaults) -> None:
    """Raises DataError for an option that is out of range or that the dataset does not take."""
    if options.seed < 0:
        raise DataError(f"seed must not be negative, got {options.seed}")
    expected = defaults.num_classes
    if expected is not None and options.num_classes not in (None, expected):
        raise DataError(
            f"dataset {options.dataset} has {expected} classes, got num_classes {options.num_classes}; for classes of "
            "your own use dataset folder"
        )
    if options.shift_labels and not options.dataset.startswith("ade20k"):
        raise DataError(f"shift_labels is an option of ade20k, not of {options.dataset}")


def _geometry(options: DataOptions, defaults: Defaults, phase: str) -> Geometry:
    preprocess = options.preprocess or defaults.preprocess
    crop_size = options.crop_size or defaults.crop_size
    return Geometry(
        preprocess,
        crop_size,
        options.load_size or default_load_size(preprocess, crop_size),
        options.aspect_ratio or defaults.aspect_ratio,
        options.flip,
        phase == "train",
    )


def _require_folders(options: DataOptions, need_images: bool, need_instances: bool) -> None:
    """Raises DataError when neither dataroot nor the option of its own gives a folder that is needed."""
    if options.dataroot is not None:
        return
    name = options.dataset
    if options.label_dir is None:
        raise DataError(f"dataset {name}: its folder is not given (--dataroot)")
    if need_images and options.image_dir is None:
        raise DataError(f"dataset {name}: a folder of label maps but none of images is given (--image-dir)")
    if need_instances and options.instance_dir is None:
        raise DataError(
            f"dataset {name}: a folder of label maps but none of instance maps is given (--instance-dir); to go "
            "without, turn edges off"
        )


def _open_files(options: DataOptions, kind: _Kind, phase: str, geometry: Geometry, need_images: bool) -> FileDataset:
    """A dataset made of files; its `faults` and `absent` are not looked at yet."""
    assert kind.spec is not None
    file_list = None if options.file_list is None else FileList(options.file_list)
    # Instance maps that are given are used, also where the kind of dataset has none.
    given = options.use_edges is None and options.instance_dir is not None
    use_edges = given or (kind.defaults.use_edges if options.use_edges is None else options.use_edges)

    def open_phase(phase: str) -> FileDataset:
        assert kind.spec is not None
        return FileDataset(
            kind.spec(options, phase),
            geometry,
            seed=options.seed,
            need_images=need_images,
            ignore_value=options.ignore_value,
            use_edges=use_edges,
            keep=kind.keep(options) if kind.keep is not None and file_list is None else None,
            file_list=file_list,
        )

    dataset = open_phase(phase)
    if dataset.absent:  # one list may name the samples of both phases
        with contextlib.suppress(DataError):
            elsewhere = set(open_phase("val" if phase == "train" else "train").absent)
            dataset.absent = [fault for fault in dataset.absent if fault in elsewhere]
    return dataset
