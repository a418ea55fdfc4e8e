# SPDX-License-Identifier: Apache-2.0
"""Each loss against a value worked out by hand."""

import math

import pytest
import torch
from torch import nn

from spade_fast.train.losses import GANLoss, VGGLoss, feature_matching_loss, kl_loss, l1_loss

# two scales; the prediction is the last feature
PREDICTIONS = [[torch.zeros(1), torch.tensor([[2.0, -0.5]])], [torch.zeros(1), torch.tensor([[0.5, -3.0]])]]


def sigmoid_loss(logit: float, target: int) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p if target else 1 - p)


@pytest.mark.parametrize(
    ("mode", "real", "fake", "generator"),
    [
        # real: max(0, 1-p): (0 + 1.5)/2, (0.5 + 4)/2; fake: max(0, 1+p): (3 + .5)/2, (1.5 + 0)/2; generator: -mean
        ("hinge", (0.75 + 2.25) / 2, (1.75 + 0.75) / 2, (-0.75 + 1.25) / 2),
        # (p-1)²: (1 + 2.25)/2, (.25 + 16)/2; p²: (4 + .25)/2, (.25 + 9)/2
        ("lsgan", (1.625 + 8.125) / 2, (2.125 + 4.625) / 2, (1.625 + 8.125) / 2),
        (
            "original",
            sum(sigmoid_loss(p, 1) for p in (2, -0.5, 0.5, -3)) / 4,
            sum(sigmoid_loss(p, 0) for p in (2, -0.5, 0.5, -3)) / 4,
            sum(sigmoid_loss(p, 1) for p in (2, -0.5, 0.5, -3)) / 4,
        ),
    ],
)
def test_gan_losses(mode, real, fake, generator):
    loss = GANLoss(mode)
    assert loss.discriminator(PREDICTIONS, True).item() == pytest.approx(real, rel=1e-6)
    assert loss.discriminator(PREDICTIONS, False).item() == pytest.approx(fake, rel=1e-6)
    assert loss.generator(PREDICTIONS).item() == pytest.approx(generator, rel=1e-6)


def test_unknown_gan_mode():
    with pytest.raises(ValueError, match="gan mode must be one of hinge, lsgan, original, w, got 'wgan'"):
        GANLoss("wgan")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_l1(dtype):
    x = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.0, 8.0]], dtype=dtype, requires_grad=True)
    target = torch.tensor([[0.0, 4.0, -3.0], [0.25, 0.0, -8.0]], dtype=dtype, requires_grad=True)
    loss = l1_loss(x, target)
    assert loss.item() == pytest.approx((1 + 2 + 0 + 0.25 + 0 + 16) / 6, rel=1e-6)  # half precision in float32
    (12.0 * loss).backward()
    assert torch.equal(x.grad, 2.0 * torch.tensor([[1.0, -1.0, 0.0], [1.0, 0.0, 1.0]], dtype=dtype))
    assert target.grad is None


def test_l1_keeps_nothing_of_its_own():
    kept = []
    x, target = torch.randn(3, 4, requires_grad=True).exp(), torch.randn(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        l1_loss(x, target)
    assert set(kept) == {x.data_ptr(), target.data_ptr()}


def test_l1_of_other_shapes():
    with pytest.raises(ValueError, match=r"l1_loss: expected a target of shape \[2, 3\], got \[3\]"):
        l1_loss(torch.zeros(2, 3), torch.zeros(3))


def test_feature_matching():
    fake = [
        [torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([9.0])],
        [torch.tensor([0.0]), torch.tensor([5.0])],
    ]
    real = [
        [torch.tensor([0.0, 4.0]), torch.tensor([7.0]), torch.tensor([1.0])],
        [torch.tensor([2.0]), torch.tensor([0.0])],
    ]
    fake[0][0].requires_grad_()
    real[0][0].requires_grad_()
    loss = feature_matching_loss(fake, real)
    # scale 0: (1 + 2)/2 + 4, scale 1: 2; the predictions (last) do not count; mean over two scales
    assert loss.item() == pytest.approx((1.5 + 4 + 2) / 2)
    loss.backward()
    assert fake[0][0].grad.tolist() == [0.25, -0.25]
    assert real[0][0].grad is None


class FakeVGG(nn.Module):
    def forward(self, image):
        return [image * k for k in range(1, 6)]


def test_perceptual_loss():
    fake = torch.full((1, 3, 2, 2), 0.5, requires_grad=True)
    real = torch.full((1, 3, 2, 2), 0.25, requires_grad=True)
    loss = VGGLoss(FakeVGG())(fake, real)
    # |0.5 - 0.25| · (1/32 + 2/16 + 3/8 + 4/4 + 5)
    assert loss.item() == pytest.approx(0.25 * (1 / 32 + 2 / 16 + 3 / 8 + 1 + 5))
    loss.backward()
    assert fake.grad is not None and real.grad is None


def test_kl():
    mu, logvar = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, math.log(2.0)]])
    # per dimension -(1 + logvar - mu² - var)/2: (1)/2 and -(1 + log 2 - 2)/2
    assert kl_loss(mu, logvar).item() == pytest.approx(0.5 + (1 - math.log(2)) / 2)
    assert kl_loss(torch.zeros(3, 4), torch.zeros(3, 4)).item() == 0
