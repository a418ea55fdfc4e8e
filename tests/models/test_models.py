# SPDX-License-Identifier: Apache-2.0
"""Networks: names and sizes of the released checkpoints, parameter and multiply-add counts, numbers."""

import hashlib
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spade_fast import LabelMap
from spade_fast.models import (
    ConvEncoder,
    MultiscaleDiscriminator,
    SPADEGenerator,
    VGG19Features,
    VGGWeightsError,
    count_parameters,
    init_weights,
    load_vgg19,
    reparameterize,
    vgg,
)


def spectral(name: str, bias: bool) -> list[str]:
    return [f"{name}.weight_{s}" for s in ("orig", "u", "v")] + ([f"{name}.bias"] if bias else [])


def released_generator_names(most: bool = False) -> set[str]:
    """The entries of latest_net_G.pth, as the authors' networks name them."""
    names = ["fc.weight", "fc.bias", "conv_img.weight", "conv_img.bias"]
    blocks = {
        "head_0": False,
        "G_middle_0": False,
        "G_middle_1": False,
        "up_0": True,
        "up_1": True,
        "up_2": True,
        "up_3": True,
    }
    if most:
        blocks["up_4"] = True
    for block, shortcut in blocks.items():
        names += spectral(f"{block}.conv_0", True) + spectral(f"{block}.conv_1", True)
        names += spectral(f"{block}.conv_s", False) if shortcut else []
        for norm in ["norm_0", "norm_1"] + (["norm_s"] if shortcut else []):
            names += [
                f"{block}.{norm}.param_free_norm.{s}" for s in ("running_mean", "running_var", "num_batches_tracked")
            ]
            for conv in ("mlp_shared.0", "mlp_gamma", "mlp_beta"):
                names += [f"{block}.{norm}.{conv}.weight", f"{block}.{norm}.{conv}.bias"]
    return set(names)


def on_meta(net, *args, **kwargs):
    with torch.device("meta"):
        return net(*args, **kwargs)


@pytest.mark.parametrize("upsampling", ["normal", "most"])
def test_generator_names(upsampling):
    net = on_meta(SPADEGenerator, 184, num_upsampling_layers=upsampling)
    assert set(net.state_dict()) == released_generator_names(upsampling == "most")


def test_discriminator_names_and_widths():
    net = on_meta(MultiscaleDiscriminator, 184)
    names = []
    for d in ("discriminator_0", "discriminator_1"):
        names += [f"{d}.model0.0.weight", f"{d}.model0.0.bias", f"{d}.model4.0.weight", f"{d}.model4.0.bias"]
        for i in (1, 2, 3):
            names += spectral(f"{d}.model{i}.0.0", False)
    state = net.state_dict()
    assert set(state) == set(names)
    assert list(state["discriminator_1.model0.0.weight"].shape) == [64, 187, 4, 4]
    assert list(state["discriminator_0.model3.0.0.weight_orig"].shape) == [512, 256, 4, 4]
    assert list(state["discriminator_0.model4.0.weight"].shape) == [1, 512, 4, 4]


def test_encoder_names_and_widths():
    state = on_meta(ConvEncoder).state_dict()
    names = [f"fc_{s}.{t}" for s in ("mu", "var") for t in ("weight", "bias")]
    for i in range(1, 7):
        names += spectral(f"layer{i}.0", False)
    assert set(state) == set(names)
    widths = [state[f"layer{i}.0.weight_orig"].shape[0] for i in range(1, 7)]
    assert widths == [64, 128, 256, 512, 512, 512]
    assert list(state["fc_mu.weight"].shape) == [256, 512 * 4 * 4]


@pytest.mark.parametrize(
    ("options", "millions", "size"),
    [
        (dict(label_nc=184), 97.5, (256, 256)),
        (dict(label_nc=36, crop_size=512, aspect_ratio=2.0, num_upsampling_layers="more"), 93.0, (256, 512)),
    ],
)
def test_published_parameter_counts(options, millions, size):
    net = on_meta(SPADEGenerator, **options)
    assert round(count_parameters(net) / 1e6, 1) == millions
    assert net.output_size == size


