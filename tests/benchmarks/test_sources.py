# SPDX-License-Identifier: Apache-2.0
"""Benchmarks say where their label maps come from, and what they need."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import common, gpu, layer, readme

SIZE = 32


@pytest.fixture
def sample(tmp_path):
    """A folder in the layout of COCO-Stuff with one image in each phase. Returns it and the two label maps."""
    random, stored = np.random.default_rng(0), []
    for phase in ("val", "train"):
        stored.append(random.integers(0, 182, (SIZE, SIZE), dtype=np.uint8))
        for kind in ("label", "inst"):
            folder = tmp_path / f"{phase}_{kind}"
            folder.mkdir()
            Image.fromarray(stored[-1]).save(folder / "a.png")
    return tmp_path, stored


def test_the_sample_that_the_environment_names_is_read(sample, monkeypatch):
    folder, stored = sample
    monkeypatch.setenv("SPADE_FAST_SAMPLES", str(folder))
    names = runpy.run_path(common.__file__)
    maps, source = names["label_maps"](SIZE)
    assert source.startswith("COCO-Stuff sample at ") and source.endswith(folder.name)
    for got, want in zip(maps, stored, strict=True):
        assert torch.equal(got.ids[0], torch.from_numpy(want).int())
    assert len(names["label_maps"](SIZE, 1)[0]) == 1


def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SPADE_FAST_SAMPLES", str(tmp_path / "nothing"))
    monkeypatch.setattr(common, "SAMPLES", tmp_path / "nothing")
    with pytest.raises(SystemExit, match=r"SPADE_FAST_SAMPLES must name the folder .*, got .*/nothing"):
        common.label_maps(SIZE)


def test_without_a_sample_the_maps_are_called_synthetic(tmp_path, monkeypatch, capsys):
    """They differ from one another, and rows of the layer's results are not called real."""
    monkeypatch.delenv("SPADE_FAST_SAMPLES", raising=False)
    monkeypatch.setattr(common, "SAMPLES", tmp_path / "nothing")
    maps, source = common.label_maps(SIZE, 2)
    assert source == common.SYNTHETIC
    assert not torch.equal(maps[0].ids, maps[1].ids)

    monkeypatch.setattr(layer, "label_maps", lambda: (maps, source))
    out = tmp_path / "layer.json"
    arguments = ["--device", "cpu", "--sizes", "4@8", "--maps", "1", "--no-noise", "--seconds", "0", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["layer", *arguments])
    layer.main()
    result = json.loads(out.read_text())
    assert result["config"]["labels"] == common.SYNTHETIC
    assert len(result["synthetic"]) == 1 and "real" not in result
    printed = capsys.readouterr().out
    assert f"label maps: {common.SYNTHETIC}" in printed
    assert "synthetic     4@8" in printed and "real" not in printed


@pytest.mark.parametrize("text", ["64", "64@", "@64", "64@0", "-1@8", "a@b"])
def test_sizes_are_two_positive_numbers(text):
    assert common.read_size("64@256") == (64, 256)
    with pytest.raises(Exception, match=f"expected two positive numbers as in 64@256, got '{text}'"):
        common.read_size(text)


def test_without_a_gpu_its_benchmarks_stop_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "sees no GPU; --device cpu runs the parts that need none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_committed_results_are_of_real_label_maps():
    for path in readme.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        if isinstance(result, dict):
            source = result.get("labels", result.get("config", {}).get("labels"))
            assert source != common.SYNTHETIC, path.name


def test_the_generator_as_built_is_a_row_of_its_own(monkeypatch):
    """Results that have it say what it is; results without it do not speak of it."""
    without_row = readme.read("generator_cpu.json")
    with_row = json.loads(json.dumps(without_row))
    for part in ("forward", "training"):
        with_row[part]["times"]["fused, as built"] = {"median_ms": 2000.0}
        with_row[part]["ratios"]["fused, as built"] = 2.5
        for figures in without_row[part].values():
            figures.pop("fused, as built", None)
    tables = []
    for result in (with_row, without_row):
        monkeypatch.setattr(readme, "read", lambda name, result=result: result)
        tables.append("\n".join(readme.generator()))
    assert "| fused, as built | 2000 ms (2.50×) | 2000 ms (2.50×) |" in tables[0]
    assert "`fused, as built` is neither" in tables[0]
    assert "as built" not in tables[1]
