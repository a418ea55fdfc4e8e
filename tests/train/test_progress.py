# SPDX-License-Identifier: Apache-2.0
"""What a run shows: the share that is done, lines without tqdm, pictures, TensorBoard and Weights & Biases."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from spade_fast.cli import ConfigError
from spade_fast.train import progress as progress_module
from spade_fast.train import samples as samples_module
from spade_fast.train.__main__ import main
from spade_fast.train.config import merge, resolve_config
from spade_fast.train.monitor import MissingExtraError
from spade_fast.train.progress import Progress, clock
from spade_fast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    **{"dataset": "synthetic", "crop_size": 32, "ngf": 4, "ndf": 4, "batch_size": 2, "synthetic_size": 6, "steps": 7},
    **{"lambda_vgg": 0.0, "workers": 0, "num_samples": 1, "sample_every": 0, "tensorboard": False, "num_d": 1},
    **{"ema_samples": 2, "device": "cpu"},
}


def trainer(path, resume=False, **changes):
    return Trainer(resolve_config(merge({}, {**TINY, "out": str(path), **changes})), resume)


@pytest.fixture
def time(monkeypatch):
    """A clock that a test sets."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def no_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)


class FakeBar:
    """Stands in for tqdm: its position, and what it was made with."""

    def __init__(self, total, initial=0, **options):
        self.total, self.n, self.options, self.text = total, initial, options, ""

    def update(self, n):
        assert n >= 0
        self.n += n

    def set_postfix_str(self, text, refresh):
        self.text = text


@pytest.fixture
def bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=FakeBar))


def test_clock():
    assert [clock(s) for s in (0, 59.9, 60, 3600, 36061)] == ["0:00", "0:59", "1:00", "1:00:00", "10:01:01"]


def test_a_bar_of_steps_without_a_time_limit(time, bar):
    shown = Progress(step=10, total=30, limit=None)
    shown.update(15, "gan 1")
    assert (shown._bar.total, shown._bar.n, shown._bar.text) == (30, 15, "gan 1")


def test_a_bar_of_time_with_a_time_limit(time, bar):
    """Five minutes for 1000 steps: after one minute a fifth is done, although only 10 steps are."""
    shown = Progress(step=0, total=1000, limit=300.0)
    time.seconds = 60.0
    shown.update(10, "gan 1")
    assert (shown._bar.total, shown._bar.n) == (300, 60)
    assert shown._bar.text == "step 10 of 1000, gan 1"
    time.seconds = 75.0
    shown.update(900)  # the steps will end the run before the time does
    assert shown._bar.n == pytest.approx(270)
    assert "{remaining}" in shown._bar.options["bar_format"]
    assert shown._bar.options["smoothing"] == 0  # remaining is elapsed × (1 / share - 1)


