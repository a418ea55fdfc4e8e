# SPDX-License-Identifier: Apache-2.0
"""The choice of the implementation that runs an operation.

The backends are:

- `torch`: torch's own operations, on every device;
- `cpp`: the native extension, for CPU tensors;
- `cuda`: the native extension, for CUDA tensors;
- `triton`: the Triton kernels, for CUDA tensors, and for CPU tensors under the interpreter (TRITON_INTERPRET=1).

`use(name)` chooses a backend, and so does the environment variable `SPADE_FAST_BACKEND`. A choice that can not be met
raises RuntimeError. An op that the chosen backend lacks runs on torch. Without a choice, each op takes the fastest
backend that is available on its device.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from spade_fast.native import loader as native

NAMES = ("torch", "cpp", "triton", "cuda")
_NATIVE_OPS = (  # Both cpp and cuda have these.
    "patterns",
    "segments",
    "embedding_sum",
    "embedding_sum_backward",
    "statistics",
    "modulation",
    "modulation_backward",
)
_CPP_OPS = (
    *_NATIVE_OPS,
    "pattern_params",
    "pattern_params_backward",
    "label_conv",
    "label_conv_backward",
    "recognize",
)
OPS = (*_CPP_OPS, "normalization_gradient")
_TRITON_OPS = tuple(op for op in OPS if op != "recognize")
# CPU: as measured in benchmarks/results/ops_cpu.json. GPU: nothing is measured yet, and Triton has nearly every op.
FASTEST: dict[str, dict[str, str]] = {"cpu": dict.fromkeys(_CPP_OPS, "cpp"), "cuda": {}}
DEFAULT = {"cpu": "torch", "cuda": "triton"}
_override: list[str] = []


def has(name: str, op: str) -> bool:
    """Whether backend `name` implements op."""
    return op in {"cpp": _CPP_OPS, "cuda": _NATIVE_OPS, "triton": _TRITON_OPS}.get(name, OPS)


def _import_kernels() -> object:
    return importlib.import_module("spade_fast.kernels")


def why_not(name: str, device: torch.device | str = "cpu") -> str | None:
    """The reason why backend `name` can not run on tensors of `device`, or None if it can."""
    if name == "torch":
        return None
    if name not in NAMES:
        return f"unknown; known are {', '.join(NAMES)}"
    kind = torch.device(device).type
    if kind not in ("cuda", "cpu"):
        return f"no kernels for {kind} tensors"
    if name == "triton":
        return _why_not_triton(kind)
    if kind != ("cpu" if name == "cpp" else "cuda"):
        return f"it is for {'CPU' if name == 'cpp' else 'CUDA'} tensors"
    try:
        stamp = native.load()
    except RuntimeError as error:
        return str(error)
    if name == "cuda" and not stamp["nvcc"]:
        return f"the native extension {stamp['path']} was built without nvcc"
    return None


def _why_not_triton(kind: str) -> str | None:
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CPU tensors only under the interpreter (TRITON_INTERPRET=1)"
    try:
        _import_kernels()
    except Exception as error:  # An import can fail in any way, and the user has to read how.
        return f"{type(error).__name__}: {error}"
    return None


def available(device: torch.device | str = "cpu") -> list[str]:
    """The names of the backends that can run on tensors of `device`."""
    return [name for name in NAMES if why_not(name, device) is None]


def _check(name: str, device: torch.device | str) -> None:
    reason = why_not(name, device)
    if reason is None:
        return
    others = "; ".join(f"{n}: {why_not(n, device) or 'available'}" for n in NAMES if n != name)
    raise RuntimeError(f"spade_fast backend {name!r} can not run on {device} tensors: {reason} ({others})")


_chosen: dict[tuple[str, str], str] = {}  # (device type, op) -> default backend


def choose(op: str, device: torch.device) -> str:
    """The backend of `op` for tensors of `device`.

    Raises:
        RuntimeError: the backend that the user chose can not run on `device`.
    """
    asked = _override[-1] if _override else os.environ.get("SPADE_FAST_BACKEND")
    if asked:
        _check(asked, device)
        return asked if has(asked, op) else "torch"
    key = (device.type, op)
    if key not in _chosen:
        fastest = FASTEST.get(device.type, {}).get(op)
        wanted = [name for name in (fastest, DEFAULT.get(device.type)) if name]
        _chosen[key] = next((n for n in wanted if has(n, op) and why_not(n, device) is None), "torch")
    return _chosen[key]


def forget_choices() -> None:
    """The next call of each op chooses its default backend anew."""
    _chosen.clear()


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Inside the `with` block, every operation runs on one backend, forward and backward.

    Args:
        name: "torch", "cpp", "triton" or "cuda".

    Raises:
        RuntimeError: no backend has this name. A call of an operation raises it if the backend can not run there.

    Example:
        >>> from spade_fast.ops.recognize import recognize
        >>> with use("torch"):
        ...     codes, kind = recognize(torch.ones(1, 1, 1, 2))
        >>> codes
        tensor([[[0, 0]]], dtype=torch.int32)
    """
    if name not in NAMES:
        raise RuntimeError(f"spade_fast backend {name!r} is unknown; known are {', '.join(NAMES)}")
    _override.append(name)
    try:
        yield
    finally:
        _override.pop()


def implementation(op: str, torch_function: Callable, device: torch.device, module: str | None = None) -> Callable:
    """The function that runs `op` on the chosen backend.

    It is torch_function, spade_fast.kernels.<module or op>.<op> or torch.ops.spade_fast_native.<op>. The kernels of
    GPUs compute in float32, so float64 arguments go to torch_function.
    """
    name = choose(op, device)
    if name == "torch":
        return torch_function
    if name == "triton":
        kernels = importlib.import_module(f"spade_fast.kernels.{module or op}")
        return without_float64(getattr(kernels, op), torch_function)
    native = getattr(torch.ops.spade_fast_native, op).default
    return native if name == "cpp" else without_float64(native, torch_function)


def without_float64(function: Callable, torch_function: Callable) -> Callable:
    """A function that calls `torch_function` if an argument is a float64 tensor, and `function` otherwise."""

    def run(*args: Any) -> Any:
        tensors = (t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)))
        double = any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tensors)
        return (torch_function if double else function)(*args)

    return run
