# SPDX-License-Identifier: Apache-2.0
"""embedding_sum: per row of codes, the sum of one table row a tap: a convolution of one-hot patches, as a gather."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from spade_fast.ops import _register
from spade_fast.ops._segment_sum import bag_sum, segment_plan, segment_sum

NOTHING = -1  # the row number of a code that contributes no row: outside the image, ignored, or no edge


def row_numbers(codes: Tensor, num_rows: int, edges: bool) -> Tensor:
    """Rows of the flattened table [T * num_rows] that codes [Q, T] add up -> [Q, T], or [Q, 2T] with edges."""
    stop = codes.shape[1] * num_rows
    taps = torch.arange(0, stop, num_rows, dtype=codes.dtype, device=codes.device)
    inside = codes >= 0
    if not edges:
        return torch.where(inside & (codes < num_rows), codes + taps, NOTHING)
    label = codes >> 1
    labels = torch.where(inside & (label < num_rows - 1), label + taps, NOTHING)
    edge = torch.where(inside & (codes & 1).bool(), taps + (num_rows - 1), NOTHING)
    return torch.cat([labels, edge], 1)


_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # codes -> {what was asked: what was worked out}


def _remembered(codes: Tensor, key: tuple, work_out: Callable[[], tuple]) -> tuple:
    """work_out(), kept as long as codes lives unchanged: the layers of one resolution share a label map's codes, and on
    a CPU indices cost as much as the sums for small maps."""
    if codes.device.type != "cpu" or codes.is_inference():
        return work_out()
    known = _plans.setdefault(codes, {})
    key = (codes._version, *key)
    if key not in known:
        known[key] = work_out()
    return known[key]


def _present(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row numbers that are not NOTHING, offsets [B + 1] of each row of numbers among them, where they are)."""
    present = numbers >= 0
    offsets = torch.zeros(numbers.shape[0] + 1, dtype=numbers.dtype)
    torch.cumsum(present.sum(1), 0, out=offsets[1:])
    return numbers[present], offsets, present


def sum_rows(rows: Tensor, numbers: Tensor, weights: Tensor | None = None) -> Tensor:
    """out[b] = sum of rows[numbers[b, i]] (times weights[b, i]) over i; a negative number adds nothing. [B, D]."""
    bags, columns = numbers.shape
    if numbers.device.type == "cpu":
        numbers, offsets, present = _present(numbers)
        return bag_sum(rows, numbers, offsets, None if weights is None else weights[present])
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # no host synchronization: a row of zeros instead
    numbers = torch.where(numbers < 0, rows.shape[0] - 1, numbers).view(-1)
    offsets = torch.arange(bags + 1, dtype=numbers.dtype, device=numbers.device) * columns
    return bag_sum(rows, numbers, offsets, None if weights is None else weights.view(-1))


def embedding_sum_torch(table: Tensor, bias: Tensor | None, codes: Tensor, edges: bool, relu: bool) -> Tensor:
    taps, num_rows, width = table.shape
    acc = _register.accumulation_dtype(table.dtype)
    rows = table.reshape(taps * num_rows, width).to(acc)
    if codes.device.type == "cpu":
        numbers, offsets = _remembered(
            codes, ("forward", num_rows, edges), lambda: _present(row_numbers(codes, num_rows, edges))[:2]
        )
        out = bag_sum(rows, numbers, offsets)
    else:
        out = sum_rows(rows, row_numbers(codes, num_rows, edges))
    if bias is not None:
        out += bias
    if relu:
        out.relu_()
    return out.to(table.dtype)


def _embedding_sum_fake(table: Tensor, bias: Tensor | None, codes: Tensor, edges: bool, relu: bool) -> Tensor:
    return table.new_empty((codes.shape[0], table.shape[2]))


