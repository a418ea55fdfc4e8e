# SPDX-License-Identifier: Apache-2.0
"""fuse(): other people's SPADE layers evaluated by pattern, in place, each proven equal before it is kept."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spade_fast.fusion.forward import Adapter, FusedForward, ScopedForward
from spade_fast.fusion.proof import Example, find_reading, kept, prove
from spade_fast.fusion.report import FusedLayer, FuseReport
from spade_fast.fusion.structure import NotUnderstood, understand
from spade_fast.layers.spade import FusedSPADE

__all__ = ["FuseReport", "FusedLayer", "fuse", "unfuse"]


def fuse(
    model: nn.Module, adapters: Mapping[str, Adapter] | None = None, example: tuple[Any, ...] | None = None
) -> FuseReport:
    """Replaces the forward of every SPADE layer of a model by one that evaluates once per distinct label patch.

    In place: modules, parameters, buffers, names and state dict stay; :func:`unfuse` undoes it. Layers are recognized
    by what they are made of, not by their names, and kept only if outputs, all gradients and buffers agree with the
    module's on random input, in evaluation and training, with random weights and its own. All others are left, and the
    report says why. A fused layer that is changed afterwards (a submodule, a hook, an option), is traced, compiled,
    exported or transformed by ``torch.func``, or is called with arguments unlike those proven, runs as before. A fused
    layer takes a :class:`spade_fast.LabelMap` for its one-hot map, too.

    Args:
        model: any module. Its parameters are float32 or float64.
        adapters: by name of a layer's class, a function of the layer's arguments that returns (x, map), for layers
            that are not called with those two. They need an example.
        example: arguments of the model. Layers are then also compared and timed at the shapes they have in
            ``model(*example)``, which is run once, in evaluation mode.

    Returns:
        What was done with each layer, a table when printed.

    Raises:
        TypeError: an example that is not a tuple.
        ValueError: an adapter for a class of which the model has no module.
    """
    if example is not None and not isinstance(example, tuple):
        raise TypeError(f"example must be a tuple of the model's arguments, got {type(example).__name__}")
    adapters = adapters or {}
    classes = {type(module).__name__ for module in model.modules()}
    for name in adapters:
        if name not in classes:
            raise ValueError(f"adapters: {type(model).__name__} has no module of class {name!r}")
    unfuse(model)
    found, layers = _candidates(model), []
    calls = {} if example is None else _record(model, example, [m for _, m, _ in found])
    for name, module, structure in found:
        cls = type(module).__name__
        try:
            if isinstance(structure, NotUnderstood):
                raise structure
            call = _example(module, structure, calls.get(module), adapters.get(cls))
            only = call if cls in adapters else None
            fused, dtype = find_reading(module, structure, adapters.get(cls), only)
            differences = prove(module, fused, dtype, only, call)
        except NotUnderstood as reason:
            layers.append(FusedLayer(name, cls, False, str(reason)))
            continue
        except Exception as error:  # whatever a foreign module raises, it is left
            text = (str(error).splitlines() or [""])[0]
            layers.append(FusedLayer(name, cls, False, f"{type(error).__name__} in the comparison: {text}"))
            continue
        module.forward = fused
        how = fused.structure.describe() + (", adapter" if cls in adapters else "")
        layers.append(FusedLayer(name, cls, True, how, *vars(differences).values()))
    if any(layer.fused for layer in layers) and not isinstance(model.__dict__.get("forward"), FusedForward):
        model.forward = ScopedForward(model)
    return FuseReport(layers)


def unfuse(model: nn.Module) -> None:
    """Takes back what :func:`fuse` did to a model. Weights trained since stay."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, (FusedForward, ScopedForward)):
            del module.forward
        if isinstance(forward, ScopedForward) and forward.before is not None:
            module.forward = forward.before


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    """(name, module, Structure or NotUnderstood) of what looks like SPADE, in the model's order.

    The innermost: what is around one (an activation, noise added to x) runs as before.
    """
    found: dict[nn.Module, tuple[str, nn.Module, Any]] = {}
    modules = list(model.named_modules())
    for name, module in reversed(modules):  # submodules come before what holds them
        if any(part in found for part in module.modules()):
            continue
        try:
            structure = (
                NotUnderstood("is a FusedSPADE already") if isinstance(module, FusedSPADE) else understand(module)
            )
        except NotUnderstood as reason:
            structure = reason
        if structure is not None:
            found[module] = (name, module, structure)
    return [found[module] for _, module in modules if module in found]


def _record(model: nn.Module, example: tuple, modules: list[nn.Module]) -> dict[nn.Module, tuple]:
    """The arguments of each module's first call in model(*example)."""
    calls: dict[nn.Module, tuple] = {}

    def note(module, args, kwargs):
        calls.setdefault(module, (args, kwargs))

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    try:
        with kept(model), torch.no_grad():
            model.eval()
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _example(module: nn.Module, structure, call: tuple | None, adapter: Adapter | None) -> Example | None:
    if call is None:
        if adapter is not None:
            raise NotUnderstood("has an adapter, but no example that calls it")
        return None
    args, kwargs = call
    if kwargs:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        if bound.kwargs:  # of keywords alone
            return None
        args = bound.args[1:]
    if adapter is not None:
        x, labels = adapter(*args)
    elif structure.only_map:
        x, labels = None, args[0] if args else None
    else:
        x, labels = args[:2] if len(args) >= 2 else (None, None)
    if not isinstance(labels, Tensor) or not (structure.only_map or isinstance(x, Tensor)):
        return None

    def build(new_x: Tensor | None, new_labels: Tensor) -> tuple:
        return tree_map(lambda t: new_x if t is x else new_labels if t is labels else t, args)

    return Example(build, x, labels)
