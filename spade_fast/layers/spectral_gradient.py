# SPDX-License-Identifier: Apache-2.0
"""The convolution with a spectrally normalized weight, and its gradient (Miyato et al., ICLR 2018, equation 12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.ops import _register


def _in_order_of(weight: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """weight in dtype and in x's memory format. On a CPU the copy lies in scratch memory, for use within one call."""
    if not x.is_contiguous(memory_format=torch.channels_last) or weight.is_contiguous(
        memory_format=torch.channels_last
    ):
        return weight.to(dtype)
    out, inner, kh, kw = weight.shape
    copy = _register.scratch((out, kh, kw, inner), dtype, weight.device).permute(0, 3, 1, 2)
    return copy.copy_(weight)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, geometry: tuple) -> Tensor:
    """conv(x, weight / sigma) + bias. Divides the smaller of weight and output."""
    cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if cast else weight.dtype
    if x.numel() // max(1, x.shape[1]) * weight.shape[0] >= weight.numel():
        return F.conv2d(x, weight / sigma, bias, *geometry)
    y = F.conv2d(x, _in_order_of(weight, x, dtype), None, *geometry)
    y.div_(sigma.to(y.dtype))
    return y if bias is None else y.add_(bias.to(y.dtype).view(-1, 1, 1))


class SpectralConvolution(torch.autograd.Function):
    """y = conv(x, W / sigma) + b with sigma = uᵀ W v. Neither W / sigma nor an x that can be recomputed is kept.

    With G = dL/d(W / sigma): dL/dW = (G - <G, W / sigma> u vᵀ) / sigma (Miyato et al., equation 12).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor,
        v: Tensor,
        sigma: Tensor,
        geometry: tuple,
        function: Callable[..., Tensor] | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.divide_output = x.numel() // max(1, x.shape[1]) * weight.shape[0] < weight.numel()
        ctx.geometry, ctx.function, ctx.has_bias, ctx.x_dtype = geometry, function, bias is not None, x.dtype
        ctx.save_for_backward(weight, u, v, sigma, *((x,) if function is None else tensors))
        return convolve(x, weight, bias, sigma, geometry)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, u, v, sigma, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dw = _differentiable_backward(ctx, dy, weight, u, v, kept)
        else:
            dx, dw = _first_backward(ctx, dy, weight, u, v, sigma, kept)
        dbias = dy.sum((0, 2, 3)).to(weight.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return (dx, dw, dbias, *(None for _ in ctx.needs_input_grad[3:]))


def _first_backward(
    ctx: Any, dy: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, kept: list[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
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
            # Optimizers compare strides, and a 1×1 kernel has several strides for the same memory order.
            dw = dw.as_strided(weight.shape, weight.stride())
        if not ctx.divide_output:
            dw.div_(sigma)
        matrix, of = ((t.permute(0, 2, 3, 1) if channels_last else t).flatten(1) for t in (dw, weight))
        along = torch.dot(matrix.flatten(), of.flatten()) / sigma
        matrix.addr_(u * along, v, alpha=-1)
    return None if dx is None else dx.to(ctx.x_dtype), dw


def _differentiable_backward(
    ctx: Any, dy: Tensor, weight: Tensor, u: Tensor, v: Tensor, kept: list[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) as functions of dy, x and weight, for second derivatives (R1, WGAN-GP, path length)."""
    x = kept[0] if ctx.function is None else ctx.function(*kept)
    channels_last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)

    def divided_convolution(x: Tensor, weight: Tensor) -> Tensor:
        matrix = (weight.permute(0, 2, 3, 1) if channels_last else weight).flatten(1)
        divided = weight / torch.dot(u, torch.mv(matrix, v))
        return F.conv2d(x.to(dy.dtype), divided.to(dy.dtype), None, *ctx.geometry)

    dx, dweight = _register.gradients(divided_convolution, (x, weight), (dy,), ctx.needs_input_grad[:2])
    return dx, dweight


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, geometry: tuple, needs: tuple[bool, ...]) -> tuple:
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
