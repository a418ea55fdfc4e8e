# SPDX-License-Identifier: Apache-2.0
"""A whole training step (paper, section 4), fused against plain: every loss and every gradient."""

import pytest
import torch
from torch import Tensor, nn

from spade_fast import LabelMap
from spade_fast.models import (
    ConvEncoder,
    MultiscaleDiscriminator,
    SPADEGenerator,
    VGG19Features,
    init_weights,
    reparameterize,
)
from spade_fast.train.losses import GANLoss, VGGLoss, feature_matching_loss, kl_loss

CLASSES, SIZE = 6, 64


def networks(spade: str, norm: str, use_vae: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    z_dim = 8 if use_vae else None
    nets: dict[str, nn.Module] = {
        "generator": SPADEGenerator(
            CLASSES + 1, 2, SIZE, num_upsampling_layers="normal", z_dim=z_dim, norm=norm, spade=spade
        ),
        "discriminator": MultiscaleDiscriminator(CLASSES + 1, ndf=4),
    }
    if use_vae:
        nets["encoder"] = ConvEncoder(ngf=2, z_dim=8)
    for net in nets.values():
        init_weights(net, "glorot", gain=1.0)
        net.double()
    if spade != "reference":  # random numbers are drawn in memory order, which differs
        for name, net in networks("reference", norm, use_vae).items():
            nets[name].load_state_dict(net.state_dict())
    return nets


def label_map() -> LabelMap:
    """Two images of blocks of labels, with an ignored corner and instance edges."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(CLASSES, (2, 8, 8), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    blocks[:, :5, :7] = 255
    edges = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    edges[:, 20:22, 10:40] = True
    return LabelMap(blocks, CLASSES, edges, ignore_index=255)


def step(nets: dict[str, nn.Module], labels, image: Tensor, vgg: nn.Module, mode: str) -> dict[str, Tensor]:
    """Losses and gradients of the generator's step, then of the discriminator's, as training makes them."""
    generator, discriminator, gan = nets["generator"], nets["discriminator"], GANLoss(mode)
    torch.manual_seed(2)
    values: dict[str, Tensor] = {}
    z = None
    if "encoder" in nets:
        mu, logvar = nets["encoder"](image)
        values["kl"] = 0.05 * kl_loss(mu, logvar)
        z = reparameterize(mu, logvar)
    fake = generator(labels, z)
    features = discriminator(labels, torch.cat([fake, image]))
    fakes, reals = ([[f.chunk(2)[i] for f in scale] for scale in features] for i in range(2))
    values |= {
        "gan": gan.generator(fakes),
        "feat": 10 * feature_matching_loss(fakes, reals),
        "vgg": 10 * vgg(fake, image),
    }
    sum(values.values()).backward()
    for name, net in nets.items():
        values |= {f"G step, {name}.{n}": p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
    features = discriminator(labels, torch.cat([fake.detach(), image]))
    fakes, reals = ([[f.chunk(2)[i] for f in scale] for scale in features] for i in range(2))
    values |= {"d_fake": gan.discriminator(fakes, False), "d_real": gan.discriminator(reals, True)}
    (values["d_fake"] + values["d_real"]).backward()
    values |= {f"D step, {n}": p.grad.clone() for n, p in discriminator.named_parameters()}
    values |= {f"fake, {n}": b for n, b in generator.named_buffers() if "running" in n}
    return {name: value.detach() for name, value in values.items()} | {"fake": fake.detach()}


@pytest.mark.parametrize(
    ("norm", "use_vae", "mode"),
    [("syncbatch", False, "hinge"), ("instance", True, "lsgan"), ("none", False, "original")],
)
def test_fused_step_equals_the_plain_one(norm, use_vae, mode):
    torch.manual_seed(3)
    vgg = VGGLoss(VGG19Features()).double()
    image = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64) * 2 - 1
    labels = label_map()
    plain = step(networks("reference", norm, use_vae), labels.one_hot(torch.float64), image, vgg, mode)
    fused = step(networks("fused", norm, use_vae), labels, image, vgg, mode)
    assert fused.keys() == plain.keys()
    parameters = list(networks("fused", norm, use_vae)["generator"].named_parameters())
    assert all(f"G step, generator.{name}" in plain for name, _ in parameters)
    for name, expected in plain.items():
        # float64 rounding through some thirty layers forward and backward; a bias before a norm has gradient 0
        bound = 1e-8 * expected.abs().max() + 1e-12
        assert (fused[name] - expected).abs().max() <= bound, name
