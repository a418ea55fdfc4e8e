# SPDX-License-Identifier: Apache-2.0
"""The size of each image that synthesis makes: that of its label map, or one that a line explains."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from spade_fast import data, models
from spade_fast.cli import ConfigError
from spade_fast.data.transforms import Geometry, Placement


@dataclass(frozen=True)
class ImageSizes(Geometry):
    """Keeps the size of a label map where the generator makes images of it. Resizes every other map.

    Args:
        generator: it decides; None resizes every map.
        stored: receives the stored (height, width) of each map, by its path.
    """

    generator: models.SPADEGenerator | None = None
    stored: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.generator is not None and not self.generator.size_refusal(height, width):
            return width, height
        return super()._resized(width, height)

    def place(self, width: int, height: int, rng: np.random.Generator | None, name: str) -> Placement:
        self.stored[name] = height, width
        return super().place(width, height, rng, name)


def fit(dataset: data.SegmentationDataset, generator: models.SPADEGenerator, args: argparse.Namespace) -> None:
    """Sets the sizes in which the generator gets the label maps.

    A folder's maps keep their size where the generator allows it. The other datasets are read at the generator's size,
    as the paper tests them.

    Raises:
        ConfigError: the channels of the maps are not the generator's.
    """
    wanted = generator.options["label_nc"]
    if dataset.label_nc != wanted:
        edges = " + 1 instance-edge channel" if dataset.has_edges else " and no instance edges"
        raise ConfigError(
            f"the dataset {dataset.name} has {dataset.label_nc} channels ({dataset.num_classes} classes{edges}), but "
            f"the checkpoint {args.checkpoint} was trained with {wanted} (label_nc): see --dataset, --num-classes and "
            "--use-edges / --no-use-edges"
        )
    height, width = generator.output_size
    geometry = Geometry(args.preprocess or "fixed", width, width, width / height, False, args.phase == "train")
    if args.preprocess is None:
        keep = dataset.name == "folder" and args.crop_size is None and args.aspect_ratio is None
        geometry = ImageSizes(**dataclasses.asdict(geometry), generator=generator if keep else None)
    dataset.geometry = geometry


class Resized:
    """Counts the label maps whose images have another size, though the command line asks for no resize."""

    def __init__(
        self, dataset: data.SegmentationDataset, generator: models.SPADEGenerator, args: argparse.Namespace
    ) -> None:
        self.dataset, self.generator, self.args = dataset, generator, args
        self.count = 0

    def note(self, sample: dict[str, Any], size: tuple[int, int]) -> None:
        """Counts a sample whose image, of (height, width) size, is not as large as its label map. Prints the first."""
        geometry, path = self.dataset.geometry, sample["path"]
        height, width = sample["label"].shape
        if isinstance(geometry, ImageSizes):
            height, width = geometry.stored.get(path, (height, width))
        if (height, width) == size:
            return
        if self.count == 0:
            sizes = f"{width}×{height} to {size[1]}×{size[0]} pixels (width×height)"
            print(f"{path} is resized from {sizes}: {self._why(height, width)}", flush=True)
        self.count += 1

    def _why(self, height: int, width: int) -> str:
        other = "--preprocess none keeps the size of the maps, each side rounded to a multiple of 32"
        if self.generator.z_dim is not None:
            return self.generator.size_refusal(height, width)
        if self.args.crop_size is not None or self.args.aspect_ratio is not None:
            return "the command line gives the size"
        if self.dataset.name != "folder" and self.args.preprocess is None:
            return f"the paper tests {self.dataset.name} at one size; {other}"
        why = self.generator.size_refusal(height, width)
        return why if self.args.preprocess is not None else f"{why}; {other}"
