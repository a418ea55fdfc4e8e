# SPDX-License-Identifier: Apache-2.0
"""Norms by the authors' names: what they build, how they start, and a discriminator fed one tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spade_fast.models import ConvEncoder, MultiscaleDiscriminator, init_weights, norm_g_options

NAMES = {
    **{"spectralinstance": (True, "instance"), "spectralbatch": (True, "batch"), "spectralsyncbatch": (True, "batch")},
    **{"spectralsync_batch": (True, "batch"), "spectralnone": (True, "none"), "spectral": (True, "none")},
    **{"instance": (False, "instance"), "batch": (False, "batch"), "syncbatch": (False, "batch")},
    **{"none": (False, "none")},
}


@pytest.mark.parametrize("name", NAMES)
def test_discriminator_norms_by_the_formula(name):
    """Names in the state dict, and the second layer's output from its parameters, in evaluation and in training."""
    is_spectral, kind = NAMES[name]
    torch.manual_seed(0)
    net = MultiscaleDiscriminator(3, ndf=4, n_layers=3, num_d=1, norm=name).double()
    conv = "discriminator_0.model1.0" + ("" if kind == "none" else ".0")
    state = net.state_dict()
    assert (f"{conv}.weight_orig" in state) == is_spectral != (f"{conv}.weight" in state)
    assert (f"{conv}.bias" in state) == (kind == "none")
    assert ("discriminator_0.model1.0.1.running_mean" in state) == (kind == "batch")
    for key, value in state.items():
        if value.is_floating_point() and not key.endswith(("_u", "_v")):
            value.copy_(torch.rand_like(value) - (0 if "running_var" in key else 0.5))
    segmap, image = torch.rand(2, 3, 24, 32).double(), torch.rand(2, 3, 24, 32).double()
    for training in (False, True):
        before = {key: value.clone() for key, value in state.items()}
        with torch.no_grad():
            x, y = net.train(training)(segmap, image)[0][:2]
        weight = state[f"{conv}.weight_orig"] if is_spectral else state[f"{conv}.weight"]
        if is_spectral:
            weight = weight / (state[f"{conv}.weight_u"] @ weight.flatten(1) @ state[f"{conv}.weight_v"])
        want = F.conv2d(x, weight, state.get(f"{conv}.bias"), 2, 2)
        if kind == "instance":
            want = F.instance_norm(want)
        elif kind == "batch":
            norm = {key: before[f"discriminator_0.model1.0.1.{key}"] for key in ("running_mean", "running_var")}
            affine = {key: before[f"discriminator_0.model1.0.1.{key}"] for key in ("weight", "bias")}
            want = F.batch_norm(want, **norm, **affine, training=training)
        torch.testing.assert_close(y, F.leaky_relu(want, 0.2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [MultiscaleDiscriminator, ConvEncoder])
def test_unknown_norms_are_named(kind):
    with pytest.raises(ValueError, match=r"norm must be one of spectralinstance, .* got 'spectralgroup'"):
        kind(6, norm="spectralgroup")


def test_norm_g():
    assert norm_g_options("spectralspadesyncbatch3x3") == dict(norm="syncbatch", kernel_size=3, spectral_norm=True)
    assert norm_g_options("spadeinstance5x5") == dict(norm="instance", kernel_size=5, spectral_norm=False)
    for bad in ("spectralinstance", "spadebatch3x5", "spadegroup3x3", "spadebatch4x4"):
        with pytest.raises(ValueError, match=f"norm_G .*'{bad}'"):
            norm_g_options(bad)


def test_one_tensor_of_map_and_image():
    torch.manual_seed(0)
    net = MultiscaleDiscriminator(5, ndf=4, num_d=3).double().eval()
    segmap, image = torch.randn(2, 5, 32, 48).double(), torch.randn(2, 3, 32, 48).double()
    for mine, theirs in zip(net(torch.cat([segmap, image], 1)), net(segmap, image), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"\[N, 8, H, W\] .*label_nc=5 \+ image_nc=3 channels.* \[1, 7, 8, 8\]"):
        net(torch.zeros(1, 7, 8, 8))


def test_affine_batch_norms_start_as_the_authors():
    torch.manual_seed(0)
    net = MultiscaleDiscriminator(5, ndf=64, norm="spectralbatch")
    init_weights(net)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    scales = torch.cat([norm.weight for norm in norms])
    assert scales.numel() == 2 * (128 + 256 + 512)
    assert scales.mean().item() == pytest.approx(1, abs=0.002)
    assert scales.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(norm.bias.any() for norm in norms)