def test_published_multiply_adds():
    """191.1 GMAC for the COCO-Stuff generator at 256×256: every convolution's output values × its inputs."""
    net, total = on_meta(SPADEGenerator, 184, spade="reference").eval(), 0

    def count(module, _, output):
        nonlocal total
        total += output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.empty(1, 184, 256, 256, device="meta"))
    assert round(total / 1e9, 1) == 191.1


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def spectral_conv(p, name, x, padding):
    weight, u, v = (p[f"{name}.weight_{s}"] for s in ("orig", "u", "v"))
    weight = weight / (u @ weight.flatten(1) @ v)
    return F.conv2d(x, weight, p.get(f"{name}.bias"), padding=padding)


def spade(p, name, x, segmap):
    segmap = F.interpolate(segmap, x.shape[2:])
    hidden = F.conv2d(segmap, p[f"{name}.mlp_shared.0.weight"], p[f"{name}.mlp_shared.0.bias"], padding=1).clamp(min=0)
    gamma, beta = (
        F.conv2d(hidden, p[f"{name}.mlp_{s}.weight"], p[f"{name}.mlp_{s}.bias"], padding=1) for s in ("gamma", "beta")
    )
    mean, var = (p[f"{name}.param_free_norm.running_{s}"][:, None, None] for s in ("mean", "var"))
    return (x - mean) / (var + 1e-5).sqrt() * (1 + gamma) + beta


def generator(p, segmap, z, start, doublings):
    """The whole generator in evaluation mode, written from the paper's Figure 14 over a state dict."""
    if z is None:
        x = F.conv2d(F.interpolate(segmap, start), p["fc.weight"], p["fc.bias"], padding=1)
    else:
        x = (z @ p["fc.weight"].T + p["fc.bias"]).reshape(len(z), -1, *start)
    names = ["head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3", "up_4"]
    for name in [n for n in names if f"{n}.conv_0.bias" in p]:
        if doublings[name]:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        out = spectral_conv(p, f"{name}.conv_0", leaky(spade(p, f"{name}.norm_0", x, segmap)), 1)
        out = spectral_conv(p, f"{name}.conv_1", leaky(spade(p, f"{name}.norm_1", out, segmap)), 1)
        if f"{name}.conv_s.weight_orig" in p:
            x = spectral_conv(p, f"{name}.conv_s", spade(p, f"{name}.norm_s", x, segmap), 0)
        x = x + out
    return torch.tanh(F.conv2d(leaky(x), p["conv_img.weight"], p["conv_img.bias"], padding=1))


@pytest.mark.parametrize(
    ("upsampling", "crop", "aspect", "z_dim", "start"),
    [("normal", 64, 1.0, None, (2, 2)), ("more", 64, 0.5, 7, (2, 1)), ("most", 128, 1.0, 5, (1, 1))],
)
@pytest.mark.parametrize("spade", ["fused", "reference"])
def test_generator_equals_the_formula(upsampling, crop, aspect, z_dim, start, spade):
    torch.manual_seed(0)
    options = dict(
        spade=spade, ngf=2, crop_size=crop, aspect_ratio=aspect, num_upsampling_layers=upsampling, z_dim=z_dim
    )
    net = SPADEGenerator(5, **options).double().eval()
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    height, width = net.output_size
    segmap = F.one_hot(torch.randint(5, (1, height, width)), 5).permute(0, 3, 1, 2).double()
    z = None if z_dim is None else torch.randn(1, z_dim, dtype=torch.float64)
    doublings = dict.fromkeys(["G_middle_0", "up_0", "up_1", "up_2", "up_3", "up_4"], True)
    doublings |= {"head_0": False, "G_middle_1": upsampling != "normal"}
    soft = torch.randn_like(segmap)  # dense conditioning
    for conditioning in (segmap, LabelMap.from_segmap(segmap), soft):
        dense = conditioning if isinstance(conditioning, torch.Tensor) else segmap
        with torch.no_grad():
            expected = generator(net.state_dict(), dense, z, start, doublings)
            actual = net(conditioning, z)
        assert list(expected.shape) == [1, 3, height, width]
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def instance_norm(x):
    mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, correction=0)
    return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize("conditioning", ["dense", "labels", "labels and edges"])
