# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to the device: loaded, and their label patterns found, by other processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from spade_fast import data
from spade_fast.labels.batch import batch_labels
from spade_fast.labels.label_map import LabelMap
from spade_fast.models import SPADEGenerator
from spade_fast.train.config import TrainConfig
from spade_fast.train.ranks import Ranks
from spade_fast.train.schedule import EpochBatches
from spade_fast.train.setup import open_dataset
from spade_fast.train.stopping import worker_signals


class _FaultsAsItems(Dataset):
    """Hands a DataError over as an item, so that one raised in a worker reaches the loop with its message intact."""

    def __init__(self, dataset: data.SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | data.DataError:
        try:
            return self.dataset[index]
        except data.DataError as e:
            return e


def collate(items: list, num_classes: int, sizes: list[tuple[int, int]], kernel_size: int) -> Any:
    """(LabelMap with the patterns of sizes, images in channels-last memory) of samples; or the first fault."""
    fault = next((item for item in items if isinstance(item, data.DataError)), None)
    if fault is not None:
        return fault
    batch = _stack(items)
    labels = batch_labels(batch, num_classes, torch.device("cpu"))
    labels.build(sizes, kernel_size, backward=True)
    return labels, batch["image"].contiguous(memory_format=torch.channels_last)


def pattern_sizes(generator: SPADEGenerator) -> list[tuple[int, int]]:
    """(height, width) of every resolution at which the generator's fused layers look at the label map."""
    if not generator.fused:
        return []
    (h, w), sizes = generator.start, set()
    for _, upsample in generator.blocks():
        h, w = h * upsample, w * upsample
        sizes.add((h, w))
    return sorted(sizes)


def load(
    dataset: data.SegmentationDataset,
    config: TrainConfig,
    generator: SPADEGenerator,
    ranks: Ranks,
    epoch: int,
    batch: int,
) -> Iterator[tuple[LabelMap, Tensor] | data.DataError]:
    """This process's part of every batch from (epoch, batch) on, without end, on the device. Close it to end the
    loading processes."""
    order = EpochBatches(len(dataset), config.batch_size, config.seed, epoch, batch, ranks.part(config.batch_size))
    loader = DataLoader(
        _FaultsAsItems(dataset),
        batch_sampler=order,
        num_workers=config.workers,
        collate_fn=functools.partial(
            collate,
            num_classes=dataset.num_classes,
            sizes=pattern_sizes(generator),
            kernel_size=config.kernel_size,
        ),
        pin_memory=ranks.device.type == "cuda",
        persistent_workers=config.workers > 0,
        worker_init_fn=worker_signals,
        generator=torch.Generator(),  # its own: the loader must not draw from the state that a resume restores
    )
    while True:
        dataset.set_epoch(order.epoch)
        for item in loader:
            if isinstance(item, data.DataError):
                yield item
            else:
                labels, image = item
                yield labels.to(ranks.device, non_blocking=True), image.to(ranks.device, non_blocking=True)
        order.epoch, order.start = order.epoch + 1, 0


def recalibration_maps(config: TrainConfig, ranks: Ranks) -> list[LabelMap]:
    """This process's parts of the batches that set the averaged generator's statistics: label maps spread over the
    training set, in the crops of the first epoch.

    Raises DataError when not one of its files can be used; single ones are left to training to report.
    """
    dataset = open_dataset(config, "train", need_images=False)
    size, (first, last) = config.batch_size, ranks.part(config.batch_size)
    count = max(1, min(config.ema_samples, len(dataset)) // size)  # batches, the same number in every process
    wanted = [b * size + i for b in range(count) for i in range(first, last)]
    items, fault = [], None
    for i in wanted:
        try:
            items.append(dataset[i * len(dataset) // (count * size)])
        except data.DataError as e:
            fault = e
    if not items:
        raise fault
    items = list(itertools.islice(itertools.cycle(items), len(wanted)))
    parts = [items[b * (last - first) : (b + 1) * (last - first)] for b in range(count)]
    return [batch_labels(_stack(part), dataset.num_classes, torch.device("cpu")) for part in parts]


def _stack(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    return default_collate([{k: v for k, v in item.items() if k != "path"} for item in items])
