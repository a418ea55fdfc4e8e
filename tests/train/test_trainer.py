# SPDX-License-Identifier: Apache-2.0
"""The training loop: what each step updates, what is written, and every way to stop."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from spade_fast import models
from spade_fast.data import DataError
from spade_fast.labels.batch import batch_labels
from spade_fast.train import config as cfg
from spade_fast.train.__main__ import main
from spade_fast.train.memory import saved_bytes
from spade_fast.train.plan import describe
from spade_fast.train.run_directory import RunDirectory, RunDirectoryError, random_state, restore_random_state
from spade_fast.train.setup import build_networks
from spade_fast.train.step import TrainingStep
from spade_fast.train.trainer import NonFiniteError, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    **{"dataset": "synthetic", "crop_size": 32, "ngf": 4, "ndf": 4, "batch_size": 2, "synthetic_size": 6, "steps": 4},
    **{"lambda_vgg": 0.0, "workers": 0, "num_samples": 1, "sample_every": 0, "tensorboard": False, "log_every": 1},
}


def trainer(path, resume=False, **changes):
    return Trainer(cfg.resolve_config(cfg.merge({}, {**TINY, "out": str(path), **changes})), resume)


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def changed(net, before):
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


def batch_of(t):
    batch = default_collate([t.dataset[0], t.dataset[1]])
    return batch_labels(batch, t.dataset.num_classes, t.device), batch["image"]


def test_each_step_updates_its_own_networks_only(tmp_path):
    t = trainer(tmp_path / "run", use_vae=True, z_dim=8)
    labels, image = batch_of(t)
    before = {name: weights(net) for name, net in t.nets.items()}
    t.training.generator_step(labels, image)
    assert changed(t.discriminator, before["discriminator"]) == set()
    assert all(p.grad is None for p in t.discriminator.parameters())
    assert {"fc.weight", "conv_img.weight"} <= changed(t.generator, before["generator"])
    assert {"fc_mu.weight", "fc_var.weight", "layer1.0.weight_orig"} <= changed(t.nets["encoder"], before["encoder"])
    before = {name: weights(net) for name, net in t.nets.items()}
    t.training.discriminator_step(labels, image)
    assert changed(t.generator, before["generator"]) == changed(t.nets["encoder"], before["encoder"]) == set()
    scales = {name.split(".")[0] for name in changed(t.discriminator, before["discriminator"])}
    assert scales == {"discriminator_0", "discriminator_1"}


def test_generator_terms_are_the_losses_times_their_weights(tmp_path, monkeypatch):
    t = trainer(tmp_path / "run", lambda_feat=3.0, lambda_l1=7.0, lambda_kl=0.5)
    labels, _ = batch_of(t)
    fake = torch.full((2, 3, 32, 32), 0.25, requires_grad=True)
    real = torch.full((2, 3, 32, 32), -0.5)
    monkeypatch.setattr(
        t.training, "generate", lambda labels, image, noise: (fake, torch.tensor(6.0, requires_grad=True))
    )
    # one scale, one feature and the prediction: feature 1.5 apart, prediction for the fake 0.75
    features = [[torch.tensor([[2.0], [2.0], [0.5], [0.5]]), torch.tensor([0.5, 1.0, 9.0, 9.0])]]
    monkeypatch.setattr(t.training, "discriminator", Stub(features))
    terms = {name: value.item() for name, value in t.training.generator_step(labels, real).items()}
    assert terms == {"gan": -0.75, "feat": 3 * 1.5, "kl": 0.5 * 6, "l1": 7 * 0.75}
    # hinge: mean(relu(1 + fake)) = (1.5 + 2) / 2; real 9 is beyond the margin
    t.training.optimizers["discriminator"] = torch.optim.SGD([fake], lr=0)
    features[0][1].requires_grad_(True)
    terms = {name: value.item() for name, value in t.training.discriminator_step(labels, real).items()}
    assert terms == {"d_fake": 1.75, "d_real": 0.0}


class Stub(torch.nn.Module):
    """Stands in for the discriminator; the batch it gets must be fake then real."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, segmap, image):
        assert image[:2].eq(0.25).all()
        assert image[2:].eq(-0.5).all()
        return [[f + 0 * image.sum() for f in scale] for scale in self.features]


def test_the_discriminator_sees_images_of_the_updated_generator(tmp_path):
    t = trainer(tmp_path / "run", norm="none")
    labels, image = batch_of(t)
    seen = []
    t.discriminator.register_forward_pre_hook(lambda net, args: seen.append(args[1].detach().clone()))
    t.training.generator_step(labels, image)
    t.training.discriminator_step(labels, image)
    assert not torch.equal(seen[0][:2], seen[1][:2])
    t.generator.eval()  # spectral norm's vectors stay where the last step left them
    assert torch.allclose(t.generator(labels), seen[1][:2], atol=1e-6)
    for halves in seen:
        assert torch.equal(halves[2:], image)


