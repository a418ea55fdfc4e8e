# SPDX-License-Identifier: Apache-2.0
"""Import paths of earlier versions: each gives the module that took its place, with a warning that names it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

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
