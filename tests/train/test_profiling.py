# SPDX-License-Identifier: Apache-2.0
"""Spans of the training step: what they time, the trace, and the table."""

import json
import time

import pytest

from spade_fast.train import config as cfg
from spade_fast.train.__main__ import main
from spade_fast.train.profiling import PARTS, STEPS, span, table, timed
from spade_fast.train.trainer import Trainer

TINY = (
    "--dataset synthetic --crop-size 32 --ngf 4 --ndf 4 --batch-size 2 --synthetic-size 6 --steps 9 --lambda-vgg 0 "
    "--workers 0 --num-samples 1 --sample-every 0 --no-tensorboard --device cpu"
).split()


def test_spans_are_timed_and_add_up():
    with timed() as seconds:
        for _ in range(2):
            with span("generator"):
                time.sleep(0.02)
        with span("losses"):
            time.sleep(0.01)
        time.sleep(0.01)
    assert seconds["generator"] >= 0.04
    assert seconds["losses"] >= 0.01
    assert seconds["step"] >= seconds["generator"] + seconds["losses"] + 0.01
    with span("generator"):  # outside, nothing is timed
        pass
    assert set(seconds) == {"generator", "losses", "step"}


def test_table_holds_every_part_and_the_rest():
    lines = table({"generator": 0.03, "backward": 0.05, "step": 0.1}, steps=2, communication=0.004).splitlines()
    assert [line.split()[0] for line in lines] == [*PARTS, "other", "step", "communication"]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["generator"] == ["15.00", "ms", "30.0%"]
    assert rows["other"] == ["10.00", "ms", "20.0%"]
    assert rows["step"] == ["50.00", "ms", "100.0%"]
    assert rows["communication"][0] == "2.00"


def test_profile_writes_trace_and_table(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TINY, "--out", str(out), "--profile", "2"]) == 0
    names = {event["name"] for event in json.loads((out / "profile/trace.json").read_text())["traceEvents"]}
    parts = set(PARTS) - {"VGG"}  # there are no VGG weights here
    assert parts <= names
    rows = {line.split()[0]: float(line.split()[1]) for line in (out / "profile/table.txt").read_text().splitlines()}
    assert all(rows[part] > 0 for part in parts)
    assert sum(rows[name] for name in (*PARTS, "other")) == pytest.approx(rows["step"], abs=0.05)
    assert "backward" in capsys.readouterr().out


def test_training_that_ends_before_its_profile(tmp_path):
    options = cfg.merge({}, {"out": str(tmp_path / "run"), "dataset": "synthetic", "crop_size": 32, "ngf": 4, "ndf": 4,
                             "batch_size": 2, "synthetic_size": 6, "steps": STEPS + 1, "lambda_vgg": 0.0, "workers": 0,
                             "sample_every": 0, "tensorboard": False})  # fmt: skip
    for after in (2, 0):  # the trace is cut short; the table is
        options.out = str(tmp_path / str(after))
        assert Trainer(cfg.resolve_config(options)).train(profile=after) == "finished"
        assert (tmp_path / str(after) / "profile/trace.json").exists()
    with timed() as seconds:  # and nothing is left on
        pass
    assert set(seconds) == {"step"}
