# SPDX-License-Identifier: Apache-2.0
"""SPADE over tensors: the layer's function for weights that live anywhere, and its gamma and beta by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast import reference
from spade_fast.labels.label_map import LabelMap
from spade_fast.labels.map_scope import recognized
from spade_fast.labels.pattern_tables import Patterns
from spade_fast.layers import spade as layers
from spade_fast.layers.as_built import changed_norm
from spade_fast.ops.embedding_sum import embedding_sum
from spade_fast.ops.modulation import modulation
from spade_fast.ops.pattern_params import pattern_params
from spade_fast.ops.statistics import statistics

EPS = 1e-5  # of the norms that are named
Norm = str | Callable[[Tensor], Tensor] | None


@dataclasses.dataclass
class ModulationNetwork:
    """The network from labels to gamma and beta (Park et al., CVPR 2019, Figure 2), and how they are used:
    ``out = norm(x) * (gamma_offset + gamma) + beta``.

    shared_weight [hidden, label_nc, k, k] and shared_bias [hidden]: the first convolution.
    gamma_weight, beta_weight [C, hidden, k, k], gamma_bias, beta_bias [C]: the two after it. Biases may be None.
    hidden_slope: negative slope of the activation between them (0: ReLU, 1: none).
    gamma_offset: 1 in the paper.
    padding: ``zeros`` or ``reflect``, of all convolutions, by k // 2.
    instance_eps: if given, gamma and beta each pass an instance norm without parameters first.
    gamma_out, beta_out: (weight [C', C, 1, 1], bias [C'] or None) of a 1×1 convolution of gamma and of beta after all
        that; C' is then the channels of x.
    """

    shared_weight: Tensor
    shared_bias: Tensor | None
    gamma_weight: Tensor
    gamma_bias: Tensor | None
    beta_weight: Tensor
    beta_bias: Tensor | None
    hidden_slope: float = 0.0
    gamma_offset: float = 1.0
    padding: str = "zeros"
    instance_eps: float | None = None
    gamma_out: tuple[Tensor, Tensor | None] | None = None
    beta_out: tuple[Tensor, Tensor | None] | None = None

    def __post_init__(self) -> None:
        if self.padding not in ("zeros", "reflect"):
            raise ValueError(f"padding must be zeros or reflect, got {self.padding!r}")
        hidden, k = self.shared_weight.shape[0], self.kernel_size
        channels = self.gamma_weight.shape[0]
        shapes = {
            "shared_weight": (hidden, self.label_nc, k, k),
            "shared_bias": (hidden,),
            "gamma_weight": (channels, hidden, k, k),
            "gamma_bias": (channels,),
            "beta_weight": (channels, hidden, k, k),
            "beta_bias": (channels,),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if k not in reference.KERNEL_SIZES:
            raise ValueError(f"the kernels' size must be one of {reference.KERNEL_SIZES}, got {k}")

    @property
    def kernel_size(self) -> int:
        return self.shared_weight.shape[-1]

    @property
    def channels(self) -> int:
        return (self.gamma_weight if self.gamma_out is None else self.gamma_out[0]).shape[0]

    @property
    def label_nc(self) -> int:
        return self.shared_weight.shape[1]


@dataclasses.dataclass
class ConstantsAndLabels:
    """A map whose first channels are constant in each image ([N, number of them]) and whose others are one-hot,
    without edges."""

    constants: Tensor
    labels: LabelMap


@dataclasses.dataclass
class _Parameters:
    """gamma and beta [P, 2C] by pattern, or [N, 2C, H, W] by pixel with no patterns."""

    values: Tensor
    patterns: Patterns | None


def gamma_beta(
    labels: LabelMap | Tensor, network: ModulationNetwork, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """gamma (without its offset) and beta of every pixel.

    Args:
        labels: LabelMap, or a map [N, label_nc, h, w]; an exactly one-hot tensor is taken as a LabelMap.
        network: the weights.
        size: (H, W) to resize the labels to by nearest neighbor; their own by default.

    Returns:
        Two tensors [N, C, H, W].

    Raises:
        ValueError: labels that do not fit the network.
    """
    shape = reference.segmap_shape(labels)
    found = _parameters(labels, network, tuple(shape[2:]) if size is None else size)
    values = found.values
    if found.patterns is not None:
        values = F.embedding(found.patterns.ids.to(torch.int64), values).permute(0, 3, 1, 2)
    channels = network.channels
    return values[:, :channels], values[:, channels:]  # slices, unlike chunks, may be written to under autograd


def spade(x: Tensor, labels: LabelMap | Tensor, network: ModulationNetwork, norm: Norm = None) -> Tensor:
    """``norm(x) * (gamma_offset + gamma) + beta`` (Park et al., CVPR 2019, equation 1).

    Args:
        x: activation [N, C, H, W].
        labels: LabelMap, or a map [N, label_nc, h, w], resized by nearest neighbor to H×W; an exactly one-hot tensor
            is taken as a LabelMap.
        network: the weights.
        norm: None; ``batch`` (statistics of this batch) or ``instance``, eps 1e-5; or a function or module of x. An
            ``nn.BatchNorm2d`` or ``nn.InstanceNorm2d`` without parameters or hooks is evaluated within the modulation
            (running statistics are updated as it does), anything else is called.

    Returns:
        [N, C, H, W] in the dtype and layout of x (of norm(x), where norm is called).

    Raises:
        ValueError: labels or x that do not fit the network; an unknown norm.
    """
    channels = network.channels
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must have shape [N, {channels}, H, W], got {list(x.shape)}")
    if len(labels) != len(x):
        raise ValueError(f"labels must be for N={len(x)} images as x is, got {len(labels)}")
    if isinstance(norm, str) and norm not in ("batch", "instance"):
        raise ValueError(f"norm must be None, batch, instance or a function, got {norm!r}")
    found = _parameters(labels, network, (x.shape[2], x.shape[3]), network.gamma_offset - 1.0)
    x, mean, rstd, depends = _normalization(x, norm)
    p = found.patterns
    ids, order, offsets = (None, None, None) if p is None else (p.ids, p.order, p.offsets)
    return modulation(x, mean, rstd, [found.values], ids, order, offsets, [1.0], 1, depends)[0]


def positional_norm(x: Tensor) -> Tensor:
    """x [N, C, H, W] minus its mean over channels at each pixel, divided by sqrt(unbiased variance + 1e-5) (Li et al.,
    Positional Normalization, NeurIPS 2019)."""
    variance, mean = torch.var_mean(x, dim=1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS)


def conditioning(labels: LabelMap | Tensor) -> LabelMap | ConstantsAndLabels | Tensor:
    """What a map stands for: a LabelMap, one behind constant channels, or itself."""
    found = layers.recognize(labels)
    if found is not labels or isinstance(labels, LabelMap):
        return found
    if labels.requires_grad or labels.is_meta or torch.compiler.is_compiling() or not labels.is_floating_point():
        return labels
    found = recognized(labels, _behind_constants)
    return labels if found is None else found


def _behind_constants(labels: Tensor) -> ConstantsAndLabels | None:
    if labels.dim() != 4 or labels.numel() == 0:
        return None
    values = labels.detach()
    if not bool((values[:, :1] == values[:, :1, :1, :1]).all()):
        return None
    constant = (values == values[:, :, :1, :1]).all(3).all(2).all(0)
    count = int(constant.to(torch.uint8).cummin(0).values.sum())
    # A label that no image or every pixel of an image has is constant too: channels of 0 and 1 are left to the labels.
    first = values[:, :count, 0, 0]
    plain = ((first == 0) | (first == 1)).all(0).tolist()
    while count and plain[count - 1]:
        count -= 1
    if count == 0 or count == values.shape[1]:
        return None
    rest = LabelMap.from_segmap(values[:, count:])
    return None if rest is None or rest.has_edges else ConstantsAndLabels(first[:, :count].clone(), rest)


def _parameters(
    labels: LabelMap | Tensor, network: ModulationNetwork, size: tuple[int, int], gamma_shift: float = 0.0
) -> _Parameters:
    """gamma + gamma_shift and beta at H×W."""
    shape = reference.segmap_shape(labels)
    if len(shape) != 4 or shape[1] != network.label_nc:
        raise ValueError(f"labels must have {network.label_nc} channels as the network has, got {list(shape)}")
    found = conditioning(labels)
    reflect = network.padding == "reflect"
    if reflect and min(size) <= network.kernel_size // 2:
        raise ValueError(f"reflection padding by {network.kernel_size // 2} needs more pixels than that, got {size}")
    patterns = None
    if not isinstance(found, Tensor):
        constants = found.constants if isinstance(found, ConstantsAndLabels) else None
        found = found if constants is None else found.labels
        patterns = found.patterns(*size, network.kernel_size, torch.is_grad_enabled(), network.padding)
        # A traced graph must not depend on how many patterns this map has.
        if not torch.compiler.is_compiling() and patterns.density > layers.DENSE_ABOVE:
            rows = _hidden_rows(patterns.pixel_codes, patterns, found, network, constants, by_pixel=True)
            hidden = rows.view(*patterns.hidden_ids.shape, -1).permute(0, 3, 1, 2)
            patterns = None
        else:
            hidden = _hidden_rows(patterns.codes, patterns, found, network, constants)
    else:
        if tuple(found.shape[2:]) != tuple(size):
            found = F.interpolate(found, size=size, mode="nearest")
        found = found.to(network.shared_weight.dtype)
        hidden = _activate(_convolve(found, network.shared_weight, network.shared_bias, reflect), network.hidden_slope)
    gamma_bias = network.gamma_bias
    last = network.instance_eps is None and network.gamma_out is None
    if gamma_shift and last:
        gamma_bias = _bias(network.gamma_weight, gamma_bias) + gamma_shift
    if patterns is None:
        values = _by_pixel(hidden, network, gamma_bias, reflect)
    else:
        values = pattern_params(
            hidden,
            patterns.taps,
            network.gamma_weight,
            _bias(network.gamma_weight, gamma_bias),
            network.beta_weight,
            _bias(network.beta_weight, network.beta_bias),
            patterns.tap_order,
            patterns.tap_offsets,
        )
    if network.instance_eps is not None:
        values = _instance_norm(values, patterns, network.instance_eps)
    if network.gamma_out is not None:
        halves = zip(values.chunk(2, dim=1), (network.gamma_out, network.beta_out), strict=True)
        values = torch.cat([_mix(half, *out) for half, out in halves], dim=1)
    if gamma_shift and not last:
        gamma, beta = values.chunk(2, dim=1)
        values = torch.cat([gamma + gamma_shift, beta], dim=1)
    return _Parameters(values, patterns)


def _mix(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution of values by pattern [P, C], or by pixel [N, C, H, W]."""
    return F.conv2d(values, weight, bias) if values.dim() == 4 else F.linear(values, weight.flatten(1), bias)


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def _activate(hidden: Tensor, slope: float) -> Tensor:
    if slope == 0.0:
        return F.relu(hidden)
    return hidden if slope == 1.0 else F.leaky_relu(hidden, slope)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reflect: bool) -> Tensor:
    pad = weight.shape[-1] // 2
    if reflect and pad:
        return F.conv2d(F.pad(x, (pad,) * 4, mode="reflect"), weight, bias)
    return F.conv2d(x, weight, bias, padding=pad)


