# SPDX-License-Identifier: Apache-2.0
"""What `--dry-run` prints: networks, memory, data, steps and learning rates of a run, without training anything."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from spade_fast import models
from spade_fast.cli import pick_device
from spade_fast.train import losses
from spade_fast.train.config import TrainConfig
from spade_fast.train.schedule import lr_factor
from spade_fast.train.setup import build_networks, check_size, length, open_dataset, steps_per_epoch


def describe(config: TrainConfig) -> str:
    """The plan of a resolved configuration, as text. Opens the dataset; writes nothing.

    Raises what `Trainer` would for options that do not fit the dataset.
    """
    dataset = open_dataset(config, "train")
    per_epoch = steps_per_epoch(config, dataset)
    steps, epochs = length(config, per_epoch)
    with torch.device("meta"):
        # the plain layer: how much the fused one keeps depends on the label maps, and is less
        nets = build_networks(dataclasses.replace(config, spade="reference"), dataset.label_nc)
        vgg = models.VGG19Features() if config.lambda_vgg > 0 else None
    check_size(config, dataset, nets["generator"])
    height, width = nets["generator"].output_size
    edges = " + instance edges" if dataset.has_edges else ""
    terms = {"GAN": 1.0, "feature matching": config.lambda_feat, "VGG": config.lambda_vgg, "L1": config.lambda_l1}
    if config.use_vae:
        terms["KL"] = config.lambda_kl
    updates = -(-steps // config.d_steps_per_g)
    lines = [
        f"dataset        {config.dataset}, {len(dataset)} training samples, {dataset.num_classes} classes{edges}",
        f"images         {height} x {width} (height x width), {config.preprocess}",
        *(f"{name:14} {models.count_parameters(net) / 1e6:.1f} M parameters" for name, net in nets.items()),
        f"device         {pick_device(config.device)}",
        *_memory(config, nets, vgg, dataset.label_nc),
        f"batch          {config.batch_size}: {per_epoch} steps an epoch",
        f"length         {steps} steps, {steps * config.batch_size} images, {steps / per_epoch:.4g} epochs",
        f"updates        generator {updates}, discriminator {steps}",
        f"losses         {config.gan_mode}; " + ", ".join(f"{n} x{w:g}" for n, w in terms.items() if w > 0),
        f"Adam           beta1 {config.beta1:g}, beta2 {config.beta2:g}",
        *_learning_rates(config, epochs),
        f"checkpoints    every {config.save_every} steps in {config.out}, the last {config.keep} kept",
    ]
    return "\n".join(lines) + f"\noptions        {dataclasses.asdict(config)}"


def _learning_rates(config: TrainConfig, epochs: int) -> list[str]:
    """The learning rates wherever they change from one epoch to the next, in at most a dozen lines."""
    generator, discriminator = config.lrs()
    start = config.decay_from
    if start is None or start >= epochs - 1:
        late = "" if start is None else f" (the decay would begin at epoch {start})"
        return [f"learning rate  generator {generator:.3g}, discriminator {discriminator:.3g}, constant{late}"]
    changing = list(range(start, epochs))
    shown = sorted({0, *changing[:: max(1, len(changing) // 10)], epochs - 1})
    lines = []
    for epoch in shown:
        f = lr_factor(epoch, epochs, start)
        lines.append(
            f"learning rate  epoch {epoch}: generator {generator * f:.3g}, discriminator {discriminator * f:.3g}"
        )
    return lines


def _memory(config: TrainConfig, nets: dict[str, nn.Module], vgg: nn.Module | None, label_nc: int) -> list[str]:
    """Weights with gradients and Adam's moments (one when beta1 is 0), the generator's moving average,
    and what autograd keeps for backward of one micro-batch on one process, in float32."""
    each = 4 * (4 if config.beta1 else 3)
    fixed = each * sum(models.count_parameters(net) for net in nets.values())
    if config.ema > 0:
        fixed += 4 * models.count_parameters(nets["generator"])
    if vgg is not None:
        fixed += 4 * models.count_parameters(vgg)
    kept = -(-config.batch_size // config.accumulate) * saved_bytes(config, nets, vgg, label_nc)
    return [
        f"memory         at most about {(fixed + kept) / 2**30:.2f} GiB: weights and optimizers {fixed / 2**30:.2f}, "
        f"kept for backward {kept / 2**30:.2f} (by plain SPADE layers, float32, one process; workspaces not counted)"
    ]


def saved_bytes(config: TrainConfig, nets: dict[str, nn.Module], vgg: nn.Module | None, label_nc: int) -> int:
    """Bytes that autograd keeps at most for the generator step of one image: those of the generator and, at a time, of
    one network that judges its image. Counted on meta tensors (nothing is computed)."""
    height, width = nets["generator"].output_size
    every = [net for net in (*nets.values(), vgg) if net is not None]
    known = {p.untyped_storage()._cdata for net in every for p in net.parameters()}
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:  # what several operations keep is there once
            known.add(tensor.untyped_storage()._cdata)
            kept.append(tensor)
        return tensor

    def count() -> int:
        return sum(t.untyped_storage().nbytes() for t in kept)

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        # two images: batch norm refuses a single value a channel
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
