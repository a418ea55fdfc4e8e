# SPDX-License-Identifier: Apache-2.0
"""Every operator on every backend of the device, each against the results in float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases.ops import CASES, SIZES, Operands, check_case, expected_of
from benchmarks.conftest import Measure, batch_of, chosen_sizes, readable
from spade_fast.ops import _backend as backend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    metafunc.parametrize("operands", chosen_sizes(config, SIZES), indirect=True, ids=readable)
    metafunc.parametrize("op", CASES, ids=readable)
    metafunc.parametrize("on", backend.available(config.getoption("--device")))


@pytest.fixture(scope="module")
def operands(request: pytest.FixtureRequest, device: str) -> Operands:
    channels, size = request.param
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Operands(batch_of(request.config, "maps"), channels, size, dtype)


def test_op(operands: Operands, op: str, on: str, measure: Measure) -> None:
    case = CASES[op](operands)
    if not backend.has(on, case.op):
        pytest.skip(f"backend {on} has no {case.op}: torch runs it")
    expected = expected_of(CASES[op], operands)
    with backend.use(on):
        bound = 2e-2 if operands.x.dtype == torch.bfloat16 else case.bound
        error = check_case(f"{op} on {on}", case, expected, bound)
        channels, size = operands.x.shape[1:3]
        floor = {"floor_bytes": case.floor_bytes, "flops": case.flops}
        measure(case.call, f"{op}, C={channels} @{size}²", **floor, relative_error=error)
