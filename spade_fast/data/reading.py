# SPDX-License-Identifier: Apache-2.0
"""Reading photographs, label maps and instance maps from files, with errors that name the file."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
from PIL import Image

IGNORE = -1
"""Class of a pixel that contributes nothing to the conditioning."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp"})
LABEL_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff", ".pgm", ".gif"})

_INDEX_MODES = frozenset({"L", "P", "1", "I", "I;16", "I;16B", "I;16L"})
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, MemoryError, Image.DecompressionBombError,
)  # fmt: skip


class DataError(ValueError):
    """A fault in the data: the message names the file, what was found and what was expected."""


def _open(path: str | os.PathLike, what: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()  # decoding is lazy: a truncated file shows only here
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: cannot read this {what}: {type(error).__name__}: {error}") from error
    return image


def read_image(path: str | os.PathLike) -> Image.Image:
    """A photograph as an 8-bit RGB image.

    Raises:
        DataError: the file is unreadable, truncated, or holds more than 8 bits a channel.
    """
    image = _open(path, "image")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise DataError(
            f"{path}: the image has pixels of mode {image.mode!r}; expected 8 bits a channel (convert it to 8-bit RGB)"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def _png_grey_step(path: str | os.PathLike) -> int:
    """Pillow stretches 2- and 4-bit grey PNG to 0..255; the factor to divide by to get the stored values back."""
    with open(path, "rb") as file:
        head = file.read(26)
    if len(head) == 26 and head[:8] == b"\x89PNG\r\n\x1a\n" and head[25] == 0 and head[24] in (2, 4):
        return 255 // (2 ** head[24] - 1)
    return 1


def _indices(image: Image.Image, path: str | os.PathLike) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "L" and image.format == "PNG":
        values = values // _png_grey_step(path)
    return values.astype(np.int32)


def read_labels(path: str | os.PathLike) -> np.ndarray:
    """The values of a label map as stored: int32 [H, W]. A palette image is read as its indices, not its colours.

    Raises:
        DataError: the file is unreadable, truncated, lossy (JPEG), or stores colours rather than one value a pixel.
    """
    image = _open(path, "label map")
    if image.format == "JPEG":
        raise DataError(f"{path}: the label map is a JPEG, whose compression changes label values; save it as PNG")
    if image.mode not in _INDEX_MODES:
        raise DataError(
            f"{path}: the label map has mode {image.mode!r}, so its pixels are colours; expected one class number a "
            "pixel (8-bit, 16-bit or palette PNG). Convert each colour to its class number first"
        )
    return _indices(image, path)


def read_instances(path: str | os.PathLike) -> np.ndarray:
    """The ids of an instance map, int32 [H, W]; in an RGB map each colour is an id.

    Raises:
        DataError: the file is unreadable, truncated, lossy (JPEG), or of another mode.
    """
    image = _open(path, "instance map")
    if image.format == "JPEG":
        raise DataError(f"{path}: the instance map is a JPEG, whose compression changes ids; save it as PNG")
    if image.mode == "RGB":
        colour = np.asarray(image).astype(np.int32)
        return colour[..., 0] << 16 | colour[..., 1] << 8 | colour[..., 2]
    if image.mode not in _INDEX_MODES:
        raise DataError(f"{path}: the instance map has mode {image.mode!r}; expected 8-bit, 16-bit, palette or RGB")
    return _indices(image, path)


def size_hint(path: str | os.PathLike) -> str:
    """Why an image and its label map may differ in size, when the image says so itself; else empty."""
    with Image.open(path) as image:
        orientation = image.getexif().get(0x0112, 1)
    if orientation in (5, 6, 7, 8):
        return " (the image has an EXIF rotation, which is not applied: store its pixels rotated)"
    return ""


def list_files(folder: str | os.PathLike, suffixes: frozenset[str]) -> list[str]:
    """Paths below a folder, from there on, of files with one of the suffixes: sorted, hidden ones left out.

    Strings, because a Path each would cost seconds and 100 MB for COCO's 350,000 files.

    Raises:
        DataError: the folder does not exist.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder")
    found = []
    for parent, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = "" if parent == root else os.path.relpath(parent, root) + "/"
        found += [
            below + name for name in names if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes
        ]
    return sorted(found)
