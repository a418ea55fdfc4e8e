# SPDX-License-Identifier: Apache-2.0
"""The canvas of the synthetic landscapes: it holds image, classes and instance ids, and makes noise for textures."""

from __future__ import annotations

import numpy as np

_CLASSES = (  # name, color in the palette
    ("sky", (135, 196, 240)),
    ("cloud", (236, 240, 246)),
    ("sun", (255, 214, 70)),
    ("mountain", (128, 112, 124)),
    ("sea", (24, 100, 180)),
    ("sand", (232, 206, 146)),
    ("grass", (112, 184, 70)),
    ("road", (96, 96, 104)),
    ("tree", (26, 104, 46)),
    ("building", (188, 92, 70)),
    ("person", (222, 48, 132)),
    ("car", (122, 44, 178)),
)
CLASS_NAMES = [name for name, _ in _CLASSES]
PALETTE = np.array([color for _, color in _CLASSES], dtype=np.uint8)
_NUMBER = {name: number for number, name in enumerate(CLASS_NAMES)}


def rgb(red: int, green: int, blue: int) -> np.ndarray:
    """A color as float32 [3] in 0..1."""
    return np.array((red, green, blue), dtype=np.float32) / 255


def mix(a: np.ndarray, b: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """A blend: `a` where share is 0, `b` where it is 1. Colors are [3] or [h, w, 3], share is [h, w]."""
    share = np.clip(np.asarray(share, dtype=np.float32), 0, 1)[..., None]
    return a + (b - a) * share


def smoothstep(low: float, high: float, value: np.ndarray) -> np.ndarray:
    """0 up to `low`, 1 from `high` on, smooth between. It falls where high < low."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _interpolation(positions: np.ndarray, cells: int) -> np.ndarray:
    """Smooth weights of cells + 1 grid values at positions in 0..1: float32 [len(positions), cells + 1]."""
    at = positions * cells
    left = np.minimum(at.astype(np.int64), cells - 1)
    share = at - left
    share = share * share * (3 - 2 * share)
    weights = np.zeros((len(positions), cells + 1), dtype=np.float32)
    rows = np.arange(len(positions))
    weights[rows, left] = 1 - share
    weights[rows, left + 1] = share
    return weights


class Canvas:
    """An image with its classes and instances.

    Attributes:
        x: float32 [1, W], pixel centers in 0..aspect.
        y: float32 [H, 1], pixel centers in 0..1.
        aspect: width / height.
        image: float32 [H, W, 3] in 0..1.
        labels: int32 [H, W], the class of each pixel.
        instance_ids: int32 [H, W], the instance of each pixel.
        grain: float32 [H, W], white noise of unit variance, the finest texture.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng = rng
        self.height, self.width = height, width
        self.aspect = width / height
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
        self.x = ((np.arange(width, dtype=np.float32) + 0.5) / height)[None, :]
        self.image = np.zeros((height, width, 3), dtype=np.float32)
        self.labels = np.zeros((height, width), dtype=np.int32)
        self.instance_ids = np.zeros((height, width), dtype=np.int32)
        self.everywhere = np.ones((height, width), dtype=bool)
        # The grain has its own generator: the shapes of a scene must not depend on the size.
        self.grain = np.random.default_rng(rng.integers(2**62)).standard_normal((height, width), dtype=np.float32)
        self._next = 0

    def wash(self, cells: float) -> np.ndarray:
        """Smooth noise with about `cells` features along the height: [H, W] in 0..1."""
        rows, columns = max(1, round(cells)), max(1, round(cells * self.aspect))
        grid = self.rng.random((rows + 1, columns + 1), dtype=np.float32)
        return _interpolation(self.y[:, 0], rows) @ grid @ _interpolation(self.x[0] / self.aspect, columns).T

    def noise(self, cells: float) -> np.ndarray:
        """Fractal noise of three octaves: [H, W] in 0..1, about 0.5 in the mean."""
        return (self.wash(cells) + 0.5 * self.wash(2.1 * cells) + 0.25 * self.wash(4.3 * cells)) / 1.75

    def wave(self, cells: float) -> np.ndarray:
        """Smooth noise along x alone: [1, W] in 0..1."""
        count = max(1, round(cells * self.aspect * 2))
        return (_interpolation(self.x[0] / self.aspect, count) @ self.rng.random(count + 1, dtype=np.float32))[None]

    def ridge(self, cells: float) -> np.ndarray:
        """A mountain's outline: [1, W] in 0..1, pointed crests over five octaves."""
        outline = np.zeros_like(self.x)
        for octave in range(5):
            fold = 1 - np.abs(2 * self.wave(cells * 2**octave) - 1)
            outline += fold * 0.5**octave
        outline -= outline.min()
        return outline / max(float(outline.max()), 1e-6)

    def window(self, x0: float, x1: float, y0: float, y1: float) -> tuple[slice, slice] | None:
        """Rows and columns of a rectangle; None if it is outside of the image."""
        rows = slice(max(0, int(y0 * self.height)), min(self.height, int(np.ceil(y1 * self.height)) + 1))
        columns = slice(max(0, int(x0 * self.height)), min(self.width, int(np.ceil(x1 * self.height)) + 1))
        return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None

    def instance(self) -> int:
        """A new instance id."""
        self._next += 1
        return self._next

    def paint(
        self,
        mask: np.ndarray,
        name: str,
        color: np.ndarray,
        window: tuple[slice, slice] | None = None,
        instance: int | None = None,
    ) -> None:
        """Give pixels a class, an instance and a color.

        Args:
            mask: bool, broadcastable to the window: the pixels.
            name: of the class.
            color: float32 [3] or [h, w, 3] in 0..1.
            window: rows and columns; None for the whole canvas.
            instance: id of the instance; None for a new one.
        """
        place = window or (slice(None), slice(None))
        labels, instance_ids, target = self.labels[place], self.instance_ids[place], self.image[place]
        mask = np.broadcast_to(mask, labels.shape)
        labels[mask] = _NUMBER[name]
        instance_ids[mask] = self.instance() if instance is None else instance
        target[mask] = np.broadcast_to(color, target.shape)[mask]

    def tint(
        self, mask: np.ndarray, color: np.ndarray, share: float, window: tuple[slice, slice] | None = None
    ) -> None:
        """Mix a color into the masked pixels; classes stay."""
        target = self.image[window or (slice(None), slice(None))]
        mask = np.broadcast_to(mask, target.shape[:2])
        color = np.broadcast_to(color, target.shape)[mask]
        target[mask] += (color - target[mask]) * share

    def shade(self, share: np.ndarray, window: tuple[slice, slice]) -> None:
        """Darken a window by `share` [h, w] in 0..1; classes stay."""
        self.image[window] *= 1 - share[..., None]

    def finish(self, tint: np.ndarray) -> np.ndarray:
        """The image as uint8 [H, W, 3]: tinted, and a little soft as behind a lens."""
        image = np.clip(self.image, 0, 1) * tint
        soft = image.copy()
        soft[:, 1:-1] = 0.5 * image[:, 1:-1] + 0.25 * (image[:, :-2] + image[:, 2:])
        down = soft.copy()
        down[1:-1] = 0.5 * soft[1:-1] + 0.25 * (soft[:-2] + soft[2:])
        return (255 * (0.45 * image + 0.55 * down) + 0.5).astype(np.uint8)
