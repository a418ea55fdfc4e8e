# SPDX-License-Identifier: Apache-2.0
"""The micro-batches of a step, whose gradients add up."""

from __future__ import annotations

import itertools

from torch import Tensor

from spade_fast.labels.label_map import LabelMap
from spade_fast.train.config import ResolvedConfig


class MicroBatch:
    """Samples start..stop-1 of this process's share of a batch.

    Attributes:
        labels, image: the samples.
        weight: how many of the whole batch's samples these are, as a fraction.
        first, last: whether this is the first or the last micro-batch of the share.
    """

    def __init__(self, labels: LabelMap, image: Tensor, start: int, stop: int, weight: float) -> None:
        whole = (start, stop) == (0, image.shape[0])
        self.labels = labels if whole else labels[start:stop]
        self.image = image if whole else image[start:stop]
        self.start, self.stop, self.weight = start, stop, weight
        self.first, self.last = start == 0, stop == image.shape[0]


def micro_batches(labels: LabelMap, image: Tensor, config: ResolvedConfig) -> list[MicroBatch]:
    """This process's share of a batch, in `accumulate` parts whose sizes differ by one at most.

    Args:
        labels: N label maps.
        image: [N, 3, H, W].
        config: resolved options.
    """
    n, k = image.shape[0], config.accumulate
    bounds = [n * i // k for i in range(k + 1)]
    return [
        MicroBatch(labels, image, start, stop, (stop - start) / config.batch_size)
        for start, stop in itertools.pairwise(bounds)
    ]
