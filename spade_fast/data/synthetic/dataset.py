# SPDX-License-Identifier: Apache-2.0
"""Procedural landscapes, drawn from a seed when they are asked for. They have instances and need no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..base import Inspection, SegmentationDataset
from ..reading import DataError
from ..spec import Defaults
from ..transforms import Geometry, image_to_tensor, instances_to_edges
from .scenery import CLASS_NAMES, PALETTE, draw_scene

_SIZES = {"train": 2000, "val": 64}
DEFAULTS = Defaults(len(CLASS_NAMES), use_edges=True, crop_size=128, size=_SIZES["train"])
_STREAM = {"train": 0, "val": 1}  # part of the seed: the phases never share a scene


class SyntheticDataset(SegmentationDataset):
    """Scenes that depend on (seed, phase, index) and the size of the image alone. Half of the training set is mirrored.

    Scenes are drawn at the final size: there is nothing to resize or crop.

    Args:
        phase: "train" or "val".
        geometry: its crop size, aspect ratio and flip are used.
        seed: of scenes and flips.
        size: number of scenes; None takes 2000 for "train", 64 for "val".
        use_edges: instance edges in the items.
        need_images: False leaves "image" out.

    Raises:
        DataError: size is below 1.
    """

    def __init__(
        self,
        phase: str,
        geometry: Geometry,
        *,
        seed: int = 0,
        size: int | None = None,
        use_edges: bool = True,
        need_images: bool = True,
    ) -> None:
        super().__init__("synthetic", len(CLASS_NAMES), use_edges, PALETTE.copy(), list(CLASS_NAMES), geometry, seed)
        if size is None:
            size = _SIZES[phase]
        if size < 1:
            raise DataError(f"dataset synthetic: size must be at least 1, got {size}")
        self.phase = phase
        self.size = size
        self.need_images = need_images

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of every item in pixels."""
        width, height = self.geometry.crop
        return height, width

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A scene before mirroring: image uint8 [H, W, 3], classes int32 [H, W], instance ids int32 [H, W]."""
        rng = np.random.default_rng((self.seed, _STREAM[self.phase], self._index(index)))
        return draw_scene(rng, *self.output_size)

    def inspect(self, index: int) -> Inspection:
        """No faults, and the sample's pixels of each class."""
        return Inspection([], np.bincount(self.scene(index)[1].ravel(), minlength=self.num_classes))

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._index(index)
        image, labels, instance_ids = self.scene(index)
        if self.geometry.train and self.geometry.flip and self._rng(index).random() < 0.5:
            image, labels, instance_ids = image[:, ::-1], labels[:, ::-1], instance_ids[:, ::-1]
        item = {"label": torch.from_numpy(labels.astype(np.int64)), "path": f"synthetic/{index:06d}"}
        if self.need_images:
            item["image"] = image_to_tensor(image)
        if self.has_edges:
            item["edges"] = torch.from_numpy(instances_to_edges(instance_ids))
        return item
