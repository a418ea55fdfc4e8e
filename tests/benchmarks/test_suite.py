# SPDX-License-Identifier: Apache-2.0
"""The pytest-benchmark suite runs, small, and its results file holds what comparisons need."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest

from benchmarks.cases import layer, ops
from benchmarks.common import ROOT
from benchmarks.conftest import chosen_sizes

pytest.importorskip("pytest_benchmark")


def run_suite(*arguments):
    """Runs it in a process of its own, without what this process's tests set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON", "SPADE_FAST_BACKEND"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


def test_every_case_is_a_group_with_its_reference_and_its_figures(tmp_path):
    small = ["--device", "cpu", "--sizes", "8@16", "--network", "4@64", "--benchmark-only"]
    short = ["--benchmark-min-rounds", "1", "--benchmark-max-time", "0.001", "--benchmark-min-time", "0.000001"]
    done = run_suite(*small, *short, "--benchmark-json", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["benchmarks"]

    groups = defaultdict(set)
    for row in rows:
        groups[row["group"]].add(row["params"].get("variant", row["params"].get("on")))
    parts = ("forward", "training")
    assert set(groups) == {
        *(f"{name}, C=8 @16²" for name in ops.CASES),
        *(f"layer {part} on {kind}, C=8 @16²" for part in parts for kind in ("label maps", "noise")),
        *(f"generator {part}, ngf 4 at 64²" for part in parts),
    }
    for name, variants in groups.items():
        assert "torch" in variants or {"plain NCHW", "fused"} <= variants, name

    for row in rows:
        info, median = row["extra_info"], row["stats"]["median"]
        assert info["floor_bytes"] > 0
        assert info["gb_s"] == pytest.approx(info["floor_bytes"] / median / 1e9)
        assert info["gflop_s"] == pytest.approx(info["flops"] / median / 1e9)
        assert 0 <= info["relative_error"] < 5e-3
        assert info["labels"]
    flops = {row["group"]: row["extra_info"]["flops"] for row in rows}
    assert flops["pattern_params, C=8 @16²"] > 0 == flops["statistics, C=8 @16²"]


@pytest.mark.parametrize("text", ["8x16", "8@16,", "full"])
def test_a_wrong_size_is_an_error_that_names_the_option(text):
    config = SimpleNamespace(getoption={"--full": False, "--sizes": text}.get)
    with pytest.raises(pytest.UsageError, match="--sizes: expected two positive numbers as in 64@256, got"):
        chosen_sizes(config, layer.SIZES)


def test_full_means_the_sizes_of_the_generator():
    config = SimpleNamespace(getoption={"--full": True}.get)
    assert chosen_sizes(config, layer.SIZES) == list(layer.SIZES)
    config = SimpleNamespace(getoption={"--sizes": "8@16,4@8"}.get)
    assert chosen_sizes(config, layer.SIZES) == [(8, 16), (4, 8)]


def test_a_sample_that_is_not_there_is_one_error_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SPADE_FAST_SAMPLES", str(tmp_path / "nothing"))
    done = run_suite("--collect-only")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert (
        done.stderr
        == f"ERROR: SPADE_FAST_SAMPLES must name the folder of the COCO-Stuff sample, got {tmp_path}/nothing\n\n"
    )
