# SPDX-License-Identifier: Apache-2.0
"""Options of the training step which must not change what is computed, or only in a way that is told."""

import copy
from collections import Counter
from weakref import WeakSet

import processes
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from spade_fast import LabelMap
from spade_fast.data import make_dataset
from spade_fast.labels.batch import batch_labels
from spade_fast.models import VGG19Features, init_weights
from spade_fast.train import batches
from spade_fast.train import config as cfg
from spade_fast.train.losses import VGGLoss
from spade_fast.train.ranks import Ranks
from spade_fast.train.setup import build_networks
from spade_fast.train.step import TrainingStep
from spade_fast.train.trainer import NON_FINITE_LIMIT, NonFiniteError, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    **{"dataset": "synthetic", "crop_size": 32, "ngf": 4, "ndf": 4, "batch_size": 5, "synthetic_size": 10, "steps": 3},
    **{"lambda_vgg": 0.0, "lambda_l1": 1.0, "workers": 0, "num_samples": 1, "sample_every": 0, "tensorboard": False},
    **{"log_every": 1, "use_vae": True, "z_dim": 4, "device": "cpu"},
}


def resolved(**changes):
    return cfg.resolve_config(cfg.merge({}, {**TINY, **changes}))


def system(dtype=torch.float64, **changes):
    """(TrainingStep, labels and images of this process)."""
    config = resolved(**changes)
    dataset = make_dataset("synthetic", "train", crop_size=32, size=5)
    torch.manual_seed(0)
    nets = build_networks(config, dataset.label_nc)
    for net in nets.values():
        init_weights(net, "glorot", gain=1.0)
        net.to(dtype).train()
    step = TrainingStep(nets, config, None, Ranks("cpu"))
    for optimizer in step.optimizers.values():
        # A bias before a norm has no gradient but rounding, which Adam would blow up to the learning rate.
        optimizer.param_groups[0]["eps"] = 1e-6
    first, last = step.ranks.share(5)
    batch = default_collate([{k: v for k, v in dataset[i].items() if k != "path"} for i in range(5)])
    labels = batch_labels(batch, dataset.num_classes, torch.device("cpu"))[first:last]
    return step, labels, batch["image"].to(dtype)[first:last]


def three_steps(rank=0, world=1, changes=None) -> dict:
    step, labels, image = system(**(changes or {}))
    losses = []
    for i in range(3):
        terms = step(labels, image, i)
        losses.append(dict(zip(terms, step.ranks.sum(torch.stack(list(terms.values()))).tolist(), strict=True)))
    return {"losses": losses, "nets": {name: net.state_dict() for name, net in step.nets.items()}}


