# SPDX-License-Identifier: Apache-2.0
"""SPADE as a function of tensors: the layer for weights that live anywhere, and its gamma and beta alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast import reference
from spade_fast.labels.conditioning import ConstantsAndLabels, conditioning
from spade_fast.labels.label_map import LabelMap
from spade_fast.labels.pattern_tables import PatternTables
from spade_fast.layers.as_built import changed_norm
from spade_fast.layers.dense import dense_gamma_beta, merged_gamma_beta
from spade_fast.layers.normalization import Normalization, modulated, normalizations
from spade_fast.layers.patches import by_pixel, few_repeats, hidden_of_patches, weight_table
from spade_fast.ops.pattern_params import pattern_params

__all__ = [
    "ConstantsAndLabels",
    "ModulationNetwork",
    "Norm",
    "conditioning",
    "gamma_beta",
    "is_native",
    "positional_norm",
    "spade",
]
EPS = 1e-5  # of the norms that are given by name
Norm = str | Callable[[Tensor], Tensor] | None


@dataclasses.dataclass
class ModulationNetwork:
    """The network from labels to gamma and beta (Park et al., CVPR 2019, Figure 2).

    They are used as ``norm(x) * (gamma_offset + gamma) + beta``.

    Args:
        shared_weight, shared_bias: the first convolution, [hidden, label_nc, k, k] and [hidden] or None.
        gamma_weight, gamma_bias: the convolution to gamma, [C, hidden, k, k] and [C] or None.
        beta_weight, beta_bias: the convolution to beta, of the same shapes.
        hidden_slope: negative slope of the activation after the first convolution. 0 is ReLU, 1 is none.
        gamma_offset: what is added to gamma; 1 in the paper.
        padding: ``zeros`` or ``reflect``. All convolutions pad by k // 2 pixels.
        instance_eps: eps of an instance norm without parameters that gamma and beta each pass. None: no norm.
        gamma_out, beta_out: (weight [C', C, 1, 1], bias [C'] or None) of a 1×1 convolution of gamma and of beta after
            all that. C' is then the number of channels of x. None: no such convolution.

    Raises:
        ValueError: a shape, the kernels' size or padding does not fit.
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
        """k of the k×k kernels."""
        return self.shared_weight.shape[-1]

    @property
    def channels(self) -> int:
        """Channels of gamma, of beta and of x."""
        return (self.gamma_weight if self.gamma_out is None else self.gamma_out[0]).shape[0]

    @property
    def label_nc(self) -> int:
        """Channels of the map."""
        return self.shared_weight.shape[1]


@dataclasses.dataclass
class _Parameters:
    """gamma and beta [P, 2C] by pattern. Without patterns, [N, 2C, H, W] by pixel."""

    values: Tensor
    patterns: PatternTables | None