def _by_pixel(hidden: Tensor, network: ModulationNetwork, gamma_bias: Tensor | None, reflect: bool) -> Tensor:
    gamma, beta = network.gamma_weight, network.beta_weight
    bias = None
    if gamma_bias is not None or network.beta_bias is not None:
        bias = torch.cat([_bias(gamma, gamma_bias), _bias(beta, network.beta_bias)])
    return _convolve(hidden, torch.cat([gamma, beta]), bias, reflect)


def _hidden_rows(
    codes: Tensor,
    patterns: Patterns,
    labels: LabelMap,
    network: ModulationNetwork,
    constants: Tensor | None,
    by_pixel: bool = False,
) -> Tensor:
    """[Q, hidden]: the hidden layer at label patches, codes [Q, k·k], image after image."""
    k = network.kernel_size
    table = network.shared_weight.permute(2, 3, 1, 0).reshape(k * k, network.label_nc, -1)
    slope = network.hidden_slope
    if constants is not None:
        count = constants.shape[1]
        base = torch.einsum("tch,nc->tnh", table[:, :count], constants.to(table.dtype))
        table = table[:, count:]
        rows = F.pad(table, (0, 0, 0, 1))  # of an ignored pixel: the constants alone
        table = (rows[:, None] + base[:, :, None]).flatten(1, 2)
        pixels = patterns.hidden_ids[0].numel()
        lengths = [pixels] * len(labels) if by_pixel else list(patterns.hidden_counts)
        image = torch.arange(len(labels), dtype=codes.dtype, device=codes.device)
        image = image.repeat_interleave(torch.tensor(lengths, device=codes.device))
        shifted = codes.clamp(max=rows.shape[1] - 1) + image[:, None] * rows.shape[1]
        codes = torch.where(codes < 0, codes, shifted)
    out = embedding_sum(table, network.shared_bias, codes, labels.has_edges, relu=slope == 0.0)
    return out if slope == 0.0 else _activate(out, slope)


