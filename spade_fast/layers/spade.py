# SPDX-License-Identifier: Apache-2.0
"""FusedSPADE, the drop-in fast SPADE layer."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spade_fast import _moved, reference
from spade_fast.labels.label_map import LabelMap
from spade_fast.labels.map_scope import as_label_map
from spade_fast.labels.pattern_tables import PatternTables
from spade_fast.layers import sync
from spade_fast.layers.as_built import changed_network, changed_norm, torch_only
from spade_fast.layers.dense import dense_gamma_beta, merged_gamma_beta
from spade_fast.layers.normalization import Normalization, modulated, normalizations
from spade_fast.layers.patches import by_pixel, few_repeats, hidden_of_patches, weight_table
from spade_fast.layers.plain import by_torch, check_input, enlarged, formula, refuse_own_statistics, slope_of
from spade_fast.layers.spectral import Recompute
from spade_fast.ops.modulation import modulation
from spade_fast.ops.pattern_params import pattern_params

FEW_PIXELS = 256  # at or below, call overhead dominates on a CPU: plain torch operations are fastest there


class FusedSPADE(nn.Module):
    """The SPADE layer (Park et al., CVPR 2019, section 3, equation 1), evaluated once per distinct label patch.

    It has the function, the gradients, the initial distribution and the state dict of
    :class:`spade_fast.reference.SPADE`. Whatever works on that layer works here with the same result:

    - No value derived from parameters, buffers or a map is kept after a call. They may be written in any way.
    - A submodule that is not exactly as built runs through its own forward, and one warning names it. Hooks, wrappers,
      another class, padding, activation or norm make it so. The rest stays fused.
    - Torch's own operations compute the layer under ``torch.jit.trace``, ``torch.export``, ONNX export, ``torch.func``
      and forward-mode derivatives.
    - The layer can be differentiated twice.

    Training with statistics over several processes has two limits. A second derivative is refused by name. So are
    traces, exports, ``torch.func`` and forward-mode derivatives.

    Examples:
        >>> layer = FusedSPADE(norm_nc=4, label_nc=3)  # or FusedSPADE("spadesyncbatch3x3", 4, 3)
        >>> layer(torch.randn(1, 4, 8, 8), LabelMap(torch.zeros(1, 8, 8, dtype=torch.uint8), num_classes=3)).shape
        torch.Size([1, 4, 8, 8])

    Args:
        norm_nc: channels of the activation.
        label_nc: channels of the segmentation map: classes, plus one for instance edges.
        norm: ``syncbatch``, ``batch``, ``instance`` or ``none``.
        kernel_size: 1, 3 or 5, for all three convolutions.
        hidden_nc: channels of the shared hidden layer.
        config_text: norm and kernel in the authors' form, such as ``spadesyncbatch3x3``. Given as the first argument
            or by name, it replaces norm, kernel_size and hidden_nc.

    Raises:
        ValueError: an option is out of range.
    """

    @overload
    def __init__(
        self, norm_nc: int, label_nc: int, norm: str = "syncbatch", kernel_size: int = 3, hidden_nc: int = 128
    ) -> None: ...

    @overload
    def __init__(self, config_text: str, norm_nc: int, label_nc: int) -> None: ...

    @reference.takes_config_text
    def __init__(
        self, norm_nc: int, label_nc: int, norm: str = "syncbatch", kernel_size: int = 3, hidden_nc: int = 128
    ) -> None:
        super().__init__()
        reference.check_layer_options(norm, kernel_size, norm_nc=norm_nc, label_nc=label_nc, hidden_nc=hidden_nc)
        self.norm, self.norm_nc, self.label_nc, self.kernel_size = norm, norm_nc, label_nc, kernel_size
        padding = kernel_size // 2
        self.param_free_norm = reference.param_free_norm(norm, norm_nc)
        self.process_group: tuple[str, int] | None = None  # its name and size, see spade_fast.layers.sync
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, hidden_nc, kernel_size, padding=padding), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden_nc, norm_nc, kernel_size, padding=padding)
        self.mlp_beta = nn.Conv2d(hidden_nc, norm_nc, kernel_size, padding=padding)
        self._warned: set[str] = set()

    def forward(
        self, x: Tensor, labels: LabelMap | Tensor, activation: float | str | None = None, upsample: int = 1
    ) -> Tensor:
        """Normalize, modulate, activate.

        Args:
            x: activation [N, norm_nc, H, W].
            labels: LabelMap, or a map [N, label_nc, h, w]. It is resized by nearest neighbor to the output's size. A
                tensor that is exactly one-hot, with or without 0/1 edges in its last channel, is taken as a LabelMap.
                To find out, the layer reads the tensor once and waits for a GPU; inside
                :func:`spade_fast.labels.map_scope.map_scope` all layers share one reading. Any other tensor is dense
                conditioning.
            activation: negative slope of a LeakyReLU after the modulation, ``"leaky_relu"`` (0.2), or None.
            upsample: 1, or 2 to normalize and modulate x enlarged twice by nearest neighbor. The enlarged x is not
                built.

        Returns:
            [N, norm_nc, H·upsample, W·upsample] in the dtype and layout of x.

        Raises:
            ValueError: x, labels or activation do not fit; a single value has no variance in training.
            RuntimeError: see the class on statistics over several processes.
        """
        return modulate(x, labels, [self], [activation], upsample)[0][0]

    def extra_repr(self) -> str:
        return f"{self.norm_nc}, label_nc={self.label_nc}, norm={self.norm!r}, kernel_size={self.kernel_size}"

    @property
    def _shared(self) -> nn.Conv2d:
        """The first convolution, once `changed_network` has found it as built."""
        convolution = self.mlp_shared[0]
        assert isinstance(convolution, nn.Conv2d)
        return convolution

    def params(self, labels: LabelMap | Tensor, patterns: PatternTables | None, size: tuple[int, int]) -> Tensor:
        """[gamma | beta] by the cheapest way: [P, 2·norm_nc] by pattern, or [N, 2·norm_nc, *size] by pixel.

        Args:
            labels: LabelMap, or a dense map [N, label_nc, h, w].
            patterns: the LabelMap's tables at size; None for a dense map.
            size: (H, W) of the output.
        """
        if isinstance(labels, Tensor):
            return self.pixel_params(labels, size)
        assert patterns is not None
        if few_repeats(patterns):
            return self.label_pixel_params(patterns, labels.has_edges)
        return self.pattern_params(patterns, labels.has_edges)

    def pattern_params(self, patterns: PatternTables, edges: bool) -> Tensor:
        """[P, 2·norm_nc] = [gamma | beta] of every pattern."""
        gamma, beta = self.mlp_gamma, self.mlp_beta
        assert gamma.bias is not None and beta.bias is not None
        return pattern_params(
            self._hidden_rows(patterns.patch_codes, edges),
            patterns.pattern_patches,
            gamma.weight,
            gamma.bias,
            beta.weight,
            beta.bias,
            patterns.taps_by_patch,
            patterns.patch_offsets,
        )

    def _hidden_rows(self, codes: Tensor, edges: bool) -> Tensor:
        """[Q, hidden_nc]: the hidden layer at label patches, codes [Q, k·k]."""
        return hidden_of_patches(weight_table(self._shared.weight), self._shared.bias, codes, edges)

    def label_pixel_params(self, patterns: PatternTables, edges: bool) -> Tensor:
        """[N, 2·norm_nc, H, W] = [gamma | beta] of every pixel, for maps with few repeated patches."""
        gamma, beta = self.mlp_gamma, self.mlp_beta
        hidden = self._hidden_pixels(patterns, edges)
        return merged_gamma_beta(hidden, gamma.weight, gamma.bias, beta.weight, beta.bias)

    def _hidden_pixels(self, patterns: PatternTables, edges: bool) -> Tensor:
        """[N, hidden_nc, H, W]: the hidden layer at every pixel.

        With few repeats, one sum for each pixel costs less than one for each patch and then a gather.
        """
        return by_pixel(self._hidden_rows(patterns.pixel_codes, edges), patterns)

    def modulate_few_pixels(self, x: Tensor, patterns: PatternTables, edges: bool, slope: float) -> Tensor:
        """:meth:`forward` of x [N, norm_nc, H, W] with labels of its size, by torch's own operations."""
        return formula(x, self._hidden_pixels(patterns, edges), self, slope)

    def pixel_params(self, segmap: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, 2·norm_nc, H, W] = [gamma | beta] of every pixel, from a dense map [N, label_nc, h, w]."""
        shared, gamma, beta = self._shared, self.mlp_gamma, self.mlp_beta
        return dense_gamma_beta(
            segmap, size, shared.weight, shared.bias, gamma.weight, gamma.bias, beta.weight, beta.bias
        )

    def module_params(self, labels: LabelMap | Tensor, size: tuple[int, int]) -> Tensor:
        """[N, 2·norm_nc, H, W] = [gamma | beta] of every pixel through the submodules' own forwards."""
        hidden = self.mlp_shared(self._resized(labels, size))
        return torch.cat([self.mlp_gamma(hidden), self.mlp_beta(hidden)], dim=1)

    def _resized(self, labels: LabelMap | Tensor, size: tuple[int, int]) -> Tensor:
        """A dense map [N, label_nc, *size] in the weights' dtype."""
        dtype = next(self.parameters()).dtype
        if isinstance(labels, LabelMap):
            return LabelMap.from_codes(labels.resized(*size), labels.num_classes, labels.has_edges).one_hot(dtype)
        segmap = labels if labels.is_floating_point() else labels.to(dtype)
        if tuple(segmap.shape[2:]) != size:
            segmap = F.interpolate(segmap, size=size, mode="nearest")
        return segmap.to(dtype)

    def changed_network(self) -> str | None:
        """Which submodule of the modulation network is not as built, and how. None: all are as built."""
        sizes = (self.label_nc, self.norm_nc, self.kernel_size)
        return changed_network(self.mlp_shared, self.mlp_gamma, self.mlp_beta, *sizes)

    def changed_norm(self) -> str | None:
        """Why the statistics kernels cannot compute param_free_norm. None: they can."""
        why = changed_norm(self.param_free_norm, self.norm_nc)
        return None if why is None else f"param_free_norm {why}"

    def warn(self, why: str) -> None:
        """Warns once that a submodule is not as built."""
        if why not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(why)
            warnings.warn(
                f"FusedSPADE: {why}; it runs through its own forward, which is right but not as fast",
                stacklevel=7,  # the caller of the layer, above the two frames of torch.nn.Module
            )


