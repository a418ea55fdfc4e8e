# SPDX-License-Identifier: Apache-2.0
"""The losses of SPADE (paper, section 4 and appendix A), each a scalar without its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spade_fast.ops._register import accumulation_dtype

VGG_LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
GAN_MODES = ("hinge", "lsgan", "original", "w")


class GANLoss:
    """Adversarial loss, averaged over the scales of a multi-scale discriminator (paper, section 4).

    Predictions are a list over scales: each is a tensor of any shape, or a list of features with the prediction last.

    Args:
        mode: ``hinge`` (Geometric GAN), ``lsgan`` (least squares), ``original`` (binary cross-entropy on logits) or
            ``w`` (Wasserstein; spectral norm bounds the critic's slope, and there is no gradient penalty).

    Raises:
        ValueError: the mode is none of these.
    """

    def __init__(self, mode: str = "hinge") -> None:
        if mode not in GAN_MODES:
            raise ValueError(f"gan mode must be one of {', '.join(GAN_MODES)}, got {mode!r}")
        self.mode = mode

    def discriminator(self, predictions: list, target_is_real: bool) -> Tensor:
        """Loss of the discriminator on real, or on synthesized, images."""
        return self._mean(predictions, lambda p: self._distance(p, target_is_real))

    def generator(self, predictions: list) -> Tensor:
        """Loss of the generator on predictions for its images."""
        if self.mode in ("hinge", "w"):
            return self._mean(predictions, lambda p: -p.mean())
        return self._mean(predictions, lambda p: self._distance(p, True))

    def _distance(self, prediction: Tensor, target_is_real: bool) -> Tensor:
        if self.mode == "hinge":
            return F.relu(1 - prediction if target_is_real else 1 + prediction).mean()
        if self.mode == "w":
            return -prediction.mean() if target_is_real else prediction.mean()
        target = torch.full_like(prediction, float(target_is_real))
        if self.mode == "lsgan":
            return F.mse_loss(prediction, target)
        return F.binary_cross_entropy_with_logits(prediction, target)

    @staticmethod
    def _mean(predictions: list, loss: Callable[[Tensor], Tensor]) -> Tensor:
        losses = [loss(p if isinstance(p, Tensor) else p[-1]) for p in predictions]
        return torch.stack(losses).mean()


class _L1Loss(torch.autograd.Function):
    """Saves x for backward instead of the difference: the network that made x keeps x anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(x, target)
        return _difference(x, target).abs_().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, target = ctx.saved_tensors
        signs = _difference(x, target).sign_()
        return signs.mul_(grad / max(signs.numel(), 1)).to(x.dtype), None


def _difference(x: Tensor, target: Tensor) -> Tensor:
    """x - target, in float32 where x has half precision."""
    return x.to(accumulation_dtype(x.dtype)) - target


def l1_loss(x: Tensor, target: Tensor) -> Tensor:
    r"""Mean of \|x - target\|. Differentiable once, in x.

    Args:
        x: any shape and floating dtype.
        target: of the same shape; a constant.

    Returns:
        A scalar, in float32 where x has half precision.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> l1_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
        tensor(1.5000)
    """
    if x.shape != target.shape:
        raise ValueError(f"l1_loss: expected a target of shape {list(x.shape)}, got {list(target.shape)}")
    return _L1Loss.apply(x, target.detach())


def feature_matching_loss(fake: list[list[Tensor]], real: list[list[Tensor]]) -> Tensor:
    """L1 between discriminator features of fake and real images (paper, appendix A).

    Args:
        fake, real: for each scale the features of each layer, and the prediction last. Real features are constants.

    Returns:
        A scalar: summed over layers without the prediction, averaged over scales.
    """
    total = fake[0][0].new_zeros(())
    for fake_scale, real_scale in zip(fake, real, strict=True):
        for f, r in zip(fake_scale[:-1], real_scale[:-1], strict=True):
            total = total + l1_loss(f, r)
    return total / len(fake)


class VGGLoss(nn.Module):
    """Perceptual loss: weighted L1 between VGG19 features (paper, appendix A).

    The weights are 1/32, 1/16, 1/8, 1/4, 1 from relu1_1 to relu5_1.

    Args:
        vgg: `spade_fast.models.VGG19Features`.
    """

    def __init__(self, vgg: nn.Module) -> None:
        super().__init__()
        self.vgg = vgg

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """A scalar from images [N, 3, H, W] in [-1, 1]; real is a constant."""
        with torch.no_grad():
            real_features = self.vgg(real)
        fake_features = self.vgg(fake)
        losses = zip(VGG_LAYER_WEIGHTS, fake_features, real_features, strict=True)
        return sum((weight * l1_loss(f, r) for weight, f, r in losses), start=fake.new_zeros(()))


def kl_loss(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mu, exp(logvar)) from N(0, 1) (paper, appendix A).

    Args:
        mu, logvar: [N, z_dim].

    Returns:
        A scalar, summed over batch and latent dimensions.

    Examples:
        >>> kl_loss(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor(2.5000)
    """
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
