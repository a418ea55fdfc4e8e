# SPDX-License-Identifier: Apache-2.0
"""Several processes with gloo between them, for the tests of what runs on more than one."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode


def run(function: Callable, world: int, *arguments) -> list:
    """[function(rank, world, *arguments) for every rank], each in a process of its own; results are of plain types.

    function must be at the top level of a module."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (function, world, folder, arguments), nprocs=world)
        return [torch.load(Path(folder) / str(rank)) for rank in range(world)]


def _process(rank: int, function: Callable, world: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.save(function(rank, world, *arguments), Path(folder) / str(rank))
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """While entered, counts the functional collectives of this process by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and func is not torch.ops._c10d_functional.wait_tensor.default:
            name = func._schema.name.split("::")[1]
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))
