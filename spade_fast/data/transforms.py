# SPDX-License-Identifier: Apache-2.0
"""Resize, crop and flip: the same for an image, its label map and its instance map. The authors named the modes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .reading import DataError

PREPROCESS_MODES = (
    "resize_and_crop",
    "crop",
    "scale_width",
    "scale_width_and_crop",
    "scale_shortside",
    "scale_shortside_and_crop",
    "fixed",
    "none",
)
_MULTIPLE = 32  # mode "none" rounds each side to a multiple of this: a generator doubles its first features 5 times


def default_load_size(preprocess: str, crop_size: int) -> int:
    """The load size of a training set where none is given: 286 for a crop of 256, as in the authors' release.

    Examples:
        >>> default_load_size("resize_and_crop", 512)
        572
    """
    return round(crop_size * 286 / 256) if preprocess.endswith("_and_crop") else crop_size


@dataclass(frozen=True)
class Placement:
    """The geometry of one sample.

    Args:
        size: (width, height) in pixels to resize to.
        box: (left, top, right, bottom) in pixels to cut out after that; None keeps everything.
        flip: whether to mirror after that.
    """

    size: tuple[int, int]
    box: tuple[int, int, int, int] | None
    flip: bool

    def _place(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        if image.size != self.size:
            image = image.resize(self.size, resample)
        if self.box is not None:
            image = image.crop(self.box)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def image(self, image: Image.Image) -> torch.Tensor:
        """An RGB image, resized bicubically, as float32 [3, H, W] in [-1, 1]."""
        return image_to_tensor(np.asarray(self._place(image, Image.Resampling.BICUBIC)))

    def indices(self, values: np.ndarray) -> np.ndarray:
        """Integers int32 [H, W] (labels, instance ids), resized to the nearest: int32 [h, w]."""
        return np.array(self._place(Image.fromarray(values), Image.Resampling.NEAREST))


@dataclass(frozen=True)
class Geometry:
    """The resize, crop and flip of a dataset (the authors' options of the same names).

    Args:
        preprocess: one of PREPROCESS_MODES.
        crop_size: width of the result in pixels for the modes that crop, and for "fixed".
        load_size: width (or short side) to resize to before the crop.
        aspect_ratio: width / height of the result, for "resize_and_crop", "fixed" and every crop.
        flip: mirror half of the samples of a training set.
        train: random crops and flips. Otherwise crops are taken from the center, nothing is flipped, and
            resize_and_crop and scale_shortside_and_crop load at crop_size, as the authors' test options do.

    Raises:
        DataError: an argument is unknown or out of range.
    """

    preprocess: str
    crop_size: int
    load_size: int
    aspect_ratio: float = 1.0
    flip: bool = True
    train: bool = True

    def __post_init__(self) -> None:
        if self.preprocess not in PREPROCESS_MODES:
            raise DataError(f"preprocess {self.preprocess!r} is unknown; expected one of {', '.join(PREPROCESS_MODES)}")
        for name in ("crop_size", "load_size"):
            if int(getattr(self, name)) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.aspect_ratio > 0:
            raise DataError(f"aspect_ratio must be positive, got {self.aspect_ratio}")
        if self.preprocess.endswith("_and_crop") and self.load_size < self.crop_size:
            raise DataError(f"load_size {self.load_size} is smaller than crop_size {self.crop_size}")

    @property
    def crop(self) -> tuple[int, int]:
        """(width, height) of a crop."""
        return self.crop_size, round(self.crop_size / self.aspect_ratio)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every sample, or None where it depends on the image (batches of one)."""
        if "crop" in self.preprocess or self.preprocess == "fixed":
            return self.crop[1], self.crop[0]
        return None

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        mode = self.preprocess
        whole = not self.train and mode in ("resize_and_crop", "scale_shortside_and_crop")
        load = self.crop_size if whole else self.load_size
        if mode == "resize_and_crop":
            return load, round(load / self.aspect_ratio)
        if mode == "fixed":
            return self.crop
        if mode == "none":
            return _rounded(width), _rounded(height)
        if mode.startswith("scale_width"):
            return load, max(1, load * height // width)
        if mode.startswith("scale_shortside"):
            short = min(width, height)
            return max(1, load * width // short), max(1, load * height // short)
        return width, height

    def place(self, width: int, height: int, rng: np.random.Generator | None, name: str) -> Placement:
        """Draws the geometry of one sample.

        Args:
            width, height: of the stored image, in pixels.
            rng: draws crop and flip of a training sample; None in validation, which draws nothing.
            name: the file, for the error.

        Raises:
            DataError: the image, after its resize, is smaller than the crop.
        """
        size = self._resized(width, height)
        box = None
        if "crop" in self.preprocess:
            room = size[0] - self.crop[0], size[1] - self.crop[1]
            if min(room) < 0:
                raise DataError(
                    f"{name}: {size[0]}×{size[1]} pixels (width×height) after the resize of {self.preprocess!r} is "
                    f"smaller than the crop {self.crop[0]}×{self.crop[1]}; take a larger load size, a smaller crop "
                    "size, or preprocess resize_and_crop"
                )
            if self.train:
                assert rng is not None
                left, top = (int(rng.integers(0, side + 1)) for side in room)
            else:
                left, top = room[0] // 2, room[1] // 2
            box = (left, top, left + self.crop[0], top + self.crop[1])
        flip = self.train and self.flip and rng is not None and bool(rng.random() < 0.5)
        return Placement(size, box, flip)


def _rounded(side: int) -> int:
    return max(_MULTIPLE, round(side / _MULTIPLE) * _MULTIPLE)


def image_to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """An image as the networks take it.

    Args:
        pixels: uint8 [H, W, 3].

    Returns:
        float32 [3, H, W] in [-1, 1].
    """
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(planes).float().div_(127.5).sub_(1.0)


def instances_to_edges(ids: np.ndarray) -> np.ndarray:
    """The pixels that have a 4-neighbor of another instance. Both sides of a boundary are marked.

    Args:
        ids: integers [H, W], the instance of each pixel.

    Returns:
        bool [H, W].

    Examples:
        >>> instances_to_edges(np.array([[1, 1, 2, 2]])).tolist()
        [[False, True, True, False]]
    """
    edges = np.zeros(ids.shape, dtype=bool)
    across = ids[:, 1:] != ids[:, :-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    down = ids[1:] != ids[:-1]
    edges[1:] |= down
    edges[:-1] |= down
    return edges
