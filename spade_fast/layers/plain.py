# SPDX-License-Identifier: Apache-2.0
"""What FusedSPADE does as the plain layer does: its arguments, and the formula by torch's own operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast import reference
from spade_fast.labels.label_map import LabelMap
from spade_fast.layers import sync

SLOPE = 0.2  # LeakyReLU everywhere in the generator and the discriminator


class Layer(sync.Layer, Protocol):
    """The parts of a SPADE layer."""

    norm_nc: int
    label_nc: int
    mlp_shared: nn.Sequential
    mlp_gamma: nn.Conv2d
    mlp_beta: nn.Conv2d

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


def check_input(x: Tensor, labels: LabelMap | Tensor, layer: Layer) -> None:
    """Raises ValueError if x and labels do not fit the layer or each other."""
    if x.dim() != 4 or x.shape[1] != layer.norm_nc:
        raise ValueError(f"x must have shape [N, {layer.norm_nc}, H, W], got {list(x.shape)}")
    shape = reference.segmap_shape(labels)
    if shape[:2] != (x.shape[0], layer.label_nc):
        raise ValueError(
            f"labels must be for [N={x.shape[0]}, label_nc={layer.label_nc}] as x and the layer are, got {list(shape)}"
        )
    if labels.device != x.device:
        raise ValueError(f"labels are on {labels.device}, x is on {x.device}")


def enlarged(x: Tensor, upsample: int) -> Tensor:
    """x [N, C, h, w] enlarged by nearest neighbor."""
    return x if upsample == 1 else F.interpolate(x, scale_factor=float(upsample), mode="nearest")


def by_torch(x: Tensor, labels: LabelMap | Tensor, layer: Layer, slope: float, upsample: int) -> Tensor:
    """The reference formula through the layer's submodules, which a trace, an export or a transform can follow."""
    refuse_own_statistics(layer, "a trace, an export, a transform of torch.func or a forward-mode derivative")
    x = enlarged(x, upsample)
    segmap = reference.as_segmap(labels, next(layer.parameters()).dtype)
    hidden = layer.mlp_shared(F.interpolate(segmap, size=x.shape[2:], mode="nearest"))
    return formula(x, hidden, layer, slope)


def formula(x: Tensor, hidden: Tensor, layer: Layer, slope: float) -> Tensor:
    """Equation 1 of the paper and the activation, from the hidden layer [N, hidden, H, W]."""
    out = layer.param_free_norm(x) * (1 + layer.mlp_gamma(hidden)) + layer.mlp_beta(hidden)
    return out if slope == 1.0 else F.leaky_relu(out, slope)


def refuse_own_statistics(layer: Layer, what: str) -> None:
    """Raises RuntimeError if the layer shares its statistics over several processes, which the norm's own forward
    does not."""
    norm = layer.param_free_norm
    own = isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)
    if own and sync.layer_group(layer) is not None:
        raise RuntimeError(
            f'FusedSPADE with norm="syncbatch" on several processes: {what} would take batch statistics of this '
            'process alone; call eval() first, take norm="batch", whose statistics are each process\'s own, or put '
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm(network) in its place"
        )


def slope_of(activation: float | str | None) -> float:
    """The negative slope of an activation's LeakyReLU; 1 for none."""
    if activation is None:
        return 1.0
    if activation == "leaky_relu":
        return SLOPE
    if isinstance(activation, (int, float)) and not isinstance(activation, bool):
        return float(activation)
    raise ValueError(f'activation must be None, a negative slope or "leaky_relu", got {activation!r}')
