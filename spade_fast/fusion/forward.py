# SPDX-License-Identifier: Apache-2.0
"""The forward that stands in a fused module's place, and that of the model around it."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast import reference
from spade_fast.functional import gamma_beta, spade
from spade_fast.fusion.structure import Structure
from spade_fast.labels.conditioning import conditioning
from spade_fast.labels.label_map import LabelMap
from spade_fast.labels.map_scope import map_scope

Adapter = Callable[..., tuple[Tensor, Tensor]]
_PLAIN = (Tensor, nn.Parameter)
_SIMPLE = (bool, int, float, str, tuple, type(None))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Forward:
    """Stands for a module's forward.

    It is an object and no closure, because copies and pickles of a model must refer to their own modules.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __code__(self) -> types.CodeType:  # torch.export reads it
        return type(self.module).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))


class FusedForward(_Forward):
    """The fused layer's function.

    Args:
        module: the layer.
        structure: the proven reading of the layer.
        adapter: a function of the layer's arguments that returns (x, map), or None.
        resizes: whether the layer resizes its map to x's size.
    """

    def __init__(self, module: nn.Module, structure: Structure, adapter: Adapter | None, resizes: bool) -> None:
        super().__init__(module)
        self.structure, self.adapter, self.resizes = structure, adapter, resizes
        self.proven = fingerprint(module)
        self.warned = False  # whether it has warned that the module changed

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own function, which gets a LabelMap as its one-hot map."""
        dense = [self._dense(value) for value in args]
        options = {name: self._dense(value) for name, value in kwargs.items()}
        return type(self.module).forward(self.module, *dense, **options)

    def _dense(self, value: Any) -> Any:
        return value.one_hot(next(self.module.parameters()).dtype) if isinstance(value, LabelMap) else value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _observed():
            return self.original(*args, **kwargs)
        cause = self._changed()
        if cause is not None:
            if not self.warned:
                self.warned = True
                name = type(self.module).__name__
                warnings.warn(f"a fused {name} runs unfused: {cause} changed since fuse()", stacklevel=2)
            return self.original(*args, **kwargs)
        taken = self._arguments(args, kwargs)
        if taken is None:
            return self.original(*args, **kwargs)
        if not self.structure.gains_when_dense and isinstance(conditioning(taken[1]), Tensor):
            return self.original(*args, **kwargs)
        return self.compute(*taken)

    def compute(self, x: Tensor | None, labels: LabelMap | Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The layer's output, or (gamma, beta) of a layer that takes a map alone."""
        network = self.structure.network()
        if self.structure.only_map:
            return gamma_beta(labels, network)
        assert x is not None
        return spade(x, labels, network, self.structure.norm)

    def _arguments(self, args: tuple, kwargs: dict) -> tuple[Tensor | None, LabelMap | Tensor] | None:
        """(x, map), or None for a call unlike those proven."""
        structure = self.structure
        x: Any = None
        labels: Any = None
        if self.adapter is not None:
            x, labels = self.adapter(*args, **kwargs)
        elif structure.only_map:
            (labels,) = self._bind(args, kwargs, 1) or (None,)
        else:
            x, labels = self._bind(args, kwargs, 2) or (None, None)
        if not structure.only_map and type(x) not in _PLAIN:
            return None
        if type(labels) not in (*_PLAIN, LabelMap):
            return None
        shape = reference.segmap_shape(labels)
        if len(shape) != 4 or shape[1] != structure.shared.in_channels or 0 in shape or labels.device.type == "meta":
            return None
        size, tensors = shape[2:], [labels]
        if not structure.only_map:
            if x.dim() != 4 or x.shape[:2] != (shape[0], structure.channels) or x.numel() == 0:
                return None
            size, tensors = tuple(x.shape[2:]), [x, labels]
            if not self.resizes and shape[2:] != size:
                return None
        if structure.padding == "reflect" and min(size) <= structure.shared.kernel_size[0] // 2:
            return None
        parameter = next(self.module.parameters())
        device, dtype = parameter.device, parameter.dtype
        if any(t.device != device for t in tensors):
            raise RuntimeError(
                f"a fused {type(self.module).__name__} has its weights on {device} and was called with tensors on "
                f"{', '.join(str(t.device) for t in tensors)} (torch.nn.DataParallel needs spade_fast.unfuse first)"
            )
        unlike = any(isinstance(t, Tensor) and t.dtype != dtype for t in tensors)
        if unlike and not torch.is_autocast_enabled(device.type):
            return None
        return x, labels

    def _bind(self, args: tuple, kwargs: dict, count: int) -> list | None:
        """The first `count` arguments. None where another argument is present, and neither None nor its default."""
        if not kwargs and len(args) == count:
            return list(args)
        signature = inspect.signature(type(self.module).forward)
        try:
            bound = signature.bind(self.module, *args, **kwargs)
        except TypeError:  # the module's own error
            return None
        values = []
        for name, value in list(bound.arguments.items())[1:]:
            parameter = signature.parameters[name]
            if parameter.kind == parameter.VAR_POSITIONAL:
                values.extend(value)
            elif parameter.kind == parameter.VAR_KEYWORD or len(values) >= count:
                if value is not None and value is not parameter.default and value != {}:
                    return None
            else:
                values.append(value)
        extra = values[count:]
        return values[:count] if len(values) >= count and all(v is None for v in extra) else None

    def _changed(self) -> str | None:
        """What has changed since the proof; None: nothing."""
        if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
            return "hooks of all modules were"
        now = fingerprint(self.module)
        if now != self.proven:
            if len(now) != len(self.proven):
                return "its submodules"
            name = next(a[0] for a, b in zip(now, self.proven, strict=True) if a != b)
            return name or "the module itself"
        for conv in self.structure.convolutions:
            weight = conv._parameters.get("weight")
            if weight is not None and type(weight) not in _PLAIN:
                return f"a weight is a {type(weight).__name__} and so"
        return None


def _observed() -> bool:
    """Whether a trace, an export, a functorch transform or a forward-mode derivative follows the operations."""
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined]  # public, but not in torch.jit's __all__
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def fingerprint(module: nn.Module) -> tuple:
    """A value that changes with the submodules, their classes, options, hooks and replaced forwards.

    It does not change with weights.
    """
    parts = []
    for name, part in module.named_modules():
        own = part.__dict__
        options = tuple((k, v) for k, v in own.items() if isinstance(v, _SIMPLE) and not _is_torchs(k))
        hooks = () if part is module else tuple(tuple(own[kind].values()) for kind in _HOOKS)
        replaced = None if part is module else own.get("forward")
        parts.append((name, part, type(part), type(part).forward, replaced, hooks, options))
    return tuple(parts)


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)  # its training flag and torch's own bookkeeping


def _is_torchs(name: str) -> bool:
    return name in _OF_EVERY_MODULE or name.startswith("_is_")  # _is_torch_compile and the like


class ScopedForward(_Forward):
    """The model's own forward. Each map is recognized once a call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.before = module.__dict__.get("forward")  # others may have set one on the instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._run(*args, **kwargs)
        with map_scope():
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)
