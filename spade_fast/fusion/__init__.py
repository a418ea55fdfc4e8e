# SPDX-License-Identifier: Apache-2.0
"""fuse(): SPADE layers of other code evaluated by pattern, in place, each proven equal before it is kept."""

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
from spade_fast.fusion.structure import NotUnderstood, Structure, understand
from spade_fast.layers.spade import FusedSPADE

__all__ = ["FuseReport", "FusedLayer", "fuse", "unfuse"]


def fuse(
    model: nn.Module, adapters: Mapping[str, Adapter] | None = None, example: tuple[Any, ...] | None = None
) -> FuseReport:
    """Replaces the forward of every SPADE layer of a model by one that evaluates once per distinct label patch.

    The change is in place: modules, parameters, buffers, names and state dict stay. :func:`unfuse` undoes it.

    Layers are recognized by what they are made of, not by their names. A layer is fused only if outputs, all gradients
    and buffers agree with the module's own. They are compared on random input, in evaluation and training, with random
    weights and the layer's own. Every other layer stays as it is, and the report says why.

    A fused layer runs as before in three cases: a submodule, a hook or an option of it was changed afterwards; it is
    traced, compiled, exported or transformed by ``torch.func``; it is called with arguments unlike those proven.

    A fused layer takes a :class:`spade_fast.LabelMap` in place of its one-hot map, too.

    Examples:
        >>> from spade_fast.reference import SPADE
        >>> report = fuse(nn.ModuleDict({"norm": SPADE(norm_nc=4, label_nc=3)}))
        >>> [layer.how for layer in report.fused]
        ['batch norm']

    Args:
        model: any module. Its parameters are float32 or float64.
        adapters: by the name of a layer's class, a function of the layer's arguments that returns (x, map). They are
            for layers that are called with other arguments, and they need an example.
        example: arguments of the model. ``model(*example)`` is then run once in evaluation mode, and layers are also
            compared and timed at the shapes that they have in it.

    Returns:
        What was done with each layer. It prints as a table.

    Raises:
        TypeError: example is not a tuple.
        ValueError: the model has no module of an adapter's class.
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
        except Exception as error:  # a foreign module may raise anything, and is then left as it is
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
    """Takes back what :func:`fuse` did to a model. Weights that were trained since stay.

    Args:
        model: the module that was given to :func:`fuse`.
    """
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, (FusedForward, ScopedForward)):
            del module.forward
        if isinstance(forward, ScopedForward) and forward.before is not None:
            module.forward = forward.before


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    """(name, module, Structure or NotUnderstood) of what looks like SPADE, in the model's order.

    Of nested candidates, the innermost counts. What is around it, such as an activation or added noise, runs as before.
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

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
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


def _example(module: nn.Module, structure: Structure, call: tuple | None, adapter: Adapter | None) -> Example | None:
    """The recorded call of a layer; None where there is none or it has no x and map."""
    if call is None:
        if adapter is not None:
            raise NotUnderstood("has an adapter, but no example that calls it")
        return None
    args, kwargs = call
    if kwargs:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        if bound.kwargs:  # some arguments can be given by keyword only
            return None
        args = bound.args[1:]
    x: Any = None
    labels: Any = None
    if adapter is not None:
        x, labels = adapter(*args)
    elif structure.only_map:
        labels = args[0] if args else None
    elif len(args) >= 2:
        x, labels = args[:2]
    if not isinstance(labels, Tensor) or not (structure.only_map or isinstance(x, Tensor)):
        return None

    def build(new_x: Tensor | None, new_labels: Tensor) -> tuple:
        return tree_map(lambda t: new_x if t is x else new_labels if t is labels else t, args)

    return Example(build, x, labels)