def test_discriminator_equals_the_formula(conditioning):
    torch.manual_seed(0)
    net = MultiscaleDiscriminator(3, ndf=4, num_d=3).double().eval()
    segmap = given = torch.randn(2, 3, 37, 44, dtype=torch.float64)
    if conditioning != "dense":
        edges = torch.randint(2, (2, 37, 44)) if "edges" in conditioning else None
        classes = 3 if edges is None else 2
        ids = torch.randint(classes, (2, 37, 44))
        given = LabelMap(ids, classes, edges)
        segmap = F.one_hot(ids, classes).permute(0, 3, 1, 2).double()
        segmap = segmap if edges is None else torch.cat([segmap, edges[:, None].double()], 1)
    fake, real = torch.randn(2, 2, 3, 37, 44, dtype=torch.float64)
    p = net.state_dict()
    expected = []
    for image in (fake, real):
        x, scales = torch.cat([segmap, image], 1), []
        for d in ("discriminator_0", "discriminator_1", "discriminator_2"):
            if d != "discriminator_0":  # mean over the part of each 3×3 window that is inside
                ones = F.avg_pool2d(torch.ones_like(x), 3, 2, 1)
                x = F.avg_pool2d(x, 3, 2, 1) / ones
            h, features = x, []
            for i, stride in enumerate((2, 2, 2, 1, 1)):
                if i in (0, 4):
                    h = F.conv2d(h, p[f"{d}.model{i}.0.weight"], p[f"{d}.model{i}.0.bias"], stride, 2)
                else:
                    weight, u, v = (p[f"{d}.model{i}.0.0.weight_{s}"] for s in ("orig", "u", "v"))
                    h = instance_norm(F.conv2d(h, weight / (u @ weight.flatten(1) @ v), None, stride, 2))
                h = leaky(h) if i < 4 else h
                features.append(h)
            scales.append(features)
        expected.append(scales)
    actual = net(given, torch.cat([fake, real]))
    assert [len(scale) for scale in actual] == [5, 5, 5]
    for s in range(3):
        for i in range(5):
            both = torch.cat([expected[0][s][i], expected[1][s][i]])
            torch.testing.assert_close(actual[s][i], both, rtol=1e-9, atol=1e-9)


def test_encoder_equals_the_formula():
    torch.manual_seed(0)
    net = ConvEncoder(ngf=2, z_dim=3).double().eval()
    image = torch.randn(2, 3, 80, 112, dtype=torch.float64)
    p = net.state_dict()
    x = F.interpolate(image, (256, 256), mode="bilinear", align_corners=False)
    for i in range(1, 7):
        weight, u, v = (p[f"layer{i}.0.weight_{s}"] for s in ("orig", "u", "v"))
        x = leaky(instance_norm(F.conv2d(x, weight / (u @ weight.flatten(1) @ v), None, 2, 1)))
    mu, logvar = (x.flatten(1) @ p[f"fc_{s}.weight"].T + p[f"fc_{s}.bias"] for s in ("mu", "var"))
    actual = net(image)
    torch.testing.assert_close(actual[0], mu, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual[1], logvar, rtol=1e-9, atol=1e-9)


def test_reparameterize_draws_from_the_posterior():
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 4.0]])
    torch.manual_seed(0)
    z = reparameterize(mu.expand(200_000, 2), logvar.expand(200_000, 2))
    # five standard errors of the mean, and of the standard deviation
    torch.testing.assert_close(z.mean(0), mu[0], rtol=0, atol=5 * 7.39 / 200_000**0.5)
    torch.testing.assert_close(z.std(0), torch.tensor([1.0, 7.389]), rtol=5 / (2 * 200_000) ** 0.5, atol=0)
    noise = torch.tensor([[0.5, -1.0]])
    torch.testing.assert_close(reparameterize(mu, logvar, noise), torch.tensor([[1.5, -2 - math.exp(2)]]))


