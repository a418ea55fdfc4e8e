# SPDX-License-Identifier: Apache-2.0
"""The plain-PyTorch SPADE layer: the definition of correct that every faster path is held against."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Protocol, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("syncbatch", "batch", "instance", "none")
KERNEL_SIZES = (1, 3, 5)


def check_layer_options(norm: str, kernel_size: int, **sizes: int) -> None:
    """Raises ValueError naming the option of a SPADE layer that is out of range."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if kernel_size not in KERNEL_SIZES:
        raise ValueError(f"kernel_size must be one of {KERNEL_SIZES}, got {kernel_size!r}")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")


def config_options(config_text: str) -> tuple[str, int]:
    """(norm, kernel_size) of a SPADE layer in the authors' form, such as ``spadesyncbatch3x3``.

    Examples:
        >>> config_options("spadeinstance5x5")
        ('instance', 5)

    Raises:
        ValueError: the text has another form, or its norm or kernel is unknown.
    """
    found = re.match(r"spade(\D+)(\d)x\d", config_text)
    if found is None or found[1] not in NORMS or int(found[2]) not in KERNEL_SIZES:
        kernels = ", ".join(f"{k}x{k}" for k in KERNEL_SIZES)
        raise ValueError(
            f"config_text must be spade, then a norm ({', '.join(NORMS)}), then a kernel ({kernels}), "
            f"as in 'spadesyncbatch3x3', got {config_text!r}"
        )
    return found[1], int(found[2])


def takes_config_text(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates the ``__init__`` of a SPADE layer to take the authors' (config_text, norm_nc, label_nc) too."""

    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if "config_text" in kwargs or (args and isinstance(args[0], str)):
            args, kwargs = _from_config_text(*args, **kwargs), {}
        init(self, *args, **kwargs)

    return __init__


def _from_config_text(config_text: str, norm_nc: int, label_nc: int) -> tuple[int, int, str, int]:
    return norm_nc, label_nc, *config_options(config_text)


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``F.instance_norm`` of x [N, C, H, W], with a right gradient for one image on a CPU.

    For one image on a CPU, torch 2.13 computes a wrong input gradient if the incoming gradient is in channels-last
    memory. Its group norm with a group for each channel is the same function and has no such fault.
    """
    if x.device.type == "cpu" and x.shape[0] == 1 and x.shape[2] * x.shape[3] > 1:
        return F.group_norm(x.contiguous(), x.shape[1], weight, bias, eps)
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps)


class InstanceNorm2d(nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` with the gradient of :func:`instance_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, H, W], with statistics of each image and channel."""
        if x.dim() != 4 or x.shape[1] != self.num_features or self.track_running_stats:
            return super().forward(x)
        return instance_norm(x, self.weight, self.bias, self.eps)


def param_free_norm(norm: str, num_features: int) -> nn.Module:
    """The normalization of a SPADE layer, without learned affine parameters (eps 1e-5).

    ``syncbatch`` is batch normalization. To take its statistics over several processes, convert the network with
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``.

    Args:
        norm: ``syncbatch``, ``batch``, ``instance`` or ``none``.
        num_features: channels of the activation.
    """
    if norm in ("syncbatch", "batch"):
        return nn.BatchNorm2d(num_features, affine=False)
    if norm == "instance":
        return InstanceNorm2d(num_features, affine=False)
    return nn.Identity()


class SPADE(nn.Module):
    """Spatially-adaptive normalization, written out plainly (Park et al., CVPR 2019, section 3, equation 1).

    ``out = norm(x) * (1 + gamma(segmap)) + beta(segmap)``, where ``segmap`` is nearest-resized to the size of ``x``,
    and gamma and beta are two convolutions over a shared ``relu(convolution(segmap))``.

    Examples:
        >>> layer = SPADE(norm_nc=4, label_nc=3)  # or SPADE("spadesyncbatch3x3", 4, 3)
        >>> layer(torch.randn(1, 4, 8, 8), torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 4, 8, 8])

    Args:
        norm_nc: channels of the activation.
        label_nc: channels of the segmentation map (classes, plus one if instance edges are used).
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

    @takes_config_text
    def __init__(
        self, norm_nc: int, label_nc: int, norm: str = "syncbatch", kernel_size: int = 3, hidden_nc: int = 128
    ) -> None:
        super().__init__()
        check_layer_options(norm, kernel_size, norm_nc=norm_nc, label_nc=label_nc, hidden_nc=hidden_nc)
        padding = kernel_size // 2
        self.param_free_norm = param_free_norm(norm, norm_nc)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, hidden_nc, kernel_size, padding=padding), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden_nc, norm_nc, kernel_size, padding=padding)
        self.mlp_beta = nn.Conv2d(hidden_nc, norm_nc, kernel_size, padding=padding)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        """Normalize and modulate.

        Args:
            x: activation [N, norm_nc, H, W].
            segmap: map [N, label_nc, h, w], one-hot or dense; resized to H×W by nearest neighbor.

        Returns:
            [N, norm_nc, H, W].
        """
        segmap = F.interpolate(segmap, size=x.shape[2:], mode="nearest")
        hidden = self.mlp_shared(segmap)
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class LabelMapLike(Protocol):
    """What this module needs of a :class:`spade_fast.LabelMap`."""

    @property
    def label_nc(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]: ...

    def __len__(self) -> int: ...

    def one_hot(self, dtype: torch.dtype = ...) -> Tensor: ...


def segmap_shape(segmap: LabelMapLike | Tensor) -> tuple[int, ...]:
    """[N, label_nc, h, w] of a LabelMap or of a dense tensor."""
    return tuple(segmap.shape) if isinstance(segmap, Tensor) else (len(segmap), segmap.label_nc, *segmap.size)


def as_segmap(segmap: LabelMapLike | Tensor, dtype: torch.dtype) -> Tensor:
    """A dense [N, label_nc, h, w] map from a LabelMap or a tensor."""
    return segmap.to(dtype) if isinstance(segmap, Tensor) else segmap.one_hot(dtype)
