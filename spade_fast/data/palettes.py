# SPDX-License-Identifier: Apache-2.0
"""Colors to show label maps in."""

from __future__ import annotations

import numpy as np


def distinct_colors(count: int) -> np.ndarray:
    """A different color for each class: the Pascal VOC color map.

    The bits of the class number go to red, green and blue in turn, and fill each from its highest bit down. This is a
    bijection of 24-bit numbers.

    Args:
        count: number of classes, at most 2^24.

    Returns:
        uint8 [count, 3].

    Examples:
        >>> distinct_colors(3).tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    numbers = np.arange(count, dtype=np.int64)
    colors = np.zeros((count, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (numbers >> (3 * bit + channel) & 1) << (7 - bit)
    return colors.astype(np.uint8)
