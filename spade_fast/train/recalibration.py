# SPDX-License-Identifier: Apache-2.0
"""Sets the batch-norm statistics of the averaged generator, from label maps spread over the training set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spade_fast import data
from spade_fast.data.options import open_dataset
from spade_fast.labels.batch import batch_labels
from spade_fast.labels.label_map import LabelMap
from spade_fast.train.batches import stack
from spade_fast.train.config import ResolvedConfig
from spade_fast.train.ranks import Ranks
from spade_fast.train.step import TrainingStep


class Recalibration:
    """Recalibrates the moving average of a run at most once a step.

    Args:
        config: resolved options.
        training: holds the moving average, or none.
    """

    def __init__(self, config: ResolvedConfig, training: TrainingStep) -> None:
        self.config, self.training = config, training
        self._done_at: int | None = None  # the step at which the statistics were last set
        self._maps: list[LabelMap] | None = None

    def __call__(self, step: int) -> None:
        """Sets the statistics. Every process calls it at the same step, and does its share of each batch."""
        ema = self.training.ema
        if ema is None or self._done_at == step:
            return
        if self._maps is None:
            self._maps = recalibration_maps(self.config, self.training.ranks)
        with self.training.autocast():
            ema.recalibrate(self._batches(self._maps))
        self._done_at = step

    def _batches(self, maps: list[LabelMap]) -> Iterator[tuple[LabelMap, Tensor | None]]:
        size, device = self.config.batch_size, self.training.device
        first, last = self.training.ranks.share(size)
        noise = torch.Generator().manual_seed(self.config.seed)
        for labels in maps:
            z = None
            if self.config.z_dim is not None:
                z = torch.randn(size, self.config.z_dim, generator=noise)[first:last].to(device)
            # A new LabelMap each time: the patterns of hundreds of maps must not stay in memory.
            yield labels[:].to(device), z


def recalibration_maps(config: ResolvedConfig, ranks: Ranks) -> list[LabelMap]:
    """This process's shares of the batches of label maps, in the crops of the first epoch.

    Raises:
        DataError: not one of the files can be used. Single bad files are left to training to report.
    """
    dataset = open_dataset(config, "train", need_images=False)
    size, (first, last) = config.batch_size, ranks.share(config.batch_size)
    count = max(1, min(config.ema_samples, len(dataset)) // size)  # batches, the same number in every process
    wanted = [b * size + i for b in range(count) for i in range(first, last)]
    items: list[dict[str, Any]] = []
    fault: data.DataError | None = None
    for i in wanted:
        try:
            items.append(dataset[i * len(dataset) // (count * size)])
        except data.DataError as e:
            fault = e
    if not items and fault is not None:
        raise fault
    items = list(itertools.islice(itertools.cycle(items), len(wanted)))
    shares = [items[b * (last - first) : (b + 1) * (last - first)] for b in range(count)]
    return [batch_labels(stack(share), dataset.num_classes, torch.device("cpu")) for share in shares]
