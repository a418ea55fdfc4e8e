# SPDX-License-Identifier: Apache-2.0
"""Spectrally normalized convolution (Miyato et al., ICLR 2018), with the state-dict names of torch's hook version.

torch's own module is not used because it divides the whole weight in every forward and keeps the quotient for backward,
copies a channels-last weight to flatten it, and breaks ``torch.compile(fullgraph=True)``; names and numbers are equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from spade_fast.layers.as_built import torch_only
from spade_fast.ops import _register

EPS = 1e-12
_held = 0


@contextlib.contextmanager
def hold_power_iteration() -> Iterator[None]:
    """Inside, training mode estimates sigma from u and v as they are: where the same weights run more than once."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1


def has_spectral_norm(network: nn.Module) -> bool:
    """Whether some layer of a network is spectrally normalized, by this module or by torch's hook."""
    return any("weight_u" in module._buffers for module in network.modules())


class _Marker(SpectralNorm):
    """Lets ``torch.nn.utils.remove_spectral_norm`` find the layer, which divides by sigma itself."""

    spade_fast_marker = True

    def __call__(self, module: nn.Module, inputs: object) -> None:
        pass

    def remove(self, module: nn.Module) -> None:
        """Makes the layer an ``nn.Conv2d`` with the weight it convolves with now."""
        with torch.no_grad(), hold_power_iteration():
            weight = module.normalized_weight()
        for name in ("weight_orig", "weight_u", "weight_v", "_frozen"):
            delattr(module, name)
        module.__class__ = nn.Conv2d
        module.register_parameter("weight", nn.Parameter(weight))


class SpectralConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight is divided by its largest singular value, estimated by power iteration.

    State dict: ``weight_orig``, ``weight_u`` [out], ``weight_v`` [in·k·k] and ``bias``. Training mode makes one power
    iteration a forward. Sigma is computed in every forward from the weight as it then is, unless the layer is frozen.
    ``torch.nn.utils.remove_spectral_norm`` makes it an ``nn.Conv2d``.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        weight = self.weight
        del self.weight
        self.weight_orig = nn.Parameter(weight.data)
        self.register_buffer("weight_u", F.normalize(torch.randn(out_channels), dim=0, eps=EPS))
        self.register_buffer("weight_v", F.normalize(torch.randn(weight[0].numel()), dim=0, eps=EPS))
        self._frozen: dict[torch.Size | None, Tensor] | None = None
        marker = _Marker("weight", eps=EPS)
        self.register_forward_pre_hook(marker)

    @property
    def weight(self) -> nn.Parameter:
        """The trained weight, ``weight_orig``: what initializers write. ``normalized_weight()`` is what convolves."""
        return self.weight_orig

    def _matrix(self) -> tuple[Tensor, bool]:
        """weight_orig as [out, in·k·k] without a copy in either memory format, and whether columns are k·k·in."""
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
        """(u, v, sigma), v in the column order of `_matrix`; one power iteration in training. sigma is differentiable
        in weight_orig, u and v are constants."""
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
        """weight_orig / sigma [out, in, k, k], in the memory format of weight_orig; one power iteration in training."""
        return self.weight_orig / self._estimate()[2]

    @torch.no_grad()
    def settle(self, iterations: int = 15) -> None:
        """Power iterations for a new weight: with random u and v, sigma is far too small for evaluation."""
        was_training = self.training
        self.training = True
        for _ in range(iterations):
            self._estimate()
        self.training = was_training

    def freeze(self) -> None:
        """From now on forwards in evaluation mode without gradients use the weight as it is now, divided and packed
        once. Later writes to the weight show after `unfreeze`, `train` or `load_state_dict`."""
        with torch.no_grad(), hold_power_iteration():
            self._frozen = {None: self.normalized_weight()}

    def unfreeze(self) -> None:
        """Every forward computes from the weight as it then is, as at first."""
        self._frozen = None

    def train(self, mode: bool = True) -> SpectralConv2d:
        if mode:
            self.unfreeze()
        return super().train(mode)

    def _load_from_state_dict(self, *args) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args)

    def _apply(self, *args, **options) -> SpectralConv2d:
        self.unfreeze()
        return super()._apply(*args, **options)

    def _packed_weight(self, shape: torch.Size) -> Tensor:
        """The frozen weight in oneDNN's own order for inputs of a shape, instead of reordering it in every call."""
        if shape not in self._frozen:
            weight = self._frozen[None].contiguous().to_mkldnn()
            geometry = (list(self.padding), list(self.stride), list(self.dilation), self.groups, list(shape))
            self._frozen = {
                None: self._frozen[None],
                shape: torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *geometry),
            }
        return self._frozen[shape]

    def _packs(self, x: Tensor) -> bool:
        # Reordering costs as much as the convolution itself where the map is small (1024 channels at 8×8: 15 -> 5 ms).
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
        """Whether only torch's own operations give what was asked for."""
        return (
            torch.compiler.is_compiling()
            or torch_only()
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or "_conv_forward" in self.__dict__
        )

    def forward(self, x: Tensor, recompute: tuple[Callable[..., Tensor], list[Tensor | None]] | None = None) -> Tensor:
        """Convolve x [N, in, H, W].

        recompute: (function, tensors) with function(*tensors) equal to x: backward then evaluates it again, and x is
        not kept.
        """
        if self._by_torch():
            return self._conv_forward(x, self.normalized_weight(), self.bias)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if torch.is_grad_enabled():
            with torch.no_grad():
                u, v, sigma = self._estimate()
            function, tensors = recompute or (None, [])
            return _SpectralConvolution.apply(x, self.weight_orig, self.bias, u, v, sigma, geometry, function, *tensors)
        if self._frozen is None or self.training:
            return _convolve(x, self.weight_orig, self.bias, self._estimate()[2], geometry)
        if self._packs(x):
            options = tuple(list(o) if isinstance(o, tuple) else o for o in (self.padding, self.stride, self.dilation))
            weight = self._packed_weight(x.shape)
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *options, self.groups, "none", [], "")
        return self._conv_forward(x, self._frozen[None], self.bias)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_frozen": None}  # copies and pickles are not frozen


