# SPDX-License-Identifier: Apache-2.0
"""Reading photographs, label maps and instance maps from files, with errors that name the file."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from . import pnm

IGNORE = -1
"""Class of a pixel that contributes nothing to the conditioning."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".pnm", ".bmp", ".tif", ".tiff", ".webp"})
LABEL_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff", ".pgm", ".pbm", ".pnm", ".gif"})
MAX_PIXELS = "SPADE_FAST_MAX_PIXELS"
"""Environment variable: how many pixels a file may have. Pillow's own limit applies where it is not set."""

_INDEX_MODES = frozenset({"L", "P", "1", "I", "I;16", "I;16B", "I;16L"})
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, MemoryError, Image.DecompressionBombError,
)  # fmt: skip
_ORIENTATION = 0x0112
# TIFF tags
_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 254, 258, 262, 339
_WHITE_IS_ZERO, _SIGNED, _FLOAT = 0, 2, 3


class DataError(ValueError):
    """A fault in the data: the message names the file, what was found and what was expected."""


def _allow_pixels() -> None:
    given = os.environ.get(MAX_PIXELS)
    if given is not None:
        if not given.isdecimal() or int(given) == 0:
            raise DataError(f"{MAX_PIXELS} must be a number of pixels, got {given!r}")
        Image.MAX_IMAGE_PIXELS = int(given)  # Pillow warns above this many pixels, and refuses twice as many


def _open(path: str | os.PathLike, what: str) -> Image.Image:
    """A decoded image. Raises DataError, which says what the file is, when it cannot be read."""
    _allow_pixels()
    try:
        # Pillow gets an open file: it maps an uncompressed TIFF that it gets by name, and scrambles a rotated one.
        with open(path, "rb") as file:
            image = Image.open(file)
            if what != "image":
                _one_picture(image, path, what)
            image.load()  # decoding is lazy: a truncated file shows only here
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: cannot read this {what}: {error} If you trust the file, set the environment variable "
            f"{MAX_PIXELS} to the number of its pixels"
        ) from error
    except UnidentifiedImageError as error:
        found = _tiff_kind(path) or "it is no image file, or one of an unknown kind"
        raise DataError(f"{path}: cannot read this {what}: {found}") from error
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: cannot read this {what}: {type(error).__name__}: {error}") from error
    return image