def modulate(
    x: Tensor,
    labels: LabelMap | Tensor,
    layers: Sequence[FusedSPADE],
    activations: Sequence[float | str | None],
    upsample: int = 1,
) -> tuple[list[Tensor], list[Recompute | None]]:
    """One or two FusedSPADE layers of the same kind on the same x, which share statistics and reads of x.

    Args:
        x, labels, upsample: see :meth:`FusedSPADE.forward`.
        layers: the layers.
        activations: an activation for each layer.

    Returns:
        For each layer its output, and how to compute the output again from what is kept for backward anyway. With the
        latter, a convolution after the layer need not keep its input. None: it must keep it.
    """
    slopes = [slope_of(a) for a in activations]
    check_input(x, labels, layers[0])
    if torch_only():
        outs = [by_torch(x, labels, layer, slope, upsample) for layer, slope in zip(layers, slopes, strict=True)]
        return outs, [None for _ in layers]
    labels = as_label_map(labels)
    changes = [(layer.changed_network(), layer.changed_norm()) for layer in layers]
    if len(layers) == 2 and (any(why is not None for pair in changes for why in pair) or not _alike(*layers)):
        pairs = [modulate(x, labels, [layer], [slope], upsample) for layer, slope in zip(layers, slopes, strict=True)]
        return [outs[0] for outs, _ in pairs], [again[0] for _, again in pairs]
    return _modulate_alike(x, labels, layers, slopes, upsample, *changes[0])