def test_learning_rates_follow_the_schedule_by_epoch(tmp_path):
    t = trainer(tmp_path / "run", steps=None, epochs=3, decay_from=1, lr=1e-3)  # 3 steps an epoch
    t.train()
    lines = [json.loads(line) for line in (tmp_path / "run/stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    factors = [1, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5]
    assert [line["lr_generator"] for line in lines] == pytest.approx([5e-4 * f for f in factors])
    assert [line["lr_discriminator"] for line in lines] == pytest.approx([2e-3 * f for f in factors])
    assert {"gan", "feat", "l1", "d_fake", "d_real", "images_per_second", "seconds"} <= set(lines[0])


def test_training_learns_colors(tmp_path):
    t = trainer(tmp_path / "run", steps=40, lambda_l1=50.0, lr=4e-3, synthetic_size=8, save_every=100)
    assert t.train() == "finished"
    # As training sees it: after 40 steps the running statistics of batch norm still lag behind the weights.
    l1 = [json.loads(line)["l1"] for line in (tmp_path / "run/stats.jsonl").read_text().splitlines()]
    assert sum(l1[-10:]) / 10 < 0.8 * sum(l1[:2]) / 2  # 0.46 to 0.59 over eight seeds


def test_drawing_samples_leaves_training_as_it_was(tmp_path):
    plain = trainer(tmp_path / "a", z_dim=4)
    plain.train()
    drawn = trainer(tmp_path / "b", z_dim=4, sample_every=1)
    drawn.train()
    for name, value in plain.generator.state_dict().items():
        assert torch.equal(value, drawn.generator.state_dict()[name]), name
    assert len(list((tmp_path / "b/samples").glob("*.png"))) == 4
    sheet = np.asarray(Image.open(tmp_path / "b/samples/step_00000004.png"))
    real = ((drawn.sheets.fixed.samples[0]["image"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    real = real.repeat(5, axis=0).repeat(5, axis=1)  # small cells are shown enlarged
    places = np.argwhere((sheet == real[0, 0]).all(-1))
    cells = [sheet[y : y + 160, x : x + 160] for y, x in places]
    here = [np.array_equal(cell, real) for cell in cells]
    assert sum(here) == 1  # the true image is on the sheet, once


def test_workers_do_not_change_the_result(tmp_path):
    here, there = trainer(tmp_path / "a"), trainer(tmp_path / "b", workers=2)
    here.train()
    there.train()
    assert torch.equal(here.generator.conv_img.weight, there.generator.conv_img.weight)


def test_the_newest_checkpoints_are_kept(tmp_path):
    t = trainer(tmp_path / "run", save_every=1, keep=2)
    t.train()
    assert [p.name for p in RunDirectory(tmp_path / "run").checkpoints()] == [
        "checkpoint_00000003.pt",
        "checkpoint_00000004.pt",
    ]


@pytest.mark.parametrize("term", ["gan", "d_real"])
def test_a_non_finite_loss_stops_with_step_term_and_checkpoint(tmp_path, term, capsys, monkeypatch):
    method = "generator_step" if term == "gan" else "discriminator_step"
    original, calls = getattr(TrainingStep, method), []

    def broken(self, *args):
        terms = original(self, *args)
        calls.append(1)
        return {**terms, term: torch.tensor(float("nan"))} if len(calls) == 3 else terms

    monkeypatch.setattr(TrainingStep, method, broken)
    argv = [a for name, v in TINY.items() if not isinstance(v, bool) for a in (cfg.flag(name), str(v))]
    code = main([*argv, "--no-tensorboard", "--out", str(tmp_path / "run"), "--save-every", "2"])
    error = capsys.readouterr().err
    assert code == 2
    assert f"step 3: the loss term '{term}' is nan" in error
    assert f"Last good checkpoint: {tmp_path / 'run' / 'checkpoint_00000002.pt'}" in error
    assert len(RunDirectory(tmp_path / "run").checkpoints()) == 1


def test_broken_weights_are_not_saved(tmp_path):
    t = trainer(tmp_path / "run")
    t.directory.create()
    t.save()
    with torch.no_grad():
        t.generator.conv_img.weight[0, 0, 0, 0] = float("inf")
    t.step = 1
    with pytest.raises(NonFiniteError, match=r"step 1: the generator's conv_img.weight is not finite.*00000000\.pt"):
        t.save()
    assert len(t.directory.checkpoints()) == 1


def make_folder(root, count=6):
    rng = np.random.default_rng(0)
    for kind in ("img", "label"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(root / f"img/{i}.png")
        Image.fromarray(rng.integers(0, 3, (40, 40)).astype(np.uint8)).save(root / f"label/{i}.png")
    return {
        **{"dataset": "folder", "image_dir": str(root / "img"), "label_dir": str(root / "label"), "num_classes": 3},
        **{"synthetic_size": None, "batch_size": 2, "num_samples": 1, "steps": 8},
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_saves_names_the_file_and_resumes_once_repaired(tmp_path, workers):
    options = make_folder(tmp_path / "data")
    good = (tmp_path / "data/label/3.png").read_bytes()
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    Image.fromarray(np.full((40, 40), 7, dtype=np.uint8)).save(tmp_path / "data/label/3.png")
    t = trainer(tmp_path / "run", workers=workers, **options)
    with pytest.raises(DataError, match=r"label/3\.png: label value 7 .*3 classes") as error:
        t.train()
    assert "Traceback" not in str(error.value)
    assert t.last_checkpoint.name == f"checkpoint_{t.step:08d}.pt"
    (tmp_path / "data/label/3.png").write_bytes(good)
    again = trainer(tmp_path / "run", resume=True, workers=workers, **options)
    assert again.step == t.step
    again.train()
    for name, value in whole.generator.state_dict().items():
        assert torch.equal(value, again.generator.state_dict()[name]), name


def test_a_used_directory_needs_resume(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/x").write_text("")
    with pytest.raises(RunDirectoryError, match="exists and is not empty: --resume"):
        trainer(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"--resume: .* has no run in it"):
        trainer(tmp_path / "run", resume=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["x"]


def test_vgg_weights_are_asked_for_before_anything_is_written(tmp_path, capsys):
    absent = str(tmp_path / "vgg19.pth")
    code = main(["--out", str(tmp_path / "run"), "--lambda-vgg", "10", "--vgg-weights", absent])
    error = capsys.readouterr().err
    assert code == 1
    assert absent in error
    assert "--vgg-weights" in error
    assert "--lambda-vgg 0" in error
    assert not (tmp_path / "run").exists()


def test_options_that_do_not_fit_the_data_are_named(tmp_path):
    with pytest.raises(cfg.ConfigError, match="--batch-size 7 is more than the 6 samples"):
        trainer(tmp_path / "run", batch_size=7)
    with pytest.raises(cfg.ConfigError, match=r"\(64, 64\), but --preprocess .* gives \(61, 64\)"):
        trainer(tmp_path / "run", crop_size=64, aspect_ratio=1.05)
    for changes in ({"batch_size": 1}, {"norm": "instance"}):
        with pytest.raises(cfg.ConfigError, match=r"--norm .* has one value a channel"):
            trainer(tmp_path / "run", **changes)
    with pytest.raises(cfg.ConfigError, match="--device cuda:77 can't be used"):
        trainer(tmp_path / "run", device="cuda:77")


def test_time_limit_saves_and_can_be_resumed(tmp_path):
    t = trainer(tmp_path / "run", max_minutes=1e-9)
    assert t.train() == "time"
    assert (t.step, t.last_checkpoint.name) == (1, "checkpoint_00000001.pt")
    assert trainer(tmp_path / "run", resume=True).train() == "finished"


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["--preset", "synthetic", "--epochs", "4", "--decay-from", "1", "--synthetic-size", "20", "--out", str(out)]
    argv += ["--d-steps-per-g", "3"]
    assert main([*argv, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not out.exists()
    assert "20 training samples" in text
    assert "8: 2 steps an epoch" in text  # 20 // 8
    assert "8 steps, 64 images" in text
    assert "generator 3, discriminator 8\n" in text  # in steps 0, 3 and 6
    for epoch, lr in ((0, 1e-4), (1, 1e-4), (2, 1e-4 * 2 / 3), (3, 1e-4 / 3)):
        assert f"epoch {epoch}: generator {lr:.3g}, discriminator {4 * lr:.3g}" in text


def test_memory_of_the_plan_is_what_autograd_really_keeps(tmp_path):
    c = cfg.resolve_config(cfg.merge({}, {**TINY, "spade": "reference"}))
    real = build_networks(c, 13)
    with torch.device("meta"):
        predicted = saved_bytes(c, build_networks(c, 13), None, 13)
    weights = {p.data_ptr() for net in real.values() for p in net.parameters()}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        segmap = torch.zeros(2, 13, 32, 32)
        fake = real["generator"](segmap)
        out = real["discriminator"](segmap, torch.cat([fake, fake.detach()]))
        loss = -torch.stack([scale[-1].mean() for scale in out]).mean()
    measured = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights) / 2
    assert loss.requires_grad
    assert predicted == pytest.approx(measured, rel=0.05)
    assert f"{models.count_parameters(real['generator']) / 1e6:.1f} M parameters" in describe(c)


def test_random_state_of_every_generator_comes_back(tmp_path):
    import random

    torch.save(random_state(), tmp_path / "state.pt")
    first = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)) == first


def test_no_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path / "run", steps=1).train()
