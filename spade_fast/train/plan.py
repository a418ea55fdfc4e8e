# SPDX-License-Identifier: Apache-2.0
"""What `--dry-run` prints: networks, memory, data, steps and learning rates of a run, without training anything."""

from __future__ import annotations

import dataclasses

import torch

from spade_fast import models
from spade_fast.cli import flag, pick_device
from spade_fast.data.options import open_dataset
from spade_fast.train.batch_size import fit_batch_size
from spade_fast.train.config import ResolvedConfig, merge, resolve_config
from spade_fast.train.memory import estimate
from spade_fast.train.schedule import lr_factor
from spade_fast.train.setup import build_networks, check_size, generator_of, length, steps_per_epoch


def describe(config: ResolvedConfig) -> str:
    """The plan of a resolved configuration, as text. Opens the dataset; writes nothing.

    Raises:
        ConfigError, DataError: what `Trainer` would raise for options that do not fit the dataset.
    """
    dataset = open_dataset(config, "train")
    device = pick_device(config.device)
    config, chosen = fit_batch_size(config, dataset, device)
    usual = resolve_config(merge({}, {"dataset": config.dataset}))
    per_epoch = steps_per_epoch(config, dataset)
    steps, epochs = length(config, per_epoch)
    with torch.device("meta"):
        nets = build_networks(config, dataset.label_nc)
    generator = generator_of(nets)
    check_size(config, dataset, generator)
    height, width = generator.output_size
    edges = " + instance edges" if dataset.has_edges else ""
    terms = {"GAN": 1.0, "feature matching": config.lambda_feat, "VGG": config.lambda_vgg, "L1": config.lambda_l1}
    if config.use_vae:
        terms["KL"] = config.lambda_kl
    updates = -(-steps // config.d_steps_per_g)
    lines = [
        f"dataset        {config.dataset}, {len(dataset)} training samples, {dataset.num_classes} classes{edges}",
        f"images         {height} x {width} (height x width), {config.preprocess}",
        *(f"{name:14} {models.count_parameters(net) / 1e6:.1f} M parameters" for name, net in nets.items()),
        f"device         {device}",
        _memory(config, dataset.label_nc),
        f"batch          {config.batch_size}: {per_epoch} steps an epoch" + (f" ({chosen})" if chosen else ""),
        f"length         {steps} steps, {steps * config.batch_size} images, {steps / per_epoch:.4g} epochs",
        f"updates        generator {updates}, discriminator {steps}",
        f"losses         {config.gan_mode}; " + ", ".join(f"{n} x{w:g}" for n, w in terms.items() if w > 0),
        f"Adam           beta1 {config.beta1:g}, beta2 {config.beta2:g}",
        *_learning_rates(config, epochs),
        f"checkpoints    every {config.save_every} steps in {config.out}, the last {config.keep} kept",
        *_options(config, dataclasses.replace(usual, batch_size=config.batch_size) if chosen else usual),
    ]
    return "\n".join(lines)


def _learning_rates(config: ResolvedConfig, epochs: int) -> list[str]:
    """The learning rates wherever they change from one epoch to the next, in at most a dozen lines."""
    generator, discriminator = config.lrs()
    start = config.decay_from
    if start is None or start >= epochs - 1:
        late = "" if start is None else f" (the decay would begin at epoch {start})"
        return [f"learning rate  generator {generator:.3g}, discriminator {discriminator:.3g}, constant{late}"]
    changing = range(start, epochs)
    shown = sorted({0, *changing[:: max(1, len(changing) // 10)], epochs - 1})
    lines = []
    for epoch in shown:
        f = lr_factor(epoch, epochs, start)
        lines.append(
            f"learning rate  epoch {epoch}: generator {generator * f:.3g}, discriminator {discriminator * f:.3g}"
        )
    return lines


def _memory(config: ResolvedConfig, label_nc: int) -> str:
    need = estimate(config, label_nc)
    kept = -(-config.batch_size // config.accumulate) * need.per_image
    return (
        f"memory         at most about {(need.fixed + kept) / 2**30:.2f} GiB: weights and optimizers "
        f"{need.fixed / 2**30:.2f}, kept for backward {kept / 2**30:.2f} (by plain SPADE layers, float32, one process; "
        "workspaces not counted)"
    )


def _options(config: ResolvedConfig, usual: ResolvedConfig) -> list[str]:
    """A table of every option, by group. A star marks what differs from the dataset's usual options."""
    lines: list[str] = []
    groups: dict[str, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(config):
        groups.setdefault(field.metadata["group"], []).append(field)
    for title, fields in groups.items():
        lines += ["", title]
        for field in fields:
            value = getattr(config, field.name)
            shown = "-" if value is None else ("no", "yes")[value] if isinstance(value, bool) else value
            star = "*" if value != getattr(usual, field.name) else " "
            lines.append(f"  {star} {flag(field.name):26} {shown}")
    return [*lines, "", f"(*: differs from the default for {config.dataset})"]
