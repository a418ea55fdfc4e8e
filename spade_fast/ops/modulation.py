# SPDX-License-Identifier: Apache-2.0
"""modulation: normalize, scale and shift by pattern or by pixel, activate and enlarge, reading the activation once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.ops import _register
from spade_fast.ops._modulation_rows import Norm, Rows, folded, is_per_sample, norm_of, normalized
from spade_fast.ops.modulation_backward import ARGUMENTS, modulation_backward_op


def _empty_output(x: Tensor, upsample: int) -> Tensor:
    n, c, h, w = x.shape
    shape = (n, c, h * upsample, w * upsample)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_register.memory_format(x))


def modulation_torch(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: list[Tensor],
    pattern_ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int,
    stats_from_x: bool,
) -> list[Tensor]:
    outs = [_empty_output(x, upsample) for _ in params]
    if x.numel() == 0:
        return outs
    rows = Rows(x, upsample)
    norm = norm_of(mean, rstd, rows.acc)
    targets = outs
    if _register.memory_format(x) != torch.channels_last:
        targets = [torch.empty_like(out, memory_format=torch.channels_last) for out in outs]
    if pattern_ids is None:
        _dense_forward(rows, norm, params, slopes, targets)
    else:
        _pattern_forward(rows, norm, params, pattern_ids, slopes, targets)
    for out, target in zip(outs, targets, strict=True):
        if target is not out:
            out.copy_(target)
    return outs


def _dense_forward(
    rows: Rows, norm: Norm | None, params: list[Tensor], slopes: list[float], targets: list[Tensor]
) -> None:
    """Fills the channels-last targets, with parameters by pixel."""
    dense, outs = ([rows.of_output(t) for t in tensors] for tensors in (params, targets))
    for block in rows.blocks(split_images=is_per_sample(norm)):
        xhat = normalized(rows.x[block.rows].to(rows.acc), norm, block.image)
        for p, out, slope in zip(dense, outs, slopes, strict=True):
            gamma, beta = p[block.rows].chunk(2, -1)
            target = out[block.rows]
            z = torch.addcmul(xhat, xhat, gamma, out=target if target.dtype == rows.acc else None)
            z.add_(beta)
            _finish_block(z, target, slope)


def _pattern_forward(
    rows: Rows,
    norm: Norm | None,
    params: list[Tensor],
    pattern_ids: Tensor,
    slopes: list[float],
    targets: list[Tensor],
) -> None:
    """Fills the channels-last targets, with parameters by pattern."""
    flat = pattern_ids.reshape(-1)
    tables = [folded(p, norm, pattern_ids, rows.acc) for p in params]
    outs = [rows.of_output(target) for target in targets]
    for block in rows.blocks(split_images=False):
        x = rows.x[block.rows].to(rows.acc)
        for table, out, slope in zip(tables, outs, slopes, strict=True):
            scale, shift = rows.gather(table, flat, block)
            target = out[block.rows]
            z = target if target.dtype == rows.acc else torch.empty(target.shape, dtype=rows.acc, device=x.device)
            torch.addcmul(shift, x, scale, out=z)
            _finish_block(z, target, slope)


def _finish_block(z: Tensor, target: Tensor, slope: float) -> None:
    """LeakyReLU, then the conversion to the output's dtype if z has another."""
    if slope != 1.0:
        F.leaky_relu_(z, slope)
    if z.data_ptr() != target.data_ptr():
        target.copy_(z)


def modulation_fake(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: list[Tensor],
    pattern_ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int,
    stats_from_x: bool,
) -> list[Tensor]:
    return [_empty_output(x, upsample) for _ in params]


modulation_op = _register.register(f"modulation({ARGUMENTS}) -> Tensor[]", modulation_torch, modulation_fake)


def _setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, mean, rstd, params, pattern_ids, order, offsets, ctx.slopes, ctx.upsample, ctx.stats_from_x = inputs
    ctx.save_for_backward(x, mean, rstd, pattern_ids, order, offsets, *params)
    ctx.shape = output[0].shape


def _backward(ctx: Any, douts: list[Tensor | None]) -> tuple:
    x, mean, rstd, pattern_ids, order, offsets, *params = ctx.saved_tensors
    whole = [x.new_zeros(ctx.shape) if dout is None else dout for dout in douts]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        needed = [ctx.needs_input_grad[0], *(p.requires_grad for p in params)]

        def outputs(x: Tensor, *params: Tensor) -> list[Tensor]:
            return modulation_plain(x, mean, rstd, params, pattern_ids, ctx.slopes, ctx.upsample, ctx.stats_from_x)

        dx, *dparams = _register.gradients(outputs, (x, *params), whole, needed)
    else:
        dx, *dparams = modulation_backward_op(
            whole, x, mean, rstd, params, pattern_ids, order, offsets, ctx.slopes, ctx.upsample, ctx.stats_from_x
        )
    return dx, None, None, dparams, None, None, None, None, None, None


