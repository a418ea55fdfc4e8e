# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedule and sample order."""

import pytest

from spade_fast.train.schedule import EpochBatches, lr_factor


def test_linear_decay_of_the_paper():
    # 200 epochs, linear to 0 from epoch 100: full up to epoch 100, half at 150, 1/100 in the last, never 0
    assert [lr_factor(e, 200, 100) for e in (0, 99, 100, 150, 199)] == [1, 1, 1, 0.5, 0.01]
    assert [lr_factor(e, 4, 0) for e in range(4)] == [1, 0.75, 0.5, 0.25]
    assert lr_factor(7, 4, 0) == 0.25  # after the end: as the last
    assert [lr_factor(e, 100, None) for e in (0, 99)] == [1, 1]
    assert lr_factor(3, 4, 9) == 1  # decay never reached


def test_an_epoch_takes_every_sample_at_most_once_and_drops_the_rest():
    batches = list(EpochBatches(11, 3, seed=0, epoch=0))
    assert [len(b) for b in batches] == [3, 3, 3] == [3] * len(EpochBatches(11, 3, 0, 0))
    flat = [i for b in batches for i in b]
    assert len(set(flat)) == 9
    assert set(flat) <= set(range(11))


def test_order_depends_on_seed_and_epoch_alone():
    first = list(EpochBatches(50, 5, seed=1, epoch=2))
    assert first == list(EpochBatches(50, 5, seed=1, epoch=2))
    assert first != list(EpochBatches(50, 5, seed=1, epoch=3))
    assert first != list(EpochBatches(50, 5, seed=2, epoch=2))
    assert sorted(i for b in first for i in b) == list(range(50))


@pytest.mark.parametrize("start", [0, 1, 9, 10])
def test_a_resumed_epoch_is_the_rest_of_it(start):
    whole = list(EpochBatches(50, 5, seed=1, epoch=2))
    rest = EpochBatches(50, 5, seed=1, epoch=2, start=start)
    assert list(rest) == whole[start:]
    assert len(rest) == 10 - start
