# SPDX-License-Identifier: Apache-2.0
"""The commands' files: locked run directories, full disks, unreadable checkpoints, signals, paths and pipes."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from PIL import Image

from spade_fast.files import WriteError, require_writable
from spade_fast.models import VGGWeightsError, load_vgg19
from spade_fast.models.checkpoint import CheckpointError, atomic_save, safe_load
from spade_fast.synthesize import main as synthesize
from spade_fast.train import config as cfg
from spade_fast.train.__main__ import main as train
from spade_fast.train.run_directory import LOCK, RunDirectory, RunDirectoryError
from spade_fast.train.stopping import STOPPING, StopSignals

TINY = (
    "--dataset synthetic --synthetic-size 4 --crop-size 64 --ngf 4 --ndf 4 --num-d 1 --batch-size 2 --lambda-vgg 0 "
    "--workers 0 --no-tensorboard --sample-every 0 --ema 0 --device cpu"
).split()


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


# Locks


HOLD = """
import sys, time
from spade_fast.train.run_directory import RunDirectory
run = RunDirectory(sys.argv[1])
run.lock()
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_live_run_keeps_others_out_and_a_killed_one_does_not(tmp_path, holder, capsys):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=rf"run: another process \(process {holder.pid} on .*trains in this"):
        run.lock()
    run.config.write_text(json.dumps({"dataset": "synthetic"}))
    assert train(["--resume", "--out", str(run.path), *TINY[2:], "--steps", "1"]) == 1
    assert "another process" in last_line(capsys)
    run.config.unlink()
    assert train(["--out", str(run.path), *TINY, "--steps", "1"]) == 1
    assert "another process" in last_line(capsys)
    leftover = run.path / ".checkpoint_00000001.pt.77.tmp"
    leftover.write_bytes(b"half")
    holder.kill()
    holder.wait()
    assert (run.path / LOCK).exists()
    run.lock()
    assert not leftover.exists()
    run.unlock()
    assert os.listdir(run.path) == []


def test_two_runs_of_one_process_exclude_each_other(tmp_path):
    """And the second leaves the first its lock, which a closed file would lift."""
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "other" / ".." / "run")
    first.lock()
    (tmp_path / "other").mkdir()
    with pytest.raises(RunDirectoryError, match=r"run: another run of this process .* trains in this directory"):
        second.lock()
    code = "import sys; from spade_fast.train.run_directory import RunDirectory; RunDirectory(sys.argv[1]).lock()"
    result = subprocess.run([sys.executable, "-c", code, first.path], capture_output=True, text=True)
    assert result.returncode == 1 and f"another process (process {os.getpid()} on " in result.stderr
    first.unlock()
    second.lock()
    del second  # nothing uses it any more
    first.lock()
    first.unlock()


def test_a_run_that_fails_at_the_start_leaves_nothing(tmp_path, capsys):
    options = "--dataset folder --num-classes 2 --label-dir absent --image-dir absent --lambda-vgg 0".split()
    code = train([*options, "--out", str(tmp_path / "a/b")])
    assert (code, os.listdir(tmp_path)) == (1, [])
    assert "absent: no such folder" in last_line(capsys)


# Errors of the system


def test_where_nothing_can_be_written_is_known_before_data_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out, cause in (("file/run", "Not a directory"), ("x" * 300, "File name too long")):
        assert train(["--out", str(tmp_path / out), "--dataset", "coco", "--dataroot", "absent"]) == 1
        line = last_line(capsys)
        assert line.startswith(f"error: {tmp_path}") and line.endswith(cause)
        with pytest.raises(WriteError, match=cause if "long" in cause else "cannot be written"):
            require_writable(tmp_path / out)
    torch.save({}, tmp_path / "c.pt")
    arguments = ["--checkpoint", str(tmp_path / "c.pt"), "--label-dir", "absent", "--out", str(tmp_path / "file")]
    assert synthesize(arguments) == 1
    assert last_line(capsys).startswith(f"error: {tmp_path}/file: cannot be written: ")


FULL = """
import resource, sys, torch
from spade_fast.models.checkpoint import atomic_save
from spade_fast.files import WriteError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    atomic_save({"a": torch.zeros(100_000)}, sys.argv[1])
except WriteError as error:
    print(error)
"""


def test_a_save_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint_00000001.pt"
    atomic_save({"a": 1}, path)
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True)
    assert done.stdout == f"{path}: cannot be written: File too large\n", done.stderr
    assert safe_load(path) == {"a": 1} and os.listdir(tmp_path) == [path.name]


