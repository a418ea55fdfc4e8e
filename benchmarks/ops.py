# SPDX-License-Identifier: Apache-2.0
"""Every operator against its floor, on every backend the device has: ``python -m benchmarks.ops``.

The floor is the bytes that must move (each large input is read once, each output is written once, tables count once)
over the copy bandwidth measured in the same run. Results are checked against float64 before anything is timed. On a GPU
the results name every kernel of an operator too, with its launches and its time on the device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.ops import CASES, SIZES, Case, Operands, check_case, expected_of
from benchmarks.ceilings import measure as measure_ceilings
from benchmarks.common import interleave, label_maps, stamp, write_json
from spade_fast import LabelMap
from spade_fast.ops import _backend as backend

OF_THE_MAP = ("patterns, six resolutions", "recognize", "recognize, channels-last")  # the same for every layer size


def kernels_of(call: Callable[[], object]) -> dict[str, dict]:
    """Kernel name -> launches and microseconds on the GPU in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    return {e.key: {"launches": e.count, "us": e.self_device_time_total} for e in events}


def run_on(name: str, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    with backend.use(name):
        return call()


def measure_case(name: str, case: Case, expected: list[Tensor], floor_ms: float, options: argparse.Namespace) -> dict:
    """Times of one case on every backend, each with its share of the copy bandwidth."""
    cuda = torch.device(options.device).type == "cuda"
    calls: dict[str, Callable[[], object]] = {}
    for other in backend.available(options.device):
        with backend.use(other):
            check_case(f"{name} on {other}", case, expected, 2e-2 if cuda else case.bound)
        calls[other] = partial(run_on, other, case.call)
    times = interleave(calls, options.device, options.seconds, rounds=(3, 30))
    row = {other: {**t, "of_copy_bandwidth": floor_ms / t["median_ms"]} for other, t in times.items()}
    if cuda:
        for other, call in calls.items():
            row[other]["kernels"] = kernels_of(call)
    return row


def measure(options: argparse.Namespace) -> dict:
    device = options.device
    maps, source = label_maps(256)
    labels = LabelMap.cat([maps[i % len(maps)] for i in range(options.batch)]).to(device)
    print(f"label maps: {source}")
    bandwidth = measure_ceilings(device)["copy_gb_s"]
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    result: dict = {"stamp": stamp(device), "copy_gb_s": bandwidth, "labels": source, "batch": options.batch, "ops": {}}
    for channels, size in options.layers:
        operands = Operands(labels, channels, size, dtype)
        for name, build in CASES.items():
            if name in OF_THE_MAP and (channels, size) != options.layers[0]:
                continue
            case = build(operands)
            floor = case.floor_bytes / bandwidth / 1e6
            row = measure_case(name, case, expected_of(build, operands), floor, options)
            title = f"{name}, C={channels} @{size}²"
            result["ops"][title] = {"floor_ms": floor, "floor_bytes": case.floor_bytes, "flops": case.flops, **row}
            text = "  ".join(f"{n} {t['median_ms']:.3f} ms ({floor / t['median_ms']:.0%})" for n, t in row.items())
            print(f"{name:34s} C={channels:4d} @{size:3d}²  floor {floor:8.3f} ms  {text}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=None, help="default: 16 on a GPU, 1 on a CPU")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each op and size")
    parser.add_argument("--quick", action="store_true", help="one layer size, short runs")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    cuda = torch.device(options.device).type == "cuda"
    options.batch = options.batch or (16 if cuda else 1)
    options.layers = list(SIZES)
    if options.quick:
        options.seconds, options.layers = 0.5, [(128, 256), (1024, 32)] if cuda else [(64, 64)]
    write_json(options.json, measure(options))


if __name__ == "__main__":
    main()
