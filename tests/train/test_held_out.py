# SPDX-License-Identifier: Apache-2.0
"""Held-out data: where sample pictures come from, and that training never sees it."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_fast.cli import ConfigError
from spade_fast.data import DataError
from spade_fast.data.__main__ import main as data_command
from spade_fast.data.options import DataOptions, open_dataset
from spade_fast.train.config import merge, resolve_config
from spade_fast.train.run_directory import RunDirectoryError
from spade_fast.train.samples import FixedSamples
from spade_fast.train.trainer import Trainer


def folder(root, names, seed=0, instances=False):
    """Images, label maps and perhaps instance maps of three classes, in root/img, root/label and root/inst."""
    rng = np.random.default_rng(seed)
    for kind in ("img", "label", *(["inst"] if instances else [])):
        (root / kind).mkdir(parents=True)
        for name in names:
            size = (40, 40, 3) if kind == "img" else (40, 40)
            pixels = rng.integers(0, 256 if kind == "img" else 3, size).astype(np.uint8)
            Image.fromarray(pixels).save(root / kind / f"{name}.png")
    return {"dataset": "folder", "image_dir": str(root / "img"), "label_dir": str(root / "label"), "num_classes": 3}


def held_out(root):
    return {"val_image_dir": str(root / "img"), "val_label_dir": str(root / "label")}


def names(dataset):
    return [sample.label.rpartition("/")[2] for sample in dataset.samples]


def resolved(**options):
    return resolve_config(merge({}, {"crop_size": 32, "num_samples": 3, "lambda_vgg": 0.0, **options}))


def test_directories_of_held_out_data(tmp_path):
    given = folder(tmp_path / "a", ["1", "2", "3", "4"])
    folder(tmp_path / "b", ["5", "6"], seed=1)
    config = resolved(**given, **held_out(tmp_path / "b"))
    assert names(open_dataset(config, "train")) == ["1.png", "2.png", "3.png", "4.png"]
    assert names(open_dataset(config, "val")) == ["5.png", "6.png"]
    fixed = FixedSamples(config, open_dataset(config, "train"))
    assert [sample["path"].rpartition("/")[2] for sample in fixed.samples] == ["5.png", "6.png"]
    assert fixed.source == "the 2 held-out samples"


def test_a_file_list_is_of_the_training_samples(tmp_path):
    given = folder(tmp_path / "a", ["1", "2", "3"])
    folder(tmp_path / "b", ["5"])
    (tmp_path / "list.txt").write_text("1\n3\n")
    config = resolved(**given, **held_out(tmp_path / "b"), file_list=str(tmp_path / "list.txt"))
    assert names(open_dataset(config, "train")) == ["1.png", "3.png"]
    assert names(open_dataset(config, "val")) == ["5.png"]


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 3), (0.01, 1), (0.99, 11)])
def test_a_split_is_a_partition_by_name_and_seed(tmp_path, fraction, count):
    every = [f"photo{i}" for i in range(12)]
    given = folder(tmp_path / "a", every)
    options = DataOptions(**given, crop_size=32, val_split=fraction)
    train, val = (names(open_dataset(options, phase)) for phase in ("train", "val"))
    assert len(val) == count
    assert sorted(train + val) == sorted(f"{name}.png" for name in every)
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    moved = {"image_dir": str(tmp_path / "elsewhere/img"), "label_dir": str(tmp_path / "elsewhere/label")}
    again = DataOptions(**{**given, **moved}, crop_size=32, val_split=fraction)
    assert names(open_dataset(again, "val")) == val
    if fraction == 0.25:
        others = {
            tuple(
                names(
                    open_dataset(
                        DataOptions(**{**given, **moved, "crop_size": 32, "val_split": fraction}, seed=seed), "val"
                    )
                )
            )
            for seed in range(5)
        }
        assert len(others) > 1


def test_held_out_samples_are_not_augmented(tmp_path):
    given = folder(tmp_path / "a", [str(i) for i in range(8)])
    options = DataOptions(**given, crop_size=32, load_size=40, val_split=0.5)
    train, val = (open_dataset(options, phase) for phase in ("train", "val"))
    first = [[dataset[i]["image"].sum().item() for i in range(4)] for dataset in (train, val)]
    for dataset in (train, val):
        dataset.set_epoch(1)
    second = [[dataset[i]["image"].sum().item() for i in range(4)] for dataset in (train, val)]
    assert first[0] != second[0]
    assert first[1] == second[1]


def test_without_held_out_data_the_training_set_is_shown_and_named(tmp_path):
    config = resolved(**folder(tmp_path / "a", ["1", "2"]))
    fixed = FixedSamples(config, open_dataset(config, "train"))
    assert len(fixed.samples) == 2
    assert fixed.source.startswith("the training set, because nothing is held out")
    synthetic = resolved(dataset="synthetic", synthetic_size=4)
    assert FixedSamples(synthetic, open_dataset(synthetic, "train")).source == "the validation set"


def test_both_have_instance_edges_or_neither(tmp_path):
    given = folder(tmp_path / "a", ["1", "2"], instances=True) | {"instance_dir": str(tmp_path / "a/inst")}
    folder(tmp_path / "b", ["5"], instances=True)
    config = resolved(**given, **held_out(tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"have 3 channels, the training set's 4: .*--val-instance-dir"):
        FixedSamples(config, open_dataset(config, "train"))
    config = resolved(**given, **held_out(tmp_path / "b"), val_instance_dir=str(tmp_path / "b/inst"))
    assert "edges" in FixedSamples(config, open_dataset(config, "train")).samples[0]


def test_faults_of_held_out_data_are_not_passed_over(tmp_path):
    given = folder(tmp_path / "a", ["1", "2"])
    config = resolved(**given, **held_out(tmp_path / "absent"))
    with pytest.raises(DataError, match="absent/label: no such folder"):
        FixedSamples(config, open_dataset(config, "train"))
    one = resolved(**folder(tmp_path / "b", ["1"]), val_split=0.5)
    with pytest.raises(DataError, match=r"--val-split 0\.5: .* there is only one"):
        open_dataset(one, "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_split": 1.0}, r"--val-split must be above 0 and below 1, got 1\.0"),
        ({"val_split": 0.1, "val_label_dir": "l"}, "--val-split does not go with --val-label-dir: leave one out"),
        ({"val_label_dir": "l"}, "--val-label-dir needs --val-image-dir too"),
        ({"val_image_dir": "i"}, "--val-image-dir needs --val-label-dir too"),
        ({"val_instance_dir": "i"}, "--val-instance-dir needs --val-image-dir too"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        resolved(dataset="folder", num_classes=3, **options)
    with pytest.raises(ConfigError, match="--val-split: the dataset synthetic has held-out scenes of its own"):
        resolved(dataset="synthetic", val_split=0.1)


def test_the_check_reads_held_out_data_too(tmp_path, capsys):
    given = folder(tmp_path / "a", ["1", "2"])
    folder(tmp_path / "b", ["5"])
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(tmp_path / "b/label/5.png")
    argv = ["--dataset", "folder", "--num-classes", "3", "--image-dir", given["image_dir"]]
    argv += ["--label-dir", given["label_dir"]]
    assert data_command([*argv, "--val-split", "0.5"]) == 0
    assert "2 samples" in capsys.readouterr().out
    directories = ["--val-image-dir", str(tmp_path / "b/img"), "--val-label-dir", str(tmp_path / "b/label")]
    assert data_command([*argv, *directories]) == 1
    out = capsys.readouterr().out
    assert "2 samples" in out
    assert "b/label/5.png: label value 7" in out


TINY = {
    **{"ngf": 4, "ndf": 4, "num_d": 1, "batch_size": 2, "steps": 4, "workers": 0, "sample_every": 2},
    **{"tensorboard": False, "device": "cpu", "val_split": 0.3},
}


def test_training_never_reads_held_out_files(tmp_path, one_thread):
    """They are damaged once the fixed samples are read; steps, statistics and pictures go on without a fault."""
    config = resolved(**folder(tmp_path / "a", [str(i) for i in range(10)]), **TINY, out=str(tmp_path / "run"))
    t = Trainer(config)
    held = {sample["path"] for sample in t.sheets.fixed.samples}
    assert len(held) == 3
    for path in held:
        Path(path).write_bytes(b"damaged")
        Path(path.replace("/label/", "/img/")).write_bytes(b"damaged")
    assert t.train() == "finished"
    assert len(list((tmp_path / "run/samples").glob("*.png"))) == 2
    with pytest.raises(DataError, match="cannot read"):
        Trainer(dataclasses.replace(config, val_split=None, out=str(tmp_path / "all"))).train()


def test_a_resumed_run_keeps_its_split(tmp_path, one_thread):
    options = {**folder(tmp_path / "a", [str(i) for i in range(10)]), **TINY, "out": str(tmp_path / "run")}
    Trainer(resolved(**options)).train()
    with pytest.raises(RunDirectoryError, match=r"--resume: --val-split is 0\.2, but .* was trained with 0\.3"):
        Trainer(resolved(**{**options, "val_split": 0.2, "steps": 6}), resume=True)
    assert Trainer(resolved(**{**options, "steps": 6}), resume=True).train() == "finished"
