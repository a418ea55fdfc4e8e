# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run tell each other after a step."""

from __future__ import annotations

import signal

import torch
from torch import Tensor

from spade_fast.train.ranks import Ranks
from spade_fast.train.stopping import STOPPING

SIGNALS = tuple(number.name for number in STOPPING)
REASONS = (*SIGNALS, "time", "fault")


def exchange(
    ranks: Ranks, terms: dict[str, Tensor], received: signal.Signals | None, late: bool, fault: bool, picture: bool
) -> tuple[dict[str, float], str | None, bool]:
    """Sums the losses and wishes of all processes; the step's one wait for the GPU.

    All processes get the same answer. They stop, and draw pictures, after the same step.

    Args:
        ranks: the processes.
        terms: this process's shares of the losses, on the device.
        received: the signal that this process got, if any.
        late: whether its time is over.
        fault: whether it has no batch for the next step.
        picture: whether it wants a picture to be drawn.

    Returns:
        The losses of the whole batch, why to stop (one of REASONS; None: go on), and whether a picture is due.
    """
    flags = [*(received == number for number in STOPPING), late, fault, picture]
    mine = torch.tensor(flags, dtype=torch.float32).to(ranks.device, non_blocking=True)
    values = torch.cat([torch.stack([*terms.values()]).float(), mine]) if terms else mine
    numbers: list[float] = ranks.sum(values).tolist()
    *told, drawn = (number > 0 for number in numbers[len(terms) :])
    reason = next((reason for reason, yes in zip(REASONS, told, strict=True) if yes), None)
    return dict(zip(terms, numbers[: len(terms)], strict=True)), reason, drawn
