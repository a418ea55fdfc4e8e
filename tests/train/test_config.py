# SPDX-License-Identifier: Apache-2.0
"""Options: where they come from, which wins, and what a wrong one says."""

import argparse
import dataclasses
import json

import pytest

from spade_fast.cli import ConfigError, add_options, flag, parse
from spade_fast.train.config import PRESETS, RESUME_FIXED, TrainConfig, merge, read_file, read_run, resolve_config


def options(*argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser, TrainConfig)
    return parse(parser, list(argv), TrainConfig)[1]


def write(path, values):
    path.write_text(json.dumps(values))
    return path


def test_defaults_preset_file_and_command_line_win_in_that_order():
    file = {"preset": "cityscapes", "batch_size": 4, "ngf": 48}
    config = merge(file, options("--ngf", "32"))
    assert config.lambda_feat == TrainConfig.lambda_feat  # default
    assert (config.epochs, config.decay_from, config.num_upsampling_layers) == (200, 100, "more")  # preset
    assert config.batch_size == 4  # file over preset (16)
    assert config.ngf == 32  # command line over file (48)


def test_a_dataset_brings_its_own_schedule_without_a_preset():
    assert merge({}, options("--dataset", "flickr")).epochs == 50
    assert merge({}, options("--dataset", "folder")).lambda_vgg == TrainConfig.lambda_vgg
    assert merge({}, {}).lambda_vgg == 0  # synthetic needs no download


@pytest.mark.parametrize(
    ("name", "epochs", "decay_from", "batch"),
    [
        ("coco", 100, None, 32),
        ("ade20k", 200, 100, 32),
        ("ade20k-outdoor", 200, 100, 32),
        ("cityscapes", 200, 100, 16),
        ("flickr", 50, None, 32),
    ],
)
def test_presets_hold_the_papers_schedules(name, epochs, decay_from, batch):
    c = resolve_config(merge({}, {"preset": name}))
    assert (c.epochs, c.decay_from, c.batch_size) == (epochs, decay_from, batch)
    assert c.lrs() == (1e-4, 4e-4)
    assert (c.beta1, c.beta2) == (0.0, 0.9)
    assert (c.lambda_feat, c.lambda_vgg, c.lambda_kl, c.lambda_l1) == (10, 10, 0.05, 0)
    assert (c.crop_size, c.aspect_ratio) == ((512, 2.0) if name == "cityscapes" else (256, 1.0))


def test_without_ttur_both_networks_share_rate_and_betas():
    c = resolve_config(merge({}, options("--no-ttur")))
    assert c.lrs() == (2e-4, 2e-4)
    assert (c.beta1, c.beta2) == (0.5, 0.999)
    assert resolve_config(merge({}, options("--no-ttur", "--beta1", "0.3"))).beta1 == 0.3


def test_steps_and_epochs_the_later_place_wins():
    assert merge({"epochs": 7}, {"steps": 30}).epochs is None
    later = merge({"steps": 30}, {"epochs": 7})
    assert (later.steps, later.epochs) == (None, 7)
    with pytest.raises(ConfigError, match="command line: steps and epochs exclude each other"):
        merge({}, {"steps": 30, "epochs": 7})


def test_load_size_keeps_the_margin_of_the_crop():
    assert resolve_config(merge({}, {"preset": "coco"})).load_size == 286
    assert resolve_config(merge({}, {"preset": "coco", "crop_size": 128})).load_size == 143
    assert resolve_config(merge({}, {"preset": "coco", "crop_size": 128, "load_size": 128})).load_size == 128


def test_a_vae_has_a_z():
    assert resolve_config(merge({}, {"use_vae": True})).z_dim == 256
    assert resolve_config(merge({}, {"use_vae": True, "z_dim": 8})).z_dim == 8
    assert resolve_config(merge({}, {})).z_dim is None


def test_a_saved_config_reads_back_equal(tmp_path):
    config = resolve_config(merge({}, {"preset": "ade20k", "dataroot": "x", "shift_labels": True, "steps": 9}))
    config.save(tmp_path / "config.json")
    assert merge(read_file(tmp_path / "config.json"), {}) == config