def _in_order_of(weight: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """weight in dtype and in x's memory format. For use within one call: on a CPU the copy lies in scratch memory."""
    if not x.is_contiguous(memory_format=torch.channels_last) or weight.is_contiguous(
        memory_format=torch.channels_last
    ):
        return weight.to(dtype)
    out, inner, kh, kw = weight.shape
    copy = _register.scratch((out, kh, kw, inner), dtype, weight.device).permute(0, 3, 1, 2)
    return copy.copy_(weight)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, geometry: tuple) -> Tensor:
    """conv(x, weight / sigma) + bias. The division goes over the smaller of weight and output."""
    cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if cast else weight.dtype
    if x.numel() // max(1, x.shape[1]) * weight.shape[0] >= weight.numel():
        return F.conv2d(x, weight / sigma, bias, *geometry)
    y = F.conv2d(x, _in_order_of(weight, x, dtype), None, *geometry)
    y.div_(sigma.to(y.dtype))
    return y if bias is None else y.add_(bias.to(y.dtype).view(-1, 1, 1))


class _SpectralConvolution(torch.autograd.Function):
    """y = conv(x, W / sigma) + b with sigma = uᵀ W v, keeping neither W / sigma nor, if it can be recomputed, x.

    With G = dL/d(W / sigma): dL/dW = (G - <G, W / sigma> u vᵀ) / sigma (Miyato et al., equation 12).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, u, v, sigma, geometry, function, *tensors):
        ctx.divide_output = x.numel() // max(1, x.shape[1]) * weight.shape[0] < weight.numel()
        ctx.geometry, ctx.function, ctx.has_bias, ctx.x_dtype = geometry, function, bias is not None, x.dtype
        ctx.save_for_backward(weight, u, v, sigma, *((x,) if function is None else tensors))
        return _convolve(x, weight, bias, sigma, geometry)

    @staticmethod
    def backward(ctx, dy):
        weight, u, v, sigma, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dw = _differentiable_backward(ctx, dy, weight, u, v, kept)
        else:
            dx, dw = _first_backward(ctx, dy, weight, u, v, sigma, kept)
        dbias = dy.sum((0, 2, 3)).to(weight.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return (dx, dw, dbias, *(None for _ in ctx.needs_input_grad[3:]))


def _first_backward(ctx, dy, weight, u, v, sigma, kept) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight)."""
    x = kept[0] if ctx.function is None else ctx.function(*kept)
    if ctx.divide_output:
        divided, used = dy / sigma.to(dy.dtype), weight
    else:
        divided, used = dy, weight / sigma
    used = _in_order_of(used, dy, dy.dtype)
    dx, dw = _convolution_backward(divided, x.to(dy.dtype), used, ctx.geometry, ctx.needs_input_grad)
    if dw is not None:
        channels_last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        dw = dw.to(weight.dtype).contiguous(memory_format=layout)
        if weight.is_contiguous(memory_format=layout):
            # The same memory order; of a 1×1 kernel it allows several strides, and optimizers compare them.
            dw = dw.as_strided(weight.shape, weight.stride())
        if not ctx.divide_output:
            dw.div_(sigma)
        matrix, of = ((t.permute(0, 2, 3, 1) if channels_last else t).flatten(1) for t in (dw, weight))
        along = torch.dot(matrix.flatten(), of.flatten()) / sigma
        matrix.addr_(u * along, v, alpha=-1)
    return None if dx is None else dx.to(ctx.x_dtype), dw


def _differentiable_backward(ctx, dy, weight, u, v, kept) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) as functions of dy, x and weight, for second derivatives (R1, WGAN-GP, path length)."""
    x = kept[0] if ctx.function is None else ctx.function(*kept)
    channels_last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        matrix = (weight.permute(0, 2, 3, 1) if channels_last else weight).flatten(1)
        divided = weight / torch.dot(u, torch.mv(matrix, v))
        return F.conv2d(x.to(dy.dtype), divided.to(dy.dtype), None, *ctx.geometry)

    return _register.gradients(convolve, (x, weight), (dy,), ctx.needs_input_grad[:2])


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, geometry: tuple, needs) -> tuple:
    """(dx, dweight) of conv2d, each None if it is not needed."""
    stride, padding, dilation, groups = geometry
    # On a CPU, oneDNN brings a large dweight into channels-last order more slowly than it computes it.
    as_product = (
        needs[1]
        and x.device.type == "cpu"
        and weight.numel() >= 8 * x.numel()
        and weight.is_contiguous(memory_format=torch.channels_last)
        and (stride, dilation, groups) == ((1, 1), (1, 1), 1)
    )
    mask = (needs[0], needs[1] and not as_product, False)
    dx = dw = None
    if mask[0] or mask[1]:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
    return dx, _weight_gradient(dy, x, weight, padding) if as_product else dw


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """dweight of conv2d with stride 1 as one matrix product, in channels-last memory."""
    out, inner, kh, kw = weight.shape
    windows = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = windows.unfold(1, kh, 1).unfold(2, kw, 1).permute(0, 1, 2, 4, 5, 3)  # [N, Ho, Wo, kh, kw, in]
    product = dy.permute(0, 2, 3, 1).reshape(-1, out).t() @ windows.reshape(-1, kh * kw * inner)
    return product.view(out, kh, kw, inner).permute(0, 3, 1, 2)
