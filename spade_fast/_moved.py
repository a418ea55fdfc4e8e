# SPDX-License-Identifier: Apache-2.0
"""Names of earlier versions. Each gives what took its place, with a warning that names it."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

MOVED = {
    "adam": "train.adam",
    "as_built": "layers.as_built",
    "batches": "train.batches",
    "build": "native.build",
    "building": "train.setup",
    "checkpoint": "models.checkpoint",
    "config": "train.config",
    "dense": "layers.dense",
    "ema": "train.ema",
    "label_map": "labels.label_map",
    "losses": "train.losses",
    "map_scope": "labels.map_scope",
    "monitor": "train.monitor",
    "ops.backend": "ops._backend",
    "ops.library": "ops._register",
    "patterns": "labels.pattern_tables",
    "plan": "train.plan",
    "profiling": "train.profiling",
    "ranks": "train.ranks",
    "run_directory": "train.run_directory",
    "schedule": "train.schedule",
    "spectral": "layers.spectral",
    "stopping": "train.stopping",
    "sync": "layers.sync",
    "trainer": "train.trainer",
    "training_step": "train.step",
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an old name after every other finder has failed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = name.partition(".")
        if package != "spade_fast" or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        new = f"spade_fast.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new}", FutureWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._kept = module.__spec__, module.__loader__
        return module

    def get_code(self, name: str) -> types.CodeType | None:
        """Only `python -m` asks for it, and prints the error's line."""
        new = f"spade_fast.{MOVED[name.partition('.')[2]]}"
        raise ImportError(f"{name} is now {new}: run python -m {new}")

    def exec_module(self, module: types.ModuleType) -> None:
        # The import system has written the old name into the module.
        module.__spec__, module.__loader__ = self._kept


def install() -> None:
    """Makes the old names importable; once."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())


def attributes(module: str, moved: dict[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module: names of earlier versions give what took their place, with a warning.

    Args:
        module: the module's name.
        moved: the dotted name of what took the place of an attribute, by the attribute's name.
    """

    def find(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {moved[name]}", FutureWarning, stacklevel=2)
        home, _, new = moved[name].rpartition(".")
        return getattr(importlib.import_module(home), new)

    return find


def argument(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function: a keyword argument's earlier name is taken, with a warning."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if old in kwargs:
                warnings.warn(f"{function.__qualname__}: {old}= is now {new}=", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
