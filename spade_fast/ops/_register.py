# SPDX-License-Identifier: Apache-2.0
"""Registers the operations as torch.ops.spade_fast.*, and holds what their torch implementations share."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spade_fast.ops import _backend

NAMESPACE = "spade_fast"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str, torch_function: Callable, fake: Callable, *, module: str | None = None, device_argument: int = 0
) -> Callable:
    """Defines an op whose calls go to the backend chosen for their device.

    Args:
        schema: name and arguments, as torch.library takes them.
        torch_function: the implementation of backend torch.
        fake: gives outputs without values, for torch.compile.
        module: file in spade_fast.kernels with the Triton implementation; by default it has the op's name.
        device_argument: position of the argument whose device decides, a tensor or a list of tensors.

    Returns:
        The op.
    """
    name = schema.partition("(")[0]

    def dispatch(*args: Any) -> Any:
        decides = args[device_argument]
        device = decides.device if isinstance(decides, Tensor) else decides[0].device
        return _backend.implementation(name, torch_function, device, module)(*args)

    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, dispatch, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_composed(schema: str, function: Callable, fake: Callable) -> Callable:
    """Defines an op that calls other ops and has its own gradient. Every backend runs the same function."""
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gives the op `name` a gradient; the functions are those of torch.library.register_autograd."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def gradients(
    function: Callable, inputs: Sequence[Tensor], douts: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of function(*inputs), which can themselves be differentiated in inputs and douts.

    Args:
        function: made of operations that can be differentiated twice.
        inputs: its arguments.
        douts: the gradient of each of its outputs.
        needed: which inputs get a gradient.

    Returns:
        A gradient for each input, or None.
    """
    with torch.enable_grad():
        # One input may have been computed from another: the derivatives stop at these views.
        views = [t.view_as(t) for t in inputs]
        outs = function(*views)
        wanted = [v for v, need in zip(views, needed, strict=True) if need]
        outs = [outs] if isinstance(outs, Tensor) else outs
        found: Sequence[Tensor | None] = ()
        if wanted:
            found = torch.autograd.grad(outs, wanted, douts, create_graph=True, allow_unused=True)
    remaining = iter(found)
    return [next(remaining) if need else None for need in needed]


def register_first_order_only(name: str, of: str) -> None:
    """Makes the second derivative of an op raise an error.

    Args:
        name: the op that has no derivative.
        of: the forward op, which the error names.
    """

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{NAMESPACE}::{of} can be differentiated once only: its backward ({name}) has no derivative; "
            "for a gradient penalty build the layer as spade_fast.reference.SPADE, or the generator with "
            'spade="reference"'
        )

    register_gradient(name, backward, lambda ctx, inputs, output: None)


def register_autocast(name: str, cast: Callable) -> None:
    """Makes the op run on `cast(dtype, args)` under autocast to dtype."""
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    for device in ("cpu", "cuda"):
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

        def run(*args: Any, _device: str = device, _key: torch._C.DispatchKey = key) -> Any:
            dtype = torch.get_autocast_dtype(_device)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                return op(*cast(dtype, args))

        _library.impl(name, run, f"Autocast{device.upper()}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64 tensors, which gradcheck needs, and float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of outputs: channels-last if the channels of x [N, C, H, W] are adjacent, else contiguous."""
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


_scratch = threading.local()
_SCRATCH_BYTES = 2**27  # Larger memory is not kept between calls.


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory for one call of one op. The op must not return or save it.

    On a CPU all calls of a thread share this memory: touching fresh pages costs more than the arithmetic on them.
    """
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize > _SCRATCH_BYTES or torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape, dtype=dtype, device=device)
    kept = getattr(_scratch, "bytes", None)
    if kept is None or kept.numel() < size * dtype.itemsize:
        with torch.inference_mode(False):
            kept = _scratch.bytes = torch.empty(size * dtype.itemsize, dtype=torch.uint8)
    return kept[: size * dtype.itemsize].view(dtype).view(shape)
