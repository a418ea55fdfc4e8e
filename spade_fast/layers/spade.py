# SPDX-License-Identifier: Apache-2.0
"""FusedSPADE, the drop-in fast SPADE layer, and the SPADE residual block."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast import ops, reference
from spade_fast.labels.label_map import LabelMap
from spade_fast.labels.map_scope import recognized
from spade_fast.labels.pattern_tables import Patterns
from spade_fast.layers import sync
from spade_fast.layers.as_built import changed, changed_convolution, changed_norm, torch_only
from spade_fast.layers.dense import dense_gamma_beta, merged_gamma_beta
from spade_fast.layers.spectral import SpectralConv2d, hold_power_iteration
from spade_fast.ops.embedding_sum import embedding_sum
from spade_fast.ops.modulation import modulation
from spade_fast.ops.sync_modulation import combine_statistics, sync_modulation

SLOPE = 0.2  # LeakyReLU everywhere in the generator and the discriminator
FEW_PIXELS = 256  # up to so many in a batch, calls cost more than arithmetic on a CPU: torch's own cost least
DENSE_ABOVE = 0.9  # distinct patterns a pixel above which one convolution over the pixels costs less
_recomputing = 0


class recomputing(contextlib.AbstractContextManager):
    """Inside, a forward in training mode gives again what the last one gave: it changes neither running statistics nor
    spectral norm's vectors. Can be entered again: a second derivative computes forwards more than once."""

    def __enter__(self) -> None:
        global _recomputing
        _recomputing += 1
        self._held = hold_power_iteration()
        self._held.__enter__()

    def __exit__(self, *raised) -> None:
        global _recomputing
        _recomputing -= 1
        self._held.__exit__(*raised)


