# SPDX-License-Identifier: Apache-2.0
"""What a training step keeps in memory, counted on meta tensors before anything is allocated."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from spade_fast import models
from spade_fast.train import losses
from spade_fast.train.config import ResolvedConfig
from spade_fast.train.setup import build_networks, generator_of


@dataclasses.dataclass
class MemoryEstimate:
    """Bytes of one process, in float32, with plain SPADE layers; workspaces are not counted.

    The fused layer keeps less; how much less depends on the label maps.

    Attributes:
        fixed: weights, gradients, Adam's moments, the generator's moving average, and VGG.
        per_image: what autograd keeps for backward of one image.
    """

    fixed: int
    per_image: int


def estimate(config: ResolvedConfig, label_nc: int) -> MemoryEstimate:
    """The memory of a run.

    Args:
        config: resolved options.
        label_nc: channels of the label maps, with edges.
    """
    with torch.device("meta"):
        nets = build_networks(dataclasses.replace(config, spade="reference"), label_nc)
        vgg = models.VGG19Features() if config.lambda_vgg > 0 else None
    # Weight, gradient, and Adam's second moment; the first moment too unless beta1 is 0.
    each = 4 * (4 if config.beta1 else 3)
    fixed = each * sum(models.count_parameters(net) for net in nets.values())
    if config.ema > 0:
        fixed += 4 * models.count_parameters(nets["generator"])
    if vgg is not None:
        fixed += 4 * models.count_parameters(vgg)
    return MemoryEstimate(fixed, saved_bytes(config, nets, vgg, label_nc))


def saved_bytes(config: ResolvedConfig, nets: dict[str, nn.Module], vgg: nn.Module | None, label_nc: int) -> int:
    """Bytes that autograd keeps at most for the generator step of one image.

    The generator's are kept together with those of one network that judges its image at a time.

    Args:
        config: resolved options.
        nets: generator, discriminator and perhaps encoder, on the meta device.
        vgg: VGG19 features on the meta device, or None without the perceptual loss.
        label_nc: channels of the label maps, with edges.
    """
    height, width = generator_of(nets).output_size
    every = [net for net in (*nets.values(), vgg) if net is not None]
    known = {p.untyped_storage()._cdata for net in every for p in net.parameters()}
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:  # several operations may keep the same storage
            known.add(tensor.untyped_storage()._cdata)
            kept.append(tensor)
        return tensor

    def count() -> int:
        return sum(t.untyped_storage().nbytes() for t in kept)

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        # Two images, because batch norm refuses a single value a channel.
        segmap, image = torch.zeros(2, label_nc, height, width), torch.zeros(2, 3, height, width)
        z = nets["encoder"](image)[0] if "encoder" in nets else None
        fake = nets["generator"](segmap, z)
        generator = count()
        features = nets["discriminator"](segmap, torch.cat([fake, image]))
        total = losses.GANLoss(config.gan_mode).generator(features)
        discriminator = count() - generator
        if vgg is not None:
            total = total + losses.VGGLoss(vgg)(fake, image)
        perceptual = count() - generator - discriminator
    del total
    return (generator + max(discriminator, perceptual)) // 2
