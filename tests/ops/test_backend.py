# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch

from spade_fast.ops import _backend as backend
from spade_fast.ops.embedding_sum import embedding_sum
from spade_fast.ops.patterns import patterns

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_default_is_the_fastest_that_is_available(monkeypatch):
    monkeypatch.delenv("SPADE_FAST_BACKEND", raising=False)
    cpu = torch.device("cpu")
    for missing, chosen in ((), "cpp"), (("cpp",), "torch"):
        monkeypatch.setattr(backend, "_chosen", {})
        monkeypatch.setattr(backend, "why_not", lambda name, device, m=missing: "missing" if name in m else None)
        assert backend.choose("statistics", cpu) == chosen
        assert backend.choose("normalization_gradient", cpu) == "torch"  # cpp does not have it


def test_an_op_that_the_chosen_backend_lacks_runs_on_torch(monkeypatch):
    monkeypatch.setattr(backend, "why_not", lambda name, device="cpu": None)
    with backend.use("cpp"):
        assert backend.choose("statistics", torch.device("cpu")) == "cpp"
        assert backend.choose("normalization_gradient", torch.device("cpu")) == "torch"


def test_the_table_of_the_fastest_is_what_was_measured():
    """On a CPU every op takes the backend that won more of the measured sizes."""
    result = json.loads((RESULTS / "ops_cpu.json").read_text())
    for op in filter(lambda op: backend.has("cpp", op), backend.OPS):
        rows = [row for name, row in result["ops"].items() if name.split(",")[0].split(" ")[0] == op]
        rows = [{b: row[b]["median_ms"] for b in ("torch", "cpp") if b in row} for row in rows]
        winners = [min(row, key=row.get) for row in rows if len(row) == 2]
        if winners:  # a backward without a row of its own is timed elsewhere
            assert backend.FASTEST["cpu"].get(op, "torch") == max(set(winners), key=winners.count), op


def test_environment_variable_overrides(monkeypatch):
    monkeypatch.setattr(backend, "why_not", lambda name, device="cpu": None)
    monkeypatch.setenv("SPADE_FAST_BACKEND", "triton")
    assert backend.choose("statistics", torch.device("cpu")) == "triton"
    with backend.use("torch"):  # the nearer choice wins
        assert backend.choose("statistics", torch.device("cpu")) == "torch"


def test_impossible_choice_says_what_there_is(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    codes = torch.zeros(1, 2, 2, dtype=torch.int32)
    with backend.use("triton"), pytest.raises(RuntimeError, match=r"'triton' can not run on cpu.*torch: available"):
        patterns(codes, 3)
    monkeypatch.setenv("SPADE_FAST_BACKEND", "fortran")
    with pytest.raises(RuntimeError, match="'fortran' can not run on cpu tensors: unknown; known are torch, cpp"):
        patterns(codes, 3)
    with pytest.raises(RuntimeError, match="'fortran' is unknown"), backend.use("fortran"):
        pass


def test_choice_ends_with_the_block(monkeypatch):
    monkeypatch.delenv("SPADE_FAST_BACKEND", raising=False)
    with pytest.raises(KeyError), backend.use("torch"):
        raise KeyError
    assert backend._override == []


def test_broken_kernels_are_reported(monkeypatch):
    def broken():
        raise ImportError("no kernels here")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "_import_kernels", broken)
    assert backend.why_not("triton") == "ImportError: no kernels here"


def test_chosen_implementation_is_called(monkeypatch):
    """A stand-in for the Triton kernel proves that the choice reaches the op, forward and backward alike."""
    import sys
    import types

    called = []

    def forward(*args):
        called.append("forward")
        return torch.full((1, 2), 7.0)

    def backward(dout, out, codes, num_rows, edges, relu):
        called.append("backward")
        return torch.zeros(1, num_rows, 2), torch.zeros(2)

    fake = types.SimpleNamespace(embedding_sum=forward, embedding_sum_backward=backward)
    monkeypatch.setitem(sys.modules, "spade_fast.kernels.embedding_sum", fake)
    monkeypatch.setattr(backend, "why_not", lambda name, device="cpu": None)
    table = torch.zeros(1, 3, 2, requires_grad=True)
    with backend.use("triton"):
        out = embedding_sum(table, None, torch.zeros(1, 1, dtype=torch.int32), False, False)
        out.sum().backward()
    assert out.tolist() == [[7.0, 7.0]] and called == ["forward", "backward"]
    with backend.use("triton"):  # the kernels compute in float32: float64 runs on torch, forward and backward
        double = torch.ones(1, 3, 2, dtype=torch.float64, requires_grad=True)
        out = embedding_sum(double, None, torch.zeros(1, 1, dtype=torch.int32), False, False)
        out.sum().backward()
    assert out.tolist() == [[1.0, 1.0]] and len(called) == 2
    assert double.grad.tolist() == [[[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]