def test_every_field_is_an_option_on_the_command_line():
    argv = []
    for f in dataclasses.fields(TrainConfig):
        if f.type.startswith("bool"):
            argv.append(flag(f.name))
        elif f.metadata["choices"]:
            argv += [flag(f.name), str(f.metadata["choices"][-1])]
        else:
            argv += [flag(f.name), "3"]
    given = options(*argv)
    assert set(given) == {f.name for f in dataclasses.fields(TrainConfig)}
    assert given["lr"] == 3.0
    assert given["steps"] == 3
    assert given["out"] == "3"
    assert given["use_edges"] is True
    assert options("--no-use-edges") == {"use_edges": False}
    assert options() == {}  # nothing given, nothing overridden


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ngff": 3}, r"unknown option 'ngff'; did you mean ngf"),
        ({"batch_sise": 3}, r"unknown option 'batch_sise'; did you mean batch_size"),
        ({"ngf": "64"}, r"ngf must be int, got '64'"),
        ({"ngf": 6.5}, r"ngf must be int, got 6.5"),
        ({"ngf": True}, r"ngf must be int, got True"),
        ({"ttur": 1}, r"ttur must be bool, got 1"),
        ({"z_dim": "8"}, r"z_dim must be int or null, got '8'"),
        ({"gan_mode": "wgan"}, r"gan_mode must be one of hinge, lsgan, original, w, got 'wgan'"),
        ([1], r"must hold one JSON object, got list"),
    ],
)
def test_a_wrong_file_names_the_key(tmp_path, values, message):
    path = write(tmp_path / "c.json", values)
    with pytest.raises(ConfigError, match=message) as error:
        read_file(path)
    assert str(path) in str(error.value)


def test_a_whole_number_is_a_float_and_null_is_none(tmp_path):
    got = read_file(write(tmp_path / "c.json", {"lr": 1, "z_dim": None}))
    assert got == {"lr": 1.0, "z_dim": None}
    assert isinstance(got["lr"], float)


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "c.json").write_text("ngf: 3")
    with pytest.raises(ConfigError, match=r"c\.json: not a readable JSON file"):
        read_file(tmp_path / "c.json")
    with pytest.raises(ConfigError, match=r"absent\.json: not a readable JSON file"):
        read_file(tmp_path / "absent.json")


def test_an_unknown_option_ends_the_program_with_close_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        options("--crop-sise", "64")
    assert stop.value.code == 2
    assert "unknown option --crop-sise; did you mean --crop-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_size": 48}, r"--crop-size.*multiple of 32.*48"),
        ({"crop_size": 64, "num_upsampling_layers": "most"}, r"--crop-size.*multiple of 128"),
        ({"load_size": 100}, r"--load-size must be at least --crop-size 128, got 100"),
        ({"batch_size": 0}, r"--batch-size must be at least 1, got 0"),
        ({"lambda_feat": -1.0}, r"--lambda-feat must be 0 or more, got -1.0"),
        ({"lr": float("nan")}, r"--lr must be above 0, got nan"),
        ({"beta2": 1.0}, r"--beta2 must be in \[0, 1\), got 1.0"),
        ({"steps": 0}, r"--steps must be above 0, got 0"),
        ({"keep": 0}, r"--keep must be at least 1"),
    ],
)
def test_a_bad_value_names_the_option(values, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(merge({}, values))


def test_a_preset_of_another_dataset_is_refused():
    with pytest.raises(ConfigError, match="preset 'coco' is for the dataset 'coco', but dataset is 'flickr'"):
        merge({}, {"preset": "coco", "dataset": "flickr"})


@pytest.mark.parametrize(
    ("written", "shifted"),
    [
        ({"preset": "ade20k", "dataset": "ade20k", "raw_labels": False}, True),
        ({"preset": "ade20k", "dataset": "ade20k", "raw_labels": True}, False),
        ({"preset": None, "dataset": "ade20k-outdoor", "raw_labels": False}, True),
        ({"preset": "ade20k-outdoor", "raw_labels": False}, True),
        ({"preset": "ade20k"}, False),
        ({"preset": "coco", "dataset": "coco", "raw_labels": False}, False),
    ],
)
def test_labels_of_an_earlier_version_keep_their_meaning(tmp_path, written, shifted):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(written))
    assert merge(read_file(file), {}).shift_labels is shifted


def test_a_run_of_an_earlier_version_started_with_glorot(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"ngf": 8}))
    assert merge(read_run(file), {}).init == "glorot"
    assert merge(read_file(file), {}).init == "released"
    file.write_text(json.dumps({"init": "released"}))
    assert merge(read_run(file), {}).init == "released"


def test_presets_and_fixed_options_exist():
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    assert set(RESUME_FIXED) <= names
    for preset in PRESETS.values():
        assert set(preset) <= names
