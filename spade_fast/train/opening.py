# SPDX-License-Identifier: Apache-2.0
"""The first lines of a run: what trains on what, and what takes time."""

from __future__ import annotations

from pathlib import Path

import torch

from spade_fast.cli import ConfigError
from spade_fast.ops import _backend
from spade_fast.train.config import ResolvedConfig
from spade_fast.train.samples import FixedSamples
from spade_fast.train.step import TrainingStep


def opening(
    config: ResolvedConfig,
    training: TrainingStep,
    samples: int,
    steps: int,
    batch_size: str | None,
    fixed: FixedSamples | None,
) -> list[str]:
    """The lines.

    Args:
        config: resolved options.
        training: networks on their device.
        samples: training samples.
        steps: steps of the whole run.
        batch_size: what `fit_batch_size` says about its choice, or None.
        fixed: the samples that are drawn, or None where another process draws them.

    Raises:
        ConfigError: the backend that the environment asks for can't run on the device.
    """
    device, world = training.device, training.ranks.world
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    processes = f"{world} processes on " if world > 1 else ""
    dtype = str(training.amp or torch.float32).removeprefix("torch.")
    try:
        backend = "" if config.spade == "reference" else f", backend {_backend.choose('modulation', device)}"
    except RuntimeError as error:
        raise ConfigError(str(error)) from None
    lines = [
        f"Training on {processes}{device}{name} in {dtype}{backend}: {samples} samples of {config.dataset}, {steps} "
        f"steps of {config.batch_size} images, in {config.out}"
    ]
    if batch_size is not None:
        lines.append(batch_size)
    if config.sample_every and fixed is not None:
        where = Path(config.out) / "samples"
        lines.append(f"pictures of {len(fixed.samples)} samples of {fixed.source}, in {where}")
    if config.compile:
        lines.append("compiling generator and discriminator: the first steps take minutes")
    return lines
