# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs: by op and device, by `SPADE_FAST_BACKEND`, or inside `use(name)`.

`torch` runs everywhere. `cpp` (CPU tensors) and `cuda` (CUDA tensors) are the native extension, `triton` the Triton
kernels: for CUDA tensors, and for CPU tensors under the Triton interpreter (TRITON_INTERPRET=1). Without an override,
each op takes the first available backend of FASTEST. An explicit choice that can not be met raises RuntimeError saying
what is available and why not; an op which the chosen backend does not have runs on torch.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator

import torch

from spade_fast.native import loader as native

NAMES = ("torch", "cpp", "triton", "cuda")
_NATIVE_OPS = (  # of cpp and of cuda
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
# CPU: measured, benchmarks/results/ops_cpu.json. GPU: nothing is measured yet; Triton has nearly every op.
FASTEST: dict[str, dict[str, str]] = {"cpu": dict.fromkeys(_CPP_OPS, "cpp"), "cuda": {}}
DEFAULT = {"cpu": "torch", "cuda": "triton"}
_override: list[str] = []


def has(name: str, op: str) -> bool:
    """Whether backend `name` has an implementation of its own for op."""
    return op in {"cpp": _CPP_OPS, "cuda": _NATIVE_OPS, "triton": _TRITON_OPS}.get(name, OPS)


def _import_kernels() -> object:
    return importlib.import_module("spade_fast.kernels")


def why_not(name: str, device: torch.device | str = "cpu") -> str | None:
    """None when backend `name` can run on tensors of `device`, otherwise the reason it can not."""
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
    except Exception as error:  # whatever broke, say so at the point of choice
        return f"{type(error).__name__}: {error}"
    return None


def available(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends which can run on tensors of `device`."""
    return [name for name in NAMES if why_not(name, device) is None]


def _check(name: str, device: torch.device | str) -> None:
    reason = why_not(name, device)
    if reason is None:
        return
    others = "; ".join(f"{n}: {why_not(n, device) or 'available'}" for n in NAMES if n != name)
    raise RuntimeError(f"spade_fast backend {name!r} can not run on {device} tensors: {reason} ({others})")


_chosen: dict[tuple[str, str], str] = {}  # (device type, op) -> default backend, decided once


def choose(op: str, device: torch.device) -> str:
    """The backend of `op` for tensors of `device`; RuntimeError when an explicit choice can not be met."""
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
    """Inside the `with` block every operation, forward and backward, runs on backend `name`."""
    if name not in NAMES:
        raise RuntimeError(f"spade_fast backend {name!r} is unknown; known are {', '.join(NAMES)}")
    _override.append(name)
    try:
        yield
    finally:
        _override.pop()


def implementation(op: str, torch_function: Callable, device: torch.device, module: str | None = None) -> Callable:
    """The function of the chosen backend for `op`: torch_function, spade_fast.kernels.<module or op>.<op>, or
    torch.ops.spade_fast_native.<op>."""
    name = choose(op, device)
    if name == "torch":
        return torch_function
    if name == "triton":
        kernel = getattr(importlib.import_module(f"spade_fast.kernels.{module or op}"), op)
        return without_float64(kernel, torch_function)
    native = getattr(torch.ops.spade_fast_native, op).default
    return native if name == "cpp" else without_float64(native, torch_function)


def without_float64(function: Callable, torch_function: Callable) -> Callable:
    """`function`, but torch_function for float64 arguments: the CUDA kernels compute in float32."""

    def run(*args):
        tensors = (t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)))
        double = any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tensors)
        return (torch_function if double else function)(*args)

    return run
