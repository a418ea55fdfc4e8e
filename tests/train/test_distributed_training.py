# SPDX-License-Identifier: Apache-2.0
"""Training on several processes: the same steps as one process makes, and every way in which one of them can end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from spade_fast.data import DataError, make_dataset
from spade_fast.labels.batch import batch_labels
from spade_fast.models import VGG19Features, init_weights
from spade_fast.models.checkpoint import safe_load
from spade_fast.train import config as cfg
from spade_fast.train.ranks import Ranks
from spade_fast.train.run_directory import RunDirectory
from spade_fast.train.schedule import EpochBatches
from spade_fast.train.setup import build_networks
from spade_fast.train.step import TrainingStep
from spade_fast.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = {
    **{"dataset": "synthetic", "crop_size": 32, "ngf": 4, "ndf": 4, "batch_size": 3, "synthetic_size": 10},
    **{"lambda_vgg": 0.0, "lambda_l1": 1.0, "workers": 0, "num_samples": 1, "sample_every": 0, "tensorboard": False},
    **{"log_every": 1, "use_vae": True, "z_dim": 4, "device": "cpu"},
}


def resolved(**changes):
    return cfg.resolve_config(cfg.merge({}, {**TINY, **changes}))


# The step


def three_steps(rank=0, world=1, vgg=False, **changes) -> dict:
    """Losses of three training steps in float64, and every weight and buffer after them."""
    config = resolved(steps=3, batch_size=5, lambda_vgg=10.0 if vgg else 0.0, **changes)
    ranks = Ranks("cpu")
    dataset = make_dataset("synthetic", "train", crop_size=32, size=5)
    torch.manual_seed(rank)  # what starts out different must not matter: DistributedDataParallel sends rank 0's
    nets = build_networks(config, dataset.label_nc)
    torch.manual_seed(rank)
    for net in nets.values():
        init_weights(net, "glorot", gain=1.0)
        net.double().train()
    torch.manual_seed(0)
    step = TrainingStep(nets, config, VGG19Features().double() if vgg else None, ranks)
    for optimizer in step.optimizers.values():
        # A bias before a norm has no gradient but rounding, which Adam would blow up to the learning rate.
        optimizer.param_groups[0]["eps"] = 1e-6
    first, last = ranks.share(5)
    batch = default_collate([{k: v for k, v in dataset[i].items() if k != "path"} for i in range(5)])
    labels = batch_labels(batch, dataset.num_classes, torch.device("cpu"))[first:last]
    image = batch["image"].double()[first:last]
    losses = []
    for i in range(3):
        terms = step(labels, image, i)
        values = ranks.sum(torch.stack(list(terms.values())))
        losses.append(dict(zip(terms, values.tolist(), strict=True)))
    return {"losses": losses, "nets": {name: net.state_dict() for name, net in nets.items()}}


def assert_same_steps(actual: dict, expected: dict) -> None:
    for mine, theirs in zip(actual["losses"], expected["losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)
    for name, state in expected["nets"].items():
        for key, value in state.items():
            bound = 1e-9 * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(actual["nets"][name][key], value, rtol=0, atol=bound, msg=f"{name}.{key}")


@pytest.mark.parametrize("world", [2, 4])
def test_steps_of_several_processes_are_those_of_one(world):
    """5 samples on 2 and on 4 processes: uneven parts, two networks with DistributedDataParallel, noise, every loss."""
    expected = three_steps(0)
    results = processes.run(three_steps, world)
    for result in results:
        assert_same_steps(result, expected)
    for state, other in zip(results[0]["nets"].values(), results[-1]["nets"].values(), strict=True):
        for key, value in state.items():
            assert torch.equal(value, other[key]), f"ranks differ in {key}"


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_gradients_have_the_strides_of_their_weights(amp, kernel_size):
    """torch's fused Adam goes through memory and does not look at strides, or refuses others; so does a bucket."""
    config = resolved(steps=3, batch_size=2, amp=amp, kernel_size=kernel_size)
    nets = build_networks(config, 13)
    for net in nets.values():
        init_weights(net)
    step = TrainingStep(nets, config, None, Ranks("cpu"))
    dataset = make_dataset("synthetic", "train", crop_size=32, size=2)
    batch = default_collate([{k: v for k, v in dataset[i].items() if k != "path"} for i in range(2)])
    for net in ("generator", "discriminator"):
        getattr(step, f"{net}_step")(batch_labels(batch, dataset.num_classes, torch.device("cpu")), batch["image"])
        for name, p in nets[net].named_parameters():
            assert p.grad.stride() == p.stride(), name
    assert all(p.grad is None for p in nets["generator"].parameters())  # used up