class FusedSPADE(nn.Module):
    """The SPADE layer (Park et al., CVPR 2019, section 3, equation 1), evaluated once per distinct label patch.

    The same function, gradients, initial distribution and state dict as :class:`spade_fast.reference.SPADE`, whose
    arguments it takes. Whatever works on that layer works here with the same result:

    - Nothing derived from parameters, buffers or a map's values outlives a call. Any way to write them counts.
    - A submodule that is not exactly as built (hooks, wrappers, another class, padding, activation or norm) runs
      through its own forward, with one warning that names it. The rest stays fused.
    - Under ``torch.jit.trace``, ``torch.export``, ONNX export, ``torch.func`` and forward-mode derivatives, torch's own
      operations compute it.
    - It can be differentiated twice, except with statistics over several processes, which is refused by name. So is
      the paragraph above for training with such statistics.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self, norm_nc: int, label_nc: int, norm: str = "syncbatch", kernel_size: int = 3, hidden_nc: int = 128
    ) -> None:
        super().__init__()
        reference.check_layer_options(norm, kernel_size, norm_nc=norm_nc, label_nc=label_nc, hidden_nc=hidden_nc)
        self.norm, self.norm_nc, self.label_nc, self.kernel_size = norm, norm_nc, label_nc, kernel_size
        padding = kernel_size // 2
        self.param_free_norm = reference.param_free_norm(norm, norm_nc)
        self.process_group: tuple[str, int] | None = None  # see spade_fast.layers.sync
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
            labels: LabelMap, or a map [N, label_nc, h, w]; resized by nearest neighbor to the output's size. A tensor
                which is exactly one-hot (plus 0/1 edges) is taken as a LabelMap (finding out reads it once, and waits
                for a GPU; inside :func:`spade_fast.labels.map_scope.map_scope` once for all layers); any other is dense
                conditioning.
            activation: negative slope of a LeakyReLU after the modulation, ``"leaky_relu"`` (0.2), or None.
            upsample: 1, or 2 to normalize and modulate x enlarged twice by nearest neighbor, without building it.

        Returns:
            [N, norm_nc, H·upsample, W·upsample] in the dtype and layout of x.
        """
        return modulate(x, labels, [self], [activation], upsample)[0][0]

    def extra_repr(self) -> str:
        return f"{self.norm_nc}, label_nc={self.label_nc}, norm={self.norm!r}, kernel_size={self.kernel_size}"

    def pattern_params(self, patterns: Patterns, edges: bool) -> Tensor:
        """[P, 2·norm_nc] = [gamma | beta] of every pattern."""
        gamma, beta = self.mlp_gamma, self.mlp_beta
        return ops.pattern_params.pattern_params(
            self._hidden_rows(patterns.codes, edges),
            patterns.taps,
            gamma.weight,
            gamma.bias,
            beta.weight,
            beta.bias,
            patterns.tap_order,
            patterns.tap_offsets,
        )

    def _hidden_rows(self, codes: Tensor, edges: bool) -> Tensor:
        """[Q, hidden_nc]: the hidden layer at label patches, codes [Q, k·k]."""
        shared = self.mlp_shared[0]
        table = shared.weight.permute(2, 3, 1, 0).reshape(self.kernel_size**2, self.label_nc, -1)
        return embedding_sum(table, shared.bias, codes, edges, relu=True)

    def label_pixel_params(self, patterns: Patterns, edges: bool) -> Tensor:
        """[N, 2·norm_nc, H, W] = [gamma | beta] of every pixel, for maps with few repeated patches."""
        gamma, beta = self.mlp_gamma, self.mlp_beta
        hidden = self._hidden_pixels(patterns, edges)
        return merged_gamma_beta(hidden, gamma.weight, gamma.bias, beta.weight, beta.bias)

    def _hidden_pixels(self, patterns: Patterns, edges: bool) -> Tensor:
        """[N, hidden_nc, H, W]: the hidden layer at every pixel."""
        # With few repeats, one sum a pixel costs less than one a patch and then a gather.
        hidden = self._hidden_rows(patterns.pixel_codes, edges)
        return hidden.view(*patterns.hidden_ids.shape, -1).permute(0, 3, 1, 2)

    def modulate_few_pixels(self, x: Tensor, patterns: Patterns, edges: bool, slope: float) -> Tensor:
        """:meth:`forward` of x [N, norm_nc, H, W] with labels of its size, by torch's own operations."""
        hidden, norm = self._hidden_pixels(patterns, edges), self.param_free_norm
        if _recomputing and norm.training and norm.running_mean is not None:  # they were updated the first time
            running = norm.running_mean.clone(), norm.running_var.clone()
            xhat = F.batch_norm(x, *running, training=True, eps=norm.eps)
        else:
            xhat = norm(x)
        out = xhat * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)
        return out if slope == 1.0 else F.leaky_relu(out, slope)

    def pixel_params(self, segmap: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, 2·norm_nc, H, W] = [gamma | beta] of every pixel, from a dense map [N, label_nc, h, w]."""
        shared, gamma, beta = self.mlp_shared[0], self.mlp_gamma, self.mlp_beta
        return dense_gamma_beta(
            segmap, size, shared.weight, shared.bias, gamma.weight, gamma.bias, beta.weight, beta.bias
        )

    def module_params(self, labels: LabelMap | Tensor, size: tuple[int, int]) -> Tensor:
        """The same through the submodules' own forwards."""
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
        """Which submodule of the modulation network is not as built, and how; None: all are."""
        why = changed(self.mlp_shared, nn.Sequential)
        if why is not None:
            return f"mlp_shared {why}"
        if len(self.mlp_shared) != 2:
            return f"mlp_shared has {len(self.mlp_shared)} parts, not 2"
        convolution, activation = self.mlp_shared
        hidden_nc, k = convolution.out_channels if isinstance(convolution, nn.Conv2d) else 0, self.kernel_size
        checks = (
            ("mlp_shared.0", changed_convolution(convolution, self.label_nc, hidden_nc, k)),
            ("mlp_shared.1", changed(activation, nn.ReLU)),
            ("mlp_gamma", changed_convolution(self.mlp_gamma, hidden_nc, self.norm_nc, k)),
            ("mlp_beta", changed_convolution(self.mlp_beta, hidden_nc, self.norm_nc, k)),
        )
        return next((f"{name} {why}" for name, why in checks if why is not None), None)

    def changed_norm(self) -> str | None:
        """How param_free_norm is not one that the statistics kernels compute; None: it is."""
        why = changed_norm(self.param_free_norm, self.norm_nc)
        return None if why is None else f"param_free_norm {why}"

    def warn(self, why: str) -> None:
        if why not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(why)
            warnings.warn(
                f"FusedSPADE: {why}; it runs through its own forward, which is right but not as fast", stacklevel=4
            )


Recipe = tuple[Callable[..., Tensor], list[Tensor | None]] | None  # function and tensors that give an output again


