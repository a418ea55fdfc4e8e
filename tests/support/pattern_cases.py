# SPDX-License-Identifier: Apache-2.0
"""Label maps with every odd shape, and the definition of their patterns written out."""

import maps
import torch
import torch.nn.functional as F

MAPS = {
    "cells": maps.cells(2, 19, 23, 5),
    "one label": torch.full((2, 8, 8), 3),
    "noise": maps.noise(2, 13, 9, 300),
    "1x1": maps.noise(3, 1, 1, 2),
    "one row": maps.noise(1, 1, 37, 2),
    "one column": maps.noise(2, 37, 1, 2),
    "equal images": maps.cells(1, 9, 9, 3).expand(3, -1, -1),
}


def written_out(codes: torch.Tensor, k: int):
    """The definition, pixel by pixel: patches numbered by first appearance, image after image."""
    n, h, w = codes.shape
    padded = F.pad(codes, (k // 2,) * 4, value=-1)
    ids, taps, counts = torch.empty(n, h, w, dtype=torch.int32), [], []
    for image in range(n):
        seen: dict[tuple, int] = {}
        for y in range(h):
            for x in range(w):
                patch = tuple(padded[image, y : y + k, x : x + k].flatten().tolist())
                if patch not in seen:
                    seen[patch] = len(taps)
                    taps.append(patch)
                ids[image, y, x] = seen[patch]
        counts.append(len(seen))
    return ids, torch.tensor(taps, dtype=torch.int32), torch.tensor(counts)