def assert_same(actual, expected, rounding=1e-9):
    for mine, theirs in zip(actual["losses"], expected["losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=rounding)
    for name, state in expected["nets"].items():
        for key, value in state.items():
            bound = rounding * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(actual["nets"][name][key], value, rtol=0, atol=bound, msg=f"{name}.{key}")


# Updates of the discriminator for one of the generator


def test_the_generator_is_updated_in_one_of_n_iterations():
    """Iteration 0 is whole; in 1 and 2 the discriminator alone learns, on new images of the same generator, and the
    average waits; 3 is whole again."""
    step, labels, image = system(d_steps_per_g=3)
    reference, _, _ = system()
    for i in range(4):
        before = copy.deepcopy({name: net.state_dict() for name, net in step.nets.items()})
        average = copy.deepcopy(step.ema.net.state_dict())
        terms = step(labels, image, i)
        reference.draw_noise(i)
        expected = reference.generator_step(labels, image) if i in (0, 3) else {}
        expected |= reference.discriminator_step(labels, image)
        assert {k: v.item() for k, v in terms.items()} == pytest.approx({k: v.item() for k, v in expected.items()})
        assert ("gan" in terms) == (i in (0, 3)) and "d_fake" in terms
        moved = {
            name: any(not torch.equal(p, before[name][key]) for key, p in net.named_parameters())
            for name, net in step.nets.items()
        }
        assert moved == {"generator": i in (0, 3), "encoder": i in (0, 3), "discriminator": True}
        same = all(torch.equal(v, average[k]) for k, v in step.ema.net.state_dict().items())
        assert same == (i in (1, 2))
        for name, net in step.nets.items():
            for key, value in reference.nets[name].state_dict().items():
                torch.testing.assert_close(net.state_dict()[key], value, rtol=1e-9, atol=1e-9, msg=f"{name}.{key}")


def test_iterations_without_a_generator_step_have_no_images_to_share():
    with pytest.raises(cfg.ConfigError, match=r"--share-fake does not go with --d-steps-per-g 2: .*leave one out"):
        resolved(share_fake=True, d_steps_per_g=2)
    with pytest.raises(cfg.ConfigError, match=r"--d-steps-per-g must be at least 1, got 0"):
        resolved(d_steps_per_g=0)


# Micro-batches


def test_micro_batches_add_up_to_the_batch():
    """With a norm that sees one sample at a time; uneven parts, too, and 2 processes with 2 micro-batches each."""
    whole = three_steps(changes={"norm": "none"})
    assert_same(three_steps(changes={"norm": "none", "accumulate": 2}), whole)
    for result in processes.run(three_steps, 2, {"norm": "none", "accumulate": 2}):
        assert_same(result, whole)


def test_batch_norm_sees_one_micro_batch_at_a_time():
    losses = [three_steps(changes={"accumulate": k})["losses"][0]["feat"] for k in (1, 2)]
    assert abs(losses[0] / losses[1] - 1) > 1e-6


# Recomputed blocks


def test_recomputed_blocks_change_nothing():
    assert_same(three_steps(changes={"checkpoint_blocks": True}), three_steps(), 1e-12)


def test_recomputed_blocks_change_nothing_on_two_processes():
    plain, again = (processes.run(three_steps, 2, {"checkpoint_blocks": on}) for on in (False, True))
    assert_same(again[0], plain[0], 1e-12)


def test_recomputed_blocks_are_not_kept():
    kept = []
    for on in (False, True):
        step, labels, _ = system(checkpoint_blocks=on)
        storages, calls = {}, []
        step.generator.up_3.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))

        def pack(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = step.generator(labels, torch.zeros(len(labels), 4, dtype=torch.float64))
        out.sum().backward()
        kept.append(sum(storages.values()))
        assert len(calls) == 1 + on
    assert kept[1] < kept[0] / 4, kept


@pytest.mark.parametrize("other", [{"compile": True}, {"spade": "reference"}])
def test_recomputed_blocks_have_their_limits(other):
    with pytest.raises(cfg.ConfigError, match="--checkpoint-blocks does not go with"):
        resolved(checkpoint_blocks=True, **other)


# One fake for both


def test_share_fake_gives_the_discriminator_the_generators_images():
    for share in (False, True):
        step, labels, image = system(share_fake=share)
        seen, calls = [], []
        step.discriminator.register_forward_pre_hook(lambda net, args, seen=seen: seen.append(args[1].detach().clone()))
        step.generator.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        step(labels, image, 0)
        assert torch.equal(seen[0], seen[1]) == share
        assert len(calls) == 2 - share
    plain, shared = (three_steps(changes={"share_fake": s})["losses"][0] for s in (False, True))
    assert plain["gan"] == shared["gan"]
    assert plain["d_fake"] != shared["d_fake"]


# torch.compile


def test_compiled_networks_make_the_same_steps(monkeypatch):
    """Two graphs each: of the generator with and without gradients, of the discriminator with and without its own."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    original, counter = nn.Module.compile, CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend=counter, **options))
    results = []
    for compiled in (True, False):
        step, labels, image = system(compile=compiled)
        labels.build(batches.pattern_sizes(step.generator), backward=True)
        losses = [{k: v.item() for k, v in step(labels, image, i).items()} for i in range(2)]
        results.append({"losses": losses, "nets": {name: net.state_dict() for name, net in step.nets.items()}})
    assert_same(*results)
    assert counter.frame_count == 4
    torch._dynamo.reset()


# Fused Adam


def test_fused_adam_is_adam_to_rounding():
    step, labels, image = system(torch.float32)
    assert all(o.param_groups[0]["fused"] for o in step.optimizers.values())
    net = copy.deepcopy(step.discriminator)
    plain = torch.optim.Adam(net.parameters(), lr=step.base_lrs[1], betas=(0.0, 0.9), eps=1e-6)
    for i in range(3):
        step(labels, image, i)
        for p, q in zip(net.parameters(), step.discriminator.parameters(), strict=True):
            p.grad = q.grad.clone()
        plain.step()
    for p, q in zip(net.parameters(), step.discriminator.parameters(), strict=True):
        # three updates of at most lr, each with a handful of roundings, and the rounding of the weight itself
        torch.testing.assert_close(q, p, rtol=4 * 2**-24, atol=3 * 8 * 2**-24 * step.base_lrs[1])


# Mixed precision


def test_auto_is_float32_on_a_cpu():
    assert system()[0].amp is None


@pytest.mark.parametrize(("amp", "eps"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_mixed_precision_is_near_float32(amp, eps):
    """The losses of the first update: about 30 layers in a row, each rounding what it gets by eps/2."""
    expected = system(torch.float32)
    mixed = system(torch.float32, amp=amp)
    for s in (mixed, expected):
        s[0].draw_noise(0)
    terms, wanted = (s[0].generator_step(*s[1:]) for s in (mixed, expected))
    assert mixed[0].scalers["generator"].is_enabled() == (amp == "fp16")
    for name, value in wanted.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=30 * eps, abs=30 * eps), name
        assert terms[name].dtype == torch.float32
    for p in mixed[0].generator.parameters():
        assert p.dtype == p.grad.dtype == torch.float32


def test_an_overflow_skips_the_update_and_lowers_the_scale():
    step, labels, image = system(torch.float32, amp="fp16")
    step.scalers["generator"] = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = {name: p.detach().clone() for name, p in step.generator.named_parameters()}
    discriminator = step.discriminator.discriminator_0.model0[0].weight.detach().clone()
    step(labels, image, 0)
    assert step.scalers["generator"].get_scale() == 2.0**59
    assert all(torch.equal(p, before[name]) for name, p in step.generator.named_parameters())
    assert not torch.equal(step.discriminator.discriminator_0.model0[0].weight, discriminator)  # has its own scale
    for i in range(1, 60):
        step(labels, image, i)
        if not torch.equal(step.generator.conv_img.bias, before["conv_img.bias"]):
            break
    assert 0 < step.scalers["generator"].get_scale() < 2.0**40
    state = step.state()["scalers"]["generator"]
    other = system(torch.float32, amp="fp16")[0]
    other.load_state(step.state())
    assert other.scalers["generator"].get_scale() == state["scale"]


def not_finite(monkeypatch, first, count):
    """From the call `first` on, `count` calls of the generator's step say that a loss is nan."""
    original, calls = TrainingStep.generator_step, []

    def broken(self, *arguments):
        terms = original(self, *arguments)
        calls.append(1)
        return {**terms, "gan": terms["gan"] * float("nan")} if first <= len(calls) < first + count else terms

    monkeypatch.setattr(TrainingStep, "generator_step", broken)


def test_a_run_of_lost_steps_ends_training_with_a_report(tmp_path, monkeypatch):
    options = {"amp": "fp16", "steps": 30, "use_vae": False, "z_dim": None, "batch_size": 2}
    not_finite(monkeypatch, 3, 1000)
    t = Trainer(resolved(out=str(tmp_path / "run"), **options))
    with pytest.raises(
        NonFiniteError, match=rf"step {3 + NON_FINITE_LIMIT}: .*'gan' is nan, as in the 20 steps before"
    ):
        t.train()


def test_a_few_lost_steps_do_not(tmp_path, monkeypatch):
    options = {"steps": 6, "use_vae": False, "z_dim": None, "batch_size": 2}
    not_finite(monkeypatch, 3, 2)
    assert Trainer(resolved(out=str(tmp_path / "run"), amp="fp16", **options)).train() == "finished"


# Batches


def test_loading_processes_find_the_patterns_of_every_resolution():
    config = resolved(workers=1, crop_size=64, batch_size=2)
    dataset = make_dataset("synthetic", "train", crop_size=64, size=4)
    generator = build_networks(config, dataset.label_nc)["generator"]
    source = batches.device_batches(dataset, config, generator, Ranks("cpu"), 0, 0)
    labels, image = next(source)
    source.close()
    assert isinstance(labels, LabelMap)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert set(labels._patterns) == {(s, s, 3) for s in (2, 4, 8, 16, 32, 64)}
    assert all(p.order is not None and p.tap_order is not None for p in labels._patterns.values())
    known = {key: p.ids.data_ptr() for key, p in labels._patterns.items()}
    generator(labels).sum().backward()
    assert known == {key: p.ids.data_ptr() for key, p in labels._patterns.items()}  # none was found by the step


# Memory


def test_one_judge_at_a_time():
    """Before the next network judges the image, what the last one kept for backward is gone."""
    step, labels, image = system()
    vgg = VGG19Features().double()
    step.vgg_loss = VGGLoss(vgg)
    phase, live, made, seen = "generator", WeakSet(), Counter(), {}

    class Kept:
        def __init__(self, tensor):
            self.tensor, self.phase = tensor, phase
            live.add(self)
            made[phase] += 1

    def enter(name):
        def hook(*_):
            nonlocal phase
            phase, seen[name] = name, Counter(kept.phase for kept in live)

        return hook

    vgg.register_forward_pre_hook(enter("VGG"))
    step.discriminator.register_forward_pre_hook(enter("discriminator"))
    step.generator.conv_img.weight.register_hook(enter("backward"))
    step.draw_noise(0)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step.generator_step(labels, image)
    assert all(made[name] > 10 for name in ("generator", "VGG", "discriminator"))
    assert set(seen["VGG"]) == set(seen["discriminator"]) == {"generator"}
    assert set(seen["backward"]) <= {"generator"}
