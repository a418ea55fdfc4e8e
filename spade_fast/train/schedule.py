# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedule and the order of samples: both functions of (seed, epoch, position), so they resume."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def lr_factor(epoch: int, epochs: int, decay_from: int | None) -> float:
    """Factor on the base learning rate in an epoch (counted from 0): 1, then linearly down from `decay_from`.

    The last epoch has 1 / (epochs - decay_from); 0 would be reached by the one after it (paper, appendix A). An epoch
    at or after `epochs` counts as the last.
    """
    if decay_from is None or epoch <= decay_from:
        return 1.0
    return (epochs - min(epoch, epochs - 1)) / (epochs - decay_from)


class EpochBatches(Sampler[list[int]]):
    """Batches of sample indices for one epoch, from batch `start` on; a last incomplete batch is left out.

    The order is a permutation drawn from (seed, epoch) alone: it does not depend on how training got here, nor on the
    number of processes, each of which takes positions part[0]..part[1]-1 of every batch (None: all).
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, epoch: int, start: int = 0, part: tuple[int, int] | None = None
    ) -> None:
        self.size, self.batch_size, self.seed, self.epoch, self.start = size, batch_size, seed, epoch, start
        self.part = part or (0, batch_size)

    def __len__(self) -> int:
        return max(0, self.size // self.batch_size - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        # 1_000_003 is prime: (seed, epoch) pairs of any sensible run give different streams.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        first, last = self.part
        for b in range(self.start, self.size // self.batch_size):
            yield order[b * self.batch_size + first : b * self.batch_size + last]