def gamma_beta(
    labels: LabelMap | Tensor, network: ModulationNetwork, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """gamma, without its offset, and beta of every pixel (Park et al., CVPR 2019, Figure 2).

    Examples:
        >>> network = ModulationNetwork(torch.ones(8, 3, 3, 3), None, *(torch.ones(4, 8, 3, 3), None) * 2)
        >>> gamma, beta = gamma_beta(torch.zeros(1, 3, 16, 16), network, size=(8, 8))
        >>> gamma.shape
        torch.Size([1, 4, 8, 8])

    Args:
        labels: LabelMap, or a map [N, label_nc, h, w]. An exactly one-hot tensor is taken as a LabelMap.
        network: the weights.
        size: (H, W) in pixels to which labels are resized by nearest neighbor; their own by default.

    Returns:
        gamma and beta, each [N, C, H, W].

    Raises:
        ValueError: labels do not fit the network, or the map is too small for reflection padding.
    """
    shape = reference.segmap_shape(labels)
    found = _parameters(labels, network, (shape[2], shape[3]) if size is None else size)
    values = found.values
    if found.patterns is not None:
        values = F.embedding(found.patterns.pattern_of_pixel.to(torch.int64), values).permute(0, 3, 1, 2)
    channels = network.channels
    return values[:, :channels], values[:, channels:]  # slices, unlike chunks, may be written to under autograd


def spade(x: Tensor, labels: LabelMap | Tensor, network: ModulationNetwork, norm: Norm = None) -> Tensor:
    """``norm(x) * (gamma_offset + gamma) + beta`` (Park et al., CVPR 2019, equation 1).

    Examples:
        >>> network = ModulationNetwork(torch.ones(8, 3, 3, 3), None, *(torch.ones(4, 8, 3, 3), None) * 2)
        >>> spade(torch.randn(1, 4, 8, 8), torch.zeros(1, 3, 16, 16), network, norm="instance").shape
        torch.Size([1, 4, 8, 8])

    Args:
        x: activation [N, C, H, W].
        labels: LabelMap, or a map [N, label_nc, h, w]. It is resized by nearest neighbor to H×W. An exactly one-hot
            tensor is taken as a LabelMap.
        network: the weights.
        norm: None for no norm; ``batch`` for statistics of this batch, or ``instance``, with eps 1e-5; or a function or
            module of x. An ``nn.BatchNorm2d`` or ``nn.InstanceNorm2d`` without parameters or hooks is evaluated within
            the modulation, which updates running statistics as the module does. Any other is called.

    Returns:
        [N, C, H, W] in the dtype and layout of x, or of norm(x) where norm is called.

    Raises:
        ValueError: labels or x do not fit the network, or norm is unknown.
    """
    channels = network.channels
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must have shape [N, {channels}, H, W], got {list(x.shape)}")
    if len(labels) != len(x):
        raise ValueError(f"labels must be for N={len(x)} images as x is, got {len(labels)}")
    if isinstance(norm, str) and norm not in ("batch", "instance"):
        raise ValueError(f"norm must be None, batch, instance or a function, got {norm!r}")
    found = _parameters(labels, network, (x.shape[2], x.shape[3]), network.gamma_offset - 1.0)
    x, normalization = _normalization(x, norm)
    return modulated(x, normalization, [found.values], found.patterns, [1.0])[0]


def positional_norm(x: Tensor) -> Tensor:
    """Normalizes over the channels of each pixel (Li et al., Positional Normalization, NeurIPS 2019).

    The result is (x - mean) / sqrt(unbiased variance + 1e-5).

    Args:
        x: [N, C, H, W].

    Returns:
        [N, C, H, W].
    """
    variance, mean = torch.var_mean(x, dim=1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS)


def _parameters(
    labels: LabelMap | Tensor, network: ModulationNetwork, size: tuple[int, int], gamma_shift: float = 0.0
) -> _Parameters:
    """gamma + gamma_shift and beta at H×W."""
    shape = reference.segmap_shape(labels)
    if len(shape) != 4 or shape[1] != network.label_nc:
        raise ValueError(f"labels must have {network.label_nc} channels as the network has, got {list(shape)}")
    if network.padding == "reflect" and min(size) <= network.kernel_size // 2:
        raise ValueError(f"reflection padding by {network.kernel_size // 2} needs more pixels than that, got {size}")
    found = conditioning(labels)
    # Before a norm or another convolution, the shift is not a part of the bias.
    bias_is_last = network.instance_eps is None and network.gamma_out is None
    gamma_bias = network.gamma_bias
    if gamma_shift and bias_is_last:
        gamma_bias = _bias(network.gamma_weight, gamma_bias) + gamma_shift
    patterns = None
    if isinstance(found, Tensor):
        values = _of_dense(found, network, gamma_bias, size)
    else:
        constants = found.constants if isinstance(found, ConstantsAndLabels) else None
        label_map = found.labels if isinstance(found, ConstantsAndLabels) else found
        patterns = label_map.patterns(*size, network.kernel_size, torch.is_grad_enabled(), network.padding)
        if few_repeats(patterns):
            rows = _hidden_rows(patterns.pixel_codes, patterns, label_map, network, constants, each_pixel=True)
            values = _of_hidden(by_pixel(rows, patterns), network, gamma_bias)
            patterns = None
        else:
            rows = _hidden_rows(patterns.patch_codes, patterns, label_map, network, constants)
            values = _of_patterns(rows, patterns, network, gamma_bias)
    if network.instance_eps is not None:
        values = _instance_norm(values, patterns, network.instance_eps)
    if network.gamma_out is not None and network.beta_out is not None:
        gamma, beta = values.chunk(2, dim=1)
        values = torch.cat([_mix(gamma, *network.gamma_out), _mix(beta, *network.beta_out)], dim=1)
    if gamma_shift and not bias_is_last:
        gamma, beta = values.chunk(2, dim=1)
        values = torch.cat([gamma + gamma_shift, beta], dim=1)
    return _Parameters(values, patterns)


def _mix(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution of values by pattern [P, C], or by pixel [N, C, H, W]."""
    return F.conv2d(values, weight, bias) if values.dim() == 4 else F.linear(values, weight.flatten(1), bias)


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def _of_dense(labels: Tensor, network: ModulationNetwork, gamma_bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """[gamma | beta] by pixel from a dense map [N, label_nc, h, w]."""
    shared, bias, slope = network.shared_weight, network.shared_bias, network.hidden_slope
    if network.padding == "zeros":
        gamma, beta = (network.gamma_weight, gamma_bias), (network.beta_weight, network.beta_bias)
        return dense_gamma_beta(labels, size, shared, bias, *gamma, *beta, slope)
    if tuple(labels.shape[2:]) != tuple(size):
        labels = F.interpolate(labels, size=size, mode="nearest")
    hidden = F.conv2d(_reflected(labels.to(shared.dtype), network), shared, bias)
    return _of_hidden(F.leaky_relu(hidden, slope), network, gamma_bias)


def _of_hidden(hidden: Tensor, network: ModulationNetwork, gamma_bias: Tensor | None) -> Tensor:
    """[gamma | beta] by pixel from the hidden map [N, hidden, H, W]."""
    gamma, beta = network.gamma_weight, network.beta_weight
    if network.padding == "zeros":
        return merged_gamma_beta(hidden, gamma, gamma_bias, beta, network.beta_bias)
    bias = torch.cat([_bias(gamma, gamma_bias), _bias(beta, network.beta_bias)])
    return F.conv2d(_reflected(hidden, network), torch.cat([gamma, beta]), bias)


def _of_patterns(
    rows: Tensor, patterns: PatternTables, network: ModulationNetwork, gamma_bias: Tensor | None
) -> Tensor:
    """[gamma | beta] by pattern from the hidden rows of the patches [Q, hidden]."""
    return pattern_params(
        rows,
        patterns.pattern_patches,
        network.gamma_weight,
        _bias(network.gamma_weight, gamma_bias),
        network.beta_weight,
        _bias(network.beta_weight, network.beta_bias),
        patterns.taps_by_patch,
        patterns.patch_offsets,
    )


def _reflected(x: Tensor, network: ModulationNetwork) -> Tensor:
    pad = network.kernel_size // 2
    return F.pad(x, (pad,) * 4, mode="reflect") if pad else x


def _hidden_rows(
    codes: Tensor,
    patterns: PatternTables,
    labels: LabelMap,
    network: ModulationNetwork,
    constants: Tensor | None,
    each_pixel: bool = False,
) -> Tensor:
    """[Q, hidden]: the hidden layer at label patches, codes [Q, k·k], image after image.

    With constant channels, every image has a table of its own: the labels' table plus what its constants add.
    """
    table = weight_table(network.shared_weight)
    if constants is not None:
        count = constants.shape[1]
        base = torch.einsum("tch,nc->tnh", table[:, :count], constants.to(table.dtype))
        rows = F.pad(table[:, count:], (0, 0, 0, 1))  # the last row is of an ignored pixel: the constants alone
        table = (rows[:, None] + base[:, :, None]).flatten(1, 2)
        pixels = patterns.patch_of_pixel[0].numel()
        lengths = [pixels] * len(labels) if each_pixel else list(patterns.patch_counts)
        image = torch.arange(len(labels), dtype=codes.dtype, device=codes.device)
        image = image.repeat_interleave(torch.tensor(lengths, device=codes.device))
        shifted = codes.clamp(max=rows.shape[1] - 1) + image[:, None] * rows.shape[1]
        codes = torch.where(codes < 0, codes, shifted)
    return hidden_of_patches(table, network.shared_bias, codes, labels.has_edges, network.hidden_slope)


def _instance_norm(values: Tensor, patterns: PatternTables | None, eps: float) -> Tensor:
    """The instance norm of a map given by pixel, or by pattern. By pattern, statistics weigh each with its pixels."""
    if patterns is None:
        return reference.instance_norm(values, eps=eps)
    # float64, because sums over patterns of very different sizes cancel in the gradient. The table is small.
    rows, n, pixels = values.to(torch.float64), len(patterns.pattern_of_pixel), patterns.pattern_of_pixel[0].numel()
    counts = torch.tensor(patterns.pattern_counts, device=values.device)
    image = torch.arange(n, device=values.device).repeat_interleave(counts)
    sizes = torch.bincount(patterns.pattern_of_pixel.reshape(-1), minlength=len(rows)).to(rows.dtype)[:, None] / pixels
    mean = rows.new_zeros(n, rows.shape[1]).index_add(0, image, rows * sizes)
    centered = rows - mean[image]
    variance = rows.new_zeros(n, rows.shape[1]).index_add(0, image, centered.square() * sizes)
    return (centered * torch.rsqrt(variance + eps)[image]).to(values.dtype)


def is_native(norm: Norm) -> bool:
    """Whether `spade` evaluates a norm within the modulation."""
    return isinstance(norm, nn.BatchNorm2d | nn.InstanceNorm2d) and changed_norm(norm, norm.num_features) is None


def _normalization(x: Tensor, norm: Norm) -> tuple[Tensor, Normalization]:
    """(x, how it is normalized), or (norm(x), nothing) for a norm that is called; updates running statistics."""
    if norm is None:
        return x, Normalization()
    if norm == "batch":
        norm = nn.BatchNorm2d(x.shape[1], affine=False, track_running_stats=False)
    elif isinstance(norm, str):
        norm = nn.InstanceNorm2d(x.shape[1], affine=False)
    if not is_native(norm) or _no_variance(x, norm):
        return norm(x), Normalization()
    assert isinstance(norm, nn.Module)
    return x, normalizations(x, [norm])[0]


def _no_variance(x: Tensor, norm: Callable[[Tensor], Tensor]) -> bool:
    """Whether x has too few values for statistics. The norm's own forward then gives its error, or nothing."""
    if isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None:
        return False
    n, _, h, w = x.shape
    return x.numel() == 0 or h * w * (1 if isinstance(norm, nn.InstanceNorm2d) else n) < 2
