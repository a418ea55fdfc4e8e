# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the operations runs: by device, by `SPADE_FAST_BACKEND`, or inside `use(name)`.

`torch` runs everywhere. `triton` is the default for CUDA tensors, and can be forced on CPU tensors under the Triton
interpreter (TRITON_INTERPRET=1). A choice that can not be met raises RuntimeError saying what is available and why not.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator

import torch

NAMES = ("torch", "triton")
_override: list[str] = []


def _import_kernels() -> object:
    return importlib.import_module("spade_fast.kernels")


def why_not(name: str, device: torch.device | str = "cpu") -> str | None:
    """None when backend `name` can run on tensors of `device`, otherwise the reason it can not."""
    if name == "torch":
        return None
    if name != "triton":
        return f"unknown; known are {', '.join(NAMES)}"
    device = torch.device(device)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type not in ("cuda", "cpu"):
        return f"no kernels for {device.type} tensors"
    if device.type == "cpu" and not interpreted:
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


_chosen: dict[str, str] = {}  # device type -> default backend, decided once


def choose(device: torch.device) -> str:
    """The backend for tensors of `device`; RuntimeError when an explicit choice can not be met."""
    asked = _override[-1] if _override else os.environ.get("SPADE_FAST_BACKEND")
    if asked:
        _check(asked, device)
        return asked
    if device.type not in _chosen:
        triton = device.type == "cuda" and why_not("triton", device) is None
        _chosen[device.type] = "triton" if triton else "torch"
    return _chosen[device.type]


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
    """The function of the chosen backend for `op`: torch_function, or spade_fast.kernels.<module or op>.<op>."""
    if choose(device) == "torch":
        return torch_function
    return getattr(importlib.import_module(f"spade_fast.kernels.{module or op}"), op)