def test_glorot_starts_every_layer_glorot_normal_with_the_gain():
    torch.manual_seed(0)
    net = SPADEGenerator(20, ngf=8, crop_size=32)
    init_weights(net, "glorot")
    conv, gamma = net.head_0.conv_0, net.head_0.norm_0.mlp_gamma
    for weight in (conv.weight_orig, gamma.weight):
        fan_out, fan_in = weight.shape[0] * 9, weight.shape[1] * 9
        assert weight.std().item() == pytest.approx(0.02 * (2 / (fan_in + fan_out)) ** 0.5, rel=0.02)
    assert not conv.bias.any() and not gamma.bias.any()
    # evaluated untrained: the largest singular value is known to a few percent, not to a random factor
    sigma = torch.linalg.matrix_norm(conv.weight_orig.flatten(1), 2)
    torch.testing.assert_close(
        conv.weight_orig / conv.eval().normalized_weight(), sigma.expand_as(conv.weight_orig), rtol=0.05, atol=0
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: SPADEGenerator(20, ngf=8, crop_size=32),
        lambda: SPADEGenerator(20, ngf=8, crop_size=32, z_dim=8, spade="reference"),
        lambda: MultiscaleDiscriminator(20, ndf=16),
        lambda: ConvEncoder(ngf=8, z_dim=32),
    ],
    ids=["generator", "generator with z", "discriminator", "encoder"],
)
def test_released_starts_spectral_layers_by_torchs_default_and_the_others_glorot_normal(build):
    torch.manual_seed(0)
    net = build()
    for p in net.parameters():
        p.data.fill_(7.0)  # nothing of what was there before stays
    vectors = {name: b.clone() for name, b in net.named_buffers() if name.endswith(("weight_u", "weight_v"))}
    init_weights(net)
    state, kinds = net.state_dict(), set()
    for name, weight in net.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
            continue
        area = weight[0, 0].numel()
        fan_in, fan_out = weight.shape[1] * area, weight.shape[0] * area
        # Of n draws: five standard errors of the mean, and of the standard deviation of a normal distribution.
        n, spectral = weight.numel(), name.endswith("weight_orig")
        std = (1 / 3 / fan_in) ** 0.5 if spectral else 0.02 * (2 / (fan_in + fan_out)) ** 0.5
        assert weight.std().item() == pytest.approx(std, rel=5 / (2 * n) ** 0.5), name
        assert abs(weight.mean().item()) < 5 * std / n**0.5, name
        largest = weight.abs().max().item() * fan_in**0.5
        assert not spectral or 1 - 20 / n < largest <= 1.000001, name  # uniform in ±1 / sqrt(fan_in)
        kinds.add(spectral)
        if spectral:
            for letter in "uv":
                vector = state[name.removesuffix("orig") + letter]
                assert vector.norm().item() == pytest.approx(1, rel=1e-5)
                assert not torch.equal(vector, vectors[name.removesuffix("orig") + letter])
            if weight.shape[0] >= 64:  # u is random, not the singular vector of the largest value: five deviations
                top = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False).U[:, 0]
                along = torch.dot(state[name.removesuffix("orig") + "u"], top).abs().item()
                assert along < 5 / weight.shape[0] ** 0.5, name
    assert kinds == {True, False}


def test_an_unknown_start_is_named():
    with pytest.raises(ValueError, match="init must be one of released, glorot, got 'xavier'"):
        init_weights(nn.Conv2d(1, 1, 1), "xavier")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(crop_size=250), "crop_size must be a multiple of 32 with num_upsampling_layers='normal', got 250"),
        (dict(num_upsampling_layers="many"), "num_upsampling_layers must be one of normal, more, most, got 'many'"),
        (dict(aspect_ratio=0), "aspect_ratio must be positive, got 0"),
    ],
)
def test_bad_generator_options(options, message):
    with pytest.raises(ValueError, match=message):
        SPADEGenerator(5, **options)


def test_bad_network_input():
    net = SPADEGenerator(5, ngf=1, crop_size=32)
    with pytest.raises(ValueError, match=r"segmap must have shape \[N, 5, h, w\] \(label_nc=5\), got \[1, 4, 32, 32\]"):
        net(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="starts from the segmentation map"):
        net(torch.zeros(1, 5, 32, 32), torch.zeros(1, 3))
    with_z = SPADEGenerator(5, ngf=1, crop_size=32, z_dim=3)
    with pytest.raises(ValueError, match=r"z must have shape \[2, 3\], got \[1, 3\]"):
        with_z(torch.zeros(2, 5, 32, 32), torch.zeros(1, 3))
    with pytest.raises(
        ValueError, match=r"image must have shape \[M·2, 3, 32, 32\] to match segmap, got \[3, 3, 32, 32\]"
    ):
        MultiscaleDiscriminator(5)(torch.zeros(2, 5, 32, 32), torch.zeros(3, 3, 32, 32))


