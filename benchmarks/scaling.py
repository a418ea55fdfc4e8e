# SPDX-License-Identifier: Apache-2.0
"""The training step on 1, 2, 4, ... processes: ``python -m benchmarks.scaling``.

Weak scaling keeps the images of a process, strong scaling the images of all together. Processes communicate over gloo
on a CPU and over NCCL on GPUs. What a step communicates is counted, not estimated. Processes on one CPU share its
cores; there only the counts say something about other machines.

A model of 8 to 512 GPUs follows. It takes the measured step of one process, the counted bytes and collectives, and
stated figures of the network. Its rows say that they are a model.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import label_maps, stamp, synchronize, write_json
from spade_fast import LabelMap
from spade_fast.models import SPADEGenerator, VGG19Features, init_weights
from spade_fast.train import config as cfg
from spade_fast.train.batches import pattern_sizes
from spade_fast.train.profiling import timed
from spade_fast.train.ranks import Ranks
from spade_fast.train.setup import build_networks
from spade_fast.train.step import TrainingStep

LABEL_NC = 184
NODE = 8  # GPUs of a machine, in the model


def worker(rank: int, world: int, folder: str, options: argparse.Namespace, batch: int) -> None:
    """One process: `options.rounds` steps of a global batch; its times, counts and bytes go to a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if world > 1:
        store = f"file://{folder}/store-{world}-{batch}"
        backend, wait = ("nccl" if cuda else "gloo"), datetime.timedelta(minutes=5)
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=world, timeout=wait)
    ranks = Ranks(options.device)
    step, labels, image = system(options, ranks, batch)
    result = {**count(step, labels, image, ranks), **measure(step, labels, image, ranks, options.rounds)}
    if rank == 0:
        torch.save(result, Path(folder) / f"result-{world}-{batch}")
    if world > 1:
        dist.destroy_process_group()


def system(options: argparse.Namespace, ranks: Ranks, batch: int) -> tuple[TrainingStep, LabelMap, torch.Tensor]:
    """(TrainingStep, labels and images of this process's part of the batch)."""
    config = cfg.resolve_config(
        cfg.merge(
            {},
            {
                **{
                    "dataset": "coco",
                    "dataroot": "-",
                    "crop_size": options.crop,
                    "ngf": options.ngf,
                    "ndf": options.ngf,
                },
                **{"batch_size": batch, "amp": "auto", "ema": 0.0},
            },
        )
    )
    torch.manual_seed(0)
    nets = build_networks(config, LABEL_NC)
    for net in nets.values():
        init_weights(net)
        net.to(ranks.device).train()
    step = TrainingStep(nets, config, VGG19Features().to(ranks.device), ranks)
    first, last = ranks.share(batch)
    maps, _ = label_maps(options.crop)
    generator = nets["generator"]
    assert isinstance(generator, SPADEGenerator)
    sizes = pattern_sizes(generator)
    labels = LabelMap.cat([maps[i % len(maps)][:].build(sizes, backward=True) for i in range(first, last)])
    image = torch.rand(batch, 3, options.crop, options.crop, generator=torch.Generator().manual_seed(1))[first:last]
    image = (image * 2 - 1).to(ranks.device).contiguous(memory_format=torch.channels_last)
    return step, labels.to(ranks.device), image


def exchange(step: TrainingStep, labels: LabelMap, image: torch.Tensor, ranks: Ranks, i: int) -> torch.Tensor:
    """An iteration as the trainer makes it. At its end processes exchange losses and requests to stop."""
    terms = step(labels, image, i)
    return ranks.sum(torch.cat([torch.stack(list(terms.values())), torch.zeros(4, device=image.device)]))


