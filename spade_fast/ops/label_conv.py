# SPDX-License-Identifier: Apache-2.0
"""label_conv: the convolution of a one-hot label map and its edges, without the one-hot map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.ops import _register
from spade_fast.ops._segment_sum import segment_sum
from spade_fast.ops.embedding_sum import row_numbers, sum_rows
from spade_fast.ops.patterns import OUTSIDE

_POOL = 3  # pooled: avg_pool2d(one_hot, 3, stride=2, padding=1, count_include_pad=False)


def _output_size(size: int, kernel_size: int, stride: int, padding: int, pooled: bool) -> int:
    size = (size - 1) // 2 + 1 if pooled else size
    return (size + 2 * padding - kernel_size) // stride + 1


def _windows(codes: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """The codes under each tap at each output position: [N, h, w, k, k], -1 outside the image."""
    padded = F.pad(codes, (padding,) * 4, value=OUTSIDE)
    return padded.unfold(1, kernel_size, stride).unfold(2, kernel_size, stride)


def _gather_plan(
    codes: Tensor, num_rows: int, edges: bool, kernel_size: int, stride: int, padding: int, pooled: bool
) -> tuple[Tensor, Tensor | None]:
    """The table rows of each output position, and the divisor of each: [B, columns], B = N·Ho·Wo.

    The divisors are None unless pooled.
    """
    taps = kernel_size * kernel_size
    if not pooled:
        windows = _windows(codes, kernel_size, stride, padding).reshape(-1, taps)
        return row_numbers(windows, num_rows, edges), None
    pool = _windows(codes, _POOL, 2, 1)  # [N, hp, wp, 3, 3]
    n, hp, wp = pool.shape[:3]
    present = (pool >= 0).sum((3, 4))  # [N, hp, wp] pixels in each pooling window
    position = torch.arange(n * hp * wp, dtype=torch.int32, device=codes.device).view(n, hp, wp)
    window = _windows(position, kernel_size, stride, padding).reshape(-1, taps)  # [B, T] pooled positions
    inside = (window >= 0).unsqueeze(2)
    window = window.clamp(min=0)
    under = pool.reshape(n * hp * wp, -1)[window]  # [B, T, 9]
    under = torch.where(inside, under, OUTSIDE)
    present = present.view(-1)[window]
    # The nine codes of a tap all use the rows of that tap: each gets columns of its own.
    columns = [row_numbers(under[:, :, i].contiguous(), num_rows, edges) for i in range(under.shape[2])]
    repeats = 2 if edges else 1
    return torch.cat(columns, 1), present.repeat(1, repeats * under.shape[2])


def label_conv_torch(
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    edges: bool,
    kernel_size: int,
    stride: int,
    padding: int,
    pooled: bool = False,
) -> Tensor:
    taps, num_rows, width = table.shape
    acc = _register.accumulation_dtype(table.dtype)
    n, h, w = codes.shape
    ho, wo = (_output_size(s, kernel_size, stride, padding, pooled) for s in (h, w))
    out = torch.empty(n, width, ho, wo, dtype=table.dtype, device=table.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    rows = table.reshape(taps * num_rows, width).to(acc)
    plan = (num_rows, edges, kernel_size, stride, padding, pooled)
    for i in range(n):  # One image at a time: the row numbers take more memory than the map.
        numbers, divisors = _gather_plan(codes[i : i + 1], *plan)
        sums = sum_rows(rows, numbers, None if divisors is None else 1 / divisors.to(acc))
        if bias is not None:
            sums += bias
        out[i].permute(1, 2, 0).copy_(sums.view(ho, wo, width))
    return out


def _label_conv_fake(
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    edges: bool,
    kernel_size: int,
    stride: int,
    padding: int,
    pooled: bool = False,
) -> Tensor:
    n, h, w = codes.shape
    ho, wo = (_output_size(s, kernel_size, stride, padding, pooled) for s in (h, w))
    shape = (n, table.shape[2], ho, wo)
    return torch.empty(shape, dtype=table.dtype, device=table.device, memory_format=torch.channels_last)


def label_conv_backward_torch(
    dout: Tensor,
    codes: Tensor,
    num_rows: int,
    edges: bool,
    kernel_size: int,
    stride: int,
    padding: int,
    pooled: bool = False,
) -> tuple[Tensor, Tensor]:
    width, taps = dout.shape[1], kernel_size * kernel_size
    acc = _register.accumulation_dtype(dout.dtype)
    dtable = torch.zeros(taps * num_rows, width, dtype=acc, device=dout.device)
    dbias = torch.zeros(width, dtype=acc, device=dout.device)
    limits = torch.arange(taps * num_rows + 1, dtype=torch.int32, device=dout.device)
    for i in range(dout.shape[0]):
        gradient = dout[i].permute(1, 2, 0).reshape(-1, width).to(acc).contiguous()
        dbias += gradient.sum(0)
        numbers, divisors = _gather_plan(codes[i : i + 1], num_rows, edges, kernel_size, stride, padding, pooled)
        values, order = torch.sort(numbers.reshape(-1), stable=True)
        offsets = torch.searchsorted(values, limits)
        source = torch.div(order, max(numbers.shape[1], 1), rounding_mode="floor")
        weights = None if divisors is None else 1 / divisors.reshape(-1)[order].to(acc)
        dtable += segment_sum(gradient, source, offsets, weights)
    return dtable.view(taps, num_rows, width).to(dout.dtype), dbias.to(dout.dtype)


def _label_conv_backward_fake(
    dout: Tensor,
    codes: Tensor,
    num_rows: int,
    edges: bool,
    kernel_size: int,
    stride: int,
    padding: int,
    pooled: bool = False,
) -> tuple[Tensor, Tensor]:
    return dout.new_empty((kernel_size * kernel_size, num_rows, dout.shape[1])), dout.new_empty((dout.shape[1],))


_label_conv = _register.register(
    "label_conv(Tensor codes, Tensor table, Tensor? bias, bool edges, int kernel_size, int stride, int padding,"
    " bool pooled=False) -> Tensor",
    label_conv_torch,
    _label_conv_fake,
)
_label_conv_backward = _register.register(
    "label_conv_backward(Tensor dout, Tensor codes, SymInt num_rows, bool edges, int kernel_size, int stride,"
    " int padding, bool pooled=False) -> (Tensor, Tensor)",
    label_conv_backward_torch,
    _label_conv_backward_fake,
    module="label_conv",
)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    codes, table, bias, *ctx.options = inputs
    ctx.num_rows, ctx.has_bias = table.shape[1], bias is not None
    ctx.save_for_backward(codes)


def _backward(ctx: Any, dout: Tensor) -> tuple:
    edges, *options = ctx.options
    dtable, dbias = _label_conv_backward(dout, *ctx.saved_tensors, ctx.num_rows, edges, *options)
    return None, dtable, dbias if ctx.has_bias else None, None, None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, codes, *ctx.options = inputs
    ctx.shape, ctx.dtype = output[0].shape, output[0].dtype
    ctx.save_for_backward(codes)


def _second_backward(ctx: Any, d_dtable: Tensor | None, d_dbias: Tensor | None) -> tuple:
    """label_conv_backward is linear in dout. Its transpose is label_conv."""
    (codes,) = ctx.saved_tensors
    if d_dtable is None:
        d_dtable = torch.zeros(ctx.shape, dtype=ctx.dtype, device=codes.device)
    _, *options = ctx.options
    return _label_conv(codes, d_dtable, d_dbias, *options), *(None for _ in range(7))


def _cast(dtype: torch.dtype, args: tuple) -> tuple:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args)


_register.register_gradient("label_conv", _backward, _setup)
_register.register_gradient("label_conv_backward", _second_backward, _setup_backward)
_register.register_autocast("label_conv", _cast)


def label_conv(
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    edges: bool,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    pooled: bool = False,
) -> Tensor:
    """``conv2d(one_hot(codes), weight, bias, stride, padding)``, computed from the codes. Deterministic.

    Args:
        codes: [N, H, W] int32, read as `embedding_sum` reads them.
        table: [k·k, L, O], ``weight.permute(2, 3, 1, 0).reshape(k * k, L, O)`` of the weight [O, L, k, k].
        bias: [O] or None.
        edges: how to read codes.
        kernel_size: k.
        stride: of the convolution.
        padding: of the convolution.
        pooled: whether ``avg_pool2d(one_hot, 3, stride=2, padding=1, count_include_pad=False)`` is convolved instead.
            Each tap is then a mean over at most nine codes.

    Returns:
        [N, O, Ho, Wo] in channels-last memory, in table's dtype.

    Raises:
        ValueError: codes or table has a wrong shape, or the kernel is larger than the padded map.
    """
    if codes.dim() != 3 or table.dim() != 3 or table.shape[0] != kernel_size**2:
        raise ValueError(
            f"label_conv: expected codes [N, H, W] and table [{kernel_size**2}, L, O], got {list(codes.shape)} and "
            f"{list(table.shape)}"
        )
    if any(_output_size(s, kernel_size, stride, padding, pooled) < 1 for s in codes.shape[1:]):
        raise ValueError(f"label_conv: a {kernel_size}x{kernel_size} kernel does not fit codes {list(codes.shape)}")
    return _label_conv(codes, table, bias, edges, kernel_size, stride, padding, pooled)