def modulate(
    x: Tensor,
    labels: LabelMap | Tensor,
    layers: Sequence[FusedSPADE],
    activations: Sequence[float | str | None],
    upsample: int = 1,
) -> tuple[list[Tensor], list[Recipe]]:
    """The outputs of one or two FusedSPADE layers of the same kind on the same x: statistics and reads of x are shared.

    Arguments as in :meth:`FusedSPADE.forward`, an activation for each layer. Also returned, for each output: how to
    compute it again from what is kept for backward anyway, so that a convolution after it need not keep it (None: it
    must keep it).
    """
    first = layers[0]
    slopes = [_slope(a) for a in activations]
    _check_input(x, labels, first, upsample)
    if torch_only():
        return [_by_torch(x, labels, layer, slope, upsample) for layer, slope in zip(layers, slopes, strict=True)], [
            None for _ in layers
        ]
    labels = recognize(labels)
    changes = [(layer.changed_network(), layer.changed_norm()) for layer in layers]
    if len(layers) == 2 and (any(why is not None for pair in changes for why in pair) or not _alike(*layers)):
        pairs = [modulate(x, labels, [layer], [slope], upsample) for layer, slope in zip(layers, slopes, strict=True)]
        return [outs[0] for outs, _ in pairs], [recipes[0] for _, recipes in pairs]
    network, norm = changes[0]
    if norm is not None:
        _refuse_own_statistics(first, f"{norm}, so it")
    for why in (network, norm):
        if why is not None:
            first.warn(why)
    if norm is not None:
        x, upsample = first.param_free_norm(_enlarged(x, upsample)), 1
    size = (x.shape[2] * upsample, x.shape[3] * upsample)
    ids = order = offsets = None
    if network is not None:
        params = [first.module_params(labels, size)]
    elif isinstance(labels, LabelMap):
        patterns = labels.patterns(*size, first.kernel_size, backward=torch.is_grad_enabled())
        # A traced graph must not depend on how many patterns this map has.
        if not torch.compiler.is_compiling() and patterns.density > DENSE_ABOVE:
            if upsample == 1 and norm is None and _few_pixels(x, first):
                pairs = zip(layers, slopes, strict=True)
                outs = [layer.modulate_few_pixels(x, patterns, labels.has_edges, slope) for layer, slope in pairs]
                return outs, [None] * len(outs)
            params = [layer.label_pixel_params(patterns, labels.has_edges) for layer in layers]
        else:
            params = [layer.pattern_params(patterns, labels.has_edges) for layer in layers]
            ids, order, offsets = patterns.ids, patterns.order, patterns.offsets
    else:
        params = [layer.pixel_params(labels, size) for layer in layers]
    statistics = [(None, None, False, None)] if norm is not None else _statistics(x, layers, upsample)
    recipes = [
        (functools.partial(_modulate_again, slope, upsample, depends), [x, mean, rstd, p, ids])
        for (mean, rstd, depends, _), p, slope in zip(itertools.cycle(statistics), params, slopes, strict=False)
    ]
    if len(statistics) == 1:
        mean, rstd, depends, shared = statistics[0]
        if shared is not None:
            outs = sync_modulation(x, mean, rstd, params, ids, order, offsets, slopes, upsample, *shared)
            return outs, recipes
        return modulation(x, mean, rstd, params, ids, order, offsets, slopes, upsample, depends), recipes
    outs = [  # running statistics are each layer's own
        modulation(x, mean, rstd, [p], ids, order, offsets, [slope], upsample, depends)[0]
        for (mean, rstd, depends, _), p, slope in zip(statistics, params, slopes, strict=True)
    ]
    return outs, recipes


def _check_input(x: Tensor, labels: LabelMap | Tensor, layer: FusedSPADE, upsample: int) -> None:
    if x.dim() != 4 or x.shape[1] != layer.norm_nc:
        raise ValueError(f"x must have shape [N, {layer.norm_nc}, H, W], got {list(x.shape)}")
    shape = reference.segmap_shape(labels)
    if shape[:2] != (x.shape[0], layer.label_nc):
        raise ValueError(
            f"labels must be for [N={x.shape[0]}, label_nc={layer.label_nc}] as x and the layer are, got {list(shape)}"
        )
    if labels.device != x.device:
        raise ValueError(f"labels are on {labels.device}, x is on {x.device}")


def _alike(a: FusedSPADE, b: FusedSPADE) -> bool:
    """Whether statistics of one layer serve the other."""
    one, other = a.param_free_norm, b.param_free_norm
    return (
        type(one) is type(other)
        and a.kernel_size == b.kernel_size
        and getattr(one, "eps", None) == getattr(other, "eps", None)
        and one.training == other.training
        and (getattr(one, "running_mean", None) is None) == (getattr(other, "running_mean", None) is None)
        and sync.layer_group(a) == sync.layer_group(b)
    )


def _enlarged(x: Tensor, upsample: int) -> Tensor:
    return x if upsample == 1 else F.interpolate(x, scale_factor=float(upsample), mode="nearest")


