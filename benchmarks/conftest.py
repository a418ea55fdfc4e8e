# SPDX-License-Identifier: Apache-2.0
"""Options and fixtures of the pytest-benchmark suite: ``pytest benchmarks --benchmark-only`` (or ``make bench``).

A group holds the variants of one case, the reference among them. `extra_info` has the bytes that the case must move,
the floating-point operations of the variant, both over the median time, and the error that was found before timing.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.common import label_maps, noise_map, read_size, stamp, synchronize
from spade_fast import LabelMap

SMALL = {"sizes": "512@32,64@128", "network": "16@128"}
TIMES = {"floor_bytes": "gb_s", "flops": "gflop_s"}  # each over the median time, in 10⁹ a second


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("spade-fast benchmarks")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", default=device, choices=("cpu", "cuda"), help="where to run (default: %(default)s)")
    group.addoption("--full", action="store_true", help="all layer sizes of the COCO-Stuff generator, and that one")
    sizes = f"channels@size of x of operators and layers (default: {SMALL['sizes']})"
    group.addoption("--sizes", metavar="C@S,...", help=sizes)
    group.addoption("--network", metavar="NGF@CROP", help=f"the generator (default: {SMALL['network']})")


def chosen_sizes(config: pytest.Config, full: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """What --sizes names, or with --full the given sizes.

    Raises:
        pytest.UsageError: --sizes is no list of such sizes.
    """
    if config.getoption("--full"):
        return list(full)
    return [_read_size("--sizes", size) for size in (config.getoption("--sizes") or SMALL["sizes"]).split(",")]


def chosen_network(config: pytest.Config) -> tuple[int, int]:
    """(ngf, crop) of the generator; errors as in `chosen_sizes`."""
    default = "64@256" if config.getoption("--full") else SMALL["network"]
    return _read_size("--network", config.getoption("--network") or default)


def _read_size(option: str, text: str) -> tuple[int, int]:
    try:
        return read_size(text)
    except argparse.ArgumentTypeError as error:
        raise pytest.UsageError(f"{option}: {error}") from None


def readable(value: tuple[int, int] | str) -> str:
    """The id of a parameter, in letters that an expression of -k may have."""
    text = value if isinstance(value, str) else "-".join(map(str, value))
    return re.sub(r"[^\w-]+", "-", text)


def batch_of(config: pytest.Config, kind: str, size: int = 256) -> LabelMap:
    """One label map on a CPU, 16 on a GPU: "maps" from the sample or its substitute, or "noise"."""
    device = config.getoption("--device")
    count = 16 if device == "cuda" else 1
    maps = [noise_map(size)] if kind == "noise" else label_maps(size, count)[0]
    return LabelMap.cat([maps[i % len(maps)] for i in range(count)]).to(device)


@functools.cache
def source() -> str:
    return label_maps(32, 1)[1]


def pytest_sessionstart(session: pytest.Session) -> None:
    """A wrong option or a missing sample ends the run here, with one line."""
    chosen_sizes(session.config, ()), chosen_network(session.config)
    try:
        source()
    except SystemExit as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header() -> str:
    return f"label maps: {source()}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    found = stamp(config.getoption("--device"))
    machine_info["spade_fast"] = {name: found[name] for name in ("device", "capability", "torch", "triton")}


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


Measure = Callable[..., None]


@pytest.fixture
def measure(benchmark: Any, device: str) -> Measure:
    """Times a call that was found to be right."""

    def run(call: Callable[[], object], group: str, *, floor_bytes: int, flops: int, relative_error: float) -> None:
        def finished() -> None:
            call()
            synchronize(device)

        benchmark.group = group
        info = {"floor_bytes": floor_bytes, "flops": flops, "relative_error": relative_error, "labels": source()}
        benchmark.extra_info.update(info)
        benchmark(finished)
        if benchmark.stats is not None:  # None under --benchmark-disable
            seconds = benchmark.stats.stats.median
            benchmark.extra_info.update({rate: info[name] / seconds / 1e9 for name, rate in TIMES.items()})

    return run
