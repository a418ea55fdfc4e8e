# SPDX-License-Identifier: Apache-2.0
"""Label maps for tests: real, piecewise constant, and awkward."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

SAMPLES = Path(
    os.environ.get("SPADE_FAST_SAMPLES", Path(__file__).resolve().parents[3] / "shared" / "coco_stuff_sample")
)


def cells(n: int, h: int, w: int, classes: int, seed: int = 0) -> Tensor:
    """[n, h, w] int64: each pixel has the label of the nearest of a few random points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(n, 6, 2, generator=generator) * torch.tensor([h, w])
    labels = torch.randint(classes, (n, 6), generator=generator)
    grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).float()
    nearest = (grid[None, :, :, None] - points[:, None, None]).square().sum(-1).argmin(-1)
    return labels.gather(1, nearest.view(n, -1)).view(n, h, w)


def noise(n: int, h: int, w: int, classes: int, seed: int = 0) -> Tensor:
    """[n, h, w] int64: every pixel random."""
    return torch.randint(classes, (n, h, w), generator=torch.Generator().manual_seed(seed))


def boundaries(ids: Tensor) -> Tensor:
    """[n, h, w] bool: pixels whose label differs from the left or the upper neighbor's."""
    edges = torch.zeros_like(ids, dtype=torch.bool)
    edges[:, :, 1:] |= ids[:, :, 1:] != ids[:, :, :-1]
    edges[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    return edges


def real(size: int, index: int = 0) -> Tensor:
    """[1, size, size] int64 in 0..182: a COCO-Stuff map (255 = unknown as class 182); skips where there is none."""
    files = sorted(SAMPLES.glob("*_label/*.png"))
    if not files:
        pytest.skip("no COCO-Stuff sample at hand")
    image = Image.open(files[index % len(files)]).resize((size, size), Image.NEAREST)
    labels = torch.from_numpy(np.asarray(image).astype(np.int64))
    return labels.clamp(max=182)[None]
