# SPDX-License-Identifier: Apache-2.0
"""The front door of training: what is noticed first, the batch size that fits, and what the command shows."""

import argparse
import dataclasses
import shlex
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from spade_fast import models
from spade_fast.cli import ConfigError, add_options, flag, read_options
from spade_fast.data.options import DataOptions, check_command
from spade_fast.train import batch_size, memory
from spade_fast.train.__main__ import main, parser
from spade_fast.train.batch_size import fit_batch_size
from spade_fast.train.config import TrainConfig, merge, resolve_config
from spade_fast.train.plan import describe

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "--crop-size 32 --load-size 32 --ngf 4 --ndf 4 --num-d 1 --workers 0 --no-tensorboard --device cpu".split()


@pytest.fixture
def photos(tmp_path):
    """Twelve images and label maps of three classes, and the options that name them."""
    rng = np.random.default_rng(0)
    for kind in ("img", "label"):
        (tmp_path / kind).mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(tmp_path / f"img/{i}.png")
        Image.fromarray(rng.integers(0, 3, (32, 32)).astype(np.uint8)).save(tmp_path / f"label/{i}.png")
    directories = ["--image-dir", str(tmp_path / "img"), "--label-dir", str(tmp_path / "label")]
    return ["--dataset", "folder", "--num-classes", "3", *directories]


@pytest.fixture
def vgg(monkeypatch):
    """Counts the times that VGG's weights are asked for; they can't be had."""
    asked = []

    def load(path):
        asked.append(path)
        raise models.VGGWeightsError("no weights here")

    monkeypatch.setattr(models, "load_vgg19", load)
    return asked