def _modulate_alike(
    x: Tensor,
    labels: LabelMap | Tensor,
    layers: Sequence[FusedSPADE],
    slopes: list[float],
    upsample: int,
    network_change: str | None,
    norm_change: str | None,
) -> tuple[list[Tensor], list[Recompute | None]]:
    """`modulate` of layers whose statistics are the same. What a change names runs through its own forward."""
    first = layers[0]
    if norm_change is not None:
        refuse_own_statistics(first, f"{norm_change}, so it")
    for why in (network_change, norm_change):
        if why is not None:
            first.warn(why)
    if norm_change is not None:
        x, upsample = first.param_free_norm(enlarged(x, upsample)), 1
    size = (x.shape[2] * upsample, x.shape[3] * upsample)
    patterns = None
    if isinstance(labels, LabelMap) and network_change is None:
        patterns = labels.patterns(*size, first.kernel_size, backward=torch.is_grad_enabled())
        if few_repeats(patterns) and norm_change is None and upsample == 1 and _few_pixels(x, first):
            pairs = zip(layers, slopes, strict=True)
            outs = [layer.modulate_few_pixels(x, patterns, labels.has_edges, slope) for layer, slope in pairs]
            return outs, [None for _ in outs]
    found = [Normalization()] if norm_change is not None else _normalizations(x, layers, upsample)
    if network_change is not None:
        params = [first.module_params(labels, size)]
    else:
        params = [layer.params(labels, patterns, size) for layer in layers]
    return _outputs(x, found, params, patterns if params[0].dim() == 2 else None, slopes, upsample)


