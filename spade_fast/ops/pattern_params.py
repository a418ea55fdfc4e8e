# SPDX-License-Identifier: Apache-2.0
"""pattern_params: gamma and beta of every distinct pattern, from the hidden rows of its k×k patch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spade_fast.ops import _register
from spade_fast.ops._segment_sum import bag_sum, segment_sum
from spade_fast.ops.segments import segments

# Measured on 2 AVX-512 cores: float32 GEMM at 300 GFLOP/s, gathered rows at 25 GB/s. Only the ratio matters.
FLOPS_PER_BYTE = 12.0
FLOPS_PER_CALL = 4e6  # The start of a GEMM takes the time of this many floating-point operations.
_SLICE = 2**22  # Elements of the factored method's temporaries.
_CHUNK = 2048  # Patterns of one GEMM: their gathered rows stay in cache.


def choose_method(num_hidden: int, num_patterns: int, taps: int, width: int, channels: int) -> str:
    """The cheaper of two methods.

    gather: P·T·Hd·2C multiply-adds on gathered rows. factored: Q·T·Hd·2C multiply-adds, then sums of P·T rows of 2C.
    """
    flops = 4.0 * taps * width * channels
    gather = num_patterns * (flops + FLOPS_PER_BYTE * 4 * taps * width)
    factored = num_hidden * flops + num_patterns * FLOPS_PER_BYTE * 8 * taps * channels + 2 * taps * FLOPS_PER_CALL
    return "gather" if gather <= factored else "factored"


def _matrix(weight: Tensor, acc: torch.dtype) -> Tensor:
    """A weight [C, Hd, k, k] as [C, k·k, Hd]: a view when the weight is stored channels-last."""
    return weight.to(acc).permute(0, 2, 3, 1).reshape(weight.shape[0], -1, weight.shape[1]).contiguous()


def _compute_dtype(a: Tensor) -> torch.dtype:
    """The dtype of the GEMMs: that of a on a GPU, which accumulates in float32, and float32 on a CPU."""
    return a.dtype if a.is_cuda else _register.accumulation_dtype(a.dtype)


def pattern_params_torch(
    a: Tensor,
    taps: Tensor,
    w_gamma: Tensor,
    b_gamma: Tensor,
    w_beta: Tensor,
    b_beta: Tensor,
    tap_order: Tensor | None = None,
    tap_offsets: Tensor | None = None,
) -> Tensor:
    (q, width), (p, t), c = a.shape, taps.shape, w_gamma.shape[0]
    acc = _compute_dtype(a)
    halves = [(_matrix(w_gamma, acc), b_gamma.to(acc)), (_matrix(w_beta, acc), b_beta.to(acc))]
    params = torch.empty(p, 2 * c, dtype=acc, device=a.device)
    if choose_method(q, p, t, width, c) == "gather":
        rows = torch.cat([a.to(acc), a.new_zeros(1, width, dtype=acc)])
        numbers = torch.where(taps < 0, q, taps).view(-1)
        chunk = _CHUNK if a.device.type == "cpu" else max(p, 1)
        for i in range(0, p, chunk):
            patches = rows.index_select(0, numbers[i * t : (i + chunk) * t]).view(-1, t * width)
            for half, (weight, bias) in enumerate(halves):
                out = params[i : i + chunk, half * c : (half + 1) * c]
                torch.addmm(bias, patches, weight.view(c, -1).t(), out=out)
        return params.to(a.dtype)
    rows = a.to(acc)
    shift = torch.arange(t, dtype=taps.dtype, device=taps.device) * q
    numbers = torch.where(taps < 0, t * q, taps + shift).view(-1)
    offsets = torch.arange(p + 1, dtype=taps.dtype, device=taps.device) * t
    for half, (weight, bias) in enumerate(halves):
        for i, j in _channel_slices(c, max(t * q, p), a.device):
            values = _register.scratch((t * q + 1, j - i), acc, a.device)
            values[-1] = 0  # Taps outside the image take this row.
            for tap in range(t):
                out = values[tap * q : (tap + 1) * q]
                if tap == t // 2:  # The center is always inside the image, so it can bring the bias.
                    torch.addmm(bias[i:j], rows, weight[i:j, tap].t(), out=out)
                else:
                    torch.mm(rows, weight[i:j, tap].t(), out=out)
            params[:, half * c + i : half * c + j] = bag_sum(values, numbers, offsets)
    return params.to(a.dtype)


def _channel_slices(c: int, num_rows: int, device: torch.device) -> list[tuple[int, int]]:
    """Ranges of channels. On a CPU their temporaries [num_rows, channels] stay small: fresh pages cost time there."""
    count = 1 if device.type != "cpu" else min(-(-c // 32), -(-c * num_rows // _SLICE))
    step = -(-c // max(count, 1))
    return [(i, min(i + step, c)) for i in range(0, c, max(step, 1))]


def _pattern_params_fake(
    a: Tensor,
    taps: Tensor,
    w_gamma: Tensor,
    b_gamma: Tensor,
    w_beta: Tensor,
    b_beta: Tensor,
    tap_order: Tensor | None = None,
    tap_offsets: Tensor | None = None,
) -> Tensor:
    return a.new_empty((taps.shape[0], 2 * w_gamma.shape[0]))


def tap_segments(taps: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """Where each hidden row is used, and as which tap.

    Args:
        taps: [P, T] int32, hidden rows, -1 outside the image.
        num_hidden: Q, the number of hidden rows.

    Returns:
        tap_order [P·T] int32 and tap_offsets [Q·T + 1] int32: ``tap_order[tap_offsets[s]:tap_offsets[s + 1]]`` with
        s = q·T + t are the flattened positions p·T + t where taps[p, t] == q.
    """
    t = taps.shape[1]
    key = taps * t + torch.arange(t, dtype=taps.dtype, device=taps.device)
    return segments(torch.where(taps < 0, -1, key), num_hidden * t)


def pattern_params_backward_torch(
    dparams: Tensor,
    a: Tensor,
    taps: Tensor,
    w_gamma: Tensor,
    w_beta: Tensor,
    tap_order: Tensor | None = None,
    tap_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (q, width), (p, t), c = a.shape, taps.shape, w_gamma.shape[0]
    acc = _compute_dtype(a)
    if tap_order is None or tap_offsets is None:
        tap_order, tap_offsets = tap_segments(taps, q)
    gradient, rows = dparams.to(acc).contiguous(), a.to(acc)
    weights = [_matrix(w_gamma, acc), _matrix(w_beta, acc)]
    dweights = [torch.empty_like(w) for w in weights]  # [C, T, Hd]
    dbias = gradient.sum(0)
    if choose_method(q, p, t, width, c) == "gather":
        da = _backward_gather(gradient, rows, taps, weights, dweights, tap_order, tap_offsets)
    else:
        source = torch.div(tap_order, t, rounding_mode="floor")
        da = torch.zeros_like(rows)
        for half in range(2):
            for i, j in _channel_slices(c, max(t * q, p), a.device):
                upstream = gradient[:, half * c + i : half * c + j].contiguous()
                dvalues = segment_sum(upstream, source, tap_offsets).view(q, t, j - i)
                for tap in range(t):
                    da.addmm_(dvalues[:, tap], weights[half][i:j, tap])
                    torch.mm(dvalues[:, tap].t(), rows, out=dweights[half][i:j, tap])
    k = w_gamma.shape[2]
    dw = [d.view(c, k, k, width).permute(0, 3, 1, 2).to(w_gamma.dtype) for d in dweights]
    db = dbias.to(w_gamma.dtype)
    return da.to(a.dtype), dw[0], db[:c].clone(), dw[1], db[c:].clone()


def _backward_gather(
    gradient: Tensor,
    rows: Tensor,
    taps: Tensor,
    weights: list[Tensor],
    dweights: list[Tensor],
    tap_order: Tensor,
    tap_offsets: Tensor,
) -> Tensor:
    """Returns da and fills dweights. Rows are gathered again: to keep those of the forward takes memory."""
    (q, width), (p, t), c = rows.shape, taps.shape, weights[0].shape[0]
    extended = torch.cat([rows, rows.new_zeros(1, width)])
    numbers = torch.where(taps < 0, q, taps).view(-1)
    dpatches = _register.scratch((p, t * width), rows.dtype, rows.device)
    chunk = _CHUNK if rows.device.type == "cpu" else max(p, 1)
    if p == 0:
        for dweight in dweights:
            dweight.zero_()
    for i in range(0, p, chunk):
        patches = extended.index_select(0, numbers[i * t : (i + chunk) * t]).view(-1, t * width)
        part = dpatches[i : i + chunk]
        for half in range(2):
            upstream = gradient[i : i + chunk, half * c : (half + 1) * c]
            if half == 0:
                torch.mm(upstream, weights[half].view(c, -1), out=part)
            else:
                part.addmm_(upstream, weights[half].view(c, -1))
            total = dweights[half].view(c, -1)
            torch.mm(upstream.t(), patches, out=total) if i == 0 else total.addmm_(upstream.t(), patches)
    return segment_sum(dpatches.view(p * t, width), tap_order, tap_offsets[::t].contiguous())


def _pattern_params_backward_fake(
    dparams: Tensor,
    a: Tensor,
    taps: Tensor,
    w_gamma: Tensor,
    w_beta: Tensor,
    tap_order: Tensor | None = None,
    tap_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias = w_gamma.new_empty((w_gamma.shape[0],))
    dw_gamma, dw_beta = (torch.empty_like(w, memory_format=torch.channels_last) for w in (w_gamma, w_beta))
    return torch.empty_like(a), dw_gamma, bias, dw_beta, torch.empty_like(bias)


_pattern_params = _register.register(
    "pattern_params(Tensor a, Tensor taps, Tensor w_gamma, Tensor b_gamma, Tensor w_beta, Tensor b_beta,"
    " Tensor? tap_order=None, Tensor? tap_offsets=None) -> Tensor",
    pattern_params_torch,
    _pattern_params_fake,
)
_pattern_params_backward = _register.register(
    "pattern_params_backward(Tensor dparams, Tensor a, Tensor taps, Tensor w_gamma, Tensor w_beta,"
    " Tensor? tap_order=None, Tensor? tap_offsets=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    pattern_params_backward_torch,
    _pattern_params_backward_fake,
    module="pattern_params",
)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, taps, w_gamma, _, w_beta, _, tap_order, tap_offsets = inputs
    ctx.save_for_backward(a, taps, w_gamma, w_beta, tap_order, tap_offsets)


def _backward(ctx: Any, dparams: Tensor) -> tuple:
    da, dwg, dbg, dwb, dbb = _pattern_params_backward(dparams, *ctx.saved_tensors)
    return da, None, dwg, dbg, dwb, dbb, None, None


def _setup_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    dparams, a, taps, w_gamma, w_beta, tap_order, tap_offsets = inputs
    ctx.save_for_backward(dparams, a, taps, w_gamma, w_beta, tap_order, tap_offsets)


def _second_backward(
    ctx: Any,
    g_a: Tensor | None,
    g_wg: Tensor | None,
    g_bg: Tensor | None,
    g_wb: Tensor | None,
    g_bb: Tensor | None,
) -> tuple:
    """The gradients of <g_a, da> + <g_w, dw> + <g_b, db>, for upstream gradients g of the first backward's results.

    With F(a, w, b) the params, <g_a, da> = <dparams, F(g_a, w, 0)> and <g_w, dw> + <g_b, db> = <dparams, F(a, g_w,
    g_b)>. The gradients of these are F and its backward.
    """
    dparams, a, taps, w_gamma, w_beta, *order = ctx.saved_tensors
    zero = w_gamma.new_zeros(w_gamma.shape[0])
    d_dparams = torch.zeros_like(dparams)
    d_a = d_wg = d_wb = None
    if g_a is not None:
        d_dparams = d_dparams + _pattern_params(g_a, taps, w_gamma, zero, w_beta, zero, *order)
        _, d_wg, _, d_wb, _ = _pattern_params_backward(dparams, g_a, taps, w_gamma, w_beta, *order)
    if any(g is not None for g in (g_wg, g_bg, g_wb, g_bb)):
        gamma, beta = (torch.zeros_like(w_gamma) if g is None else g for g in (g_wg, g_wb))
        bias_gamma, bias_beta = (zero if g is None else g for g in (g_bg, g_bb))
        d_dparams = d_dparams + _pattern_params(a, taps, gamma, bias_gamma, beta, bias_beta, *order)
        d_a = _pattern_params_backward(dparams, a, taps, gamma, beta, *order)[0]
    return d_dparams, d_a, None, d_wg, d_wb, None, None


def _cast(dtype: torch.dtype, args: tuple) -> tuple:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args)


_register.register_gradient("pattern_params", _backward, _setup)
_register.register_gradient("pattern_params_backward", _second_backward, _setup_backward)
_register.register_autocast("pattern_params", _cast)


def pattern_params(
    a: Tensor,
    taps: Tensor,
    w_gamma: Tensor,
    b_gamma: Tensor,
    w_beta: Tensor,
    b_beta: Tensor,
    tap_order: Tensor | None = None,
    tap_offsets: Tensor | None = None,
) -> Tensor:
    """gamma and beta of every pattern: SPADE's last two convolutions (Park et al. 2019, figure 2), once a pattern.

    ``gamma[p] = b_gamma + sum over t of w_gamma[:, :, t] @ a[taps[p, t]]``, and beta alike. There are two methods,
    equal in exact arithmetic: one GEMM over gathered rows, or a GEMM over the Q rows and then sums of rows. The sizes
    decide which is cheaper; C++ always takes the second. Deterministic.

    Args:
        a: [Q, Hd], the hidden rows.
        taps: [P, k·k] int32, the hidden rows under each pattern's taps. -1 stands for a row of zeros; the center tap
            is never -1.
        w_gamma: [C, Hd, k, k], fastest when stored channels-last.
        b_gamma: [C].
        w_beta: like w_gamma.
        b_beta: [C].
        tap_order: first result of ``tap_segments(taps, Q)``. The backward computes it if it is None.
        tap_offsets: second result of ``tap_segments(taps, Q)``, or None with tap_order.

    Returns:
        [P, 2C] = [gamma | beta], in a's dtype. gamma is without the 1 that `modulation` adds.

    Raises:
        ValueError: a, taps or a weight has a wrong shape.
    """
    if a.dim() != 2 or taps.dim() != 2 or w_gamma.dim() != 4 or w_gamma.shape != w_beta.shape:
        raise ValueError(
            "pattern_params: expected a [Q, Hd], taps [P, k*k] and two weights [C, Hd, k, k], got "
            f"{list(a.shape)}, {list(taps.shape)}, {list(w_gamma.shape)} and {list(w_beta.shape)}"
        )
    if w_gamma.shape[1] != a.shape[1] or w_gamma.shape[2] * w_gamma.shape[3] != taps.shape[1]:
        raise ValueError(
            f"pattern_params: weights {list(w_gamma.shape)} do not fit a {list(a.shape)} and taps {list(taps.shape)}"
        )
    return _pattern_params(a, taps, w_gamma, b_gamma, w_beta, b_beta, tap_order, tap_offsets)
