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
    """The colors of a label map.

    Args:
        label: integers [H, W]; pixels without a class (negative) are black.
        palette: uint8 [num_classes, 3].

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: a label has no color, or an argument has a wrong shape.

    Examples:
        >>> colorize(np.array([[0, -1]]), np.array([[9, 8, 7]])).tolist()
        [[[9, 8, 7], [0, 0, 0]]]
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
    """An image as 8-bit pixels.

    Args:
        image: float [3, H, W] in [-1, 1]; values outside are clipped.

    Returns:
        uint8 [H, W, 3]: -1 becomes 0 and 1 becomes 255, rounded.

    Raises:
        ValueError: the shape is wrong.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must have shape [3, H, W], got {list(image.shape)}")
    scaled = (image.detach().float().cpu() + 1) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def sheet(
    rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str] = (), captions: Sequence[str] = ()
) -> Image.Image:
    """A contact sheet.

    Cells may differ in size: a column is as wide as its widest cell, a row as high as its highest. Where all are at
    most 80 pixels wide, they are shown enlarged by a whole number.

    Args:
        rows: the cells of each row, each uint8 [H, W, 3].
        columns: a title over each column.
        captions: a line under each row.

    Raises:
        ValueError: there is no cell.
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
    """A text that fits a width. Its front is cut off: the end of a path says more. The font knows only Latin-1."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength("..." + text) > width:
        text = text[1:]
    return "..." + text if text else ""


def save_png(picture: Image.Image | np.ndarray, path: str | Path) -> None:
    """Writes a PNG, and makes its directory.

    Args:
        picture: an image, or uint8 [H, W, 3].
        path: the file.

    Raises:
        WriteError: the file can't be written.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, format="PNG")
