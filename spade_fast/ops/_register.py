# SPDX-License-Identifier: Apache-2.0
"""Registration of the operations as torch.ops.spade_fast.*, and the few helpers their torch backends share."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spade_fast.ops import _backend

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
        return _backend.implementation(name, torch_function, device, module)(*args)

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
    """Uninitialized memory for use within one call of one op; not for anything that is returned or saved.

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
