# SPDX-License-Identifier: Apache-2.0
"""What every dataset offers, and the dataset made of files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from .classes import ClassTable
from .matching import FileList, none_found
from .reading import DataError, read_image, read_instances, read_labels, read_palette, size_hint
from .samples import Sample, match
from .spec import Spec
from .transforms import Geometry, instances_to_edges

_T = TypeVar("_T")


@dataclass(frozen=True)
class Inspection:
    """What the files of one sample hold.

    Attributes:
        faults: a message for each fault.
        counts: pixels of each class, int64 [num_classes]; None if the label map is unreadable.
        path: of the label map.
        colors: for a label map with a palette, the (red, green, blue) of each stored value that occurs.
    """

    faults: list[str]
    counts: np.ndarray | None
    path: str | None = None
    colors: dict[int, tuple[int, int, int]] = field(default_factory=dict)


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Images and label maps. Each item is a dict:

    - "label": int64 [H, W], 0..num_classes-1 or IGNORE;
    - "edges": bool [H, W], if has_edges;
    - "image": float32 [3, H, W] in [-1, 1], where there are images;
    - "path": str.

    Random augmentation is drawn from (seed, epoch, index) alone: neither workers nor a resumed run change it.

    Attributes:
        num_classes: number of classes, the unknown class included.
        has_edges: whether items carry instance edges.
        class_names: the name of each class, or None.
        palette: uint8 [num_classes, 3], the color of each class.
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
        # The epoch is in shared memory: workers that are kept alive between epochs see a change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        raise NotImplementedError

    def inspect(self, index: int) -> Inspection:
        """Every fault in the files of a sample, and what its label map holds."""
        raise NotImplementedError

    @property
    def label_nc(self) -> int:
        """Channels of the conditioning: the classes, and one for edges."""
        return self.num_classes + int(self.has_edges)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every item in pixels, or None where it follows the image."""
        return self.geometry.output_size

    @property
    def epoch(self) -> int:
        """The epoch whose crops and flips are drawn."""
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