def test_every_sample_of_an_epoch_is_seen_once():
    for world in (1, 2, 3, 5):
        parts = [(7 * r // world, 7 * (r + 1) // world) for r in range(world)]
        whole = list(EpochBatches(30, 7, 1, 2))
        shares = [list(EpochBatches(30, 7, 1, 2, share=part)) for part in parts]
        together = [[i for part in batch for i in part] for batch in zip(*shares, strict=True)]
        assert together == whole
    seen = [i for batch in whole for i in batch]
    assert len(set(seen)) == len(seen) == 28  # the last 2 of 30 make no batch of 7


# A bad sample in one of the processes


def train_with_a_bad_sample(rank, world, out, data):
    config = resolved(
        out=out, dataset="folder", image_dir=f"{data}/img", label_dir=f"{data}/label", num_classes=3, steps=8,
        synthetic_size=None, batch_size=2,
    )  # fmt: skip
    t = Trainer(config)
    try:
        return t.train(), t.step
    except DataError as error:
        return str(error), t.step


def test_a_bad_sample_of_one_process_stops_all_after_the_same_step(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("img", "label"):
        (tmp_path / kind).mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(tmp_path / f"img/{i}.png")
        label = rng.integers(0, 3, (40, 40)) if i != 3 else np.full((40, 40), 7)
        Image.fromarray(label.astype(np.uint8)).save(tmp_path / f"label/{i}.png")
    results = processes.run(train_with_a_bad_sample, 2, str(tmp_path / "run"), str(tmp_path))
    assert results[0][1] == results[1][1] < 3
    messages = sorted(r[0] for r in results)
    assert "label/3.png: label value 7" in messages[0]
    assert messages[1] == "fault"
    assert [p.name for p in RunDirectory(tmp_path / "run").checkpoints()] == [f"checkpoint_{results[0][1]:08d}.pt"]


def test_too_many_processes_for_the_batch_is_named():
    ranks = Ranks("cpu")
    ranks.world = 4
    with pytest.raises(cfg.ConfigError, match=r"--batch-size 3 .* is too small for 4 processes"):
        TrainingStep(build_networks(resolved(), 14), resolved(), None, ranks)


# Real processes, started by torchrun

OPTIONS = (
    "--dataset synthetic --crop-size 32 --ngf 4 --ndf 4 --batch-size 3 --synthetic-size 10 --lambda-vgg 0 --use-vae "
    "--z-dim 4 --epochs 10 --decay-from 2 --save-every 10 --log-every 1 --sample-every 0 --num-samples 1 --workers 0 "
    "--no-tensorboard --device cpu"
).split()  # 3 steps an epoch, 30 steps; 3 images on 2 processes: 1 and 2


def torchrun(world, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*run, *command], env=environment, start_new_session=True, **pipes)


def train(world, out, *options):
    return torchrun(world, "-m", "spade_fast.train", "--out", str(out), *options)


def finish(process, seconds=120):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out + err


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the run did not get there in two minutes"
        time.sleep(0.005)


def lines(run):
    path = run / "stats.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def workers_of(process) -> dict[int, int]:
    """rank -> process id of torchrun's children."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        rank = next((e for e in environment if e.startswith(b"RANK=")), None)
        if parent == process.pid and rank is not None:
            found[int(rank[5:])] = int(folder.name)
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """30 steps on two processes that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    code, output = finish(train(2, out, *OPTIONS))
    assert code == 0, output
    return out


def timeless(run):
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines(run)]


def test_kill_9_of_one_process_ends_all_and_fewer_can_go_on(tmp_path, straight):
    out = tmp_path / "run"
    process = train(2, out, *OPTIONS)
    wait_for(lambda: list(out.glob("checkpoint_*.pt")), process)
    workers = workers_of(process)
    os.kill(workers[1], signal.SIGKILL)
    start = time.monotonic()
    code, output = finish(process, 60)
    assert time.monotonic() - start < 60
    assert code != 0
    assert "Signal 9 (SIGKILL) received by PID" in output
    assert not Path(f"/proc/{workers[0]}").exists()
    assert not (out / "checkpoint_00000030.pt").exists()
    code, output = finish(train(1, out, "--resume", "--no-tensorboard"))
    assert code == 0, output
    ours, theirs = lines(out), lines(straight)
    assert [(line["step"], line["epoch"], line["lr_generator"]) for line in ours] == [
        (line["step"], line["epoch"], line["lr_generator"]) for line in theirs
    ]
    # The whole batch of each step, in the same order: the first losses differ by float32 rounding alone.
    names = ("gan", "feat", "kl", "d_fake", "d_real")
    assert [ours[0][n] for n in names] == pytest.approx([theirs[0][n] for n in names], rel=1e-4)


def test_sigterm_to_torchrun_saves_and_the_resumed_run_is_bit_equal(tmp_path, straight):
    out = tmp_path / "run"
    process = train(2, out, *OPTIONS, "--workers", "1", "--save-every", "1000")
    wait_for(lambda: len(lines(out)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, output = finish(process, 60)
    saved = RunDirectory(out).checkpoints()
    assert len(saved) == 1, output
    step = safe_load(saved[0])["training"]["step"]
    assert 3 <= step < 30
    assert f"Stopped (SIGTERM): step {step} of 30" in output
    code, output = finish(train(2, out, "--resume"))
    assert code == 0, output
    ours, theirs = (safe_load(run / "checkpoint_00000030.pt") for run in (out, straight))
    for net in ("generator", "discriminator", "encoder"):
        for key, value in theirs[net]["state_dict"].items():
            assert torch.equal(ours[net]["state_dict"][key], value), f"{net}.{key}"
    assert timeless(out) == timeless(straight)


def test_a_failure_shows_its_own_traceback(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        "from spade_fast.train import step, __main__ as train\n"
        "original = step.TrainingStep.discriminator_step\n"
        "def broken(self, *arguments):\n"
        "    if os.environ['RANK'] == '1' and self.optimizers['generator'].state:\n"
        "        raise ZeroDivisionError('of rank 1')\n"
        "    return original(self, *arguments)\n"
        "step.TrainingStep.discriminator_step = broken\n"
        "sys.exit(train.start(sys.argv[1:]))\n"
    )
    start = time.monotonic()
    code, output = finish(torchrun(2, str(script), "--out", str(tmp_path / "run"), *OPTIONS), 60)
    assert time.monotonic() - start < 60
    assert code != 0
    report = output[output.index("Root Cause") :]
    assert "rank      : 1" in report
    assert "ZeroDivisionError: of rank 1" in report
