# SPDX-License-Identifier: Apache-2.0
"""What a training run shows: a progress bar, stats.jsonl, and TensorBoard events where it is installed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from spade_fast.files import WriteError, one_line, writing

if TYPE_CHECKING:
    from spade_fast.train.trainer import Trainer


def import_tqdm():
    """tqdm. Raises MissingExtraError naming the extra that has it."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise MissingExtraError("the progress bar needs tqdm: pip install 'spade-fast[train]'") from None
    return tqdm


class MissingExtraError(RuntimeError):
    """A package of an optional extra is not installed."""


class Monitor:
    """Progress bar (losses, images/s, time left), stats.jsonl and TensorBoard of a run, while entered."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.failed: set[str] = set()  # what could not be written
        self.bar = None
        self.quiet = not trainer.ranks.is_main  # one process shows what happens
        self.tensorboard = self._tensorboard() if trainer.config.tensorboard and not self.quiet else None
        self.values: dict[str, list[float]] = {}  # of the steps that have them
        self.count = 0

    @contextlib.contextmanager
    def unless_full(self, what: str) -> Iterator[None]:
        """Something the run can do without: when it can't be written, a line says so, once, and training goes on."""
        try:
            yield
        except (OSError, WriteError) as error:
            if what not in self.failed:
                self.failed.add(what)
                text = one_line(error) if isinstance(error, OSError) else str(error)
                self.note(f"warning: {what} can't be written, and training goes on without: {text}")

    def _tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # tensorboard is optional
            return None
        with self.unless_full("TensorBoard events"):
            return SummaryWriter(self.trainer.directory.path / "tensorboard", purge_step=self.trainer.step + 1)

    def __enter__(self) -> Monitor:
        t = self.trainer
        options = dict(unit="step", dynamic_ncols=True, mininterval=0.5, disable=self.quiet)
        self.bar = import_tqdm()(total=t.total_steps, initial=t.step, **options)
        self.started = self.since = time.monotonic()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()
        if self.tensorboard is not None:
            with self.unless_full("TensorBoard events"):
                self.tensorboard.close()

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self.quiet:
            return
        with contextlib.suppress(OSError):  # the terminal, or the reader of a pipe, is gone: that ends no training
            if self.bar is None:
                print(text)
            else:
                self.bar.write(text)

    def step(self, terms: dict[str, float]) -> None:
        """Counts a finished step; every log_every steps writes the means of the losses since the last line."""
        if self.quiet:
            return
        t = self.trainer
        for name, value in terms.items():
            self.values.setdefault(name, []).append(value)
        self.count += 1
        with contextlib.suppress(OSError):  # as in note
            self.bar.update()
        if t.step % t.config.log_every and t.step != t.total_steps:
            return
        now = time.monotonic()
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        speed = self.count * t.config.batch_size / max(now - self.since, 1e-9)
        lrs = {f"lr_{name}": o.param_groups[0]["lr"] for name, o in t.training.optimizers.items()}
        record = {"step": t.step, "epoch": t.epoch, "seconds": round(now - self.started, 3)}
        record |= {"images_per_second": round(speed, 3), **lrs, **means}
        with self.unless_full("stats.jsonl"), writing(t.directory.stats), open(t.directory.stats, "a") as file:
            file.write(json.dumps(record) + "\n")
        with contextlib.suppress(OSError):  # as in note
            self.bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in means.items()) + f", {speed:.3g} images/s")
        if self.tensorboard is not None:
            with self.unless_full("TensorBoard events"):
                for name, value in {**means, **lrs, "images_per_second": speed}.items():
                    self.tensorboard.add_scalar(name, value, t.step)
        self.values, self.count, self.since = {}, 0, now
