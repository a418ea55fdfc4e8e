# SPDX-License-Identifier: Apache-2.0
"""Label maps in the Netpbm formats PBM and PGM, with the values as stored. (Pillow stretches them to 0..255.)"""

from __future__ import annotations

import re

import numpy as np

_TOKEN = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*([^\s#]+)")
_KINDS = {b"P1": "bits as text", b"P2": "text", b"P4": "bits", b"P5": "bytes"}


def is_gray(data: bytes) -> bool:
    """Whether a file's first bytes are those of a PBM or a PGM."""
    return data[:2] in _KINDS and data[2:3].isspace()


def decode(data: bytes) -> np.ndarray:
    """The values of a PBM or PGM. None is scaled. A PBM's 1 (black) is 1. Values of 16 bits are big-endian.

    Args:
        data: the whole file.

    Returns:
        int32 [H, W].

    Raises:
        ValueError: the header is wrong, or there are fewer pixels than it says.
    """
    kind, position = data[:2], 2
    header = []
    for name in ("width", "height", "maxval")[: 2 if kind in (b"P1", b"P4") else 3]:
        match = _TOKEN.match(data, position)
        if match is None or not match[1].isdigit() or int(match[1]) == 0:
            raise ValueError(f"its {name} is {match[1][:20]!r}" if match else f"its {name} is missing")
        header.append(int(match[1]))
        position = match.end()
    width, height, maxval = (*header, 1)[:3]
    if maxval > 65535:
        raise ValueError(f"its maxval is {maxval}, above 65535")
    count = width * height
    values: np.ndarray
    if kind in (b"P1", b"P2"):
        text = re.sub(rb"#[^\r\n]*", b"", data[position:])
        words = re.findall(rb"[01]", text) if kind == b"P1" else text.split()
        values = np.array(words[:count], dtype="S").astype(np.int64) if words else np.zeros(0, np.int64)
    elif kind == b"P4":
        row = -(-width // 8)
        values = np.frombuffer(data, np.uint8, offset=position + 1)[: row * height]
        count = row * height  # bytes, for the message below
        if len(values) == count:
            return np.unpackbits(values.reshape(height, row), axis=1)[:, :width].astype(np.int32)
    else:
        size = 2 if maxval > 255 else 1
        body = data[position + 1 :][: count * size]
        values = np.frombuffer(body[: len(body) // size * size], ">u2" if size == 2 else "u1")
    if len(values) < count:
        raise ValueError(f"it is truncated: {len(values)} of {count} pixels")
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("a value is outside of 0..65535")
    return values.reshape(height, width).astype(np.int32)
