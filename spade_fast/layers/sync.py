# SPDX-License-Identifier: Apache-2.0
"""Over which processes a layer with norm="syncbatch" takes its batch statistics."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
from torch import nn

from spade_fast.ops.sync_modulation import Group

_warned = False


def set_process_group(network: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Chooses the processes of every FusedSPADE layer of a network; None, as at first, is all that there are.

    Layers with norm="syncbatch" then share their batch statistics in training mode as soon as torch.distributed is
    initialized: over NCCL on GPUs, gloo on CPUs. norm="batch" never does.
    """
    chosen = None if group is None else (group.group_name, group.size())
    for module in network.modules():
        if hasattr(module, "process_group"):
            module.process_group = chosen


def layer_group(layer: nn.Module) -> Group | None:
    """The group over which a FusedSPADE layer shares its statistics in training mode, or None."""
    norm = layer.param_free_norm
    if not isinstance(norm, nn.SyncBatchNorm):
        return group_of(layer.norm, layer.process_group)
    chosen = layer.process_group
    if norm.process_group is not None:
        chosen = norm.process_group.group_name, norm.process_group.size()
    return group_of("syncbatch", chosen)


def group_of(norm: str, chosen: Group | None) -> Group | None:
    """The group to share statistics over, or None: one process, or a norm that does not share."""
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
    return dist.group.WORLD.group_name, dist.get_world_size()


def _warn_uninitialized(chosen: Group | None) -> None:
    global _warned
    if _warned or (chosen is None and int(os.environ.get("WORLD_SIZE", 1)) <= 1):
        return
    _warned = True
    why = "a process group was chosen" if chosen is not None else f"WORLD_SIZE is {os.environ['WORLD_SIZE']}"
    warnings.warn(
        f'{why}, but torch.distributed is not initialized: norm="syncbatch" takes statistics of this process alone '
        "(call torch.distributed.init_process_group first)",
        stacklevel=2,
    )
