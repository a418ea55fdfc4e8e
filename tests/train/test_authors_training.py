# SPDX-License-Identifier: Apache-2.0
"""Preprocessing, losses and whole training steps against the numbers of the authors' code."""

import authors
import pytest
import torch

from spade_fast import LabelMap
from spade_fast.data import coco
from spade_fast.models import VGG19Features
from spade_fast.train import config as cfg
from spade_fast.train import losses
from spade_fast.train.ranks import Ranks
from spade_fast.train.setup import build_networks
from spade_fast.train.step import TrainingStep

EXACT = authors.TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", authors.names("spade_edges*"))
def test_edges(name):
    fixture = authors.load(name)
    edges, wanted = authors.edges(fixture["inputs"]["instance"])[:, None], fixture["outputs"]
    authors.check(edges, wanted["edges"], EXACT)
    assert edges.sum(3).flatten().tolist() == wanted["row_sums"]
    assert edges.sum(2).flatten().tolist() == wanted["column_sums"]


@pytest.mark.parametrize("name", authors.names("spade_preprocess*"))
def test_preprocessing(name):
    fixture = authors.load(name)
    options, wanted = fixture["options"], fixture["outputs"]
    unknown = options["label_nc"]
    table = {**{value: value for value in range(unknown)}, 255: unknown}
    if unknown == coco.UNKNOWN:
        assert coco.stored_values() == table
    stored = fixture["inputs"]["label"].clamp(max=unknown)
    stored[stored == unknown] = 255
    classes = torch.tensor([table.get(value, -1) for value in range(256)])[stored]
    segmap = authors.label_map({**fixture, "inputs": {**fixture["inputs"], "label": classes}}).one_hot(torch.float64)
    authors.check(segmap, wanted["semantics"], EXACT)
    assert segmap.sum((0, 2, 3)).tolist() == wanted["channel_sums"]


def predictions(inputs: dict, prefix: str = "") -> list[list[torch.Tensor]]:
    """dI_fJ by scale and layer; each wants a gradient."""
    scales: dict[str, list[torch.Tensor]] = {}
    for key in sorted(k for k in inputs if k.startswith(f"{prefix}d")):
        scale = key.removeprefix(prefix).split("_")[0]
        scales.setdefault(scale, []).append(inputs[key].clone().requires_grad_())
    return list(scales.values())


@pytest.mark.parametrize("name", authors.names("spade_gan_loss*"))
def test_gan_loss(name):
    fixture = authors.load(name)
    for mode in fixture["options"]["modes"]:
        loss = losses.GANLoss(authors.GAN_MODES.get(mode, mode))
        kinds = {
            "d_real": lambda p, loss=loss: loss.discriminator(p, True),
            "d_fake": lambda p, loss=loss: loss.discriminator(p, False),
            "g": loss.generator,
        }
        for kind, value_of in kinds.items():
            wanted, scales = fixture["outputs"][f"{mode}_{kind}"], predictions(fixture["inputs"])
            value = value_of(scales)
            value.backward()
            assert value.item() == pytest.approx(wanted["multi"], rel=EXACT), (mode, kind)
            authors.check(scales[0][-1].grad, wanted["grad"], EXACT, f"{mode} {kind}")
            assert value_of([scales[0][-1]]).item() == pytest.approx(wanted["single"], rel=EXACT), (mode, kind)


@pytest.mark.parametrize("name", authors.names("spade_feature_matching*"))
def test_feature_matching(name):
    fixture = authors.load(name)
    fake, real = predictions(fixture["inputs"], "fake_"), predictions(fixture["inputs"], "real_")
    loss = fixture["options"]["lambda_feat"] * losses.feature_matching_loss(fake, real)
    loss.backward()
    assert loss.item() == pytest.approx(fixture["outputs"]["loss"], rel=EXACT)
    for key in (key for key in fixture["outputs"] if key.startswith("grad_fake_")):
        scale, layer = (int(part[1:]) for part in key.removeprefix("grad_fake_").split("_"))
        authors.check(fake[scale][layer].grad, fixture["outputs"][key], EXACT, key)
    assert all(f.grad is None for scale in real for f in scale)


@pytest.mark.parametrize("name", authors.names("spade_kld_loss*"))
def test_kl(name):
    fixture = authors.load(name)
    mu, logvar = (fixture["inputs"][key].clone().requires_grad_() for key in ("mu", "logvar"))
    loss = losses.kl_loss(mu, logvar)
    loss.backward()
    assert loss.item() == pytest.approx(fixture["outputs"]["loss"], rel=EXACT)
    authors.check(mu.grad, fixture["outputs"]["grad_mu"], EXACT)
    authors.check(logvar.grad, fixture["outputs"]["grad_logvar"], EXACT)


def vgg19(name: str, network: str | None = None) -> VGG19Features:
    """VGG19 with a fixture's weights: sliceN.I in the authors' code is features.I in torchvision."""
    net = VGG19Features().double()
    state = authors.weights(name, network)
    net.load_state_dict({f"features.{key.partition('.')[2]}": value for key, value in state.items()})
    return net


