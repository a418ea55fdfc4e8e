# SPDX-License-Identifier: Apache-2.0
"""γ and β of dense conditioning. Where x is larger than the map by a whole factor, most work is at the map's size."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.labels.pattern_tables import nearest_index

MOST_TAPS = 0.5  # share of the plain first convolution's taps; above this, assembling costs more than it saves
FEWEST_PIXELS = 96 * 96  # of the output; below this, call overhead costs more than it saves

# Along one axis, a kind of position in a block: the offset of the first block it reads, and for each block it reads a 0
# or 1 for each tap. An axis lists its kinds, each with its first and last + 1 position.
Kind = tuple[int, tuple[tuple[int, ...], ...]]
Axis = list[tuple[Kind, int, int]]


def dense_gamma_beta(
    segmap: Tensor,
    size: tuple[int, int],
    shared_weight: Tensor,
    shared_bias: Tensor | None,
    gamma_weight: Tensor,
    gamma_bias: Tensor | None,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    hidden_slope: float = 0.0,
) -> Tensor:
    """γ and β of every pixel from a dense map (Park et al., CVPR 2019, section 3, equation 1).

    Args:
        segmap: dense map [N, L, h, w]; enlarged to ``size`` by nearest neighbor.
        size: (H, W) of the output.
        shared_weight, shared_bias: of the first convolution, [hidden, L, k, k] and [hidden] or None.
        gamma_weight, gamma_bias, beta_weight, beta_bias: [C, hidden, k, k] and [C] or None.
        hidden_slope: negative slope of the LeakyReLU between the convolutions; 0 is ReLU.

    Returns:
        [N, 2·C, H, W] = [γ | β]. Convolutions pad with k // 2 zeros.
    """
    segmap = segmap.to(shared_weight.dtype)
    if segmap.device.type == "cpu":  # a convolution of another layout takes longer than this copy
        segmap = segmap.contiguous(memory_format=torch.channels_last)
    factors = _factors(tuple(segmap.shape[2:]), tuple(size)) if _worth_it(segmap, size) else None
    if factors is not None and _taps(factors, tuple(shared_weight.shape[2:])) <= MOST_TAPS:
        hidden = hidden_of_blocks(segmap, factors, shared_weight, shared_bias, hidden_slope)
    else:
        if tuple(segmap.shape[2:]) != tuple(size):
            segmap = F.interpolate(segmap, size=tuple(size), mode="nearest")
        hidden = F.conv2d(segmap, shared_weight, shared_bias, padding=_padding(shared_weight))
        hidden = _activate(hidden, hidden_slope)
    return merged_gamma_beta(hidden, gamma_weight, gamma_bias, beta_weight, beta_bias)


def merged_gamma_beta(
    hidden: Tensor, gamma_weight: Tensor, gamma_bias: Tensor | None, beta_weight: Tensor, beta_bias: Tensor | None
) -> Tensor:
    """[N, 2·C, H, W] = [γ | β] of a hidden map [N, hidden, H, W], by one convolution.

    Weights and biases as in :func:`dense_gamma_beta`.
    """
    n, _, h, w = hidden.shape
    padding = _padding(gamma_weight)
    if n * h * w < gamma_weight[0].numel():  # the outputs are smaller than the weights: join the outputs
        pairs = ((gamma_weight, gamma_bias), (beta_weight, beta_bias))
        return torch.cat([F.conv2d(hidden, weight, bias, padding=padding) for weight, bias in pairs], dim=1)
    return F.conv2d(
        hidden, torch.cat([gamma_weight, beta_weight]), _join(gamma_bias, beta_bias, gamma_weight), padding=padding
    )


def _padding(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2] // 2, weight.shape[3] // 2


def _join(gamma: Tensor | None, beta: Tensor | None, weight: Tensor) -> Tensor | None:
    if gamma is None and beta is None:
        return None
    zeros = weight.new_zeros(weight.shape[0])
    return torch.cat([zeros if gamma is None else gamma, zeros if beta is None else beta])


def _activate(hidden: Tensor, slope: float) -> Tensor:
    return hidden.relu_() if slope == 0 else F.leaky_relu(hidden, slope)


def _worth_it(segmap: Tensor, size: tuple[int, int]) -> bool:
    # The thresholds were measured on CPUs only. A traced graph must not depend on the sizes.
    return (
        segmap.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and segmap.numel() > 0
        and segmap.shape[0] * size[0] * size[1] >= FEWEST_PIXELS
    )


@functools.lru_cache(maxsize=256)
def _factors(small: tuple[int, int], large: tuple[int, int]) -> tuple[int, int] | None:
    """How many times larger each axis is. None where nearest neighbor does not make blocks of equal size."""
    for s, to in zip(small, large, strict=True):
        # Nearest neighbor's index is a rounded product: not every whole factor gives equal blocks.
        if to % s or nearest_index(s, to).tolist() != [i // (to // s) for i in range(to)]:
            return None
    return large[0] // small[0], large[1] // small[1]


@functools.lru_cache(maxsize=64)
def _axis(factor: int, kernel_size: int) -> Axis:
    """The kinds of positions of a block, along one axis. Positions of a kind read the same blocks by the same taps."""
    kinds: Axis = []
    for position in range(factor):
        reads = [(position + tap - kernel_size // 2) // factor for tap in range(kernel_size)]
        blocks = range(reads[0], reads[-1] + 1)
        kind = (reads[0], tuple(tuple(int(read == block) for read in reads) for block in blocks))
        if kinds and kinds[-1][0] == kind:
            kinds[-1] = (kind, kinds[-1][1], position + 1)
        else:
            kinds.append((kind, position, position + 1))
    return kinds


def _taps(factors: tuple[int, int], kernel: tuple[int, ...]) -> float:
    """Taps that are computed for a block, as a share of the taps of its pixels."""
    counts = [sum(len(kind[1]) for kind, _, _ in _axis(f, k)) for f, k in zip(factors, kernel, strict=True)]
    return counts[0] * counts[1] / (factors[0] * factors[1] * kernel[0] * kernel[1])


def hidden_of_blocks(
    segmap: Tensor, factors: tuple[int, int], weight: Tensor, bias: Tensor | None, slope: float
) -> Tensor:
    """The hidden layer [N, hidden, h·fy, w·fx], channels-last, of segmap [N, L, h, w] enlarged (fy, fx) times.

    The pixels of a block share their value. So the weights of the taps that read one block are added before the
    convolution. Positions that read the same blocks by the same taps share their sum.

    Args:
        segmap: [N, L, h, w].
        factors: (fy, fx).
        weight, bias: of the first convolution, [hidden, L, k, k] and [hidden] or None.
        slope: negative slope of the activation.
    """
    h, w = segmap.shape[2:]
    axes = [_axis(f, k) for f, k in zip(factors, weight.shape[2:], strict=True)]
    parts, places = [], []
    for rows in _by_size(axes[0]):
        for columns in _by_size(axes[1]):
            joined = _collapse(weight, rows, columns)
            pads = [max(max(-kind[0], kind[0] + len(kind[1]) - 1) for kind, _, _ in axis) for axis in (rows, columns)]
            together = len(rows) * len(columns)
            out = F.conv2d(segmap, joined, None if bias is None else bias.repeat(together), padding=pads)
            out = _activate(out, slope).permute(0, 2, 3, 1).unflatten(3, (together, -1))
            for i, (kind_y, y0, y1) in enumerate(rows):
                for j, (kind_x, x0, x1) in enumerate(columns):
                    top, left = pads[0] + kind_y[0], pads[1] + kind_x[0]
                    parts.append(out[:, top : top + h, left : left + w, i * len(columns) + j])
                    places.append((y0, y1, x0, x1))
    blocks = _Assemble.apply(factors, places, *parts)
    return blocks.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _by_size(axis: Axis) -> list[Axis]:
    """The kinds, grouped by how many blocks they read. One convolution computes a group."""
    sizes = dict.fromkeys(len(kind[1]) for kind, _, _ in axis)
    return [[entry for entry in axis if len(entry[0][1]) == size] for size in sizes]


def _collapse(weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """[kinds of rows · kinds of columns · hidden, L, blocks, blocks]: the weights of the taps on each block, added."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    y, x = (exact.new_tensor([kind[1] for kind, _, _ in axis]) for axis in (rows, columns))
    with torch.autocast("cpu", enabled=False):  # weights are added before they are rounded
        joined = torch.einsum("oiyx,ray,cbx->rcoabi", exact, y, x)
    return joined.flatten(0, 2).permute(0, 3, 1, 2).to(weight.dtype)


class _Assemble(torch.autograd.Function):
    """[N, h, fy, w, fx, C] with each part [N, h, w, C] at its place (y0, y1, x0, x1) in all blocks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(factors: tuple[int, int], places: list[tuple[int, ...]], *parts: Tensor) -> Tensor:
        n, h, w, c = parts[0].shape
        out = parts[0].new_empty(n, h, factors[0], w, factors[1], c)
        for part, (y0, y1, x0, x1) in zip(parts, places, strict=True):
            out[:, :, y0:y1, :, x0:x1] = part[:, :, None, :, None]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.places = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad[:, :, y0:y1, :, x0:x1].sum((2, 4)) for y0, y1, x0, x1 in ctx.places)
