# SPDX-License-Identifier: Apache-2.0
"""The processes of one training run: one process, or those that torchrun started on one machine or on many."""

from __future__ import annotations

import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spade_fast.cli import ConfigError, pick_device


class Ranks:
    """This process among `world` processes. Rank 0 logs and saves.

    Joins the process group that torchrun's environment describes (NCCL on GPUs, gloo on CPUs), unless the program has
    initialized one.

    Args:
        device: as the option. With several processes, `auto` and `cuda` mean the GPU of the process's local rank.

    Raises:
        ConfigError: the device is not there, or several processes are to share one GPU.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = pick_device(device)
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self._joined = False
        if dist.is_available() and dist.is_initialized():
            self.world = dist.get_world_size()
        if self.world > 1 and self.device.type == "cuda":
            if self.device.index is not None:
                raise ConfigError(
                    f"--device {device}: each of the {self.world} processes takes a GPU; use auto or cuda"
                )
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            cuda = self.device.type == "cuda"
            # The GPU is named so that NCCL is set up now, and not in the middle of the first step.
            dist.init_process_group("nccl" if cuda else "gloo", device_id=self.device if cuda else None)
            self._joined = True
        self.rank = dist.get_rank() if self.world > 1 else 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """(start, stop) of this process's share of `count` things. Shares differ by one at most."""
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def same(self, value: int, what: str) -> None:
        """Raises RuntimeError unless every process has this value. `what` names it."""
        if self.world == 1:
            return
        values = [torch.empty(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(values, torch.tensor([value], device=self.device))
        numbers = torch.cat(values).tolist()
        if len(set(numbers)) > 1:
            raise RuntimeError(f"the processes differ in {what}: {numbers}; do all of them see the same files?")

    def parallel(self, net: nn.Module) -> nn.Module:
        """The network with gradients averaged over processes while backward runs. One process gets the network itself.

        Every process starts with rank 0's weights and buffers. Later, buffers need no broadcast. Spectral norm's
        vectors are functions of weights, which are equal everywhere. Synchronized running statistics are equal too.
        """
        if self.world == 1:
            return net
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)  # with weights, DistributedDataParallel does it
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters  # torch 2.13
        buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return DistributedDataParallel(net, gradient_as_bucket_view=True, **buffers)

    def leave(self) -> None:
        """Leaves the process group that the constructor joined. After a failure, torchrun does that."""
        if self._joined:
            dist.destroy_process_group()


def no_sync(net: nn.Module) -> AbstractContextManager:
    """Inside, forward and backward of a network of `Ranks.parallel` keep gradients to this process."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()