def test_lines_without_tqdm(time, no_tqdm, capsys):
    shown = Progress(step=0, total=100, limit=None)
    for step in range(1, 101):
        time.seconds = 10.0 * step
        shown.update(step, f"gan {step}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1 of 100, 0:10 elapsed, about 16:30 left, gan 1"
    assert lines[1] == "step 4 of 100, 0:40 elapsed, about 16:00 left, gan 4"  # thirty seconds later
    assert lines[-1] == "step 100 of 100, 16:40 elapsed, about 0:00 left, gan 100"
    assert len(lines) == 34


def test_lines_with_a_time_limit_count_down_the_time(time, no_tqdm, capsys):
    shown = Progress(step=0, total=10**6, limit=240.0)
    time.seconds = 60.0
    shown.update(1)
    assert capsys.readouterr().out == "step 1 of 1000000, 1:00 elapsed, about 3:00 left\n"


def test_training_without_tqdm(tmp_path, no_tqdm, capsys):
    assert trainer(tmp_path / "run").train() == "finished"
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Training on cpu in float32, backend ")
    assert "6 samples of synthetic, 7 steps of 2 images" in out[0] and out[0].endswith(str(tmp_path / "run"))
    assert out[1].startswith("step 1 of 7, ")
    assert out[-1].startswith("step 7 of 7, ") and "images/s" in out[-1]


def test_compiling_is_announced(tmp_path):
    told = "compiling generator and discriminator: the first steps take minutes"
    assert told not in trainer(tmp_path / "a").notes
    assert told in trainer(tmp_path / "b", compile=True).notes


# Pictures


def drawn(path):
    return sorted(int(p.stem.rpartition("_")[2]) for p in (path / "samples").glob("*.png"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sample_every": 500}, [5, 7]),  # early, and at the end
        ({"sample_every": 3}, [3, 5, 6, 7]),
        ({"sample_every": 3, "sample_minutes": 0.0}, [3, 6, 7]),
        ({"sample_every": 0}, []),
    ],
)
def test_pictures_by_steps(tmp_path, options, expected):
    trainer(tmp_path / "run", **options).train()
    assert drawn(tmp_path / "run") == expected


def test_pictures_by_time(tmp_path, monkeypatch):
    """The first after a minute, then every two, unless drawing takes more than a twentieth of the time."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(samples_module.time, "monotonic", lambda: now.seconds)
    t = trainer(tmp_path / "run", sample_every=500, sample_minutes=2.0)
    t.sheets.start()
    due = []
    for step in range(10, 20):
        now.seconds += 30.0
        if t.sheets.due(step):
            due.append(now.seconds)
            t.sheets.pause(took=1.0 if len(due) < 2 else 8.0)
    assert due == [90.0, 240.0]  # 60 and 90 + 120 are passed; then 8 s × 20 = 160 s later
    now.seconds = 401.0
    assert t.sheets.due(20)


def test_tensorboard_has_pictures_and_options(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path / "run", sample_every=4, sample_minutes=0.0, log_every=7, tensorboard=True).train()
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("samples")] == [4, 7]
    sheet = np.asarray(Image.open(tmp_path / "run/samples/step_00000007.png"))
    assert (events.Images("samples")[1].height, events.Images("samples")[1].width) == sheet.shape[:2]
    text = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| batch_size | 2 |" in text and "| lambda_feat | 10.0 |" in text
    assert [scalar.step for scalar in events.Scalars("gan")] == [7]


# Weights & Biases


class FakeWandb(types.ModuleType):
    """Stands in for the package: what was logged, and the options of each run."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.finished = [], [], 0

    def init(self, **options):
        if options["project"] == "forbidden":
            raise RuntimeError("no login\nsecond line")
        self.runs.append(options)
        return types.SimpleNamespace(id=options["id"] or "abc", log=self._log, finish=self._finish)

    def _log(self, values, step):
        self.logged.append((step, values))

    def _finish(self):
        self.finished += 1

    @staticmethod
    def Image(path):
        return ("image", path)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_options_numbers_and_pictures_and_is_resumed(tmp_path, wandb):
    out = tmp_path / "mine"
    trainer(out, wandb="project", sample_every=7, sample_minutes=0.0, log_every=7).train()
    (first,) = wandb.runs
    assert (first["project"], first["name"], first["id"]) == ("project", "mine", None)
    assert first["config"]["batch_size"] == 2
    steps = [step for step, _ in wandb.logged]
    assert steps == [7, 7]
    numbers, picture = (values for _, values in wandb.logged)
    assert {"gan", "d_real", "lr_generator", "images_per_second"} <= set(numbers)
    assert picture == {"samples": ("image", str(out / "samples/step_00000007.png"))}
    trainer(out, resume=True, wandb="project", steps=8).train()
    assert (wandb.runs[1]["id"], wandb.runs[1]["resume"], wandb.finished) == ("abc", "allow", 2)


def test_wandb_that_is_missing_or_fails_is_named(tmp_path, wandb, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"--wandb forbidden: wandb can't start: no login$"):
        trainer(tmp_path / "a", wandb="forbidden").train()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError):
        trainer(tmp_path / "b", wandb="project", dataset="coco", dataroot="absent")  # before the data are read
    assert main(["--wandb", "project", "--lambda-vgg", "0", "--out", str(tmp_path / "c")]) == 1
    assert "--wandb needs the package wandb: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_one_process_alone_logs(tmp_path, wandb):
    from spade_fast.train.monitor import Monitor

    config = resolve_config(merge({}, {**TINY, "wandb": "project"}))
    with Monitor(config, tmp_path, tmp_path / "stats.jsonl", 0, 7, quiet=True) as monitor:
        monitor.start()
        monitor.step(7, 0, {"gan": 1.0}, {})
        monitor.note("hello")
    assert wandb.runs == [] and not (tmp_path / "stats.jsonl").exists()


def test_drawing_does_not_change_training(tmp_path):
    plain, shown = trainer(tmp_path / "a"), trainer(tmp_path / "b", sample_every=2)
    plain.train()
    shown.train()
    assert torch.equal(plain.generator.conv_img.weight, shown.generator.conv_img.weight)
