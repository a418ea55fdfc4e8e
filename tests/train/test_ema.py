# SPDX-License-Identifier: Apache-2.0
"""The moving average of the generator's weights: its formula, its statistics, and where it is used."""

import maps
import processes
import pytest
import torch

from spade_fast import LabelMap
from spade_fast.models import SPADEGenerator
from spade_fast.models.checkpoint import CheckpointError, load_generator, safe_load
from spade_fast.train import config as cfg
from spade_fast.train.ema import EMA
from spade_fast.train.trainer import Trainer

CLASSES = 5
TINY = {
    **{"dataset": "synthetic", "crop_size": 32, "ngf": 4, "ndf": 4, "batch_size": 2, "synthetic_size": 6, "steps": 4},
    **{"lambda_vgg": 0.0, "workers": 0, "num_samples": 1, "sample_every": 0, "tensorboard": False, "device": "cpu"},
}


def trainer(path, resume=False, **changes):
    return Trainer(cfg.resolve_config(cfg.merge({}, {**TINY, "out": str(path), **changes})), resume)


def generator(seed=0):
    torch.manual_seed(seed)
    return SPADEGenerator(CLASSES, ngf=2, crop_size=32).double()


def test_is_the_recurrence_with_a_warm_up():
    net = generator()
    ema = EMA(net, 0.5)
    name = "up_0.conv_0.weight_orig"
    expected = net.state_dict()[name].clone()
    for step in range(12):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        ema.update(step)
        decay = (0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17)[step] if step < 8 else 0.5
        expected = decay * expected + (1 - decay) * net.state_dict()[name]
        torch.testing.assert_close(ema.net.state_dict()[name], expected, rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in ema.net.parameters())


def recalibrated(rank=0, world=1, history=()):
    net = generator()
    ema = EMA(net, 0.9)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    ema.update(100)
    batches = [LabelMap(maps.cells(4, 32, 32, CLASSES, seed), CLASSES) for seed in range(3)]
    part = slice(4 * rank // world, 4 * (rank + 1) // world)
    for seed in history:
        ema.recalibrate([(batches[seed], None)])
    ema.recalibrate([(labels[part], None) for labels in batches])
    return ema.net.state_dict()


def test_statistics_are_the_mean_over_the_batches_of_what_batch_norm_sees():
    state = recalibrated()
    net = generator()
    net.load_state_dict(state)
    net.eval()  # with spectral norm's vectors as they are
    seen = []
    first = net.head_0.norm_0  # its input depends on no statistics
    hook = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for seed in range(3):
        labels = LabelMap(maps.cells(4, 32, 32, CLASSES, seed), CLASSES)
        seen.append(net._first_features(labels, None).detach())
    hook.remove()
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(state["head_0.norm_0.param_free_norm.running_mean"], mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state["head_0.norm_0.param_free_norm.running_var"], var, rtol=1e-9, atol=1e-12)
    assert first.param_free_norm.momentum == 0.1
    conv = net.up_0.conv_0
    sigma = torch.linalg.matrix_norm(conv.weight_orig.detach().flatten(1), 2)
    estimate = conv._estimate()[2].detach()
    assert estimate <= sigma * (1 + 1e-9)
    assert estimate > 0.9 * sigma


def test_recalibration_has_no_memory():
    fresh, used = recalibrated(), recalibrated(history=(1, 2))
    assert all(torch.equal(value, used[name]) for name, value in fresh.items())


def test_recalibration_on_two_processes_is_that_on_one():
    expected = recalibrated()
    for state in processes.run(recalibrated, 2):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_checkpoints_hold_it_and_synthesis_takes_it(tmp_path):
    t = trainer(tmp_path / "run")
    t.train()
    path = t.last_checkpoint
    state = safe_load(path)
    last, ema = load_generator(path, "last"), load_generator(path, "ema")
    assert torch.equal(last.conv_img.weight, t.generator.conv_img.weight)
    assert torch.equal(ema.conv_img.weight, t.training.ema.net.conv_img.weight)
    assert not torch.equal(last.conv_img.weight, ema.conv_img.weight)
    assert torch.equal(load_generator(path).conv_img.weight, ema.conv_img.weight)
    assert state["ema"]["state_dict"]["up_0.norm_0.param_free_norm.num_batches_tracked"] == 3  # 6 samples by 2
    torch.save({k: v for k, v in state.items() if k != "ema"}, tmp_path / "without.pt")
    assert torch.equal(load_generator(tmp_path / "without.pt").conv_img.weight, last.conv_img.weight)
    with pytest.raises(CheckpointError, match="holds no moving average"):
        load_generator(tmp_path / "without.pt", "ema")


def test_pictures_are_of_the_average(tmp_path):
    t = trainer(tmp_path / "run")
    t.recalibrate()
    before = t.sheets.synthesize()
    with torch.no_grad():
        t.generator.conv_img.bias.add_(1)
    assert torch.equal(t.sheets.synthesize(), before)
    with torch.no_grad():
        t.training.ema.net.conv_img.bias.add_(1)
    assert not torch.equal(t.sheets.synthesize(), before)


def test_without_average(tmp_path):
    t = trainer(tmp_path / "run", ema=0.0)
    t.train()
    assert "ema" not in safe_load(t.last_checkpoint)
    again = trainer(tmp_path / "run", resume=True, ema=0.99, steps=5)  # one that begins late begins from the weights
    assert torch.equal(again.training.ema.net.conv_img.weight, t.generator.conv_img.weight)
    assert again.train() == "finished"