class FileDataset(SegmentationDataset):
    """Images, label maps and instance maps in folders, matched by name.

    Args:
        spec: what the files mean and where they lie.
        geometry: resize, crop and flip.
        seed: of the augmentation.
        need_images: False for synthesis from label maps alone; images are then not looked for.
        ignore_value: stored label value to become IGNORE.
        use_edges: instance edges, if the dataset has instance maps.
        keep: names (keys) of the samples to use; None uses all.
        file_list: names the samples to use instead; each of its names must be one.

    Attributes:
        samples: the complete samples.
        incomplete: samples that lack a file.
        faults: a message for each file without a partner.
        absent: a message for each name of the file list that no sample has.

    Raises:
        DataError: a folder is missing, or ignore_value leaves no class.
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
    ) -> None:
        has_edges = use_edges and spec.instance_dir is not None
        super().__init__(spec.name, spec.num_classes, has_edges, spec.palette, spec.class_names, geometry, seed)
        self.need_images = need_images
        self.classes = ClassTable(spec.name, spec.num_classes, spec.classes, ignore_value)
        matched = match(spec, need_images, has_edges, keep, file_list)
        self.samples, self.incomplete = matched.samples, matched.incomplete
        self.faults, self.absent = matched.faults, matched.absent
        self._label_dir, self._others = spec.label_dir, matched.others
        self._chosen = keep is not None or file_list is not None

    def require(self) -> None:
        """Refuses a dataset that is empty or has faults.

        Raises:
            DataError: files have no partner, listed samples are not there, or there are no samples at all. Names them.
        """
        faults = self.absent + self.faults
        if not self.samples and (self._chosen or not faults):
            held = "" if self._chosen else none_found(self._others, "label map")
            which = "none of the samples chosen by the file list or by scene" if self._chosen else "no label maps"
            raise DataError(
                f"{self._label_dir}: {which} in this folder{held}, for dataset {self.name}{_listed(faults)}"
            )
        if faults:
            what = "samples of the list are not there" if len(self.absent) == len(faults) else "files cannot be matched"
            raise DataError(f"{self.name}: {len(faults)} {what}{_listed(faults)}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._index(index)
        sample = self.samples[index]
        assert sample.label is not None
        labels = self.classes.classify(read_labels(sample.label), sample.label)
        height, width = labels.shape
        place = self.geometry.place(width, height, self._rng(index), sample.label)
        item = {"label": torch.from_numpy(place.indices(labels).astype(np.int64)), "path": sample.label}
        if self.need_images:
            assert sample.image is not None
            image = read_image(sample.image)
            _same_size(sample.image, "image", image.size, sample.label, (width, height))
            item["image"] = place.image(image)
        if self.has_edges:
            assert sample.instance is not None
            instance_ids = read_instances(sample.instance)
            _same_size(sample.instance, "instance map", instance_ids.shape[::-1], sample.label, (width, height))
            # Edges are found at the final size, as in the authors' code: resizing thin edges would break them.
            item["edges"] = torch.from_numpy(instances_to_edges(place.indices(instance_ids)))
        return item

    def inspect(self, index: int) -> Inspection:
        """Every fault in the files of a sample, and what its label map holds.

        Args:
            index: of a complete sample; from len(self) on, of an incomplete one.
        """
        sample = self.samples[index] if index < len(self) else self.incomplete[index - len(self)]
        return _Inspector(self).inspect(sample)


class _Inspector:
    """Reads the files of one sample and keeps every fault."""

    def __init__(self, dataset: FileDataset) -> None:
        self.dataset = dataset
        self.faults: list[str] = []

    def attempt(self, action: Callable[..., _T], *arguments: Any) -> _T | None:
        """The result of an action, or None when it finds a fault."""
        try:
            return action(*arguments)
        except DataError as error:
            self.faults.append(str(error))
            return None

    def inspect(self, sample: Sample) -> Inspection:
        counts = size = None
        colors: dict[int, tuple[int, int, int]] = {}
        if sample.label is not None:
            values = self.attempt(read_labels, sample.label)
            if values is not None:
                size = values.shape[::-1]
                classes = self.attempt(self.dataset.classes.classify, values, sample.label)
                if classes is not None:
                    counts = np.bincount(classes[classes >= 0], minlength=self.dataset.num_classes)
                    colors = _colors(sample.label, values[classes >= 0])
                self.attempt(self.dataset.geometry.place, *size, np.random.default_rng(0), sample.label)
        if sample.image is not None:
            image = self.attempt(read_image, sample.image)
            if image is not None and size is not None:
                self.attempt(_same_size, sample.image, "image", image.size, sample.label, size)
        if sample.instance is not None:
            instance_ids = self.attempt(read_instances, sample.instance)
            if instance_ids is not None and size is not None:
                got = instance_ids.shape[::-1]
                self.attempt(_same_size, sample.instance, "instance map", got, sample.label, size)
        return Inspection(self.faults, counts, sample.label, colors)


def _colors(path: str, values: np.ndarray) -> dict[int, tuple[int, int, int]]:
    """The palette's color of each value that occurs; empty for a file without a palette."""
    palette = read_palette(path)
    if palette is None:
        return {}
    used = [value for value in np.unique(values).tolist() if 0 <= value < len(palette)]
    return {value: (int(palette[value][0]), int(palette[value][1]), int(palette[value][2])) for value in used}


def _listed(faults: list[str]) -> str:
    more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
    return ":\n  " + "\n  ".join(faults[:8]) + more if faults else ""


def _same_size(path: str, kind: str, size: tuple[int, ...], label: str, expected: tuple[int, ...]) -> None:
    """Raises DataError unless a file has the (width, height) of its label map."""
    if tuple(size) != tuple(expected):
        hint = size_hint(path) if kind == "image" else ""
        raise DataError(
            f"{path}: the {kind} is {size[0]}×{size[1]} pixels (width×height), but its label map {label} is "
            f"{expected[0]}×{expected[1]}; expected the same size{hint}"
        )
