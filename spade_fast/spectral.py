# SPDX-License-Identifier: Apache-2.0
"""Spectrally normalised convolution (Miyato et al., ICLR 2018), with the state-dict names of torch's hook version.

torch's own module is not used because it divides the whole weight in every forward and keeps the quotient for backward,
copies a channels-last weight to flatten it, and breaks ``torch.compile(fullgraph=True)``; names and numbers are equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


class SpectralConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight is divided by its largest singular value, estimated by power iteration.

    State dict: ``weight_orig``, ``weight_u`` [out], ``weight_v`` [in·k·k] and ``bias``. Training mode makes one power
    iteration a forward; evaluation mode folds the division once and keeps it until a weight changes.
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
        self._folded: tuple[tuple, Tensor] | None = None
        self._packed: tuple[tuple, Tensor] | None = None

    def _matrix(self) -> tuple[Tensor, bool]:
        """weight_orig as [out, in·k·k] without a copy in either memory format, and whether columns are k·k·in."""
        weight = self.weight_orig
        if weight.is_contiguous():
            return weight.flatten(1), False
        if weight.is_contiguous(memory_format=torch.channels_last):
            return weight.permute(0, 2, 3, 1).flatten(1), True
        return weight.reshape(weight.shape[0], -1), False

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
        return u, v, torch.dot(u, product)

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

    def _key(self) -> tuple:
        """Changes with every change of the weight."""
        tensors = (self.weight_orig, self.weight_u, self.weight_v)
        return tuple((t.data_ptr(), t._version, t.dtype, t.stride()) for t in tensors)

    def _folded_weight(self) -> Tensor:
        key = self._key()
        if self._folded is None or self._folded[0] != key:
            self._folded = (key, self.normalized_weight())
        return self._folded[1]

    def _packed_weight(self, shape: torch.Size) -> Tensor:
        """The folded weight in oneDNN's own order for inputs of a shape, instead of reordering it in every call."""
        key = (self._key(), shape)
        if self._packed is None or self._packed[0] != key:
            weight = self.normalized_weight().contiguous().to_mkldnn()
            geometry = (list(self.padding), list(self.stride), list(self.dilation), self.groups, list(shape))
            self._packed = (key, torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *geometry))
        return self._packed[1]

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

    def forward(self, x: Tensor, recompute: tuple[Callable[..., Tensor], list[Tensor | None]] | None = None) -> Tensor:
        """Convolve x [N, in, H, W].

        recompute: (function, tensors) with function(*tensors) equal to x: backward then evaluates it again, and x is
        not kept.
        """
        if torch.compiler.is_compiling():
            return self._conv_forward(x, self.normalized_weight(), self.bias)
        if self.training or torch.is_grad_enabled():
            with torch.no_grad():
                u, v, sigma = self._estimate()
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            function, tensors = recompute or (None, [])
            return _SpectralConvolution.apply(x, self.weight_orig, self.bias, u, v, sigma, geometry, function, *tensors)
        if self._packs(x):
            geometry = (list(self.padding), list(self.stride), list(self.dilation), self.groups)
            weight = self._packed_weight(x.shape)
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *geometry, "none", [], "")
        return self._conv_forward(x, self._folded_weight(), self.bias)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_folded": None, "_packed": None}  # copies and pickles fold for themselves


class _SpectralConvolution(torch.autograd.Function):
    """y = conv(x, W / sigma) + b with sigma = uᵀ W v, keeping neither W / sigma nor, if it can be recomputed, x.

    With G = dL/d(W / sigma): dL/dW = (G - <G, W / sigma> u vᵀ) / sigma (Miyato et al., equation 12).
    The division by sigma goes over the smaller of weight and output.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, u, v, sigma, geometry, function, *tensors):
        out_numel = x.numel() // max(1, x.shape[1]) * weight.shape[0]
        ctx.divide_output = out_numel < weight.numel()
        if ctx.divide_output:
            y = F.conv2d(x, weight, None, *geometry)
            y.div_(sigma.to(y.dtype))
            if bias is not None:
                y.add_(bias.to(y.dtype).view(-1, 1, 1))
        else:
            y = F.conv2d(x, weight / sigma, bias, *geometry)
        ctx.geometry, ctx.function, ctx.has_bias, ctx.x_dtype = geometry, function, bias is not None, x.dtype
        kept = (x,) if function is None else tuple(None if t is None else t.detach() for t in tensors)
        ctx.save_for_backward(weight, u.clone(), v.clone(), sigma, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, u, v, sigma, *kept = ctx.saved_tensors
        x = kept[0] if ctx.function is None else ctx.function(*kept)
        if ctx.divide_output:
            divided, used = dy / sigma.to(dy.dtype), weight
        else:
            divided, used = dy, weight / sigma
        dx, dw = _convolution_backward(divided, x.to(dy.dtype), used.to(dy.dtype), ctx.geometry, ctx.needs_input_grad)
        if dw is not None:
            channels_last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            dw = dw.to(weight.dtype).contiguous(memory_format=layout)
            if weight.is_contiguous(memory_format=layout):
                # The same memory order; of a 1×1 kernel it allows several strides, and optimisers compare them.
                dw = dw.as_strided(weight.shape, weight.stride())
            if not ctx.divide_output:
                dw.div_(sigma)
            matrix, of = ((t.permute(0, 2, 3, 1) if channels_last else t).flatten(1) for t in (dw, weight))
            along = torch.dot(matrix.flatten(), of.flatten()) / sigma
            matrix.addr_(u * along, v, alpha=-1)
        dbias = dy.sum((0, 2, 3)).to(weight.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        dx = None if dx is None else dx.to(ctx.x_dtype)
        return (dx, dw, dbias, *(None for _ in ctx.needs_input_grad[3:]))


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