def _by_torch(x: Tensor, labels: LabelMap | Tensor, layer: FusedSPADE, slope: float, upsample: int) -> Tensor:
    """The reference formula through the layer's submodules, which a trace, an export or a transform can follow."""
    _refuse_own_statistics(layer, "a trace, an export, a transform of torch.func or a forward-mode derivative")
    x = _enlarged(x, upsample)
    segmap = reference.as_segmap(labels, next(layer.parameters()).dtype)
    hidden = layer.mlp_shared(F.interpolate(segmap, size=x.shape[2:], mode="nearest"))
    out = layer.param_free_norm(x) * (1 + layer.mlp_gamma(hidden)) + layer.mlp_beta(hidden)
    return out if slope == 1.0 else F.leaky_relu(out, slope)


def _refuse_own_statistics(layer: FusedSPADE, what: str) -> None:
    """Raises RuntimeError where the norm's own forward would take statistics of this process alone, but the layer
    shares its statistics over several processes."""
    norm = layer.param_free_norm
    own = isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)
    if own and sync.layer_group(layer) is not None:
        raise RuntimeError(
            f'FusedSPADE with norm="syncbatch" on several processes: {what} would take batch statistics of this '
            'process alone; call eval() first, take norm="batch", whose statistics are each process\'s own, or put '
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm(network) in its place"
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


def _modulate_again(slope: float, upsample: int, depends: bool, x, mean, rstd, params, ids) -> Tensor:
    stats = depends and torch.is_grad_enabled()  # a second derivative goes through the statistics too
    return modulation(x, mean, rstd, [params], ids, None, None, [slope], upsample, stats)[0]


def recognize(labels: LabelMap | Tensor) -> LabelMap | Tensor:
    """The LabelMap that a one-hot tensor stands for, or labels itself. Inside a `map_scope`, found once a tensor."""
    if not isinstance(labels, Tensor) or labels.requires_grad or labels.is_meta or torch.compiler.is_compiling():
        return labels
    if type(labels) not in (Tensor, nn.Parameter):  # a fake or distributed tensor has no values to look at
        return labels
    found = recognized(labels, LabelMap.from_segmap)
    return labels if found is None else found


def _slope(activation: float | str | None) -> float:
    if activation is None:
        return 1.0
    if activation == "leaky_relu":
        return SLOPE
    if isinstance(activation, (int, float)) and not isinstance(activation, bool):
        return float(activation)
    raise ValueError(f'activation must be None, a negative slope or "leaky_relu", got {activation!r}')


Shared = tuple[Tensor, tuple[str, int]]  # number of values a channel over all processes, and their group


def _statistics(
    x: Tensor, layers: Sequence[FusedSPADE], upsample: int
) -> list[tuple[Tensor | None, Tensor | None, bool, Shared | None]]:
    """(mean, rstd, whether they depend on x, and over which processes): once for all layers, or for each; updates
    running statistics.

    Enlarging x by nearest neighbor changes neither mean nor biased variance, only the count behind the unbiased one.
    """
    norm = layers[0].param_free_norm
    if isinstance(norm, nn.Identity):
        return [(None, None, False, None)]
    n, _, h, w = x.shape
    if isinstance(norm, nn.InstanceNorm2d):
        if h * w * upsample**2 == 1:
            raise ValueError(f"instance norm needs more than 1 spatial element, got x of shape {list(x.shape)}")
        mean, m2 = ops.statistics.statistics(x, True)
        return [(mean, torch.rsqrt(m2 / max(h * w, 1) + norm.eps), True, None)]
    if not norm.training and norm.running_mean is not None:
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        norms = [layer.param_free_norm for layer in layers]
        return [
            (b.running_mean[None].to(acc), torch.rsqrt(b.running_var[None].to(acc) + b.eps), False, None) for b in norms
        ]
    count: int | Tensor = n * h * w
    group = sync.layer_group(layers[0]) if norm.training else None
    if group is None and count * upsample**2 == 1:
        raise ValueError(f"batch norm needs more than 1 value per channel when training, got x of {list(x.shape)}")
    mean, m2 = ops.statistics.statistics(x, False)
    shared = None
    if group is not None:
        mean, m2, count = combine_statistics(mean, m2, count, group)
        shared = (count, group)
    variance = m2 / (max(count, 1) if group is None else count.clamp(min=1))
    for layer in layers:
        _update_running(layer.param_free_norm, mean[0], variance[0], count * upsample**2)
    return [(mean, torch.rsqrt(variance + norm.eps), True, shared)]


def _update_running(norm: nn.Module, mean: Tensor, variance: Tensor, count: int | Tensor) -> None:
    """As BatchNorm2d does: momentum, unbiased variance, num_batches_tracked. count: a tensor over several processes."""
    if not norm.training or norm.running_mean is None or _recomputing:
        return
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        if isinstance(count, Tensor):
            unbiased = variance * (count / (count - 1).clamp(min=1))
        elif count == 0:
            return
        else:
            unbiased = variance * (count / max(count - 1, 1))
        momentum = norm.momentum
        if momentum is None:  # cumulative average
            momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype)
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            if running.dtype == new.dtype:
                running.lerp_(new, momentum)
            else:
                running.copy_(torch.lerp(running.to(new.dtype), new, momentum))


