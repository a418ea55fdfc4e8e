# SPDX-License-Identifier: Apache-2.0
"""The batch size where none is given: what fits a folder's samples and the device."""

from __future__ import annotations

import dataclasses

import torch

from spade_fast import data
from spade_fast.train.config import PAPERS_BATCH_SIZE, ResolvedConfig
from spade_fast.train.memory import estimate

LARGEST_ON_CPU = 4  # larger batches make the steps of a CPU long, and its memory full
STEPS_AN_EPOCH = 3  # at least, where there are samples for it
USABLE = 0.8  # share of a GPU's memory; the rest is for workspaces


def fit_batch_size(
    config: ResolvedConfig, dataset: data.SegmentationDataset, device: torch.device, world: int = 1
) -> tuple[ResolvedConfig, str | None]:
    """The options with a batch size.

    Args:
        config: resolved options; a batch size that they have stays.
        dataset: the training samples.
        device: what one process computes on.
        world: the number of processes.

    Returns:
        The options, and a line that says what was chosen and why (None when nothing was).
    """
    if config.batch_size:
        return config, None
    least = world * config.accumulate
    largest, why = PAPERS_BATCH_SIZE, "the paper's"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        need = estimate(config, dataset.label_nc)
        fitting = least * int((USABLE * total - need.fixed) // need.per_image)
        if fitting < largest:
            largest, why = fitting, f"what fits {total / 2**30:.0f} GiB of GPU memory"
    elif LARGEST_ON_CPU * world < largest:
        largest, why = LARGEST_ON_CPU * world, "enough for a CPU"
    if len(dataset) // STEPS_AN_EPOCH < largest:
        # Two images at least where there are two: batch norm needs more than one.
        largest, why = (
            max(len(dataset) // STEPS_AN_EPOCH, min(len(dataset), largest, 2)),
            f"what fits {len(dataset)} samples",
        )
    size = least
    while 2 * size <= largest:
        size *= 2
    chosen = dataclasses.replace(config, batch_size=size)
    return chosen, f"batch size {size}: {why}; --batch-size sets another"
