# SPDX-License-Identifier: Apache-2.0
"""Colors to show label maps in."""

from __future__ import annotations

import numpy as np


def distinct_colors(count: int) -> np.ndarray:
    """A color for each of `count` classes, all different: uint8 [count, 3].

    The Pascal VOC color map: the bits of the class number are dealt to R, G and B from the highest bit of each down,
    which is a bijection of 24-bit numbers.
    """
    numbers = np.arange(count, dtype=np.int64)
    colors = np.zeros((count, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (numbers >> (3 * bit + channel) & 1) << (7 - bit)
    return colors.astype(np.uint8)
