# SPDX-License-Identifier: Apache-2.0
"""What every dataset offers, and the dataset made of files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .matching import FileList, difference, keyed, none_found, other_kind
from .reading import (
    IGNORE,
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    DataError,
    read_image,
    read_instances,
    read_labels,
    read_palette,
    size_hint,
)
from .transforms import Geometry, instances_to_edges

_INVALID = -2  # in the table from stored values to classes: no class has this value


class SegmentationDataset(Dataset):
    """Items are dicts: "label" int64 [H, W] (0..num_classes-1 or IGNORE), "edges" bool [H, W] if has_edges, "image"
    float32 [3, H, W] in [-1, 1] where there are images, "path" str.

    Random augmentation is drawn from (seed, epoch, index) alone: neither workers nor a resumed run change it.

    Attributes:
        num_classes: classes, the unknown class included.
        has_edges: whether items carry instance edges.
        class_names: a name a class, or None.
        palette: uint8 [num_classes, 3], a color a class.
        geometry: resize, crop and flip.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        has_edges: bool,
        palette: np.ndarray,
        class_names: list[str] | None,
        geometry: Geometry,
        seed: int,
    ) -> None:
        self.name = name
        self.num_classes = num_classes
        self.has_edges = has_edges
        self.palette = palette
        self.class_names = class_names
        self.geometry = geometry
        self.seed = seed
        # In shared memory, so that workers kept alive between epochs see a change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def label_nc(self) -> int:
        """Channels of the conditioning: the classes, and one for edges."""
        return self.num_classes + int(self.has_edges)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every item, or None where it follows the image."""
        return self.geometry.output_size

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops and flips are drawn; call before iterating, also with persistent workers."""
        self._epoch.fill_(epoch)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.epoch, index))

    def _index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside of {self.name}, which has {len(self)} samples")
        return index % len(self)


@dataclass(frozen=True, slots=True)
class Sample:
    """The files of one sample; None for what is not needed, or (in `incomplete` alone) missing."""

    label: str | None
    image: str | None
    instance: str | None


@dataclass(frozen=True)
class Spec:
    """A dataset made of files.

    Args:
        name: as given to make_dataset.
        num_classes: classes, the unknown class included.
        palette: uint8 [num_classes, 3].
        class_names: a name a class, or None.
        classes: stored value -> class; a value not in it is an error.
        image_dir, label_dir, instance_dir: where the files are; instance_dir None for a dataset without instances.
        key: relative path without suffix -> what an image, its label map and its instance map have in common, or None
            for a file of another kind.
    """

    name: str
    num_classes: int
    palette: np.ndarray
    class_names: list[str] | None
    classes: dict[int, int]
    image_dir: Path | None
    label_dir: Path
    instance_dir: Path | None
    image_key: Callable[[str], str | None] = field(default=lambda stem: stem)
    label_key: Callable[[str], str | None] = field(default=lambda stem: stem)
    instance_key: Callable[[str], str | None] = field(default=lambda stem: stem)


