# SPDX-License-Identifier: Apache-2.0
"""What the processes tell each other after a step."""

import signal

import pytest
import torch

from spade_fast.train.exchange import REASONS, exchange
from spade_fast.train.stopping import STOPPING


class TwoRanks:
    """This process and another one, whose losses and wishes are given."""

    device = torch.device("cpu")

    def __init__(self, *others):
        self.others = torch.tensor(others, dtype=torch.float32)

    def sum(self, values):
        return values + self.others


NOTHING = [0.0] * (len(REASONS) + 1)
SHARES = {"gan": torch.tensor(1.5, dtype=torch.float64), "feat": torch.tensor(2.0)}


def test_losses_are_summed_and_nothing_is_a_reason():
    got = exchange(TwoRanks(0.25, 3.0, *NOTHING), SHARES, None, False, False, False)
    assert got == ({"gan": 1.75, "feat": 5.0}, None, False)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_of_either_process_stops_both(number):
    theirs = [float(name == number.name) for name in REASONS]
    assert exchange(TwoRanks(*theirs, 0.0), {}, None, False, False, False) == ({}, number.name, False)
    assert exchange(TwoRanks(*NOTHING), {}, number, False, False, False) == ({}, number.name, False)


def test_what_comes_first_where_there_are_several_reasons():
    both = TwoRanks(*[float(name in ("time", "fault")) for name in REASONS], 0.0)
    assert exchange(both, {}, signal.SIGTERM, True, True, False)[1] == "SIGTERM"
    assert exchange(both, {}, None, True, True, False)[1] == "time"
    assert exchange(TwoRanks(*NOTHING), {}, None, False, True, False)[1] == "fault"


def test_a_picture_that_one_process_wants_is_drawn_by_all():
    assert exchange(TwoRanks(*NOTHING[:-1], 1.0), {}, None, False, False, False) == ({}, None, True)
    assert exchange(TwoRanks(*NOTHING), {}, None, False, False, True) == ({}, None, True)
