# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by the tests of operations and layers."""

from __future__ import annotations

import contextlib

import pytest
import torch

with contextlib.suppress(ImportError):  # before anything imports triton: its kernels run on CPU tensors from here on
    import triton_interpreter  # noqa: F401

import cuda_harness  # after triton_interpreter

from spade_fast.ops import _backend as backends


@pytest.fixture(params=backends.NAMES)
def backend(request):
    """Runs the test once on every backend that works on CPU tensors here, and on `cuda` as cuda_on_cpu.h runs it."""
    on_cpu = cuda_harness.as_backend() if request.param == "cuda" else contextlib.nullcontext()
    reason = cuda_harness.why_not() if request.param == "cuda" else backends.why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    op = request.module.__name__.removeprefix("test_")
    if hasattr(torch.ops.spade_fast, op) and not backends.has(request.param, op):
        pytest.skip(f"backend {request.param} has no {op}: torch runs it")
    with on_cpu, backends.use(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """Small networks train fastest on one thread, and beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def strict_memory():
    """torch.empty gives NaN (the largest integer), so that an element nobody writes shows; and torch raises an error
    for an operation that is not deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
