# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of training count and compute; no test here times anything."""

import argparse
import statistics
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from benchmarks import gpu, init, scaling, train_step
from spade_fast.models import count_parameters
from spade_fast.train.config import merge, resolve_config
from spade_fast.train.setup import build_networks


@pytest.mark.parametrize(("limit", "start"), [(0, 4), (3, 4), (4, 4), (19, 4), (100, 16), (2000, 16)])
def test_largest_batch_is_found_to_an_eighth(limit, start):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = train_step.largest(fits, start, 1024)
    assert found <= limit
    assert limit < 1.125 * (found + 1) or found == 1024
    assert max(tried) <= 1024


def test_goals_of_a_gpu():
    """The fastest fused system is judged. A goal that was not measured is neither met nor missed."""
    plain, compiled, fused = train_step.PLAIN, train_step.COMPILED, "fused AMP"
    result = {
        "fastest": fused,
        "ratios": {plain: 5.0, compiled: 2.4, "fused": 1.5},
        "peak_memory_bytes": {plain: 900, compiled: 500, fused: 200},
        "images_per_second": {plain: 41.0, compiled: 85.0, fused: 205.0},
        "host_synchronizations": 0,
    }
    rows = gpu.judge({"train_step": {"result": result}})
    assert [row["measured"] for row in rows] == [2.4, 5.0, 0.4, 205.0, 0]
    assert [row["met"] for row in rows] == [False, True, True, True, True]
    assert {row["met"] for row in gpu.judge({"train_step": {"status": "failed"}})} == {None}


def test_model_by_hand():
    """16 GPUs on 2 machines: 100 MB of gradients at 10 GB/s take 2·15/16·10 ms. Backward hides 10 ms of them."""
    options = argparse.Namespace(node_gbs=100.0, network_gbs=10.0, node_us=20.0, network_us=10.0)
    one = {"step_ms": 20.0, "backward_share": 0.5}
    kinds = {
        "gradients": {"calls": 4, "bytes": 100_000_000},
        "statistics forward": {"calls": 28, "bytes": 1_000_000},
        "statistics backward": {"calls": 14, "bytes": 800_000},
        "losses and stops": {"calls": 1, "bytes": 36},
    }
    row = scaling.model(one, {"collectives": kinds}, 16, 4, options)
    assert row["model"] is True
    assert row["gradients_exposed_ms"] == pytest.approx(18.75 - 10)
    assert row["statistics_ms"] == pytest.approx(1.5 + 0.15 + 43 * 0.03)
    assert row["step_ms"] == pytest.approx(20 + 8.75 + 2.94)
    assert row["images_per_second"] == pytest.approx(64e3 / 31.69, rel=1e-3)


def test_collectives_and_bytes_of_a_step(tmp_path):
    """Two processes exchange every gradient once, and statistics of 14 inputs in each of two forwards."""
    options = argparse.Namespace(device="cpu", ngf=4, crop=32, rounds=1)
    mp.spawn(scaling.worker, (2, str(tmp_path), options, 2), nprocs=2)
    counted = torch.load(Path(tmp_path) / "result-2-2")["collectives"]
    config = {"dataset": "coco", "dataroot": "-", "crop_size": 32, "ngf": 4, "ndf": 4}
    nets = build_networks(resolve_config(merge({}, config)), scaling.LABEL_NC)
    assert counted["gradients"]["bytes"] == 4 * sum(count_parameters(net) for net in nets.values())
    channels = []  # of each input of a norm
    for block, _ in nets["generator"].blocks():
        channels += [block.norm_0.norm_nc, block.norm_1.norm_nc]
    assert counted["statistics forward"] == {"calls": 28, "bytes": 2 * 4 * sum(2 * c + 1 for c in channels)}
    assert counted["statistics backward"] == {"calls": 14, "bytes": 4 * sum(2 * c for c in channels)}
    assert counted["losses and stops"]["calls"] == 1


@pytest.mark.parametrize("start", ["released", "glorot"])
def test_first_change_of_a_weight_is_the_learning_rate_over_its_size(start):
    """Adam with beta1 = 0 moves every value by the learning rate in its first step."""
    options = {"dataset": "synthetic", "synthetic_size": 4, "crop_size": 32, "load_size": 32, "ngf": 8, "ndf": 8}
    change = init.first_change(start, **options, batch_size=2)
    run = init.Training(start, 0, **options, batch_size=2)
    # Elsewhere some values stay: taps that see padding alone, channels of classes that are not in the batch.
    weights = init.kernels(run.nets["discriminator"])["spectral norm"]
    expected = statistics.median(4e-4 / w.detach().square().mean().sqrt().item() for w in weights)
    assert change["discriminator"]["spectral norm"] == pytest.approx(expected, rel=0.02)