def _instance_norm(values: Tensor, patterns: Patterns | None, eps: float) -> Tensor:
    """The instance norm of a map given by pixel, or by pattern: statistics are then weighted by the patterns' sizes."""
    if patterns is None:
        return reference.instance_norm(values, eps=eps)
    # In float64: the table is small, and sums over patterns of very different sizes cancel in its gradient.
    rows, n, pixels = values.to(torch.float64), len(patterns.ids), patterns.ids[0].numel()
    counts = torch.tensor(patterns.counts, device=values.device)
    image = torch.arange(n, device=values.device).repeat_interleave(counts)
    sizes = torch.bincount(patterns.ids.reshape(-1), minlength=len(rows)).to(rows.dtype)[:, None] / pixels
    mean = rows.new_zeros(n, rows.shape[1]).index_add(0, image, rows * sizes)
    centered = rows - mean[image]
    variance = rows.new_zeros(n, rows.shape[1]).index_add(0, image, centered.square() * sizes)
    return (centered * torch.rsqrt(variance + eps)[image]).to(values.dtype)


def is_native(norm: Norm) -> bool:
    """Whether `spade` evaluates a norm within the modulation."""
    known = type(norm) in (nn.BatchNorm2d, nn.InstanceNorm2d, reference.InstanceNorm2d)
    return known and changed_norm(norm, norm.num_features) is None


