# SPDX-License-Identifier: Apache-2.0
"""embedding_sum: a convolution of one-hot patches, as sums of table rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from spade_fast.ops import _register
from spade_fast.ops._segment_sum import SegmentPlan, bag_sum, segment_plan, segment_sum

_Result = TypeVar("_Result", bound=tuple)
NOTHING = -1  # The row number of a code that adds no row: it is outside the image or ignored, or has no edge.


def row_numbers(codes: Tensor, num_rows: int, edges: bool) -> Tensor:
    """The rows of the flattened table [T * num_rows] that codes [Q, T] stand for: [Q, T], or [Q, 2T] with edges."""
    stop = codes.shape[1] * num_rows
    taps = torch.arange(0, stop, num_rows, dtype=codes.dtype, device=codes.device)
    inside = codes >= 0
    if not edges:
        return torch.where(inside & (codes < num_rows), codes + taps, NOTHING)
    label = codes >> 1
    labels = torch.where(inside & (label < num_rows - 1), label + taps, NOTHING)
    edge = torch.where(inside & (codes & 1).bool(), taps + (num_rows - 1), NOTHING)
    return torch.cat([labels, edge], 1)


_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # codes -> {key: result}


def _remembered(codes: Tensor, key: tuple, compute: Callable[[], _Result]) -> _Result:
    """compute(), whose result is kept as long as codes lives unchanged, on a CPU.

    The layers of one resolution share the codes. For small maps, indices cost as much as sums.
    """
    if codes.device.type != "cpu" or codes.is_inference():
        return compute()
    known = _plans.setdefault(codes, {})
    key = (codes._version, *key)
    if key not in known:
        known[key] = compute()
    return known[key]


def _present(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers [B, columns] that are not NOTHING, the offsets [B + 1] of each row among them, and a mask of them."""
    present = numbers >= 0
    offsets = torch.zeros(numbers.shape[0] + 1, dtype=numbers.dtype)
    torch.cumsum(present.sum(1), 0, out=offsets[1:])
    return numbers[present], offsets, present


def sum_rows(rows: Tensor, numbers: Tensor, weights: Tensor | None = None) -> Tensor:
    """out[b] = sum of rows[numbers[b, i]] * weights[b, i] over i -> [B, D]. A negative number adds nothing."""
    bags, columns = numbers.shape
    if numbers.device.type == "cpu":
        numbers, offsets, present = _present(numbers)
        return bag_sum(rows, numbers, offsets, None if weights is None else weights[present])
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # The host need not read which numbers are negative.
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


def _transposed(numbers: Tensor, rows: int) -> tuple[Tensor, Tensor, SegmentPlan]:
    """(source, offsets, plan of segment_sum): the sums source[offsets[r]:offsets[r + 1]] contain table row r."""
    values, order = torch.sort(numbers.reshape(-1), stable=True)
    limits = torch.arange(rows + 1, dtype=values.dtype, device=values.device)
    offsets = torch.searchsorted(values, limits)
    # A row of numbers lists each table row at most once.
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


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    table, bias, codes, ctx.edges, ctx.relu = inputs
    ctx.num_rows, ctx.has_bias = table.shape[1], bias is not None
    ctx.save_for_backward(output, codes)


def _backward(ctx: Any, dout: Tensor) -> tuple:
    out, codes = ctx.saved_tensors
    dtable, dbias = _embedding_sum_backward(dout, out, codes, ctx.num_rows, ctx.edges, ctx.relu)
    return dtable, dbias if ctx.has_bias else None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, out, codes, ctx.num_rows, ctx.edges, ctx.relu = inputs
    ctx.save_for_backward(out, codes)


def _second_backward(ctx: Any, d_dtable: Tensor | None, d_dbias: Tensor | None) -> tuple:
    """embedding_sum_backward is linear in dout. Its transpose is embedding_sum, masked by the ReLU."""
    out, codes = ctx.saved_tensors
    if d_dtable is None:
        d_dtable = out.new_zeros(codes.shape[1], ctx.num_rows, out.shape[1])
    gradient = _embedding_sum(d_dtable, d_dbias, codes, ctx.edges, False)
    return gradient * (out > 0) if ctx.relu else gradient, None, None, None, None, None


_register.register_gradient("embedding_sum", _backward, _setup)
_register.register_gradient("embedding_sum_backward", _second_backward, _setup_backward)


def embedding_sum(table: Tensor, bias: Tensor | None, codes: Tensor, edges: bool, relu: bool) -> Tensor:
    """Sums one row of a table for each tap: the convolution of one-hot patches.

    ``out[q] = bias + sum over t of row(t, codes[q, t])``. Without edges, a code c stands for table[t, c]; a code
    c >= L is ignored and adds nothing. With edges, it stands for table[t, c >> 1] if c >> 1 < L - 1, plus
    table[t, L - 1], the edge channel, if c is odd. A negative code is outside the image and adds nothing. Sums are
    float32 (float64 for a float64 table). The backward is deterministic, and can be differentiated.

    Args:
        table: [T, L, Hd], any strides.
        bias: [Hd] or None.
        codes: [Q, T] int32.
        edges: how to read codes.
        relu: whether a ReLU follows.

    Returns:
        [Q, Hd] in table's dtype.

    Raises:
        ValueError: table or codes has a wrong shape.

    Example:
        >>> table = torch.tensor([[[1.0], [2.0]], [[10.0], [20.0]]])  # 2 taps, 2 labels, width 1
        >>> embedding_sum(table, None, torch.tensor([[0, 1], [-1, 0]], dtype=torch.int32), False, False)
        tensor([[21.],
                [10.]])
    """
    if table.dim() != 3 or codes.dim() != 2 or codes.shape[1] != table.shape[0]:
        raise ValueError(
            f"embedding_sum: expected table [T, L, Hd] and codes [Q, T], got {list(table.shape)}, {list(codes.shape)}"
        )
    return _embedding_sum(table, bias, codes, edges, relu)