class SPADEResnetBlock(nn.Module):
    """SPADE residual block (paper, Figure 4a): SPADE, LeakyReLU, convolution, twice, and a learned shortcut when the
    number of channels changes.

    Args:
        fin, fout: channels in and out.
        label_nc: channels of the segmentation map.
        norm, kernel_size: see :class:`spade_fast.reference.SPADE`.
        spade: ``fused`` for :class:`FusedSPADE`, ``reference`` for the plain layer.
        spectral_norm: whether the convolutions are spectrally normalized.
    """

    def __init__(
        self,
        fin: int,
        fout: int,
        label_nc: int,
        norm: str = "syncbatch",
        kernel_size: int = 3,
        spade: str = "fused",
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        kinds = {"fused": FusedSPADE, "reference": reference.SPADE}
        if spade not in kinds:
            raise ValueError(f"spade must be one of {', '.join(kinds)}, got {spade!r}")
        self.fused = spade == "fused"
        layer, convolution = kinds[spade], SpectralConv2d if spectral_norm else nn.Conv2d
        middle = min(fin, fout)
        self.conv_0 = convolution(fin, middle, 3, padding=1)
        self.conv_1 = convolution(middle, fout, 3, padding=1)
        self.norm_0 = layer(fin, label_nc, norm, kernel_size)
        self.norm_1 = layer(middle, label_nc, norm, kernel_size)
        self.learned_shortcut = fin != fout
        if self.learned_shortcut:
            self.conv_s = convolution(fin, fout, 1, bias=False)
            self.norm_s = layer(fin, label_nc, norm, kernel_size)

    def forward(self, x: Tensor, segmap: LabelMap | Tensor, upsample: int = 1) -> Tensor:
        """x [N, fin, h, w], enlarged ``upsample`` times by nearest neighbor, -> [N, fout, h·upsample, w·upsample].

        segmap: a dense map [N, label_nc, ., .], or, for fused layers, a LabelMap too.
        """
        norms = [self.norm_0, self.norm_1, *([self.norm_s] if self.learned_shortcut else [])]
        if torch_only() or any(changed(norm, FusedSPADE) is not None for norm in norms):
            return self._forward_plain(x, segmap, upsample)
        if self.learned_shortcut:
            outs, recipes = modulate(x, segmap, [self.norm_0, self.norm_s], [SLOPE, None], upsample)
            shortcut = _convolve(self.conv_s, outs[1], recipes[1])
        else:
            outs, recipes = modulate(x, segmap, [self.norm_0], [SLOPE], upsample)
        out = _convolve(self.conv_0, outs[0], recipes[0])
        outs, recipes = modulate(out, segmap, [self.norm_1], [SLOPE])
        out = _convolve(self.conv_1, outs[0], recipes[0])
        if changed(self.conv_1, SpectralConv2d) is not None:  # something else may hold its output
            out = out.clone()
        return out.add_(shortcut) if self.learned_shortcut else _add_enlarged(out, x, upsample)

    def _forward_plain(self, x: Tensor, segmap: Tensor, upsample: int) -> Tensor:
        if upsample != 1:
            x = F.interpolate(x, scale_factor=float(upsample), mode="nearest")
        shortcut = self.conv_s(self.norm_s(x, segmap)) if self.learned_shortcut else x
        out = self.conv_0(F.leaky_relu(self.norm_0(x, segmap), SLOPE))
        out = self.conv_1(F.leaky_relu(self.norm_1(out, segmap), SLOPE))
        return shortcut + out


def _convolve(convolution: nn.Module, x: Tensor, recipe: Recipe) -> Tensor:
    if recipe is None or changed(convolution, SpectralConv2d) is not None:
        return convolution(x)
    return convolution(x, recipe)


def _add_enlarged(out: Tensor, x: Tensor, upsample: int) -> Tensor:
    """out + x enlarged by nearest neighbor, without building the enlarged x."""
    if upsample == 1:
        return out.add_(x)
    h, w = x.shape[2:]
    cells = out.unflatten(3, (w, upsample)).unflatten(2, (h, upsample))
    return (cells + x[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)
