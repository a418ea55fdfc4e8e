# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to the device. Other processes load them and find their label patterns."""

from __future__ import annotations

import functools
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from spade_fast import data
from spade_fast.labels.batch import batch_labels
from spade_fast.labels.label_map import LabelMap
from spade_fast.models import SPADEGenerator
from spade_fast.train.config import ResolvedConfig
from spade_fast.train.ranks import Ranks
from spade_fast.train.schedule import EpochBatches
from spade_fast.train.stopping import worker_signals


class _FaultsAsItems(Dataset):
    """Returns a DataError as an item. Its message would change if it crossed from a loading process as an exception."""

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
    """One batch of samples.

    Args:
        items: samples, or the faults of samples.
        num_classes: classes of the label maps.
        sizes: (height, width) of every resolution whose label patterns are needed.
        kernel_size: of SPADE's convolutions.

    Returns:
        The LabelMap with its patterns and the images in channels-last memory; or the first fault.
    """
    fault = next((item for item in items if isinstance(item, data.DataError)), None)
    if fault is not None:
        return fault
    batch = stack(items)
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


def device_batches(
    dataset: data.SegmentationDataset,
    config: ResolvedConfig,
    generator: SPADEGenerator,
    ranks: Ranks,
    epoch: int,
    batch: int,
) -> Generator[tuple[LabelMap, Tensor] | data.DataError, None, None]:
    """This process's share of every batch from (epoch, batch) on, without end, on the device.

    Close the generator to end the loading processes.

    Args:
        dataset: the training samples.
        config: resolved options.
        generator: the network whose resolutions need label patterns.
        ranks: the processes.
        epoch, batch: the first batch; both count from 0.

    Yields:
        Labels and images, or the fault of a sample.
    """
    order = EpochBatches(len(dataset), config.batch_size, config.seed, epoch, batch, ranks.share(config.batch_size))
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
        generator=torch.Generator(),  # its own: a resume restores the global one, so the loader must not draw from it
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


def stack(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Samples as one batch, without their paths."""
    return default_collate([{k: v for k, v in item.items() if k != "path"} for item in items])
