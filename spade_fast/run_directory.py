# SPDX-License-Identifier: Apache-2.0
"""The directory of a training run: config.json, stats.jsonl, samples/ and checkpoint_{step:08d}.pt."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spade_fast.checkpoint import atomic_save, checkpoint_path, list_checkpoints, safe_load


class RunDirectoryError(RuntimeError):
    """A run directory that can't be started in, or has nothing to resume from."""


class RunDirectory:
    """Files of one run. Nothing is written before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.stats = self.path / "stats.jsonl"
        self.samples = self.path / "samples"

    def require_new(self) -> None:
        """Raises RunDirectoryError when the directory holds anything already."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunDirectoryError(
                f"{self.path} exists and is not empty: --resume continues the run in it, another --out starts a new one"
            )

    def require_run(self) -> None:
        """Raises RunDirectoryError when there is no run to resume."""
        if not self.config.is_file():
            raise RunDirectoryError(f"--resume: {self.path} has no run in it ({self.config.name} is missing)")

    def create(self) -> None:
        self.samples.mkdir(parents=True, exist_ok=True)

    def checkpoints(self) -> list[Path]:
        """The checkpoint files, oldest first."""
        return list_checkpoints(self.path)

    def save(self, step: int, state: dict[str, Any], keep: int) -> Path:
        """Writes a checkpoint and removes all but the newest `keep`."""
        path = checkpoint_path(self.path, step)
        atomic_save(state, path)
        for old in self.checkpoints()[:-keep]:
            old.unlink(missing_ok=True)
        return path

    def load_newest(self) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint that can be read; None when there is none yet. One that can't be read is skipped.

        Raises RunDirectoryError when there are checkpoints and none can be read.
        """
        found = self.checkpoints()
        for path in reversed(found):
            try:
                state = safe_load(path)
                if not isinstance(state, dict) or "training" not in state:
                    raise ValueError("it holds no training state")
                return state, path
            except Exception as e:  # a truncated file fails in many ways: zip, pickle, end of file
                warnings.warn(f"skipping {path}: {type(e).__name__}: {e}", stacklevel=2)
        if found:
            raise RunDirectoryError(f"--resume: none of the {len(found)} checkpoints in {self.path} can be read")
        return None

    def truncate_stats(self, step: int) -> None:
        """Drops the lines after `step` (and a half-written last one), which a resumed run will write again."""
        if not self.stats.is_file():
            return
        kept = []
        for line in self.stats.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        self.stats.write_text("".join(kept))


def random_state() -> dict[str, Any]:
    """State of every global random generator, in types that `torch.load(weights_only=True)` accepts."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)),
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned; CUDA's only when as many devices are visible as then."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