def vgg_state() -> dict[str, torch.Tensor]:
    """A file as torchvision writes it: features.N and the classifier, which is not needed."""
    widths = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
    widths |= {16: (256, 256), 19: (256, 512)} | dict.fromkeys((21, 23, 25, 28, 30, 32, 34), (512, 512))
    state = {}
    for i, (fin, fout) in widths.items():
        state[f"features.{i}.weight"] = torch.randn(fout, fin, 3, 3) * (2 / (9 * fin)) ** 0.5
        state[f"features.{i}.bias"] = torch.randn(fout) * 0.1
    return {**state, "classifier.6.bias": torch.zeros(1000)}


def test_vgg_equals_torchvision_layer_list(tmp_path):
    torch.manual_seed(0)
    state = vgg_state()
    torch.save(state, tmp_path / "vgg19.pth")
    x = torch.randn(1, 3, 36, 32)
    actual = load_vgg19(tmp_path / "vgg19.pth")(x)
    # torchvision's `features`: index -> layer; ReLU after each convolution, pools at 4, 9, 18, 27
    expected, after_pool = [], True
    for i in range(30):
        if f"features.{i}.weight" in state:
            x = F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1).clamp(min=0)
            if after_pool:
                expected.append(x)
            after_pool = False
        elif i in (4, 9, 18, 27):
            x, after_pool = F.max_pool2d(x, 2), True
    assert [f.shape[1] for f in actual] == [64, 128, 256, 512, 512]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert not any(p.requires_grad for p in VGG19Features().parameters())


def test_vgg_weights_missing_or_wrong(tmp_path, monkeypatch):
    ways = "--vgg-weights FILE.*https://.*--lambda-vgg 0"
    with pytest.raises(VGGWeightsError, match=f"could not be read from .*absent.pth.*{ways}"):
        load_vgg19(tmp_path / "absent.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(VGGWeightsError, match=f"other.pth is not torchvision's VGG19: features.0.weight is .*{ways}"):
        load_vgg19(tmp_path / "other.pth")
    # a download whose bytes do not match the hash in the name must be refused
    torch.save(vgg_state(), tmp_path / "vgg19-dcbb9e9d.pth")
    monkeypatch.setattr(vgg, "URL", (tmp_path / "vgg19-dcbb9e9d.pth").as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(VGGWeightsError, match=f"could not be downloaded .*hash.*{'--vgg-weights FILE'}"):
        load_vgg19()
    digest = hashlib.sha256((tmp_path / "vgg19-dcbb9e9d.pth").read_bytes()).hexdigest()[:8]
    good = tmp_path / f"vgg19-{digest}.pth"
    (tmp_path / "vgg19-dcbb9e9d.pth").rename(good)
    monkeypatch.setattr(vgg, "URL", good.as_uri())
    assert len(load_vgg19()(torch.zeros(1, 3, 16, 16))) == 5


@pytest.mark.parametrize("way", ["a hook", "another class", "as built"])
def test_recomputed_blocks_update_running_statistics_once(way):
    """Of norms that run through their own forward, too."""

    class Counting(nn.BatchNorm2d):
        pass

    states = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = SPADEGenerator(3, ngf=1, crop_size=32).double()
        norm = net.up_1.norm_0.param_free_norm
        if way == "a hook":
            norm.register_forward_hook(lambda module, args, out: None)
        elif way == "another class":
            net.up_1.norm_0.param_free_norm = Counting(norm.num_features, affine=False).double()
        net.checkpoint_blocks = checkpointed
        labels = LabelMap(torch.arange(64 * 2).view(2, 8, 8).remainder(3), 3)
        labels = LabelMap.from_codes(labels.resized(32, 32), 3, False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the norm runs through its own forward
            net(labels).square().sum().backward()
        states.append((net.state_dict(), {name: p.grad for name, p in net.named_parameters()}))
    assert states[0][0]["up_1.norm_0.param_free_norm.num_batches_tracked"] == 1
    for plain, recomputed in zip(*states, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(recomputed[name], value, rtol=1e-12, atol=1e-12, msg=name)
