# SPDX-License-Identifier: Apache-2.0
"""Registration of the operations as torch.ops.spade_fast.*, and the few helpers their torch backends share."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spade_fast.ops import backend

NAMESPACE = "spade_fast"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str, torch_function: Callable, fake: Callable, *, module: str | None = None, device_argument: int = 0
) -> Callable:
    """Defines the op of `schema` for CPU and CUDA; each call goes to the backend chosen for its device.

    device_argument: position of the tensor (or list of tensors) whose device decides.
    """
    name = schema.partition("(")[0]

    def dispatch(*args):
        decides = args[device_argument]
        device = decides.device if isinstance(decides, Tensor) else decides[0].device
        return backend.implementation(name, torch_function, device, module)(*args)

    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, dispatch, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_composed(schema: str, function: Callable, fake: Callable) -> Callable:
    """Defines an op which is made of others, the same for every backend, but has a gradient of its own."""
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def gradients(
    function: Callable, inputs: Sequence[Tensor], douts: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of function(*inputs) for upstream gradients douts, differentiable in inputs and douts.

    function is made of operations that can be differentiated twice. needed: an entry an input.
    """
    with torch.enable_grad():
        # Of one input, others may be functions: derivatives stop at these views.
        views = [t.view_as(t) for t in inputs]
        outs = function(*views)
        wanted = [v for v, need in zip(views, needed, strict=True) if need]
        outs = [outs] if isinstance(outs, Tensor) else outs
        found = iter(torch.autograd.grad(outs, wanted, douts, create_graph=True, allow_unused=True) if wanted else ())
    return [next(found) if need else None for need in needed]


def register_first_order_only(name: str, of: str) -> None:
    """Makes differentiating the backward op `name` fail with the forward op's name."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"{NAMESPACE}::{of} can be differentiated once only: its backward ({name}) has no derivative; "
            "for a gradient penalty build the layer as spade_fast.reference.SPADE, or the generator with "
            'spade="reference"'
        )

    register_gradient(name, backward, lambda ctx, inputs, output: None)


def register_autocast(name: str, cast: Callable) -> None:
    """Under autocast, the op runs on `cast(dtype, args)` instead of args."""
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    for device in ("cpu", "cuda"):
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

        def run(*args, _device=device, _key=key):
            dtype = torch.get_autocast_dtype(_device)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                return op(*cast(dtype, args))

        _library.impl(name, run, f"Autocast{device.upper()}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 (so gradcheck means something), float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout an output shaped like x [N, C, H, W] takes: channels-last when x's channels are adjacent."""
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


_scratch = threading.local()
_SCRATCH_BYTES = 2**27  # the most that is kept between calls


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for use within one call of one op; not for anything that is returned or saved.

    On a CPU it is the same memory from call to call: touching fresh pages costs more than the arithmetic on them.
    """
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize > _SCRATCH_BYTES or torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape, dtype=dtype, device=device)
    kept = getattr(_scratch, "bytes", None)
    if kept is None or kept.numel() < size * dtype.itemsize:
        with torch.inference_mode(False):
            kept = _scratch.bytes = torch.empty(size * dtype.itemsize, dtype=torch.uint8)
    return kept[: size * dtype.itemsize].view(dtype).view(shape)


def bag_sum(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums of rows [R, D] over bags: out[b] = sum of rows[indices[offsets[b]:offsets[b + 1]]] -> [B, D].

    weights: a factor per index, or None. offsets has B + 1 entries, the first 0; indices and offsets are int32 or
    int64, alike. Deterministic: a bag is summed in order.
    """
    bags = offsets.numel() - 1
    if bags <= 0 or rows.shape[0] == 0 or indices.numel() == 0:
        return rows.new_zeros(max(bags, 0), rows.shape[1])
    return torch.ops.aten._embedding_bag_forward_only(rows, indices, offsets, False, 0, False, weights, True)[0]


LONGEST_BAG = 256  # rows summed in sequence; longer segments are summed in pieces, which is balanced and more accurate


def segment_plan(order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """What `segment_sum` works out from order and offsets alone: (order, cuts, bags, entries left out of order, bags
    left out of the result)."""
    left_out = skipped = 0
    if order.device.type == "cpu":
        left_out = int(offsets[0]) if order.numel() else 0
        if left_out:
            order, offsets = order[left_out:], offsets - left_out
    else:  # no host synchronisation: an extra bag takes what comes before
        offsets = torch.cat([torch.zeros_like(offsets[:1]), offsets])
        skipped = 1
    if order.numel() <= LONGEST_BAG:
        return order, offsets, None, left_out, skipped
    # Cut at every multiple of LONGEST_BAG too: the number of pieces is known without looking at the offsets.
    multiples = torch.arange(0, order.numel(), LONGEST_BAG, dtype=offsets.dtype, device=offsets.device)
    cuts = torch.cat([offsets, multiples]).sort()[0]
    bags = torch.searchsorted(cuts, offsets, out_int32=offsets.dtype == torch.int32)
    bags[-1:].fill_(cuts.numel() - 1)  # empty segments at the end repeat the last cut
    return order, cuts, bags, left_out, skipped


def segment_sum(
    rows: Tensor, order: Tensor, offsets: Tensor, weights: Tensor | None = None, plan: tuple | None = None
) -> Tensor:
    """out[s] = sum of rows[order[offsets[s]:offsets[s + 1]]], for segments of any length -> [S, D]. Deterministic.

    offsets may start above 0 (what comes before belongs to no segment) and end at order.numel(). weights: a factor per
    entry of order, or None. plan: `segment_plan(order, offsets)` if it is at hand.
    """
    if offsets.numel() <= 1 or order.numel() == 0:
        return bag_sum(rows, order, offsets)
    order, cuts, bags, left_out, skipped = segment_plan(order, offsets) if plan is None else plan
    sums = bag_sum(rows, order, cuts, weights[left_out:] if weights is not None and left_out else weights)
    if bags is not None:
        positions = torch.arange(sums.shape[0], dtype=bags.dtype, device=bags.device)
        sums = bag_sum(sums, positions, bags)
    return sums[skipped:]
