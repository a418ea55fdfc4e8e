# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedule and the order of samples. Both are functions of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def lr_factor(epoch: int, epochs: int, decay_from: int | None) -> float:
    """Factor on the base learning rate in an epoch: 1, then linearly down from `decay_from` (paper, appendix A).

    The last epoch has 1 / (epochs - decay_from). The epoch after it would have 0.

    Args:
        epoch: counted from 0. An epoch at or after `epochs` counts as the last.
        epochs: of the whole run.
        decay_from: the last epoch with factor 1; None keeps it for all.

    Examples:
        >>> [lr_factor(epoch, epochs=4, decay_from=2) for epoch in range(4)]
        [1.0, 1.0, 1.0, 0.5]
    """
    if decay_from is None or epoch <= decay_from:
        return 1.0
    return (epochs - min(epoch, epochs - 1)) / (epochs - decay_from)


class EpochBatches(Sampler[list[int]]):
    """Batches of sample indices for one epoch. A last incomplete batch is left out.

    The order is a permutation drawn from (seed, epoch) alone. It depends neither on the steps before nor on the number
    of processes.

    Args:
        size: samples in the dataset.
        batch_size: samples in a batch of all processes together.
        seed: of the order.
        epoch: counted from 0.
        start: the first batch.
        share: this process takes positions share[0]..share[1]-1 of every batch; None takes all.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, epoch: int, start: int = 0, share: tuple[int, int] | None = None
    ) -> None:
        self.size, self.batch_size, self.seed, self.epoch, self.start = size, batch_size, seed, epoch, start
        self.share = share or (0, batch_size)

    def __len__(self) -> int:
        return max(0, self.size // self.batch_size - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        # 1_000_003 is prime: (seed, epoch) pairs of any sensible run give different streams.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        first, last = self.share
        for b in range(self.start, self.size // self.batch_size):
            yield order[b * self.batch_size + first : b * self.batch_size + last]
