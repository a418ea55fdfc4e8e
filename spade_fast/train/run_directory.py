# SPDX-License-Identifier: Apache-2.0
"""The directory of a training run: config.json, stats.jsonl, samples/ and checkpoint_{step:08d}.pt."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import os
import random
import socket
import warnings
import weakref
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from spade_fast.files import cause, writing
from spade_fast.models.checkpoint import (
    atomic_save,
    checkpoint_path,
    list_checkpoints,
    load_training_checkpoint,
    remove_leftovers,
)

LOCK = ".lock"
# The run directories that this process has locked, by process, device and inode. The system's locks do not exclude
# their own process. A forked process holds no lock, and its process number differs.
_locked: weakref.WeakValueDictionary[tuple[int, int, int], RunDirectory] = weakref.WeakValueDictionary()


class RunDirectoryError(RuntimeError):
    """A run directory that can't be started in, or has nothing to resume from."""


class RunDirectory:
    """Files of one run. Nothing is written before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))
        self.config = self.path / "config.json"
        self.stats = self.path / "stats.jsonl"
        self.samples = self.path / "samples"
        self._lock: IO[str] | None = None
        self._key: tuple[int, int, int] | None = None
        self._made: list[Path] = []

    def require_new(self) -> None:
        """Raises RunDirectoryError if the directory holds anything already."""
        if self.path.exists() and (not self.path.is_dir() or any(entry.name != LOCK for entry in self.path.iterdir())):
            raise RunDirectoryError(
                f"{self.path} exists and is not empty: --resume continues the run in it, another --out starts a new one"
            )

    def lock(self) -> None:
        """Makes the directory and keeps others out of it, in other processes and in this one.

        The lock lasts until `unlock` or the end of this process, however it ends. What killed saves left is removed.

        Raises:
            RunDirectoryError: another process trains in it, or another run of this process.
            WriteError: it can't be written.
        """
        if self._key is not None:
            return
        path = self.path / LOCK
        with writing(self.path):
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._made = missing
            status = self.path.stat()
        self._claim((os.getpid(), status.st_dev, status.st_ino))
        try:
            self._lock_file(path)
        except BaseException:
            self.unlock()
            raise
        if self._lock is not None:
            remove_leftovers(self.path)

    def _claim(self, key: tuple[int, int, int]) -> None:
        """Raises RunDirectoryError when another RunDirectory of this process holds the directory."""
        if _locked.setdefault(key, self) is not self:
            gc.collect()  # it may hold a RunDirectory that nothing uses any more
            if _locked.setdefault(key, self) is not self:
                raise RunDirectoryError(
                    f"{self.path}: another run of this process (process {os.getpid()}) trains in this directory; wait "
                    "for its end, or take another --out"
                )
        self._key = key

    def _release(self) -> None:
        if self._key is not None:
            _locked.pop(self._key, None)
        self._key = None

    def _lock_file(self, path: Path) -> None:
        while self._lock is None:
            with writing(path):
                file = open(path, "a+")  # noqa: SIM115 -- open for as long as the lock is held
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read().strip()
                file.close()
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise RunDirectoryError(
                        f"{self.path}: another process ({holder or 'unknown'}) trains in this directory; wait for its "
                        "end, stop it, or take another --out"
                    ) from None
                warnings.warn(f"{path}: this file system has no locks ({cause(error)})", stacklevel=2)
                return
            # The process that held it may have removed the file between the two calls.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                self._lock = file
            else:
                file.close()
        with writing(path):
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._lock.flush()

    def unlock(self) -> None:
        """Lets others in. Removes the directory if `lock` made it and nothing was written to it."""
        self._release()
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            (self.path / LOCK).unlink()
        with contextlib.suppress(OSError):  # a full disk fails here if something was not flushed
            self._lock.close()
        self._lock = None
        with contextlib.suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()

    def require_run(self) -> None:
        """Raises RunDirectoryError when there is no run to resume."""
        if not self.config.is_file():
            raise RunDirectoryError(f"--resume: {self.path} has no run in it ({self.config.name} is missing)")

    def create(self) -> None:
        """Makes the directory and its samples/. Raises WriteError if it can't be made."""
        with writing(self.samples):
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
        """The newest checkpoint that can be read, with a warning for each newer one.

        Returns:
            The checkpoint (`training_checkpoint`) and its path, or None if there is none yet.

        Raises:
            RunDirectoryError: there are checkpoints, and none can be read.
        """
        found = self.checkpoints()
        for path in reversed(found):
            try:
                return load_training_checkpoint(path), path
            except Exception as e:  # a truncated file fails in many ways: zip, pickle, end of file
                warnings.warn(f"skipping {path}: {type(e).__name__}: {e}", stacklevel=2)
        if found:
            raise RunDirectoryError(f"--resume: none of the {len(found)} checkpoints in {self.path} can be read")
        return None

    def truncate_stats(self, step: int) -> None:
        """Drops the lines after `step` and a half-written last line. A resumed run writes them again."""
        if not self.stats.is_file():
            return
        kept = []
        for line in self.stats.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        with writing(self.stats):
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
    """Puts back what `random_state` returned. CUDA's states need as many visible devices as there were then."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
