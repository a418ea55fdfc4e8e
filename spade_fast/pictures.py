# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: colored label maps, images from tensors, contact sheets with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from spade_fast.files import writing

_GAP = 6  # pixels between the cells of a sheet
_LINE = 14  # height of a caption line in Pillow's built-in font
_SMALL = 160  # pixels
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)


def colorize(label: torch.Tensor | np.ndarray, palette: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] colors of a label map.

    Args:
        label: [H, W] integers; the ignore value (any negative) is black.
        palette: uint8 [num_classes, 3].

    Raises:
        ValueError: a label without a color, or a wrong shape.
    """
    label = np.asarray(label)
    palette = np.asarray(palette, dtype=np.uint8)
    if label.ndim != 2:
        raise ValueError(f"label must have shape [H, W], got {list(label.shape)}")
    if palette.ndim != 2 or palette.shape[1] != 3:
        raise ValueError(f"palette must have shape [num_classes, 3], got {list(palette.shape)}")
    if label.size and label.max() >= len(palette):
        raise ValueError(f"label has value {label.max()}, but the palette has {len(palette)} colors")
    with_black = np.concatenate([palette, np.zeros((1, 3), np.uint8)])
    return with_black[np.where(label < 0, len(palette), label)]


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """uint8 [H, W, 3] of an image [3, H, W] in [-1, 1]: -1 is 0, 1 is 255, rounded; values outside are clipped."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must have shape [3, H, W], got {list(image.shape)}")
    scaled = (image.detach().float().cpu() + 1) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def sheet(
    rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str] = (), captions: Sequence[str] = ()
) -> Image.Image:
    """A contact sheet: rows of uint8 [H, W, 3] cells, a title over each column and a caption under each row.

    Cells may differ in size: a column is as wide as its widest cell, a row as high as its highest. Where all are at
    most 80 pixels wide, they are shown enlarged by a whole number.
    """
    if not rows or not any(len(row) for row in rows):
        raise ValueError("a sheet needs at least one row with one cell")
    zoom = max(1, _SMALL // max(cell.shape[1] for row in rows for cell in row))
    rows = [[cell.repeat(zoom, axis=0).repeat(zoom, axis=1) for cell in row] for row in rows]
    count = max(len(row) for row in rows)
    widths = [max(row[i].shape[1] for row in rows if i < len(row)) for i in range(count)]
    heights = [max((cell.shape[0] for cell in row), default=0) + (_LINE if captions else 0) for row in rows]
    top = _GAP + (_LINE if columns else 0)
    canvas = Image.new("RGB", (sum(widths) + _GAP * (count + 1), top + sum(heights) + _GAP * len(rows)), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    lefts = [_GAP * (i + 1) + sum(widths[:i]) for i in range(count)]
    for left, width, title in zip(lefts, widths, columns, strict=False):
        draw.text((left, 2), _fit(draw, title, width), fill=_INK)
    y = top
    for r, row in enumerate(rows):
        for left, cell in zip(lefts, row, strict=False):
            canvas.paste(Image.fromarray(cell), (left, y))
        if captions:
            draw.text((_GAP, y + heights[r] - _LINE + 1), _fit(draw, captions[r], canvas.width - 2 * _GAP), fill=_INK)
        y += heights[r] + _GAP
    return canvas


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text, its front cut off where it would not fit (the end of a path says more), in Latin-1 for the font."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength("..." + text) > width:
        text = text[1:]
    return "..." + text if text else ""


def save_png(picture: Image.Image | np.ndarray, path: str | Path) -> None:
    """Writes a PNG, creating its directory. Raises WriteError when it can't be written."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, format="PNG")