def test_training_says_that_statistics_cannot_be_written_and_goes_on(tmp_path, capsys):
    assert train(["--out", str(tmp_path / "run"), *TINY, "--steps", "1"]) == 0
    (tmp_path / "run/stats.jsonl").unlink()
    (tmp_path / "run/stats.jsonl").mkdir()
    assert train(["--resume", "--out", str(tmp_path / "run"), "--steps", "3", "--log-every", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("warning: stats.jsonl can't be written, and training goes on without: ") == 1
    assert "stats.jsonl: cannot be written: Is a directory" in out


# Checkpoints that are something else


class Foreign:
    pass


def _zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


def _cut(path):
    whole = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, whole)
    path.write_bytes(whole.getvalue()[:2000])


SAFETENSORS = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
UNREADABLE = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "it is a web page"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "it is a Git LFS pointer"),
    "safetensors": (
        lambda path: path.write_bytes(len(SAFETENSORS).to_bytes(8, "little") + SAFETENSORS + bytes(4)),
        "it is a safetensors file",
    ),
    "zip": (_zip, "it is a zip archive, not a file of torch.save"),
    "cut": (_cut, "it is cut off or damaged"),
    "text": (lambda path: path.write_text("hello"), "it is not a file of torch.save"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Foreign())), "it holds objects other than tensors"),
    "module": (lambda path: torch.save(torch.nn.Linear(1, 1), path), r"other than tensors .*\(torch.nn.*Linear"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_an_unreadable_checkpoint_is(tmp_path, kind):
    path = tmp_path / "a.pth"
    write, message = UNREADABLE[kind]
    write(path)
    for load, error in ((safe_load, CheckpointError), (load_vgg19, VGGWeightsError)):
        with pytest.raises(error, match=message) as caught:
            load(path)
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


OURS = {"format": "spade_fast.checkpoint/1"}


@pytest.mark.parametrize(
    "held",
    [[1], 3, {}, {"a": "b"}, OURS, OURS | {"training": None}, OURS | {"training": {"config": None}, "generator": None}],
)
def test_a_checkpoint_that_holds_something_else(tmp_path, capsys, held):
    torch.save(held, tmp_path / "a.pth")
    Image.new("L", (32, 32)).save(tmp_path / "label.png")
    arguments = ["--checkpoint", str(tmp_path / "a.pth"), "--label-dir", str(tmp_path), "--out", str(tmp_path / "o")]
    arguments += ["--num-classes", "1"]
    assert synthesize(arguments) == 1
    assert last_line(capsys).startswith(f"error: {tmp_path}/a.pth ")
    with pytest.raises(VGGWeightsError, match="is not torchvision's VGG19"):
        load_vgg19(tmp_path / "a.pth")


# Options


def test_one_value_a_channel_is_refused_before_training(tmp_path, capsys):
    options = [*TINY, "--crop-size", "32", "--steps", "1", "--out", str(tmp_path / "run")]
    assert train([*options, "--accumulate", "2"]) == 1
    assert "one value a channel to normalize" in last_line(capsys) and not (tmp_path / "run").exists()
    assert train(options) == 0


@pytest.mark.parametrize("seed", [-1, 2**43, 2**64])
def test_a_seed_that_does_not_fit_is_refused(seed):
    with pytest.raises(cfg.ConfigError, match="--seed must be"):
        cfg.resolve_config(cfg.merge({}, {"preset": "synthetic", "seed": seed}))


def test_paths_are_absolute_and_know_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = {"dataroot": "~/d", "vgg_weights": "v.pth", "file_list": "~/l.txt", "label_dir": "l", "out": "~/run"}
    config = cfg.resolve_config(cfg.merge({}, {"preset": "coco", **options}))
    got = [config.dataroot, config.vgg_weights, config.file_list, config.label_dir, config.out]
    assert got == [str(tmp_path / name) for name in ("d", "v.pth", "l.txt", "l", "run")]
    assert RunDirectory("~/run").path == tmp_path / "run"


def test_a_run_resumes_in_another_working_directory(tmp_path, monkeypatch):
    for kind, mode in (("img", "RGB"), ("lab", "L")):
        (tmp_path / kind).mkdir()
        for name in "ab":
            Image.new(mode, (64, 64)).save(tmp_path / kind / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    options = ["--dataset", "folder", "--image-dir", "img", "--label-dir", "lab", "--num-classes", "2"]
    assert train([*options, *TINY[4:], "--steps", "1", "--out", "run"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(["--resume", "--out", "../run", "--steps", "2"]) == 0


# Signals


@pytest.mark.parametrize("number", STOPPING)
def test_signals_are_kept_and_only_a_second_interrupt_ends_at_once(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        assert stop.received == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_later_sigterm_ends_at_once(number, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("spade_fast.train.stopping.time.monotonic", lambda: now[0])
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        now[0] += 0.9
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher's
        now[0] += 0.2
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigpending()
        assert ended.value.code == 143 and stop.received == number


def test_a_sigterm_after_a_warning_still_lets_the_run_be_saved(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("spade_fast.train.stopping.time.monotonic", lambda: now[0])
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        now[0] += 60
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGUSR1


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_the_run(tmp_path, capsys, monkeypatch, number):
    from spade_fast.train.trainer import Trainer

    step = Trainer.train_step

    def signalled(self, batch):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", signalled)
    assert train(["--out", str(tmp_path / "run"), *TINY, "--steps", "9"]) == 0
    assert (tmp_path / "run/checkpoint_00000002.pt").exists()
    assert f"Stopped ({number.name}): step 2 of 9" in capsys.readouterr().out


# Streams


@pytest.fixture
def odd_name(tmp_path):
    """Folders whose image has a name that is no UTF-8, and many faults to print."""
    for kind in ("img", "lab"):
        (tmp_path / kind).mkdir()
    image = os.fsencode(tmp_path) + b"/img/caf\xe9.jpg"
    with open(image, "wb") as file:
        Image.new("RGB", (64, 64)).save(file, "JPEG")
    for i in range(1500):
        os.link(image, os.fsencode(tmp_path) + b"/img/%d.jpg" % i)
    Image.new("L", (64, 64)).save(tmp_path / "lab/a.png")
    folders = ["--image-dir", tmp_path / "img", "--label-dir", tmp_path / "lab"]
    return [sys.executable, "-m", "spade_fast.data", "check", "--dataset", "folder", "--num-classes", "1", *folders]


def test_names_are_escaped_and_closed_pipes_end_quietly(odd_name):
    for encoding in ("utf-8:strict", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([*odd_name, "--workers", "1"], capture_output=True, env=environment)
        assert done.returncode == 1 and b"caf\\udce9.jpg: this image has no label map" in done.stdout
    with subprocess.Popen(odd_name, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert b"Traceback" not in errors and b"BrokenPipe" not in errors
    assert process.returncode == 141