@pytest.mark.parametrize("name", authors.names("spade_vgg_loss*"))
def test_vgg_loss(name):
    fixture = authors.load(name)
    net, wanted = vgg19(name), fixture["outputs"]
    assert list(losses.VGG_LAYER_WEIGHTS) == fixture["options"]["weights"]
    x, y = fixture["inputs"]["x"].clone().requires_grad_(), fixture["inputs"]["y"]
    with torch.no_grad():
        for feature, (key, want) in zip(net(x), wanted["eval"].items(), strict=True):
            authors.check(feature, want, EXACT, key)
    loss = losses.VGGLoss(net)(x, y)
    loss.backward()
    assert loss.item() == pytest.approx(wanted["loss"], rel=EXACT)
    authors.check(x.grad, wanted["grad_x"], EXACT)
    assert x.grad.norm().item() == pytest.approx(wanted["grad_x_norm"], rel=EXACT)


def config(options: dict, batch_size: int) -> cfg.TrainConfig:
    """The authors' options of a training step in ours."""
    norm_g = authors.norm_g_options(options["norm_G"])
    given = dict(
        crop_size=options["crop_size"],
        aspect_ratio=options["aspect_ratio"],
        num_upsampling_layers=options["num_upsampling_layers"],
        ngf=options["ngf"],
        ndf=options["ndf"],
        use_vae=options["use_vae"],
        z_dim=options["z_dim"] if options["use_vae"] else None,
        **norm_g,
        norm_d=options["norm_D"],
        norm_e=options["norm_E"],
        num_d=options["num_D"],
        n_layers_d=options["n_layers_D"],
        gan_mode=authors.GAN_MODES.get(options["gan_mode"], options["gan_mode"]),
        lambda_feat=0.0 if options["no_ganFeat_loss"] else options["lambda_feat"],
        lambda_vgg=0.0 if options["no_vgg_loss"] else options["lambda_vgg"],
        lambda_kl=options["lambda_kld"],
        lambda_l1=0.0,
        ttur=not options["no_TTUR"],
        lr=options["lr"],
        batch_size=batch_size,
        amp="fp32",
        ema=0.0,
        device="cpu",
    )
    if options["no_TTUR"]:
        given.update(beta1=options["beta1"], beta2=options["beta2"])
    return cfg.resolve_config(cfg.merge({}, given))


TERMS = {"KLD": "kl", "GAN": "gan", "GAN_Feat": "feat", "VGG": "vgg", "D_Fake": "d_fake", "D_real": "d_real"}
PARTS = {"G": "generator", "D": "discriminator", "E": "encoder"}


def check_gradients(net: torch.nn.Module, wanted: dict[str, list[float]]) -> None:
    floor = 1e-3 * max(norm for norm, _ in wanted.values())  # some are zero but for rounding: biases before a norm
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert gradients.keys() == wanted.keys()
    authors.check_sums(gradients, {name: [total, norm] for name, (norm, total) in wanted.items()}, EXACT, floor)


@pytest.mark.parametrize("name", authors.names("spade_train_step*"))
@pytest.mark.parametrize("spade", ["fused", "reference"])
def test_training_step(name, spade):
    """The generator's update and then the discriminator's, in float64: losses, images, gradients, and every weight and
    buffer after."""
    fixture = authors.load(name)
    options, inputs, wanted = fixture["options"], fixture["inputs"], fixture["outputs"]
    if spade == "reference" and inputs["label"].numel() > 128 * 128:
        pytest.skip("the plain generator takes half a minute at this size")
    c = config({**options}, len(inputs["image"]))
    c.spade = spade
    nets = build_networks(c, authors.label_nc(options))
    letters = {letter: nets[part] for letter, part in PARTS.items() if part in nets}
    for letter, net in letters.items():
        authors.prepared(net, name, torch.float64, letter).train()
    step = TrainingStep(nets, c, vgg19(name, "VGG") if c.lambda_vgg else None, Ranks("cpu"))
    if options["use_vae"]:
        step._noise = torch.stack([inputs["eps_g"], inputs["eps_d"]])
    made, generate = [], step.generate

    def note(*arguments):
        made.append(generate(*arguments))
        return made[-1]

    step.generate = note
    labels: LabelMap = authors.label_map(fixture)

    terms = step.generator_step(labels, inputs["image"])
    assert {TERMS[key] for key in wanted["g_losses"]} == terms.keys()
    for key, value in wanted["g_losses"].items():
        assert terms[TERMS[key]].item() == pytest.approx(value, rel=EXACT), key
    authors.check(made[0][0], wanted["generated"], EXACT)
    check_gradients(nets["generator"], wanted["g_gradients"])
    if "encoder" in nets:
        check_gradients(nets["encoder"], wanted["e_gradients"])

    terms = step.discriminator_step(labels, inputs["image"])
    for key, value in wanted["d_losses"].items():
        assert terms[TERMS[key]].item() == pytest.approx(value, rel=EXACT), key
    check_gradients(nets["discriminator"], wanted["d_gradients"])
    for letter, net in letters.items():
        authors.check_sums(net.state_dict(), wanted["state_after"][letter], EXACT)