def _ranges(values: Iterable[int]) -> str:
    """[0, 1, 2, 255] -> "0..2, 255"."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


@dataclass(frozen=True)
class Inspection:
    """What one sample's files hold: faults; pixels of each class, int64 [num_classes], or None if unreadable; and, for
    a label map with a palette, the color of each stored value that occurs."""

    faults: list[str]
    counts: np.ndarray | None
    path: str | None = None
    colors: dict[int, tuple[int, int, int]] = field(default_factory=dict)


class FileDataset(SegmentationDataset):
    """Images, label maps and instance maps in folders, matched by name.

    Args:
        spec: what and where.
        geometry: resize, crop and flip.
        seed: of the augmentation.
        need_images: False for synthesis from label maps alone; images are then not looked for.
        ignore_value: stored label value to become IGNORE.
        use_edges: instance edges, if the dataset has instance maps.
        keep: names (keys) of the samples to use; None uses all.
        file_list: names the samples to use instead; each of its names must be one.
        strict: raise at once for files without a partner; otherwise they are only listed in `faults`, and names of the
            list that no sample has in `absent`.

    Raises:
        DataError: a folder is missing or empty, or files have no partner (named).
    """

    def __init__(
        self,
        spec: Spec,
        geometry: Geometry,
        *,
        seed: int = 0,
        need_images: bool = True,
        ignore_value: int | None = None,
        use_edges: bool = True,
        keep: Callable[[str], bool] | None = None,
        file_list: FileList | None = None,
        strict: bool = True,
    ) -> None:
        has_edges = use_edges and spec.instance_dir is not None
        super().__init__(spec.name, spec.num_classes, has_edges, spec.palette, spec.class_names, geometry, seed)
        self.need_images = need_images
        self.classes = dict(spec.classes)
        if ignore_value is not None:
            self.classes.pop(ignore_value, None)
        self.ignore_value = ignore_value
        if not self.classes:
            raise DataError(f"{spec.name}: the ignore value {ignore_value} leaves no label value with a class")
        self._table = np.full(max(self.classes) + 3, _INVALID, dtype=np.int32)  # first and last row: values beyond
        for value, number in self.classes.items():
            self._table[value + 1] = number
        self.absent: list[str] = []
        self.samples, self.incomplete, self.faults = self._match(spec, keep, file_list)
        self._spec, self._chosen = spec, keep is not None or file_list is not None
        if strict:
            self.require()

    def require(self) -> None:
        """Raises DataError, which names them, when files have no partner, listed samples are not there, or there are
        none at all."""
        name, faults = self._spec.name, self.absent + self.faults
        if not self.samples and (self._chosen or not faults):
            held = "" if self._chosen else none_found(self._others, "label map")
            which = "none of the samples chosen by the file list or by scene" if self._chosen else "no label maps"
            raise DataError(
                f"{self._spec.label_dir}: {which} in this folder{held}, for dataset {name}{_listed(faults)}"
            )
        if faults:
            what = "samples of the list are not there" if len(self.absent) == len(faults) else "files cannot be matched"
            raise DataError(f"{name}: {len(faults)} {what}{_listed(faults)}")

    def _match(
        self, spec: Spec, keep: Callable[[str], bool] | None, file_list: FileList | None
    ) -> tuple[list[Sample], list[Sample], list[str]]:
        kinds = [("label map", spec.label_dir, LABEL_SUFFIXES, spec.label_key)]
        if self.need_images:
            if spec.image_dir is None:
                raise DataError(f"{spec.name}: no image folder is given (--image-dir or --dataroot)")
            kinds.append(("image", spec.image_dir, IMAGE_SUFFIXES, spec.image_key))
        if self.has_edges:
            kinds.append(("instance map", spec.instance_dir, LABEL_SUFFIXES, spec.instance_key))
        faults: list[str] = []
        found: dict[str, dict[str, str]] = {}
        others: dict[str, dict[str, str]] = {}
        for kind, folder, suffixes, key in kinds:
            if not folder.is_dir():
                hint = "; to go without, turn edges off" if kind == "instance map" else ""
                what = "this is no folder; it" if folder.exists() else "no such folder, which"
                raise DataError(f"{folder}: {what} should hold the {kind}s of {spec.name}{hint}")
            found[kind], doubles, others[kind] = keyed(folder, suffixes, key)
            faults += doubles
        self._others = others["label map"]
        if file_list is not None:
            every = {name for files in found.values() for name in files}
            chosen, self.absent = file_list.choose(every, [key for _, _, _, key in kinds])
            keep = chosen.__contains__
        if keep is not None:
            found = {kind: {n: path for n, path in files.items() if keep(n)} for kind, files in found.items()}
        labels = found["label map"]
        samples, incomplete = [], []
        hints = {}
        for kind, _, _, _ in kinds[1:]:
            alone = found[kind].keys() - labels.keys(), labels.keys() - found[kind].keys()
            hints[kind] = difference(*alone, kind, "label map")
        for name in sorted(set().union(*found.values())):
            lacks = [kind for kind, _, _, _ in kinds if name not in found[kind]]
            # A label map is told all that it lacks, another file only that it has no label map.
            have = "label map" if name in labels else None
            for kind in lacks:
                for has in [have] if have else [k for k, _, _, _ in kinds if name in found[k] and kind == "label map"]:
                    hint = hints.get(has if kind == "label map" else kind, "")
                    if name in others[kind]:
                        hint = other_kind(others[kind][name], kind)
                    faults.append(
                        f"{found[has][name]}: this {has} has no {kind} named {name} in {_folder(kinds, kind)}{hint}"
                    )
            files = (found.get(kind, {}).get(name) for kind in ("label map", "image", "instance map"))
            (incomplete if lacks else samples).append(Sample(*files))
        return samples, incomplete, faults

    def __len__(self) -> int:
        return len(self.samples)

    def classify(self, values: np.ndarray, path: str) -> np.ndarray:
        """Stored label values int [H, W] -> classes int32 [H, W].

        Raises:
            DataError: a value has no class; names the file, the values, and the number of classes.
        """
        classes = self._table[np.clip(values, -1, len(self._table) - 2) + 1]
        if self.ignore_value is not None:
            classes[values == self.ignore_value] = IGNORE
        wrong = classes == _INVALID
        if wrong.any():
            raise DataError(self._out_of_range(values, wrong, path))
        return classes

    def _out_of_range(self, values: np.ndarray, wrong: np.ndarray, path: str) -> str:
        bad, counts = np.unique(values[wrong], return_counts=True)
        listed = ", ".join(f"{v} ({n} pixels)" for v, n in zip(bad[:8], counts[:8], strict=True))
        listed += f" and {len(bad) - 8} more values" if len(bad) > 8 else ""
        message = (
            f"{path}: label value {listed} is out of range: {self.name} has {self.num_classes} classes, expected "
            f"values {_ranges(self.classes.keys() | {self.ignore_value} - {None})}"
        )
        if bad.tolist() == [255]:
            if set(np.unique(values).tolist()) <= {0, 255}:
                message += (
                    ". It looks like a 0/255 mask: store 0 and 1 with --num-classes 2, or, if 255 means unlabeled, "
                    "pass --ignore-value 255"
                )
            else:
                message += ". If 255 marks unlabeled pixels, pass --ignore-value 255"
        elif bad.tolist() == [-1]:
            message += ". If -1 marks unlabeled pixels, pass --ignore-value -1"
        elif bad.tolist() == [self.num_classes] and int(values.min()) >= 1:
            message += ". The values seem to start at 1: store them from 0, or raise --num-classes by one"
        return message

    def __getitem__(self, index: int) -> dict:
        index = self._index(index)
        sample = self.samples[index]
        labels = self.classify(read_labels(sample.label), sample.label)
        height, width = labels.shape
        place = self.geometry.place(width, height, self._rng(index), sample.label)
        item = {"label": torch.from_numpy(place.indices(labels).astype(np.int64)), "path": sample.label}
        if self.need_images:
            image = read_image(sample.image)
            _same_size(sample.image, "image", image.size, sample.label, (width, height))
            item["image"] = place.image(image)
        if self.has_edges:
            ids = read_instances(sample.instance)
            _same_size(sample.instance, "instance map", ids.shape[::-1], sample.label, (width, height))
            # Edges are found at the final size, as in the authors' code: resizing thin edges would break them.
            item["edges"] = torch.from_numpy(instances_to_edges(place.indices(ids)))
        return item

    def inspect(self, index: int) -> Inspection:
        """Every fault in a sample's files, and what its label map holds."""
        sample = (self.samples + self.incomplete)[index] if self.incomplete else self.samples[index]
        faults: list[str] = []
        counts = size = None
        colors = {}

        def attempt(action: Callable, *arguments):
            try:
                return action(*arguments)
            except DataError as error:
                faults.append(str(error))
                return None

        values = None if sample.label is None else attempt(read_labels, sample.label)
        if values is not None:
            size = values.shape[::-1]
            classes = attempt(self.classify, values, sample.label)
            if classes is not None:
                counts = np.bincount(classes[classes >= 0], minlength=self.num_classes)
                palette = read_palette(sample.label)
                if palette is not None:
                    used = np.unique(values[classes >= 0]).tolist()
                    colors = {value: tuple(palette[value].tolist()) for value in used if 0 <= value < len(palette)}
            attempt(self.geometry.place, *size, np.random.default_rng(0), sample.label)
        if sample.image is not None:
            image = attempt(read_image, sample.image)
            if image is not None and size is not None:
                attempt(_same_size, sample.image, "image", image.size, sample.label, size)
        if sample.instance is not None:
            ids = attempt(read_instances, sample.instance)
            if ids is not None and size is not None:
                attempt(_same_size, sample.instance, "instance map", ids.shape[::-1], sample.label, size)
        return Inspection(faults, counts, sample.label, colors)


def _folder(kinds: list[tuple], kind: str) -> Path:
    return next(folder for name, folder, _, _ in kinds if name == kind)


def _listed(faults: list[str]) -> str:
    more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
    return ":\n  " + "\n  ".join(faults[:8]) + more if faults else ""


def _same_size(path: str, kind: str, size: tuple[int, int], label: str, expected: tuple[int, int]) -> None:
    if tuple(size) != tuple(expected):
        hint = size_hint(path) if kind == "image" else ""
        raise DataError(
            f"{path}: the {kind} is {size[0]}×{size[1]} pixels (width×height), but its label map {label} is "
            f"{expected[0]}×{expected[1]}; expected the same size{hint}"
        )