def count(step: TrainingStep, labels: LabelMap, image: torch.Tensor, ranks: Ranks) -> dict:
    """Collectives of a step by kind, and the bytes that each process puts into them."""
    gradients = {"calls": 0, "bytes": 0}

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations kept as strings
        gradients["calls"] += 1
        gradients["bytes"] += bucket.buffer().numel() * bucket.buffer().element_size()
        future = dist.all_reduce(bucket.buffer().div_(ranks.world), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    for net in step._parallel.values():
        assert isinstance(net, DistributedDataParallel)
        net.register_comm_hook(None, hook)
    exchange(step, labels, image, ranks, 0)  # After the first step the buckets are in their final order.
    gradients.update(calls=0, bytes=0)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        losses = exchange(step, labels, image, ranks, 1)
    kinds = {
        "gradients": dict(gradients),
        "losses and stops": {"calls": int(ranks.world > 1), "bytes": 4 * losses.numel()},
    }
    names = {"all_gather_into_tensor": "statistics forward", "all_reduce": "statistics backward"}
    for name, kind in names.items():
        found = [e for e in trace.events() if e.name == f"_c10d_functional::{name}"]
        kinds[kind] = {"calls": len(found), "bytes": sum(4 * math.prod(e.input_shapes[0]) for e in found)}
    return {"collectives": {k: v for k, v in kinds.items() if v["calls"]}}


def measure(step: TrainingStep, labels: LabelMap, image: torch.Tensor, ranks: Ranks, rounds: int) -> dict:
    """The median time of a step, and the share of it that is backward."""
    times = []
    for i in range(rounds):
        if ranks.world > 1:
            dist.barrier()
        synchronize(image.device)
        start = time.perf_counter()
        exchange(step, labels, image, ranks, 2 + i).tolist()
        times.append(time.perf_counter() - start)
    with timed() as parts:
        exchange(step, labels, image, ranks, 2 + rounds)
    return {"step_ms": 1e3 * statistics.median(times), "backward_share": parts["backward"] / parts["step"]}


def model(one: dict, several: dict, gpus: int, images: int, options: argparse.Namespace) -> dict:
    """A step of R = `gpus` GPUs with `images` images each, as a row of the results.

    - Compute is the step measured on one process.
    - Gradients: a ring all-reduce sends and receives 2 (R-1)/R times their bytes over the slowest link. It hides behind
      backward.
    - Statistics: every collective waits for its latency, which grows with the logarithm of the machines. Gathering
      receives R-1 times its bytes.

    Args:
        one: the measured step of one process.
        several: the counted collectives of several.
        gpus: how many, `NODE` a machine.
        images: of each GPU.
        options: the figures of the network.
    """
    nodes = math.ceil(gpus / NODE)
    bandwidth = 1e9 * (options.node_gbs if nodes == 1 else options.network_gbs)
    latency = 1e-6 * (options.node_us + (options.network_us * math.log2(nodes) if nodes > 1 else 0))
    compute = 1e-3 * one["step_ms"]
    kinds = several["collectives"]
    gradients = 2 * (gpus - 1) / gpus * kinds["gradients"]["bytes"] / bandwidth
    exposed = max(0.0, gradients - compute * one["backward_share"])
    gathered = kinds["statistics forward"]["bytes"] * (gpus - 1) / bandwidth
    reduced = 2 * (gpus - 1) / gpus * kinds["statistics backward"]["bytes"] / bandwidth
    calls = sum(kind["calls"] for name, kind in kinds.items() if name != "gradients")
    step = compute + exposed + gathered + reduced + calls * latency
    return {
        "model": True,
        "gpus": gpus,
        "step_ms": 1e3 * step,
        "gradients_ms": 1e3 * gradients,
        "gradients_exposed_ms": 1e3 * exposed,
        "statistics_ms": 1e3 * (gathered + reduced + calls * latency),
        "images_per_second": gpus * images / step,
        "efficiency": compute / step,
    }


def run(options: argparse.Namespace) -> dict:
    result: dict = {"stamp": stamp(options.device), "config": {k: v for k, v in vars(options).items() if k != "json"}}
    worlds = [w for w in options.worlds if options.device == "cpu" or w <= torch.cuda.device_count()]
    for kind in ("weak", "strong"):
        rows = result[kind] = []
        for world in worlds:
            batch = options.batch * (world if kind == "weak" else max(worlds))
            with tempfile.TemporaryDirectory() as folder:
                spawn(worker, (world, folder, options, batch), nprocs=world)
                row = torch.load(Path(folder) / f"result-{world}-{batch}")
            row |= {"processes": world, "batch": batch, "images_per_second": 1e3 * batch / row["step_ms"]}
            row["efficiency"] = row["images_per_second"] / (world * (rows[0] if rows else row)["images_per_second"])
            rows.append(row)
            print(
                f"  {kind:6s} {world} processes, batch {batch}: {row['step_ms']:9.1f} ms, "
                f"{row['images_per_second']:.2f} images/s, efficiency {row['efficiency']:.0%}"
            )
            for name, value in row["collectives"].items():
                print(f"         {name}: {value['calls']} collectives, {value['bytes'] / 1e6:.3f} MB")
    if len(worlds) > 1:
        one, several = result["weak"][0], result["weak"][-1]
        if options.step_ms:
            one = {**one, "step_ms": options.step_ms}
        result["model"] = [model(one, several, 2**i, options.batch, options) for i in range(3, 10)]
        print(f"  model, from a step of {one['step_ms']:.1f} ms and {options.batch} images on one process:")
        for row in result["model"]:
            print(
                f"  model {row['gpus']:4d} GPUs: {row['step_ms']:9.1f} ms (gradients {row['gradients_ms']:.1f}, "
                f"{row['gradients_exposed_ms']:.1f} not hidden; statistics {row['statistics_ms']:.1f}), "
                f"{row['images_per_second']:.0f} images/s, efficiency {row['efficiency']:.0%}"
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes (default: 1 2 4)"
    )
    parser.add_argument("--batch", type=int, default=None, help="images a process; default: 4 on a GPU, 1 on a CPU")
    parser.add_argument("--ngf", type=int, default=64)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a small system and a short run")
    figures = parser.add_argument_group("the model's figures")
    figures.add_argument("--step-ms", type=float, help="step of one GPU, instead of the one measured here")
    figures.add_argument("--node-gbs", type=float, default=300.0, help="GB/s a GPU within a machine (NVLink: 300)")
    figures.add_argument("--network-gbs", type=float, default=40.0, help="GB/s a GPU between machines (400 Gb/s: 40)")
    figures.add_argument("--node-us", type=float, default=20.0, help="µs of a small collective within a machine")
    figures.add_argument("--network-us", type=float, default=10.0, help="µs more for each doubling of machines")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    options.batch = options.batch or (4 if options.device == "cuda" else 1)
    if options.quick:
        options.rounds = 3
        if options.device == "cpu":
            options.ngf, options.crop = 8, 64
    write_json(options.json, run(options))


if __name__ == "__main__":
    main()
