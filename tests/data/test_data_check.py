# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from spade_fast.data.__main__ import main


@pytest.fixture
def bad(tmp_path):
    """One good sample, and one of each fault."""
    rng = np.random.default_rng(0)
    (tmp_path / "img").mkdir()
    (tmp_path / "label").mkdir()

    def sample(name, labels, size=(24, 24)):
        Image.fromarray(rng.integers(0, 255, (*size, 3)).astype(np.uint8)).save(tmp_path / f"img/{name}.png")
        Image.fromarray(labels).save(tmp_path / f"label/{name}.png")

    good = np.zeros((24, 24), np.uint8)
    good[:6] = 2
    sample("good", good)
    sample("value", np.full((24, 24), 9, np.uint8), (24, 20))  # two faults at once
    sample("cut", good)
    path = tmp_path / "img/cut.png"
    path.write_bytes(path.read_bytes()[:200])
    sample("rgb", np.zeros((24, 24, 3), np.uint8))
    sample("nolabel", good)
    (tmp_path / "label/nolabel.png").unlink()
    sample("noimage", np.full((24, 24), 7, np.uint8))
    (tmp_path / "img/noimage.png").unlink()
    return tmp_path


def arguments(root):
    folders = ["--image-dir", str(root / "img"), "--label-dir", str(root / "label")]
    return ["--dataset", "folder", *folders, "--num-classes", "4"]


def test_every_fault_is_listed(bad, capsys):
    assert main(arguments(bad)) == 1
    out = capsys.readouterr().out
    faults = [line for line in out.splitlines() if line.startswith("fault: ")]
    expected = [
        ("label/noimage.png", "no image named noimage"),
        ("label/noimage.png", "label value 7 (576 pixels) is out of range: folder has 4 classes"),
        ("img/nolabel.png", "no label map named nolabel"),
        ("img/cut.png", "cannot read this image"),
        ("label/rgb.png", "its pixels are colors"),
        ("label/value.png", "label value 9 (576 pixels) is out of range: folder has 4 classes"),
        ("img/value.png", "the image is 20×24 pixels (width×height), but its label map"),
    ]
    assert len(faults) == len(expected)
    for path, text in expected:
        assert any(str(bad / path) + ":" in fault and text in fault for fault in faults), (path, text)
    assert "7 faults" in out


def test_histogram(bad, capsys):
    for name in ("value", "cut", "rgb", "nolabel", "noimage"):
        for folder in ("img", "label"):
            (bad / folder / f"{name}.png").unlink(missing_ok=True)
    assert main(arguments(bad)) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "75.000%", "1"] in rows and ["2", "25.000%", "1"] in rows
    assert "2 of 4 classes do not occur".split() in rows and ["0", "faults"] in rows


def test_missing_folder_is_a_fault(tmp_path, capsys):
    assert main(["--dataset", "coco", "--dataroot", str(tmp_path), "--phase", "val"]) == 1
    assert f"fault: {tmp_path}/val_label: no such folder" in capsys.readouterr().out


def test_takes_the_options_of_training(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text('{"dataset": "synthetic", "synthetic_size": 3, "batch_size": 2}')
    assert main(["--config", str(config), "--lambda-vgg", "0", "--crop-size", "32", "--phase", "train"]) == 0
    assert "3 samples, 12 classes" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--data-root", "x"])
    assert stop.value.code == 2


def test_command_exit_status(bad):
    command = [sys.executable, "-m", "spade_fast.data"]
    result = subprocess.run([*command, "check", *arguments(bad)], capture_output=True, text=True)
    assert result.returncode == 1 and "7 faults" in result.stdout
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "usage: python -m spade_fast.data check" in result.stderr