def embedding_sum_backward_torch(
    dout: Tensor, out: Tensor, codes: Tensor, num_rows: int, edges: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    acc = _register.accumulation_dtype(dout.dtype)
    gradient = dout.to(acc)
    if relu:
        gradient = gradient * (out > 0)
    gradient = gradient.contiguous()
    taps = codes.shape[1]
    source, offsets, plan = _remembered(
        codes, ("backward", num_rows, edges), lambda: _transposed(row_numbers(codes, num_rows, edges), taps * num_rows)
    )
    dtable = segment_sum(gradient, source, offsets, plan=plan).view(taps, num_rows, -1)
    return dtable.to(dout.dtype), gradient.sum(0).to(dout.dtype)


def _transposed(numbers: Tensor, rows: int) -> tuple[Tensor, Tensor, tuple]:
    """(source, offsets, plan of segment_sum): table row r was added to the sums source[offsets[r]:offsets[r + 1]]."""
    values, order = torch.sort(numbers.reshape(-1), stable=True)
    limits = torch.arange(rows + 1, dtype=values.dtype, device=values.device)
    offsets = torch.searchsorted(values, limits)
    # A row of numbers lists each table row once at most.
    source = torch.div(order, max(numbers.shape[1], 1), rounding_mode="floor")
    return source, offsets, segment_plan(source, offsets)


def _embedding_sum_backward_fake(
    dout: Tensor, out: Tensor, codes: Tensor, num_rows: int, edges: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    return dout.new_empty((codes.shape[1], num_rows, dout.shape[1])), dout.new_empty((dout.shape[1],))


_embedding_sum = _register.register(
    "embedding_sum(Tensor table, Tensor? bias, Tensor codes, bool edges, bool relu) -> Tensor",
    embedding_sum_torch,
    _embedding_sum_fake,
)
_embedding_sum_backward = _register.register(
    "embedding_sum_backward(Tensor dout, Tensor out, Tensor codes, SymInt num_rows, bool edges, bool relu)"
    " -> (Tensor, Tensor)",
    embedding_sum_backward_torch,
    _embedding_sum_backward_fake,
    module="embedding_sum",
)


def _setup(ctx, inputs, output) -> None:
    table, bias, codes, ctx.edges, ctx.relu = inputs
    ctx.num_rows, ctx.has_bias = table.shape[1], bias is not None
    ctx.save_for_backward(output, codes)


def _backward(ctx, dout: Tensor) -> tuple:
    out, codes = ctx.saved_tensors
    dtable, dbias = _embedding_sum_backward(dout, out, codes, ctx.num_rows, ctx.edges, ctx.relu)
    return dtable, dbias if ctx.has_bias else None, None, None, None


def _setup_backward(ctx, inputs, output) -> None:
    _, out, codes, ctx.num_rows, ctx.edges, ctx.relu = inputs
    ctx.save_for_backward(out, codes)


def _second_backward(ctx, g_table: Tensor | None, g_bias: Tensor | None) -> tuple:
    """embedding_sum_backward is linear in dout; its transpose is the sum itself, where ReLU let it through."""
    out, codes = ctx.saved_tensors
    if g_table is None:
        g_table = out.new_zeros(codes.shape[1], ctx.num_rows, out.shape[1])
    gradient = _embedding_sum(g_table, g_bias, codes, ctx.edges, False)
    return gradient * (out > 0) if ctx.relu else gradient, None, None, None, None, None


_register.register_gradient("embedding_sum", _backward, _setup)
_register.register_gradient("embedding_sum_backward", _second_backward, _setup_backward)


def embedding_sum(table: Tensor, bias: Tensor | None, codes: Tensor, edges: bool, relu: bool) -> Tensor:
    """out[q] = bias + sum over taps t of what codes[q, t] stands for, then ReLU if asked -> [Q, Hd], table's dtype.

    table: [T, L, Hd], any strides; bias: [Hd] or None; codes: [Q, T] int32. Without edges a code c adds table[t, c],
    and nothing when c >= L (ignored). With edges it adds table[t, c >> 1] if c >> 1 < L - 1, plus table[t, L - 1] (the
    edge channel) if c is odd. A negative code (outside the image) adds nothing. Sums are fp32. Backward is
    deterministic.
    """
    if table.dim() != 3 or codes.dim() != 2 or codes.shape[1] != table.shape[0]:
        raise ValueError(
            f"embedding_sum: expected table [T, L, Hd] and codes [Q, T], got {list(table.shape)}, {list(codes.shape)}"
        )
    return _embedding_sum(table, bias, codes, edges, relu)