# What is noticed first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--image-dir", "absent"], "absent: no such folder"),
        (["--label-dir", "absent"], "absent: no such folder"),
        (["--file-list", "absent"], "absent"),
        (["--batch-size", "32"], "--batch-size 32 is more than the 12 samples"),
        (["--batch-size", "2", "--accumulate", "3"], "--batch-size 2 (of all processes together) is too small"),
        (["--preprocess", "none"], "sizes that differ from image to image"),
        (["--val-image-dir", "absent", "--val-label-dir", "absent"], "absent: no such folder"),
    ],
)
def test_paths_data_and_batch_are_checked_before_vgg(tmp_path, photos, vgg, capsys, changes, message):
    assert main([*photos, *SMALL, *changes, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "data check" not in error  # it would say no more
    assert vgg == []
    assert not (tmp_path / "run").exists()


def test_vgg_is_asked_for_last(tmp_path, photos, vgg, capsys):
    assert main([*photos, *SMALL, "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "error: no weights here\n"
    assert vgg == [None]
    assert not (tmp_path / "run").exists()


def test_faulty_data_names_the_check(tmp_path, photos, capsys):
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(tmp_path / "label/3.png")
    assert main([*photos, *SMALL, "--lambda-vgg", "0", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "label/3.png: label value 7" in error
    words = shlex.split(error.partition("; to list every fault of the data: ")[2].splitlines()[0])
    assert words[:4] == ["python", "-m", "spade_fast.data", "check"]
    from spade_fast.data.__main__ import main as data_command

    assert data_command(words[4:]) == 1  # the command as it is printed
    assert "1 fault" in capsys.readouterr().out


def test_the_check_command_has_every_option_of_the_data():
    options = DataOptions(dataset="ade20k", dataroot="a b", shift_labels=True, use_edges=False, ignore_value=-1)
    words = shlex.split(check_command(options))[4:]
    p = argparse.ArgumentParser()
    add_options(p, DataOptions)
    assert DataOptions(**vars(p.parse_args(words))) == options


# The batch size


def chosen(samples, device="cpu", world=1, **options):
    config = resolve_config(merge({}, {"dataset": "folder", "num_classes": 3, **options}))
    dataset = type("Samples", (), {"__len__": lambda self: samples, "label_nc": 3})()
    return fit_batch_size(config, dataset, torch.device(device), world)


@pytest.mark.parametrize(
    ("samples", "world", "accumulate", "expected"),
    [(1, 1, 1, 1), (2, 1, 1, 2), (5, 1, 1, 2), (12, 1, 1, 4), (5000, 1, 1, 4), (5000, 4, 1, 16), (50, 3, 2, 12)],
)
def test_a_batch_size_that_fits_samples_and_cpu(samples, world, accumulate, expected):
    config, why = chosen(samples, world=world, accumulate=accumulate)
    assert config.batch_size == expected
    assert f"batch size {expected}: " in why and "--batch-size" in why


@pytest.mark.parametrize(
    ("gib", "expected", "why"), [(80, 32, "the paper's"), (12, 8, "12 GiB"), (5, 2, "5 GiB"), (3, 1, "3 GiB")]
)
def test_a_batch_size_that_fits_a_gpu(monkeypatch, gib, expected, why):
    """With 2 GiB of weights and 0.8 GiB an image: 0.8 × 12 GiB are 2 + 9.5 × 0.8."""
    properties = types.SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    estimate = memory.MemoryEstimate(2 * 2**30, int(0.8 * 2**30))
    monkeypatch.setattr(batch_size, "estimate", lambda config, label_nc: estimate)
    config, text = chosen(5000, "cuda")
    assert config.batch_size == expected
    assert why in text


def test_a_batch_size_that_is_given_stays():
    config, why = chosen(12, batch_size=7)
    assert (config.batch_size, why) == (7, None)
    assert resolve_config(merge({}, {"dataset": "coco"})).batch_size == 32
    assert resolve_config(merge({}, {"dataset": "cityscapes"})).batch_size == 16


def test_twelve_photos_train_without_more_options(tmp_path, photos, capsys):
    out = tmp_path / "run"
    argv = [*photos, *SMALL, "--lambda-vgg", "0", "--epochs", "1", "--out", str(out)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "12 samples of folder, 3 steps of 4 images" in text
    assert "batch size 4: " in text
    assert "pictures of 4 samples of the training set" in text
    assert (out / "samples/step_00000003.png").is_file()
    assert main(["--resume", "--out", str(out), "--steps", "4"]) == 0  # the choice is part of the run's options
    assert "batch size" not in capsys.readouterr().out


# What the command shows


def test_help_has_groups_and_examples(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    for group in {f.metadata["group"] for f in dataclasses.fields(TrainConfig)}:
        assert f"\n{group}:\n" in text
    for words in ("your own photos", "a dataset of the paper", "on eight GPUs"):
        assert words in text
    assert len(text[: text.index("options:")].splitlines()) < 8  # no usage of sixty flags


def test_the_examples_of_help_are_right(monkeypatch, capsys):
    """Each parses, and its options are consistent."""
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    lines = text[text.index("examples:") :].replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if "-m spade_fast.train" in line]
    assert len(commands) == 4
    for words in commands:
        args = parser().parse_args(words[words.index("spade_fast.train") + 1 :])
        given = {k: v for k, v in vars(args).items() if k in {f.name for f in dataclasses.fields(TrainConfig)}}
        resolve_config(merge({}, given))


def test_dry_run_ends_with_a_table_of_options(photos):
    p = parser()
    args = p.parse_args([*photos, *SMALL, "--lambda-vgg", "0"])
    given = {k: v for k, v in vars(args).items() if hasattr(TrainConfig, k)}
    text = describe(resolve_config(merge({}, given)))
    rows = [line.split() for line in text[text.index("\nData\n") :].splitlines()]
    assert ["*", "--num-classes", "3"] in rows
    assert ["--batch-size", "4"] in rows  # chosen, not given
    assert ["--beta1", "0.0"] in rows  # what the dataset and other options decide is no difference
    assert ["*", "--lambda-vgg", "0.0"] in rows
    assert ["--num-classes", "3"] not in rows
    flags = {word for row in rows for word in row if word.startswith("--")}
    assert flags == {flag(f.name) for f in dataclasses.fields(TrainConfig)}
    assert "{'" not in text


# Configuration files


def test_yaml_is_read_as_json_is(tmp_path):
    (tmp_path / "c.yaml").write_text("# mine\nlr: 1e-4\nngf: 32\nttur: false\nz_dim: null\nnorm: none\nout: '7'\n")
    got = read_options(tmp_path / "c.yaml", TrainConfig)
    assert got == {"lr": 1e-4, "ngf": 32, "ttur": False, "z_dim": None, "norm": "none", "out": "7"}
    assert isinstance(got["lr"], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ngff: 3", r"c\.yml: unknown option 'ngff'; did you mean ngf"),
        ("ngf: '3'", r"c\.yml: ngf must be int, got '3'"),
        ("- 1", r"c\.yml: must hold one mapping, got list"),
        ("a: [1", r"c\.yml: not a readable YAML file: .*line"),
        ("a: !!python/object/apply:os.getcwd []", r"c\.yml: not a readable YAML file: .*could not determine"),
        ("", r"c\.yml: must hold one mapping, got NoneType"),
    ],
)
def test_a_wrong_yaml_file_names_the_fault(tmp_path, text, message):
    (tmp_path / "c.yml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_options(tmp_path / "c.yml", TrainConfig)
    assert "\n" not in str(error.value)


def test_yaml_without_pyyaml_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "c.yaml").write_text("ngf: 3")
    with pytest.raises(ConfigError, match=r"c\.yaml: reading YAML needs PyYAML: pip install pyyaml"):
        read_options(tmp_path / "c.yaml", TrainConfig)
    (tmp_path / "c.json").write_text('{"ngf": 3}')
    assert read_options(tmp_path / "c.json", TrainConfig) == {"ngf": 3}
