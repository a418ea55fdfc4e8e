# SPDX-License-Identifier: Apache-2.0
"""pattern_params: gamma and beta of every distinct pattern, from the hidden rows of its k×k neighbors."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _register
from spade_fast.ops._segment_sum import bag_sum, segment_sum
from spade_fast.ops.segments import segments

# Measured on 2 AVX-512 cores: fp32 GEMM 300 GFLOP/s, gathered or bag-summed rows 25 GB/s. Only the ratio matters.
FLOPS_PER_BYTE = 12.0
FLOPS_PER_CALL = 4e6  # what starting one more small GEMM costs
_SLICE = 2**22  # elements of the factored method's temporaries
_CHUNK = 2048  # patterns a GEMM, so that the gathered rows stay in cache


def choose_method(num_hidden: int, num_patterns: int, taps: int, width: int, channels: int) -> str:
    """gather: P·T·Hd·2C multiply-adds on gathered rows. factored: Q·T·Hd·2C, then a gather-sum of P·T rows of 2C."""
    flops = 4.0 * taps * width * channels
    gather = num_patterns * (flops + FLOPS_PER_BYTE * 4 * taps * width)
    factored = num_hidden * flops + num_patterns * FLOPS_PER_BYTE * 8 * taps * channels + 2 * taps * FLOPS_PER_CALL
    return "gather" if gather <= factored else "factored"


def _matrix(weight: Tensor, acc: torch.dtype) -> Tensor:
    """Convolution weight [C, Hd, k, k] as [C, T, Hd]: a view when the weight is stored channels-last."""
    return weight.to(acc).permute(0, 2, 3, 1).reshape(weight.shape[0], -1, weight.shape[1]).contiguous()


def _compute_dtype(a: Tensor) -> torch.dtype:
    """GPUs multiply half precision with fp32 accumulation; CPUs get fp32."""
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
            values[-1] = 0  # the row of taps outside the image
            for tap in range(t):
                out = values[tap * q : (tap + 1) * q]
                if tap == t // 2:  # the center is always inside the image: it brings the bias
                    torch.addmm(bias[i:j], rows, weight[i:j, tap].t(), out=out)
                else:
                    torch.mm(rows, weight[i:j, tap].t(), out=out)
            params[:, half * c + i : half * c + j] = bag_sum(values, numbers, offsets)
    return params.to(a.dtype)


def _channel_slices(c: int, num_rows: int, device: torch.device) -> list[tuple[int, int]]:
    """Ranges of channels whose [num_rows, channels] temporaries stay small on a CPU, where fresh pages are dear."""
    count = 1 if device.type != "cpu" else min(-(-c // 32), -(-c * num_rows // _SLICE))
    step = -(-c // max(count, 1))
    return [(i, min(i + step, c)) for i in range(0, c, max(step, 1))]


def _pattern_params_fake(a, taps, w_gamma, b_gamma, w_beta, b_beta, tap_order=None, tap_offsets=None):
    return a.new_empty((taps.shape[0], 2 * w_gamma.shape[0]))


def tap_segments(taps: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """(tap_order, tap_offsets): `segments` of taps [P, T] by (hidden row, tap), num = Q·T. Segment q·T + t lists the
    flattened positions p·T + t with taps[p, t] == q."""
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
    """da; fills dweights. The gathered rows are gathered again rather than kept."""
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


def _pattern_params_backward_fake(dparams, a, taps, w_gamma, w_beta, tap_order=None, tap_offsets=None):
    c = w_gamma.shape[0]

    bias = w_gamma.new_empty((c,))
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


def _setup(ctx, inputs, output) -> None:
    a, taps, w_gamma, _, w_beta, _, tap_order, tap_offsets = inputs
    ctx.save_for_backward(a, taps, w_gamma, w_beta, tap_order, tap_offsets)


def _backward(ctx, dparams: Tensor) -> tuple:
    da, dwg, dbg, dwb, dbb = _pattern_params_backward(dparams, *ctx.saved_tensors)
    return da, None, dwg, dbg, dwb, dbb, None, None


def _setup_backward(ctx, inputs, output) -> None:
    dparams, a, taps, w_gamma, w_beta, tap_order, tap_offsets = inputs
    ctx.save_for_backward(dparams, a, taps, w_gamma, w_beta, tap_order, tap_offsets)


def _second_backward(ctx, g_a, g_wg, g_bg, g_wb, g_bb) -> tuple:
    """With F(a, w, b) the params, <g_a, da> = <dparams, F(g_a, w, 0)> and
    <g_w, dw> + <g_b, db> = <dparams, F(a, g_w, g_b)>. The gradients of these are F itself and its backward."""
    dparams, a, taps, w_gamma, w_beta, *order = ctx.saved_tensors
    zero = w_gamma.new_zeros(w_gamma.shape[0])
    d_dparams = torch.zeros_like(dparams)
    d_a = d_wg = d_wb = None
    if g_a is not None:
        d_dparams = d_dparams + _pattern_params(g_a, taps, w_gamma, zero, w_beta, zero, *order)
        _, d_wg, _, d_wb, _ = _pattern_params_backward(dparams, g_a, taps, w_gamma, w_beta, *order)
    if any(g is not None for g in (g_wg, g_bg, g_wb, g_bb)):
        g_wg, g_wb = (torch.zeros_like(w_gamma) if g is None else g for g in (g_wg, g_wb))
        g_bg, g_bb = (zero if g is None else g for g in (g_bg, g_bb))
        d_dparams = d_dparams + _pattern_params(a, taps, g_wg, g_bg, g_wb, g_bb, *order)
        d_a = _pattern_params_backward(dparams, a, taps, g_wg, g_wb, *order)[0]
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
    """params[p] = [gamma | beta] (gamma without the 1), from hidden rows a [Q, Hd] and taps [P, k·k] int32 -> [P, 2C].

    gamma[p] = b_gamma + sum over t of w_gamma[:, :, t] @ a[taps[p, t]], beta alike; a tap of -1 is a row of zeros, the
    center tap is never -1. Weights [C, Hd, k, k], fastest when stored channels-last. Computed as one GEMM over gathered
    rows, or factored (GEMM over the Q rows, then a gather-sum), whichever the sizes make cheaper (in C++ always the
    latter): equal in exact arithmetic. tap_order, tap_offsets: `tap_segments(taps, Q)`, used by backward (found there
    if None). Deterministic.
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
