# SPDX-License-Identifier: Apache-2.0
"""Pictures of fixed samples that show how training goes: label map, synthesized image, real image."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from spade_fast import data, pictures
from spade_fast.cli import ConfigError
from spade_fast.data.options import has_held_out, open_dataset, phases_are_one
from spade_fast.labels.batch import batch_labels
from spade_fast.train.config import ResolvedConfig
from spade_fast.train.step import TrainingStep

FIRST_STEPS, FIRST_SECONDS = 5, 60  # the first picture comes after whichever is earlier
LEAST_PAUSE = 20  # the pause after a picture is at least this many times as long as drawing took


class FixedSamples:
    """The first samples of the held-out data, or of the training set where nothing is held out.

    Attributes:
        samples: items of the dataset.
        source: where they come from, in words.
    """

    def __init__(self, config: ResolvedConfig, training_set: data.SegmentationDataset) -> None:
        """
        Args:
            config: resolved options.
            training_set: must have the same classes and edges.

        Raises:
            DataError: the held-out data that the options name can't be read.
            ConfigError: they have other channels than the training set.
        """
        self.dataset, self.source = _open(config, training_set)
        if self.dataset.label_nc != training_set.label_nc:
            raise ConfigError(
                f"the held-out label maps have {self.dataset.label_nc} channels, the training set's "
                f"{training_set.label_nc}: give both instance maps (--instance-dir and --val-instance-dir), or neither"
            )
        self.samples: list[dict[str, Any]] = [
            self.dataset[i] for i in range(min(config.num_samples, len(self.dataset)))
        ]


def _open(config: ResolvedConfig, training_set: data.SegmentationDataset) -> tuple[data.SegmentationDataset, str]:
    if has_held_out(config):
        dataset = open_dataset(config, "val")
        return dataset, f"the {len(dataset)} held-out samples"
    trained_on = "the training set, because nothing is held out (see --val-split)"
    try:
        return open_dataset(config, "val"), trained_on if phases_are_one(config) else "the validation set"
    except data.DataError:  # the dataset has no validation set here
        return open_dataset(config, "train", flip=False), trained_on


class SampleSheets:
    """Draws the fixed samples with the averaged generator, or with the trained one if there is no average.

    Args:
        config: resolved options.
        fixed: the samples.
        training: the networks.
        folder: where the pictures go.
    """

    def __init__(self, config: ResolvedConfig, fixed: FixedSamples, training: TrainingStep, folder: Path) -> None:
        self.config, self.fixed, self.training, self.folder = config, fixed, training, folder
        self._next: float | None = None  # the time of the next picture; None until `start`

    def start(self) -> None:
        """Starts the clock of the first picture."""
        if self.config.sample_every and self.config.sample_minutes:
            self._next = time.monotonic() + min(FIRST_SECONDS, 60 * self.config.sample_minutes)

    def due(self, step: int) -> bool:
        """Whether a picture is due after this number of steps, or because of the time that has passed."""
        if not self.config.sample_every:
            return False
        early = self.config.sample_minutes > 0 and step == FIRST_STEPS
        late = self._next is not None and time.monotonic() > self._next
        return early or late or step % self.config.sample_every == 0

    @torch.no_grad()
    def synthesize(self) -> Tensor:
        """Images [N, 3, H, W] of the fixed samples, with the statistics and noise of evaluation.

        Draws no random number from the state that training uses.
        """
        ema, noise = self.training.ema, torch.Generator().manual_seed(self.config.seed)
        net = (self.training.generator if ema is None else ema.net).eval()
        device = self.training.device
        images: list[Tensor] = []
        for sample in self.fixed.samples:
            labels = batch_labels(default_collate([sample]), self.fixed.dataset.num_classes, device)
            z = None
            if self.config.z_dim is not None:
                z = torch.randn(1, self.config.z_dim, generator=noise).to(device)
            images.append(net(labels, z).cpu())
        self.training.generator.train()
        return torch.cat(images)

    def draw(self, step: int) -> Path:
        """Writes step_{step:08d}.png, a row a sample: label map, synthesized, real. Returns its path.

        Raises:
            WriteError: the file can't be written.
        """
        rows, names = [], []
        for sample, fake in zip(self.fixed.samples, self.synthesize(), strict=True):
            colors = pictures.colorize(sample["label"], self.fixed.dataset.palette)
            rows.append([colors, pictures.to_uint8(fake), pictures.to_uint8(sample["image"])])
            names.append(sample["path"])
        sheet = pictures.sheet(rows, ("label map", "synthesized", "real"), names)
        path = self.folder / f"step_{step:08d}.png"
        pictures.save_png(sheet, path)
        return path

    def pause(self, took: float) -> None:
        """Sets the time of the next picture. Drawing the last one took this many seconds."""
        if self._next is not None:
            self._next = time.monotonic() + max(60 * self.config.sample_minutes, LEAST_PAUSE * took)
