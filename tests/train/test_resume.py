# SPDX-License-Identifier: Apache-2.0
"""Real processes that are killed, stopped and resumed: a resumed run ends bit-equal to one that was never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from spade_fast.models.checkpoint import safe_load
from spade_fast.train import config as cfg
from spade_fast.train.__main__ import main
from spade_fast.train.run_directory import RunDirectory, RunDirectoryError

pytestmark = pytest.mark.usefixtures("one_thread")

# The VAE draws noise in every step, and 9 samples of batch 2 end epochs in odd places: both must resume exactly.
OPTIONS = (
    "--dataset synthetic --crop-size 32 --ngf 4 --ndf 4 --batch-size 2 --synthetic-size 9 --lambda-vgg 0 --use-vae "
    "--z-dim 4 --epochs 5 --decay-from 1 --save-every 10 --log-every 1 --sample-every 7 --num-samples 1 --workers 0 "
    "--no-tensorboard --device cpu"
).split()  # 4 steps an epoch, 20 steps


def start(out, *options):
    # One thread: the order of additions must not depend on how many cores are free.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "spade_fast.train", "--out", str(out), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)  # a process group of its own


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out + err


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the run did not get there in two minutes"
        time.sleep(0.002)


def lines(run):
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def assert_same_state(a, b, path=""):
    """Bit-equal tensors, equal everything else, at the same places."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key != "config":
                assert_same_state(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 20 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(start(out, *OPTIONS))
    return out


def test_kill_9_and_resume_is_bit_equal_to_never_stopping(tmp_path, straight):
    out = tmp_path / "run"
    process = start(out, *OPTIONS)
    wait_for((out / "checkpoint_00000010.pt").exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "checkpoint_00000020.pt").exists()
    message = finish(start(out, "--resume", "--no-tensorboard"))
    assert "resuming from" in message
    assert "step 10 of 20" in message
    ours, theirs = (safe_load(run / "checkpoint_00000020.pt") for run in (out, straight))
    assert_same_state(ours, theirs)
    assert not torch.equal(  # and the ten steps did something
        ours["generator"]["state_dict"]["fc.weight"],
        safe_load(out / "checkpoint_00000010.pt")["generator"]["state_dict"]["fc.weight"],
    )
    timeless = [
        [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines(run)]
        for run in (out, straight)
    ]
    assert [line["step"] for line in timeless[0]] == list(range(1, 21))  # none twice, none missing
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_resumes(tmp_path, straight, number, code):
    out = tmp_path / "run"
    process = start(out, *OPTIONS, "--workers", "2")
    wait_for(lambda: (out / "stats.jsonl").exists() and len(lines(out)) >= 3, process)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does: the loader's processes get it too
    message = finish(process, code)
    saved = RunDirectory(out).checkpoints()[-1]
    step = safe_load(saved)["training"]["step"]
    assert 3 <= step < 20
    assert f"Stopped ({number.name}): step {step} of 20, saved {saved}" in message
    assert main(["--out", str(out), "--resume"]) == 0
    assert_same_state(*(safe_load(run / "checkpoint_00000020.pt") for run in (out, straight)))


def test_a_truncated_checkpoint_is_skipped(tmp_path, straight, capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    newest = out / "checkpoint_00000020.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"skipping .*checkpoint_00000020\.pt"):
        state, path = RunDirectory(out).load_newest()
    assert path.name == "checkpoint_00000010.pt"
    assert state["training"]["step"] == 10
    with pytest.warns(UserWarning, match="skipping"):
        assert main(["--out", str(out), "--resume"]) == 0
    assert_same_state(*(safe_load(run / "checkpoint_00000020.pt") for run in (out, straight)))


def test_without_a_readable_checkpoint_nothing_is_guessed(tmp_path, straight):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for path in RunDirectory(out).checkpoints():
        path.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RunDirectoryError, match=r"none of the 2 checkpoints in .* can be read"):
            RunDirectory(out).load_newest()


def test_killed_before_the_first_checkpoint_starts_over(tmp_path, straight, capsys):
    out = tmp_path / "run"
    process = start(out, *OPTIONS)
    wait_for(lambda: (out / "stats.jsonl").exists() and len(lines(out)) >= 1, process)
    process.kill()
    process.communicate()
    assert not RunDirectory(out).checkpoints()
    assert main(["--out", str(out), "--resume"]) == 0
    assert "has no checkpoint yet: starting from step 0" in capsys.readouterr().out
    assert_same_state(*(safe_load(run / "checkpoint_00000020.pt") for run in (out, straight)))
    assert len(lines(out)) == 20


def test_a_finished_run_is_left_alone(tmp_path, straight, capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    before = (out / "checkpoint_00000020.pt").stat().st_mtime_ns
    assert main(["--out", str(out), "--resume"]) == 0
    assert (out / "checkpoint_00000020.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("option", "was"),
    [("--ngf=8", "4"), ("--batch-size=4", "2"), ("--no-use-vae", "True"), ("--init=glorot", "'released'")],
)
def test_what_a_run_can_not_change_is_named(straight, capsys, option, was):
    assert main(["--out", str(straight), "--resume", option]) == 1
    name = option.split("=")[0].replace("--no-", "--")
    error = capsys.readouterr().err
    assert f"--resume: {name} is " in error
    assert f"was trained with {was}" in error


def test_a_run_of_an_earlier_version_continues_as_it_started(tmp_path, straight, capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out)

    def earlier(options):  # without init and with raw_labels, which meant nothing to this dataset
        return {"raw_labels": False, **{k: v for k, v in options.items() if k not in ("init", "shift_labels")}}

    (out / "config.json").write_text(json.dumps(earlier(json.loads((out / "config.json").read_text()))))
    newest = out / "checkpoint_00000020.pt"
    state = safe_load(newest)
    state["training"]["config"] = earlier(state["training"]["config"])
    torch.save(state, newest)
    assert main(["--out", str(out), "--resume", "--init", "released"]) == 1
    assert "--resume: --init is 'released', but" in capsys.readouterr().err
    assert main(["--out", str(out), "--resume", "--steps", "21", "--no-tensorboard"]) == 0
    written = cfg.read_file(out / "config.json")
    assert (written["init"], written["shift_labels"]) == ("glorot", False)


def test_a_longer_run_continues(tmp_path, straight):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    assert main(["--out", str(out), "--resume", "--steps", "22", "--no-tensorboard"]) == 0
    state = safe_load(out / "checkpoint_00000022.pt")
    assert (state["training"]["epoch"], state["training"]["batch"]) == (5, 2)
    assert cfg.read_file(out / "config.json")["steps"] == 22