def _tiff_kind(path: str | os.PathLike) -> str | None:
    """What the pixels of a TIFF are that Pillow cannot read, in words; None for any other file."""
    try:
        with open(path, "rb") as file:
            tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
            bits, sign = tags.get(_BITS, (1,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0]
            white = ", white being 0" if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else ""
    except (*_DECODE_ERRORS, KeyError, TypeError, IndexError):
        return None
    number = {_SIGNED: "signed integers", _FLOAT: "floating-point"}.get(sign, "unsigned integers")
    return f"it is a TIFF whose pixels are {bits}-bit {number}{white}, which are not supported; save it as PNG"


def _one_picture(image: Image.Image, path: str | os.PathLike, what: str) -> None:
    """Raises DataError when the file holds several pictures. Smaller copies, as some TIFFs have, do not count."""
    count = getattr(image, "n_frames", 1)
    if count > 1 and isinstance(image, TiffImagePlugin.TiffImageFile):
        pages = range(1, count)
        count = 1
        for page in pages:
            image.seek(page)
            count += not image.tag_v2.get(_SUBFILE, 0) & 1
        image.seek(0)
    if count > 1:
        raise DataError(f"{path}: the {what} holds {count} pictures (pages or frames); expected one")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _DECODE_ERRORS:  # unreadable EXIF is ignored
        return 1


def read_image(path: str | os.PathLike) -> Image.Image:
    """A photograph, upright: turned as its EXIF orientation says.

    Args:
        path: the file, of any kind that Pillow reads.

    Returns:
        An 8-bit RGB image.

    Raises:
        DataError: the file is unreadable, truncated, or holds more than 8 bits per channel.
    """
    image = _open(path, "image")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise DataError(
            f"{path}: the image has pixels of mode {image.mode!r}; expected 8 bits a channel (convert it to 8-bit RGB)"
        )
    turn = _TURNS.get(_orientation(image))
    try:
        image = image if image.mode == "RGB" else image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: this image of mode {image.mode!r} cannot be made RGB: {error}") from error
    return image if turn is None else image.transpose(turn)


# EXIF orientation -> the operation that makes the stored pixels upright. Pillow turns a TIFF itself and drops the tag.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Stored values [H, W], turned as the image's EXIF orientation says."""
    orientation = _orientation(image)
    if orientation in (5, 6, 7, 8):
        values = values.T
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return np.ascontiguousarray(values)


def _png_bits(path: str | os.PathLike) -> int:
    """Bits per pixel of a gray PNG; 8 for any other PNG."""
    with open(path, "rb") as file:
        head = file.read(26)
    gray = len(head) == 26 and head[:8] == b"\x89PNG\r\n\x1a\n" and head[25] == 0
    return head[24] if gray else 8


def _stored(image: Image.Image, path: str | os.PathLike, what: str) -> np.ndarray:
    """The values that the file has, integers [H, W]. Undoes what Pillow does to gray values."""
    values = np.asarray(image)
    if image.mode == "F":
        whole = (
            np.isfinite(values).all() and (values == np.rint(values)).all() and np.abs(values).max(initial=0) < 2**31
        )
        if not whole:
            raise DataError(
                f"{path}: the {what} has floating-point pixels that are no whole numbers; expected one class number a "
                "pixel (8-bit, 16-bit or palette PNG)"
            )
        return values.astype(np.int32)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = tags.get(_BITS, (1,))[0] if tags else 8
    if image.format == "PNG":
        bits = _png_bits(path)
    sign = tags.get(_SAMPLE_FORMAT, (1,))[0]
    if tags and image.mode in ("L", "1") and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = ~values  # Pillow inverted them: booleans, or uint8
    if image.mode == "L" and bits in (2, 4):
        values = values // (255 // (2**bits - 1))  # Pillow stretched them to 0..255
    if image.mode == "L" and sign == _SIGNED:
        values = values.view(np.int8)
    if image.mode == "I" and bits == 32 and sign != _SIGNED and tags:
        unsigned = values.view(np.uint32).astype(np.int64)
        return unsigned if (unsigned != values).any() else values
    return values.astype(np.int32)


def _read_indices(path: str | os.PathLike, what: str, colors: bool) -> np.ndarray:
    """One integer per pixel [H, W], upright.

    Args:
        path: the file.
        what: "label map" or "instance map", for messages.
        colors: whether RGB pixels are allowed, each color being a number.
    """
    try:
        with open(path, "rb") as file:
            if pnm.is_gray(file.read(3)):
                file.seek(0)
                return pnm.decode(file.read())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read this {what}: {type(error).__name__}: {error}") from error
    image = _open(path, what)
    lossy = "JPEG" if image.format in ("JPEG", "MPO") else None
    if image.format == "TIFF" and "jpeg" in str(image.info.get("compression")):
        lossy = "TIFF compressed as JPEG"
    if lossy:
        things = "label values" if what == "label map" else "ids"
        raise DataError(f"{path}: the {what} is a {lossy}, whose compression changes {things}; save it as PNG")
    if colors and image.mode == "RGB":
        color = np.asarray(image).astype(np.int32)
        return _upright(color[..., 0] << 16 | color[..., 1] << 8 | color[..., 2], image)
    if image.mode not in _INDEX_MODES | {"F"}:
        if colors:
            raise DataError(f"{path}: the {what} has mode {image.mode!r}; expected 8-bit, 16-bit, palette or RGB")
        raise DataError(
            f"{path}: the {what} has mode {image.mode!r}, so its pixels are colors; expected one class number a "
            f"pixel (8-bit, 16-bit or palette PNG). Convert each color to its class number first{_hint(image)}"
        )
    return _upright(_stored(image, path, what), image)


def _hint(image: Image.Image) -> str:
    """What to do if the colors are grays; else empty."""
    bands = [np.asarray(band) for band in image.split()]
    if image.mode == "LA":
        return "; it is gray with an alpha channel: save it without the channel, if its gray is the class number"
    if image.mode in ("RGB", "RGBA") and all((band == bands[0]).all() for band in bands[1:3]):
        return "; its red, green and blue are equal: save one of them, if that is the class number"
    return ""


def read_labels(path: str | os.PathLike) -> np.ndarray:
    """The values of a label map as stored, upright as by `read_image`.

    A palette image gives its indices, not its colors. Gray values are neither scaled nor inverted: the maxval of a PGM
    and the bits, sign and photometric interpretation of a TIFF change nothing. Floating-point pixels must be whole
    numbers.

    Args:
        path: the file.

    Returns:
        int32 [H, W]; int64 if the values need it.

    Raises:
        DataError: the file is unreadable, truncated, lossy (JPEG), stores colors instead of one value per pixel, or
            holds several pictures.
    """
    return _read_indices(path, "label map", colors=False)


def read_instances(path: str | os.PathLike) -> np.ndarray:
    """The ids of an instance map, upright as by `read_image`. In an RGB map each color is an id.

    Args:
        path: the file.

    Returns:
        int32 [H, W].

    Raises:
        DataError: the file is unreadable, truncated, lossy (JPEG), of another mode, or holds several pictures.
    """
    # Unsigned ids above 2^31 wrap around, and stay distinct.
    return _read_indices(path, "instance map", colors=True).astype(np.int32)


def read_palette(path: str | os.PathLike) -> np.ndarray | None:
    """Colors of a palette image, uint8 [n, 3], without decoding its pixels; None for any other file."""
    try:
        with Image.open(path) as image:
            palette = image.getpalette("RGB") if image.mode == "P" else None
    except _DECODE_ERRORS:
        return None
    return None if palette is None else np.array(palette, np.uint8).reshape(-1, 3)


def size_hint(path: str | os.PathLike) -> str:
    """Why an image and its label map may differ in size: the image's EXIF rotation; empty if it has none."""
    with Image.open(path) as image:
        if _orientation(image) in (5, 6, 7, 8):
            return " (the image has an EXIF rotation, which is applied: rotate its label map in the same way)"
    return ""


def list_files(folder: str | os.PathLike, suffixes: frozenset[str] | None) -> list[str]:
    """The files in a folder and in the folders below it. Hidden files and folders are left out.

    Args:
        folder: where to look.
        suffixes: endings of the files, in lower case with the dot; None for all files.

    Returns:
        Paths relative to the folder, sorted. They are strings: Paths would cost seconds and 100 MB for COCO's 350,000
        files.

    Raises:
        DataError: the folder, or one below it, does not exist or cannot be read.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder" if not os.path.exists(root) else f"{root}: this is no folder")
    found: list[str] = []
    folders: list[tuple[str, frozenset]] = [("", frozenset())]
    while folders:
        below, above = folders.pop()
        try:
            here = os.stat(os.path.join(root, below))
            if (here.st_dev, here.st_ino) in above:  # the link points to a folder that contains it
                continue
            above |= {(here.st_dev, here.st_ino)}
            with os.scandir(os.path.join(root, below)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        folders.append((below + entry.name + "/", above))
                    elif not (entry.is_file() or entry.is_symlink()):
                        continue  # a pipe or a socket; a broken link is listed, and reading it gives the error
                    elif suffixes is None or os.path.splitext(entry.name)[1].lower() in suffixes:
                        found.append(below + entry.name)
        except OSError as error:
            raise DataError(f"{os.path.join(root, below)}: cannot read this folder: {error.strerror}") from error
    return sorted(found)