def _normalizations(x: Tensor, layers: Sequence[FusedSPADE], upsample: int) -> list[Normalization]:
    """Of all layers together, or of each; updates running statistics."""
    norms = [layer.param_free_norm for layer in layers]
    shares = isinstance(norms[0], _BatchNorm) and norms[0].training
    return normalizations(x, norms, upsample, sync.layer_group(layers[0]) if shares else None)


def _outputs(
    x: Tensor,
    found: list[Normalization],
    params: list[Tensor],
    patterns: PatternTables | None,
    slopes: list[float],
    upsample: int,
) -> tuple[list[Tensor], list[Recompute | None]]:
    """The modulation for each entry of params. found: one normalization for all, or one for each."""
    pattern_of_pixel = None if patterns is None else patterns.pattern_of_pixel
    again: list[Recompute | None] = [
        Recompute(
            functools.partial(_modulate_again, slope, upsample, one.stats_from_x),
            [x, one.mean, one.rstd, p, pattern_of_pixel],
        )
        for one, p, slope in zip(itertools.cycle(found), params, slopes, strict=False)
    ]
    if len(found) == 1:
        return modulated(x, found[0], params, patterns, slopes, upsample), again
    each = zip(found, params, slopes, strict=True)  # running statistics are each layer's own
    return [modulated(x, one, [p], patterns, [slope], upsample)[0] for one, p, slope in each], again


def _modulate_again(
    slope: float,
    upsample: int,
    stats_from_x: bool,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: Tensor,
    pattern_of_pixel: Tensor | None,
) -> Tensor:
    through = stats_from_x and torch.is_grad_enabled()  # a second derivative goes through the statistics too
    return modulation(x, mean, rstd, [params], pattern_of_pixel, None, None, [slope], upsample, through)[0]


def _alike(a: FusedSPADE, b: FusedSPADE) -> bool:
    """Whether the statistics that one layer takes of x are also the other's."""
    one, other = a.param_free_norm, b.param_free_norm
    return (
        type(one) is type(other)
        and a.kernel_size == b.kernel_size
        and getattr(one, "eps", None) == getattr(other, "eps", None)
        and one.training == other.training
        and (getattr(one, "running_mean", None) is None) == (getattr(other, "running_mean", None) is None)
        and sync.layer_group(a) == sync.layer_group(b)
    )


def _few_pixels(x: Tensor, layer: FusedSPADE) -> bool:
    norm = layer.param_free_norm
    return (
        x.device.type == "cpu"
        and 1 < x.shape[0] * x.shape[2] * x.shape[3] <= FEW_PIXELS
        and x.dtype == layer.mlp_gamma.weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and type(norm) is nn.BatchNorm2d
        and not (norm.training and sync.layer_group(layer))
    )


if not TYPE_CHECKING:  # a type checker must not take every name for an attribute
    __getattr__ = _moved.attributes(
        __name__,
        {
            "DENSE_ABOVE": "spade_fast.layers.patches.DENSE_ABOVE",
            "SLOPE": "spade_fast.layers.plain.SLOPE",
            "SPADEResnetBlock": "spade_fast.layers.block.SPADEResnetBlock",
            "recognize": "spade_fast.labels.map_scope.as_label_map",
            "recomputing": "spade_fast.layers.normalization.recomputing",
        },
    )
