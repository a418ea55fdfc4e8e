# SPDX-License-Identifier: Apache-2.0
"""What the launchers share: tuning, devices, tile shapes, addresses.

Results are bitwise equal from run to run. Only kernels whose results do not depend on the tile are tuned: those that
work by element, and the GEMM, which has the same K step in every config. Kernels that reduce have fixed shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import triton
import triton.language as tl
import triton.testing

try:  # Triton >= 3.4 keeps its settings in knobs.
    from triton import knobs

    INTERPRET = bool(knobs.runtime.interpret)
except ImportError:
    import os

    INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _bench(fn: Callable[[], None], quantiles: tuple[float, ...] | None = None):
    if INTERPRET:  # Times mean nothing there, so the first config is taken.
        return [0.0] * len(quantiles or (0.5,))
    return triton.testing.do_bench(fn, warmup=5, rep=20, quantiles=quantiles)


def autotune(configs: list[triton.Config], key: list[str]):
    """``triton.autotune`` with a short measurement. Under the interpreter nothing is measured."""
    return triton.autotune(configs=configs, key=key, do_bench=_bench)


# TILE: elements of the [pixels, channels] tile of one program. A thread has 8, which is one 16-byte access in half
# precision. With more, registers spill where a pixel has four output positions and two outputs.
TILES = [
    triton.Config({"TILE": 1024}, num_warps=4),
    triton.Config({"TILE": 2048}, num_warps=8),
]


def block_channels(channels: int, channel_stride: int, limit: int = 128) -> int:
    """Channels of a tile: many when channels are adjacent in memory, few when pixels are, as in NCHW."""
    return min(triton.next_power_of_2(max(channels, 1)), limit if channel_stride == 1 or channels == 1 else 8)


def on_device(t: torch.Tensor):
    """A context in which t's CUDA device is current, because Triton launches kernels on the current device."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()


def empty_activation(like: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """An uninitialized tensor [N, C, H, W] of `like`'s dtype: channels-last if `like` is, otherwise contiguous."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout_of(like))


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """channels_last if x's channels are adjacent in memory, as they are in a slice of such a tensor too."""
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def grid_of(n: int, hw: int, c: int, block: int):
    """The grid of a tuned kernel: tiles of pixels of every image × blocks of channels."""
    return lambda meta: (n * triton.cdiv(hw, meta["TILE"] // block), triton.cdiv(c, block))


def group_step_of(mean: torch.Tensor | None) -> int:
    """What the kernels multiply an image's number with to get its row of mean [G, C]: 0 where G = 1."""
    return int(mean is not None and mean.shape[0] > 1)


@triton.jit
def pixel_tile(pid, HW, W, ROWS: tl.constexpr):
    """The tile of ROWS pixels of a program: its image (int64), a mask of rows inside the image, y and x [ROWS]."""
    tiles = tl.cdiv(HW, ROWS)
    n = (pid // tiles).to(tl.int64)
    p = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    y = p // W
    return n, p < HW, y, p - y * W


@triton.jit
def place(strides, n, y, x, cols):
    """Offsets [ROWS, BLOCK_C] of channels cols [BLOCK_C] at pixels (n, y, x) [ROWS]. strides: (n, c, h, w)."""
    at = n * strides[0] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return at[:, None] + (cols.to(tl.int64) * strides[1])[None, :]


@triton.jit
def load_norm(mean, rstd, group, cols, col_mask, C: tl.constexpr):
    """mean and rstd [BLOCK_C] of a group, or 0 and 1 if mean is None."""
    if mean is not None:
        center = tl.load(mean + group * C + cols, mask=col_mask, other=0.0)
        scale = tl.load(rstd + group * C + cols, mask=col_mask, other=0.0)
    else:
        center = tl.zeros(cols.shape, tl.float32)
        scale = center + 1.0
    return center, scale


@triton.jit
def load_pattern(pattern_ids, n, y, x, HW_OUT, W_OUT, row_mask, mask):
    """The pattern [ROWS] of each output pixel, and the mask of its parameters. Dense parameters use no pattern."""
    if pattern_ids is None:
        pattern = y
        known = mask
    else:
        pattern = tl.load(pattern_ids + n * HW_OUT + y * W_OUT + x, mask=row_mask, other=-1)
        known = mask & (pattern >= 0)[:, None]
    return pattern, known


@triton.jit
def load_params(params, strides, pattern, n, y, x, cols, mask, C: tl.constexpr, DENSE: tl.constexpr):
    """gamma and beta, fp32 [ROWS, BLOCK_C], from rows [P, 2C] by pattern or from dense [N, 2C, Ho, Wo]."""
    if DENSE:
        at = params + place(strides, n, y, x, cols)
    else:
        at = params + (pattern.to(tl.int64) * strides[0])[:, None] + (cols.to(tl.int64) * strides[1])[None, :]
    gamma = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    beta = tl.load(at + C * strides[1], mask=mask, other=0.0).to(tl.float32)
    return gamma, beta
