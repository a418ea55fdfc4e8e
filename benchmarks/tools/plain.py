# SPDX-License-Identifier: Apache-2.0
"""The training step of a plain SPADE system, to measure against.

It has the reference layers, one-hot label maps through every convolution, both losses in one graph, and torch's Adam.
It is the paper's computation: nothing is shared and nothing is saved.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.models.discriminator import MultiscaleDiscriminator, PatchDiscriminator
from spade_fast.train import losses
from spade_fast.train.config import TrainConfig
from spade_fast.train.profiling import span
from spade_fast.train.step import _in_float32


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, terms)


def discriminate(net: MultiscaleDiscriminator, segmap: Tensor, image: Tensor) -> list[list[Tensor]]:
    """`MultiscaleDiscriminator` on (labels ⊕ image), joined before the first convolution and at every scale.

    Args:
        net: the discriminator.
        segmap: one-hot labels [N, label_nc, H, W].
        image: [N, 3, H, W].

    Returns:
        The features of each layer of each scale, the prediction last.
    """
    x, features = torch.cat([segmap, image], dim=1), []
    for discriminator in net.children():
        assert isinstance(discriminator, PatchDiscriminator)
        out, found = x, []
        for i in range(discriminator.n_layers + 1):
            out = getattr(discriminator, f"model{i}")(out)
            found.append(out)
        features.append(found)
        x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
    return features


def vgg_loss(vgg: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
    """Perceptual loss (paper, appendix A): weighted L1 distances of VGG features of images [N, 3, H, W]."""
    with torch.no_grad():
        real_features = vgg(real)
    pairs = zip(losses.VGG_LAYER_WEIGHTS, vgg(fake), real_features, strict=True)
    return _sum(weight * F.l1_loss(f, r) for weight, f, r in pairs)


def feature_matching_loss(fake: list[list[Tensor]], real: list[list[Tensor]]) -> Tensor:
    """L1 distances of the discriminator's features, without its predictions: summed over layers, mean over scales."""
    scales = zip(fake, real, strict=True)
    return _sum(F.l1_loss(f, r.detach()) for a, b in scales for f, r in zip(a[:-1], b[:-1], strict=True)) / len(fake)


class PlainTrainingStep:
    """Both updates of an iteration; called as `spade_fast.train.step.TrainingStep` is, with one-hot labels.

    Args:
        nets: generator and discriminator.
        config: resolved options of training.
        vgg: VGG19 features.
        device: where the networks are.
        amp: what autocast computes in; None for float32.
    """

    def __init__(
        self, nets: dict[str, nn.Module], config: TrainConfig, vgg: nn.Module, device: str, amp: torch.dtype | None
    ) -> None:
        self.nets, self.config, self.vgg, self.amp, self.device = nets, config, vgg, amp, torch.device(device)
        self.generator, discriminator = nets["generator"], nets["discriminator"]
        assert isinstance(discriminator, MultiscaleDiscriminator)
        self.discriminator = discriminator
        self.gan_loss = losses.GANLoss(config.gan_mode)
        self.discriminate = discriminate
        assert config.beta1 is not None and config.beta2 is not None  # resolved
        betas = config.beta1, config.beta2
        self.optimizers = {
            name: torch.optim.Adam(nets[name].parameters(), lr, betas)
            for name, lr in zip(("generator", "discriminator"), config.lrs(), strict=True)
        }

    def compile(self) -> None:
        """The three networks are compiled at their first call."""
        self.generator.compile()
        self.vgg.compile()
        self.discriminate = torch.compile(discriminate)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def _discriminate(self, segmap: Tensor, fake: Tensor, image: Tensor) -> tuple[list, list]:
        with span("discriminator"):
            both = torch.cat([fake, image.to(fake.dtype)])
            features = self.discriminate(self.discriminator, torch.cat([segmap, segmap]).to(fake.dtype), both)
        halves = [[f.chunk(2) for f in scale] for scale in features]
        return [[f for f, _ in scale] for scale in halves], [[r for _, r in scale] for scale in halves]

    def _update(self, name: str, terms: dict[str, Tensor]) -> None:
        with span("backward"):
            _sum(terms.values()).backward()
        with span("optimizer"):
            self.optimizers[name].step()

    def __call__(self, segmap: Tensor, image: Tensor, step: int) -> dict[str, Tensor]:
        """One iteration.

        Args:
            segmap: one-hot labels [N, label_nc, H, W].
            image: real images [N, 3, H, W].
            step: unused; `TrainingStep` takes it.

        Returns:
            The weighted losses, detached.
        """
        c = self.config
        self.discriminator.requires_grad_(False)
        self.optimizers["generator"].zero_grad()
        with self.autocast():
            with span("generator"):
                fake = self.generator(segmap)
            fake_features, real_features = self._discriminate(segmap, fake, image)
            with span("VGG"):
                total = {"vgg": c.lambda_vgg * vgg_loss(self.vgg, fake, image)}
            with span("losses"):
                total["gan"] = self.gan_loss.generator(_in_float32(fake_features))
                total["feat"] = c.lambda_feat * feature_matching_loss(fake_features, real_features)
        self._update("generator", total)
        self.discriminator.requires_grad_(True)
        self.optimizers["discriminator"].zero_grad()
        with self.autocast():
            with torch.no_grad(), span("generator"):
                fake = self.generator(segmap)
            fake_features, real_features = self._discriminate(segmap, fake, image)
            with span("losses"):
                terms = {
                    "d_fake": self.gan_loss.discriminator(_in_float32(fake_features), False),
                    "d_real": self.gan_loss.discriminator(_in_float32(real_features), True),
                }
        self._update("discriminator", terms)
        return {name: term.detach() for name, term in (total | terms).items()}
