# SPDX-License-Identifier: Apache-2.0
"""What a training run shows: progress, stats.jsonl, TensorBoard events, and Weights & Biases where it is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from spade_fast.cli import ConfigError
from spade_fast.files import WriteError, one_line, writing
from spade_fast.train.config import ResolvedConfig
from spade_fast.train.progress import Progress


class MissingExtraError(RuntimeError):
    """A package of an optional extra is not installed. The message says how to install it."""


def import_wandb() -> Any:
    """The package wandb. Raises MissingExtraError if it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise MissingExtraError(
            "--wandb needs the package wandb: pip install wandb, or pip install 'spade-fast[wandb]'"
        ) from None


class Sink(Protocol):
    """Where numbers and pictures go besides stats.jsonl."""

    name: str

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Logs the numbers of a step."""

    def picture(self, path: Path, step: int) -> None:
        """Logs a sheet of samples."""

    def close(self) -> None:
        """Writes what is still in memory."""


class TensorBoard:
    """TensorBoard events in the run directory. The constructor raises ImportError if TensorBoard is not installed."""

    name = "TensorBoard events"

    def __init__(self, folder: Path, options: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        rows = "".join(f"| {name} | {value} |\n" for name, value in options.items())
        self._writer.add_text("options", f"| option | value |\n| --- | --- |\n{rows}", step)

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, path: Path, step: int) -> None:
        self._writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases. A resumed run goes on under the same identifier, which the run directory keeps."""

    name = "Weights & Biases"

    def __init__(self, project: str, folder: Path, options: dict[str, Any]) -> None:
        self._wandb = import_wandb()
        kept = folder / "wandb_id.txt"
        identifier = kept.read_text().strip() if kept.is_file() else None
        try:
            self._run = self._wandb.init(
                project=project, name=folder.name, dir=str(folder), config=options, id=identifier, resume="allow"
            )
        except Exception as error:  # wandb raises several types: no login, no network, a wrong name
            raise ConfigError(f"--wandb {project}: wandb can't start: {str(error).splitlines()[0]}") from error
        with writing(kept):
            kept.write_text(f"{self._run.id}\n")

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def picture(self, path: Path, step: int) -> None:
        self._run.log({"samples": self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class Monitor:
    """Shows and logs a run while entered.

    Args:
        config: resolved options.
        folder: the run directory.
        stats: the file of statistics in it.
        step: steps done before.
        total: steps of the whole run.
        quiet: shows and logs nothing, as all processes but one do.
    """

    def __init__(self, config: ResolvedConfig, folder: Path, stats: Path, step: int, total: int, quiet: bool) -> None:
        self.config, self.stats, self.quiet = config, stats, quiet
        self.folder, self.first, self.total = folder, step, total
        self.failed: set[str] = set()  # what could not be written
        self.sinks: list[Sink] = []
        self.progress: Progress | None = None
        self.values: dict[str, list[float]] = {}  # losses since the last line, of the steps that have them
        self.count = 0
        self.started = self.since = time.monotonic()

    def __enter__(self) -> Monitor:
        if self.quiet:
            return self
        options = dataclasses.asdict(self.config)
        if self.config.tensorboard:
            with contextlib.suppress(ImportError), self.unless_full(TensorBoard.name):  # it is optional
                self.sinks.append(TensorBoard(self.folder, options, self.first))
        if self.config.wandb is not None:
            self.sinks.append(WeightsAndBiases(self.config.wandb, self.folder, options))
        return self

    def start(self) -> None:
        """Starts the clock and the progress bar."""
        limit = None if self.config.max_minutes is None else 60 * self.config.max_minutes
        self.progress = None if self.quiet else Progress(self.first, self.total, limit)
        self.started = self.since = time.monotonic()

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.progress is not None:
            self.progress.close()
        for sink in self.sinks:
            with self.unless_full(sink.name):
                sink.close()

    @contextlib.contextmanager
    def unless_full(self, what: str) -> Iterator[None]:
        """Around what the run can do without. If it can't be written, a line says so once, and training goes on."""
        try:
            yield
        except (OSError, WriteError) as error:
            if what not in self.failed:
                self.failed.add(what)
                text = one_line(error) if isinstance(error, OSError) else str(error)
                self.note(f"warning: {what} can't be written, and training goes on without: {text}")

    def note(self, text: str) -> None:
        """A line for the user."""
        if self.progress is not None:
            self.progress.note(text)
        elif not self.quiet:
            with contextlib.suppress(OSError):  # the reader of a pipe is gone, and training goes on
                print(text, flush=True)

    def step(self, step: int, epoch: int, terms: dict[str, float], rates: dict[str, float]) -> None:
        """Counts a finished step. Every log_every steps, logs the means of the losses since the last line.

        Args:
            step: steps done.
            epoch: epochs done.
            terms: the losses of the step.
            rates: the learning rate of each optimizer.
        """
        if self.progress is None:
            return
        for name, value in terms.items():
            self.values.setdefault(name, []).append(value)
        self.count += 1
        if step % self.config.log_every and step != self.total:
            self.progress.update(step)
            return
        now = time.monotonic()
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        speed = self.count * self.config.batch_size / max(now - self.since, 1e-9)
        record: dict[str, float] = {"step": step, "epoch": epoch, "seconds": round(now - self.started, 3)}
        record |= {"images_per_second": round(speed, 3), **rates, **means}
        with self.unless_full("stats.jsonl"), writing(self.stats), open(self.stats, "a") as file:
            file.write(json.dumps(record) + "\n")
        shown = " ".join(f"{name} {value:.3g}" for name, value in means.items())
        self.progress.update(step, f"{shown}, {speed:.3g} images/s")
        for sink in self.sinks:
            with self.unless_full(sink.name):
                sink.numbers({**means, **rates, "images_per_second": speed}, step)
        self.values, self.count, self.since = {}, 0, now

    def picture(self, path: Path, step: int) -> None:
        """Logs a sheet of samples that was written."""
        for sink in self.sinks:
            with self.unless_full(sink.name):
                sink.picture(path, step)
