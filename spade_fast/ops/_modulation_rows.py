# SPDX-License-Identifier: Apache-2.0
"""What the torch forward and backward of modulation share: blocks of rows, statistics, folded parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spade_fast.ops import _register

BLOCK_ELEMENTS = 2**19  # Elements of x in a block on a CPU: the buffers of a block stay in cache.
BLOCK_ELEMENTS_GPU = 2**27


@dataclass(frozen=True)
class Norm:
    """Statistics of x in the dtype of accumulation."""

    mean: Tensor  # [G, C], G = 1 or N
    rstd: Tensor  # [G, C]

    @property
    def per_sample(self) -> bool:
        return self.mean.shape[0] != 1

    def group(self, image: int) -> int:
        """The row of mean and rstd that holds for an image."""
        return image if self.per_sample else 0


def norm_of(mean: Tensor | None, rstd: Tensor | None, dtype: torch.dtype) -> Norm | None:
    if mean is None or rstd is None:
        return None
    return Norm(mean.to(dtype), rstd.to(dtype))


def is_per_sample(norm: Norm | None) -> bool:
    return norm is not None and norm.per_sample


class Block(NamedTuple):
    """Some rows of x, which are handled at once."""

    rows: slice  # into tensors [N·H, ...]
    pixels: slice  # into the flattened output pixels [N·Ho·Wo]
    image: int  # of the first row


class Rows:
    """The rows of pixels of one call.

    Attributes:
        n, c, h, w: shape of x.
        x: [N·H, 1, W, 1, C], x in channels-last order.
        pixels: output pixels of one row of x.
    """

    def __init__(self, x: Tensor, upsample: int) -> None:
        self.n, self.c, self.h, self.w = x.shape
        self.upsample = upsample
        self.acc = _register.accumulation_dtype(x.dtype)
        self.x = self.of_input(x)
        self.pixels = upsample * upsample * self.w
        elements = BLOCK_ELEMENTS if x.device.type == "cpu" else BLOCK_ELEMENTS_GPU
        self._step = max(1, elements // max(1, self.pixels * self.c))

    def of_input(self, t: Tensor) -> Tensor:
        """[N·H, 1, W, 1, C] of a tensor of x's size: a view when t is channels-last, otherwise a copy."""
        t = t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return t.reshape(-1, 1, self.w, 1, self.c)

    def of_output(self, t: Tensor) -> Tensor:
        """[N·H, up, W, up, channels] of a tensor of the output's size: a view when t is channels-last."""
        t = t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return t.reshape(-1, self.upsample, self.w, self.upsample, t.shape[-1])

    def blocks(self, rows: slice | None = None, *, split_images: bool) -> Iterator[Block]:
        """Cuts rows (default: all) into blocks; with split_images, a block lies in one image."""
        start, end = (0, self.n * self.h) if rows is None else (rows.start, rows.stop)
        while start < end:
            stop = min(start + self._step, end)
            if split_images:
                stop = min(stop, (start // self.h + 1) * self.h)
            yield Block(slice(start, stop), slice(start * self.pixels, stop * self.pixels), start // self.h)
            start = stop

    def gather(self, table: Tensor, pattern_ids: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """The two halves of table [P, 2C] at a block's output pixels: [rows, up, W, up, C] each."""
        found = table.index_select(0, pattern_ids[block.pixels])
        scale, shift = found.view(-1, self.upsample, self.w, self.upsample, 2 * self.c).chunk(2, -1)
        return scale, shift


def normalized(x: Tensor, norm: Norm | None, image: int) -> Tensor:
    """(x - mean) * rstd of rows of one image; of any rows when the statistics are shared."""
    if norm is None:
        return x
    mean, rstd = norm.mean[norm.group(image)], norm.rstd[norm.group(image)]
    return torch.addcmul(-(mean * rstd), x, rstd)


def _image_of_pattern(pattern_ids: Tensor, num: int) -> Tensor:
    """The image [P] of each pattern: no two images share a pattern."""
    n = pattern_ids.shape[0]
    image = torch.zeros(num, dtype=torch.int64, device=pattern_ids.device)
    pixels = pattern_ids[0].numel() if n else 0
    image[pattern_ids.reshape(-1)] = torch.arange(n, device=pattern_ids.device).repeat_interleave(pixels)
    return image


def folded(params: Tensor, norm: Norm | None, pattern_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, 2C] = [scale | shift] with x * scale + shift = (x - mean) * rstd * (1 + gamma) + beta."""
    c = params.shape[1] // 2
    params = params.to(dtype)  # Before the 1 is added: half precision would round the sum.
    table = torch.empty_like(params)
    scale, shift = table[:, :c], table[:, c:]
    torch.add(params[:, :c], 1.0, out=scale)
    if norm is None:
        shift.copy_(params[:, c:])
        return table
    mean, rstd = norm.mean, norm.rstd
    if norm.per_sample:
        image = _image_of_pattern(pattern_ids, params.shape[0])
        mean, rstd = mean[image], rstd[image]
    scale.mul_(rstd)
    torch.addcmul(params[:, c:], mean, scale, value=-1, out=shift)
    return table