def modulation_plain(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: Sequence[Tensor],
    pattern_ids: Tensor | None,
    slopes: list[float],
    upsample: int,
    stats_from_x: bool,
) -> list[Tensor]:
    """`modulation` in operations that can be differentiated any number of times.

    With stats_from_x, the derivatives go through the mean and rstd too.
    """
    acc = _register.accumulation_dtype(x.dtype)
    xhat = x.to(acc)
    if mean is not None and rstd is not None:
        mean, rstd = mean.to(acc)[:, :, None, None], rstd.to(acc)[:, :, None, None]
        if stats_from_x:
            axes = (0, 2, 3) if mean.shape[0] == 1 else (2, 3)
            variance, center = torch.var_mean(xhat, axes, correction=0, keepdim=True)
            eps = (rstd**-2 - variance).detach()  # The layer added this to the variance.
            mean, rstd = center, torch.rsqrt(variance + eps)
        xhat = (xhat - mean) * rstd
    if upsample != 1:
        xhat = xhat.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    outs = []
    for p, slope in zip(params, slopes, strict=True):
        by_pixel = p.to(acc)
        if pattern_ids is not None:
            by_pixel = by_pixel[pattern_ids.to(torch.int64)].permute(0, 3, 1, 2)
        gamma, beta = by_pixel.chunk(2, 1)
        out = xhat * (1 + gamma) + beta
        outs.append((out if slope == 1.0 else F.leaky_relu(out, slope)).to(x.dtype))
    return outs


_register.register_gradient("modulation", _backward, _setup)


def modulation(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: list[Tensor],
    pattern_ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int = 1,
    stats_from_x: bool = False,
) -> list[Tensor]:
    """Normalizes x, then scales, shifts and activates it: once for each set of parameters.

    The operation of SPADE (Park et al. 2019, equation 1), where gamma and beta are stored without repetition:
    ``out[m] = leaky_relu((x_up - mean) * rstd * (1 + gamma[m]) + beta[m], slopes[m])``. x_up is x enlarged by nearest
    neighbor; it is never built. Arithmetic is float32 (float64 for float64 x). The backward is deterministic. Gradients
    go to x and params. It saves its inputs only.

    Args:
        x: [N, C, H, W].
        mean: [G, C], G = 1 or N; None: no normalization.
        rstd: [G, C], 1 / standard deviation, from the biased variance; None with mean.
        params: one or two tensors [gamma | beta]: [P, 2C], a row a pattern; or, where pattern_ids is None,
            [N, 2C, H·up, W·up], a value a pixel.
        pattern_ids: [N, H·up, W·up] int32, the row of params of each output pixel; or None.
        order: first result of ``segments(pattern_ids, P)``. The backward computes it if it is None.
        offsets: second result of ``segments(pattern_ids, P)``, or None with order.
        slopes: negative slope of the LeakyReLU of each output; 1.0: no activation.
        upsample: up, 1 or 2.
        stats_from_x: mean and rstd were computed from this x, and dx takes that into account. Otherwise they are
            constants.

    Returns:
        A tensor [N, C, H·up, W·up] for each of params, in x's dtype and memory layout.

    Raises:
        ValueError: an argument has a wrong shape; the message names it.

    Example:
        >>> x = torch.ones(1, 1, 1, 2)
        >>> params = torch.tensor([[1.0, 0.0], [0.0, -3.0]])  # gamma and beta of two patterns
        >>> modulation(x, None, None, [params], torch.tensor([[[0, 1]]], dtype=torch.int32), None, None, [0.5])
        [tensor([[[[ 2., -1.]]]])]
    """
    check_arguments(x, params, pattern_ids, slopes, upsample)
    return modulation_op(x, mean, rstd, params, pattern_ids, order, offsets, slopes, upsample, stats_from_x)


def check_arguments(
    x: Tensor, params: list[Tensor], pattern_ids: Tensor | None, slopes: list[float], upsample: int
) -> None:
    """Checks the shapes of a call of `modulation`.

    Raises:
        ValueError: an argument has a wrong shape; the message names it.
    """
    if x.dim() != 4:
        raise ValueError(f"modulation: x must have shape [N, C, H, W], got {list(x.shape)}")
    if upsample not in (1, 2):
        raise ValueError(f"modulation: upsample must be 1 or 2, got {upsample}")
    if len(params) not in (1, 2) or len(slopes) != len(params):
        raise ValueError(f"modulation: 1 or 2 sets of params, a slope each; got {len(params)} and {len(slopes)}")
    n, c, h, w = x.shape
    size = (h * upsample, w * upsample)
    for m, p in enumerate(params):
        if pattern_ids is None and p.shape != (n, 2 * c, *size):
            raise ValueError(f"modulation: params[{m}] must have shape {[n, 2 * c, *size]}, got {list(p.shape)}")
        if pattern_ids is not None and (p.dim() != 2 or p.shape[1] != 2 * c):
            raise ValueError(f"modulation: params[{m}] must have shape [P, {2 * c}], got {list(p.shape)}")
    if pattern_ids is not None and pattern_ids.shape != (n, *size):
        raise ValueError(f"modulation: pattern_ids must have shape {[n, *size]}, got {list(pattern_ids.shape)}")
