# SPDX-License-Identifier: Apache-2.0
"""Spectrally normalized convolution (Miyato et al., ICLR 2018), with the state-dict names of torch's hook version.

Names and numbers are those of torch's own module. That module divides the whole weight in every forward and keeps the
quotient for backward. It copies a channels-last weight to flatten it, and it breaks ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from spade_fast.layers.as_built import torch_only
from spade_fast.layers.spectral_gradient import SpectralConvolution, convolve

EPS = 1e-12
_held = 0


@contextlib.contextmanager
def hold_power_iteration() -> Iterator[None]:
    """Inside, training mode estimates sigma from u and v as they are. For weights that run more than once a step."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1


def has_spectral_norm(network: nn.Module) -> bool:
    """Whether some layer of a network is spectrally normalized, by SpectralConv2d or by torch's hook."""
    return any("weight_u" in module._buffers for module in network.modules())


class Recompute(NamedTuple):
    """How a tensor is computed again: function(*tensors)."""

    function: Callable[..., Tensor]
    tensors: list[Tensor | None]


class _Frozen(NamedTuple):
    """A divided weight, and the same packed for inputs of one shape."""

    weight: Tensor
    packed: dict[torch.Size, Tensor]


class _Marker(SpectralNorm):
    """A hook by which ``torch.nn.utils.remove_spectral_norm`` finds the layer. The layer divides by sigma itself."""

    spade_fast_marker = True

    def __call__(self, module: nn.Module, inputs: object) -> None:
        pass

    def remove(self, module: nn.Module) -> None:
        """Makes the layer an ``nn.Conv2d`` with the weight it convolves with now."""
        assert isinstance(module, SpectralConv2d)
        with torch.no_grad(), hold_power_iteration():
            weight = module.normalized_weight()
        for name in ("weight_orig", "weight_u", "weight_v", "_frozen"):
            delattr(module, name)
        module.__class__ = nn.Conv2d  # type: ignore[assignment]  # the annotated class is the subclass
        module.register_parameter("weight", nn.Parameter(weight))


class SpectralConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight is divided by its largest singular value, estimated by power iteration.

    State dict: ``weight_orig``, ``weight_u`` [out], ``weight_v`` [in·k·k] and ``bias``. Training mode makes one power
    iteration a forward. Sigma is computed in every forward from the weight as it then is, unless the layer is frozen.
    ``torch.nn.utils.remove_spectral_norm`` makes it an ``nn.Conv2d``.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        weight = self.weight
        del self.weight
        self.weight_orig = nn.Parameter(weight.data)
        self.register_buffer("weight_u", F.normalize(torch.randn(out_channels), dim=0, eps=EPS))
        self.register_buffer("weight_v", F.normalize(torch.randn(weight[0].numel()), dim=0, eps=EPS))
        self._frozen: _Frozen | None = None
        marker = _Marker("weight", eps=EPS)
        self.register_forward_pre_hook(marker)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]  # remove_spectral_norm makes it an attribute again
        """``weight_orig``, which is trained and which initializers write. ``normalized_weight()`` convolves."""
        return self.weight_orig

    def _matrix(self) -> tuple[Tensor, bool]:
        """weight_orig as [out, in·k·k], and whether its columns are in the order k·k·in. Never a copy."""
        weight = self.weight_orig
        if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
            return weight.permute(0, 2, 3, 1).flatten(1), True
        return weight.flatten(1), False

    def _reorder(self, v: Tensor, back: bool) -> Tensor:
        """weight_v between the state dict's order (in, k, k) and channels-last order (k, k, in)."""
        inner, kh, kw = self.weight_orig.shape[1:]
        if back:
            return v.view(kh, kw, inner).permute(2, 0, 1).reshape(-1)
        return v.view(inner, kh, kw).permute(1, 2, 0).reshape(-1)

    def _estimate(self) -> tuple[Tensor, Tensor, Tensor]:
        """(u, v, sigma), with v in the column order of `_matrix`; makes one power iteration in training mode.

        sigma is differentiable in weight_orig; u and v are constants.
        """
        matrix, channels_last = self._matrix()
        u, v = self.weight_u, self.weight_v
        if self.training and not _held:
            with torch.no_grad():
                v = F.normalize(torch.mv(matrix.t(), u), dim=0, eps=EPS)
                self.weight_v.copy_(self._reorder(v, back=True) if channels_last else v)
            product = torch.mv(matrix, v)
            with torch.no_grad():
                u = F.normalize(product, dim=0, eps=EPS)
                self.weight_u.copy_(u)
        else:
            v = self._reorder(v, back=False) if channels_last else v
            product = torch.mv(matrix, v)
        # A later forward in training mode writes u and v in place, and backward may come after it.
        return u.clone(), v.clone(), torch.dot(u.clone(), product)

    def normalized_weight(self) -> Tensor:
        """weight_orig / sigma [out, in, k, k], in the memory format of weight_orig.

        Makes one power iteration in training mode.
        """
        return self.weight_orig / self._estimate()[2]

    @torch.no_grad()
    def settle(self, iterations: int = 15) -> None:
        """Makes power iterations for a new weight. With random u and v, sigma is far too small for evaluation."""
        was_training = self.training
        self.training = True
        for _ in range(iterations):
            self._estimate()
        self.training = was_training

    def freeze(self) -> None:
        """Divides and packs the weight as it is now, once for all forwards in evaluation mode without gradients.

        Later writes to the weight show after `unfreeze`, `train` or `load_state_dict`.
        """
        with torch.no_grad(), hold_power_iteration():
            self._frozen = _Frozen(self.normalized_weight(), {})

    def unfreeze(self) -> None:
        """Takes back `freeze`: every forward computes from the weight as it then is."""
        self._frozen = None

    def train(self, mode: bool = True) -> SpectralConv2d:
        """As in ``nn.Module``; training mode takes back `freeze`."""
        if mode:
            self.unfreeze()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args)

    def _apply(self, *args: Any, **options: Any) -> SpectralConv2d:
        self.unfreeze()
        return super()._apply(*args, **options)

    def _packed_weight(self, frozen: _Frozen, shape: torch.Size) -> Tensor:
        """The frozen weight in oneDNN's own order for inputs of a shape. It is kept for the last shape."""
        packed = frozen.packed.get(shape)
        if packed is None:
            weight = frozen.weight.contiguous().to_mkldnn()
            geometry = (list(self.padding), list(self.stride), list(self.dilation), self.groups, list(shape))
            packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight, *geometry)
            self._frozen = _Frozen(frozen.weight, {shape: packed})
        return packed

    def _packs(self, x: Tensor) -> bool:
        # On a small map, reordering the weight costs more than the convolution (1024 channels at 8×8: 15 -> 5 ms).
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight_orig.dtype == torch.float32
            and x.numel() < self.weight_orig.numel()
            and x.numel() > 0
            and x.is_contiguous(memory_format=torch.channels_last)
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
        )

    def _by_torch(self) -> bool:
        """Whether only torch's own convolution computes what was asked for."""
        return (
            torch.compiler.is_compiling()
            or torch_only()
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or "_conv_forward" in self.__dict__
        )

    def forward(self, x: Tensor, recompute: Recompute | None = None) -> Tensor:
        """Convolves.

        Args:
            x: [N, in, H, W].
            recompute: how x is computed again. Backward then does so, and x is not kept.

        Returns:
            [N, out, H', W'].
        """
        if self._by_torch():
            return self._conv_forward(x, self.normalized_weight(), self.bias)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if torch.is_grad_enabled():
            with torch.no_grad():
                u, v, sigma = self._estimate()
            function, tensors = (None, []) if recompute is None else recompute
            return SpectralConvolution.apply(x, self.weight_orig, self.bias, u, v, sigma, geometry, function, *tensors)
        if self._frozen is None or self.training:
            return convolve(x, self.weight_orig, self.bias, self._estimate()[2], geometry)
        if self._packs(x):
            options = tuple(list(o) if isinstance(o, tuple) else o for o in (self.padding, self.stride, self.dilation))
            weight = self._packed_weight(self._frozen, x.shape)
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *options, self.groups, "none", [], "")
        return self._conv_forward(x, self._frozen.weight, self.bias)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_frozen": None}  # copies and pickles are not frozen
