# SPDX-License-Identifier: Apache-2.0
"""Opening a dataset of any kind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spade_fast.cli import suggest

from . import ade20k, cityscapes, coco, folder
from .base import FileDataset, SegmentationDataset
from .matching import FileList
from .reading import DataError
from .spec import DATASETS, PHASES, Defaults, Request, Spec
from .synthetic.dataset import DEFAULTS as SYNTHETIC_DEFAULTS
from .synthetic.dataset import SyntheticDataset
from .transforms import Geometry, default_load_size


@dataclass(frozen=True)
class _Kind:
    """A kind of dataset.

    Args:
        defaults: what it takes where nothing is chosen.
        spec: its files in a phase; None for a dataset without files.
        keep: which samples to use, by name, where no file list is given; None uses all.
    """

    defaults: Defaults
    spec: Callable[[Request, str], Spec] | None = None
    keep: Callable[[Request], Callable[[str], bool]] | None = None


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

    Examples:
        >>> default_options("coco")["crop_size"]
        256
    """
    options = dataclasses.asdict(_kind(name).defaults)
    return {**options, "flip": True, "load_size": default_load_size(options["preprocess"], options["crop_size"])}


def make_dataset(name: str, phase: str = "train", **options: Any) -> SegmentationDataset:
    """Open a dataset. An option that is None or not given takes the dataset's own default, see `default_options`.

    Args:
        name: one of DATASETS.
        phase: "train" (random crops and flips) or "val" (none).
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
        size: number of synthetic samples.
        need_images: False to use label maps alone; items then have no "image".
        strict: False lists files without a partner in `dataset.faults` instead of raising.

    Raises:
        DataError: an option is impossible, a folder is missing or empty, or files have no partner.
        TypeError: an option is unknown.

    Examples:
        >>> make_dataset("synthetic", "val", crop_size=64)[0]["label"].shape
        torch.Size([64, 64])
    """
    known = [field.name for field in dataclasses.fields(Request)][1:]
    for option in options:
        if option not in known:
            raise TypeError(f"make_dataset has no option {option!r}{suggest(option, known)}")
    request = Request(name, **options)
    kind = _kind(name)
    if phase not in PHASES:
        raise DataError(f"phase {phase!r} is unknown; expected one of {', '.join(PHASES)}")
    _check(request, kind.defaults)
    geometry = _geometry(request, kind.defaults, phase)
    use_edges = kind.defaults.use_edges if request.use_edges is None else request.use_edges
    if kind.spec is None:
        return SyntheticDataset(
            phase,
            geometry,
            seed=request.seed,
            size=request.size,
            use_edges=use_edges,
            need_images=request.need_images,
        )
    if name != "folder":
        _require_folders(request, use_edges and kind.defaults.use_edges)
    dataset = _open_files(request, kind, phase, geometry)
    if request.strict:
        dataset.require()
    return dataset


def _kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise DataError(f"dataset {name!r} is unknown; expected one of {', '.join(DATASETS)}")
    return _KINDS[name]


def _check(request: Request, defaults: Defaults) -> None:
    """Raises DataError for an option that is out of range or that the dataset does not take."""
    if request.seed < 0:
        raise DataError(f"seed must not be negative, got {request.seed}")
    expected = defaults.num_classes
    if expected is not None and request.num_classes not in (None, expected):
        raise DataError(
            f"dataset {request.dataset} has {expected} classes, got num_classes {request.num_classes}; for classes of "
            "your own use dataset folder"
        )
    if request.shift_labels and not request.dataset.startswith("ade20k"):
        raise DataError(f"shift_labels is an option of ade20k, not of {request.dataset}")


def _geometry(request: Request, defaults: Defaults, phase: str) -> Geometry:
    preprocess = request.preprocess or defaults.preprocess
    crop_size = request.crop_size or defaults.crop_size
    return Geometry(
        preprocess,
        crop_size,
        request.load_size or default_load_size(preprocess, crop_size),
        request.aspect_ratio or defaults.aspect_ratio,
        request.flip,
        phase == "train",
    )


def _require_folders(request: Request, need_instances: bool) -> None:
    """Raises DataError when neither dataroot nor the option of its own gives a folder that is needed."""
    if request.dataroot is not None:
        return
    name = request.dataset
    if request.label_dir is None:
        raise DataError(f"dataset {name}: its folder is not given (--dataroot)")
    if request.need_images and request.image_dir is None:
        raise DataError(f"dataset {name}: a folder of label maps but none of images is given (--image-dir)")
    if need_instances and request.instance_dir is None:
        raise DataError(
            f"dataset {name}: a folder of label maps but none of instance maps is given (--instance-dir); to go "
            "without, turn edges off"
        )


def _open_files(request: Request, kind: _Kind, phase: str, geometry: Geometry) -> FileDataset:
    """A dataset made of files; its `faults` and `absent` are not looked at yet."""
    assert kind.spec is not None
    file_list = None if request.file_list is None else FileList(request.file_list)
    # Instance maps that are given are used, also where the kind of dataset has none.
    given = request.use_edges is None and request.instance_dir is not None
    use_edges = given or (kind.defaults.use_edges if request.use_edges is None else request.use_edges)

    def open_phase(phase: str) -> FileDataset:
        assert kind.spec is not None
        return FileDataset(
            kind.spec(request, phase),
            geometry,
            seed=request.seed,
            need_images=request.need_images,
            ignore_value=request.ignore_value,
            use_edges=use_edges,
            keep=kind.keep(request) if kind.keep is not None and file_list is None else None,
            file_list=file_list,
        )

    dataset = open_phase(phase)
    if dataset.absent:  # one list may name the samples of both phases
        with contextlib.suppress(DataError):
            elsewhere = set(open_phase("val" if phase == "train" else "train").absent)
            dataset.absent = [fault for fault in dataset.absent if fault in elsewhere]
    return dataset
