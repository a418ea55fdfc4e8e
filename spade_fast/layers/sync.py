# SPDX-License-Identifier: Apache-2.0
"""The processes over which a layer with norm="syncbatch" takes its batch statistics."""

from __future__ import annotations

import os
import warnings
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from spade_fast.ops.sync_modulation import Group

_warned = False


class Layer(Protocol):
    """What a layer says about the processes that share its statistics."""

    norm: str
    param_free_norm: nn.Module
    process_group: Group | None


def set_process_group(network: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Chooses the processes over which the FusedSPADE layers of a network take their batch statistics.

    Layers with ``norm="syncbatch"`` share batch statistics in training mode once torch.distributed is initialized: over
    NCCL on GPUs, over gloo on CPUs. Layers with ``norm="batch"`` never do.

    Args:
        network: any module. Modules in it that are no FusedSPADE are left alone.
        group: the processes; None, the setting of a new layer, for all processes.
    """
    chosen = None if group is None else (group.group_name, group.size())
    for module in network.modules():
        if "param_free_norm" in module._modules and "process_group" in module.__dict__:
            module.__dict__["process_group"] = chosen


def layer_group(layer: Layer) -> Group | None:
    """The group over which a layer shares its statistics in training mode, or None."""
    norm = layer.param_free_norm
    if not isinstance(norm, nn.SyncBatchNorm):
        return group_of(layer.norm, layer.process_group)
    chosen = layer.process_group
    if norm.process_group is not None:
        chosen = norm.process_group.group_name, norm.process_group.size()
    return group_of("syncbatch", chosen)


def group_of(norm: str, chosen: Group | None) -> Group | None:
    """The group to share statistics over. None for one process, and for a norm that does not share."""
    if norm != "syncbatch":
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if not torch.compiler.is_compiling():
            _warn_uninitialized(chosen)
        return None
    if chosen is None:
        chosen = _world()
    return chosen if chosen[1] > 1 else None


def _world() -> Group:
    world = dist.group.WORLD
    assert world is not None
    return world.group_name, dist.get_world_size()


def _warn_uninitialized(chosen: Group | None) -> None:
    global _warned
    if _warned or (chosen is None and int(os.environ.get("WORLD_SIZE", 1)) <= 1):
        return
    _warned = True
    cause = "a process group was chosen" if chosen is not None else f"WORLD_SIZE is {os.environ['WORLD_SIZE']}"
    warnings.warn(
        f'{cause}, but torch.distributed is not initialized: norm="syncbatch" takes statistics of this process alone '
        "(call torch.distributed.init_process_group first)",
        stacklevel=2,
    )
