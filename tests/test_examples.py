# SPDX-License-Identifier: Apache-2.0
"""Each example runs, small, and does what it says."""

import contextlib
import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> dict:
    """The names that an example defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f'"{path.stem}' in text, f"{path.name} has no test"


def test_drop_in(capsys):
    difference = example("drop_in")["main"](["--size", "32", "--rounds", "1"])
    assert 0 < difference < 1e-5  # two orders of summation: equal results would mean that nothing was swapped
    assert "2 layers swapped" in capsys.readouterr().out


def test_drop_in_tells_a_wrong_layer():
    names = example("drop_in")
    wrong = names["FusedSPADE"].forward
    names["main"].__globals__["FusedSPADE"] = type(
        "Wrong", (names["FusedSPADE"],), {"forward": lambda self, *args: 1.001 * wrong(self, *args)}
    )
    with pytest.raises(SystemExit, match="the results differ"):
        names["main"](["--size", "32", "--rounds", "1"])


def test_train_on_a_folder(tmp_path, capfd):
    out = tmp_path / "run"
    example("train_on_a_folder")["main"](["--out", str(out), "--crop-size", "32", "--steps", "2"])
    text = capfd.readouterr().out
    assert "12 samples, 12 classes, 0 faults" in text
    assert [path.name for path in out.glob("checkpoint_*.pt")] == ["checkpoint_00000002.pt"]
    images = sorted(path.name for path in (out / "images").iterdir())
    assert images == [*(f"{i:03d}.png" for i in range(12)), "contact_sheet.png"]


def test_train_on_a_folder_stops_at_faulty_data(tmp_path):
    names = example("train_on_a_folder")
    names["make_folder"](tmp_path, 2, 32)
    Image.fromarray(np.full((32, 32), 200, np.uint8)).save(tmp_path / "labels" / "001.png")
    folders = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels"), "--num-classes", "12"]
    with pytest.raises(SystemExit) as stopped:
        names["main"]([*folders, "--out", str(tmp_path / "run")])
    assert stopped.value.code == 1
    assert not (tmp_path / "run").exists()


def test_released_weights(tmp_path):
    """The image of a file in the authors' format is that of the network which was saved."""
    names = example("released_weights")
    weights = names["stand_in"](str(tmp_path))
    stored = np.full((256, 256), 255, np.uint8)  # unknown
    stored[:, :100] = 17
    Image.fromarray(stored).save(tmp_path / "labels.png")
    names["main"]([str(weights), "--labels", str(tmp_path / "labels.png"), "--out", str(tmp_path / "image.png")])

    network = names["untrained"]()
    ids = torch.full((1, 256, 256), 182)
    ids[:, :, :100] = 17
    segmap = torch.zeros(1, 184, 256, 256).scatter_(1, ids[:, None], 1.0)
    with torch.no_grad():
        expected = names["to_uint8"](network(segmap)[0])
    found = np.asarray(Image.open(tmp_path / "image.png"))
    assert np.abs(found.astype(int) - expected).max() <= 1  # rounding
    assert len(np.unique(found)) > 10


def test_released_weights_without_a_file(tmp_path):
    example("released_weights")["main"](["--out", str(tmp_path / "image.png")])
    assert Image.open(tmp_path / "image.png").size == (256, 256)


def test_tour_runs_from_top_to_bottom():
    """Its cells hold their own assertions. They are executed here without a kernel."""
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict = {"__name__": "tour"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for number, cell in enumerate(cells):
            exec(compile(cell, f"tour.ipynb, code cell {number}", "exec"), names)
    assert names["image"].shape == (1, 3, 128, 128)
    assert "1 of 1 fused" in out.getvalue()


def test_tour_is_stored_without_outputs():
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