def _normalization(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """(x, mean, rstd, whether they depend on x); updates running statistics."""
    if norm is None:
        return x, None, None, False
    n, _, h, w = x.shape
    if isinstance(norm, str):
        module = nn.BatchNorm2d if norm == "batch" else nn.InstanceNorm2d
        options = {"track_running_stats": False} if norm == "batch" else {}
        norm = module(x.shape[1], affine=False, **options)
    if not is_native(norm):
        return norm(x), None, None, False
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    per_sample = isinstance(norm, nn.InstanceNorm2d)
    if not per_sample and not norm.training and norm.running_mean is not None:
        mean, variance = norm.running_mean[None].to(acc), norm.running_var[None].to(acc)
        return x, mean, torch.rsqrt(variance + norm.eps), False
    count = h * w if per_sample else n * h * w
    if count < 2 or x.numel() == 0:  # an error, or nothing to do: the norm's own
        return norm(x), None, None, False
    mean, m2 = statistics(x, per_sample)
    if not per_sample and norm.training and norm.running_mean is not None:
        _update_running(norm, mean[0], m2[0] / (count - 1))
    return x, mean, torch.rsqrt(m2 / count + norm.eps), True


@torch.no_grad()
def _update_running(norm: nn.BatchNorm2d, mean: Tensor, unbiased: Tensor) -> None:
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.lerp_(new.to(running.dtype), momentum)
