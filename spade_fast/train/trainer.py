# SPDX-License-Identifier: Apache-2.0
"""The training loop: one process or several, logging, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast import models
from spade_fast.cli import flag
from spade_fast.data.options import migrate, open_dataset
from spade_fast.files import writing
from spade_fast.labels.label_map import LabelMap
from spade_fast.models.checkpoint import checkpoint_path, training_checkpoint
from spade_fast.train import setup
from spade_fast.train.batch_size import fit_batch_size
from spade_fast.train.batches import device_batches
from spade_fast.train.config import BEFORE_INIT, RESUME_FIXED, ResolvedConfig
from spade_fast.train.exchange import exchange
from spade_fast.train.monitor import Monitor, import_wandb
from spade_fast.train.opening import opening
from spade_fast.train.profiling import profiled, span
from spade_fast.train.ranks import Ranks
from spade_fast.train.recalibration import Recalibration
from spade_fast.train.run_directory import RunDirectory, RunDirectoryError, random_state, restore_random_state
from spade_fast.train.samples import FixedSamples, SampleSheets
from spade_fast.train.schedule import lr_factor
from spade_fast.train.step import TrainingStep
from spade_fast.train.stopping import StopSignals

NON_FINITE_LIMIT = 20  # fp16 overflows for a few steps until its loss scale fits; more in a row have another cause

Batch = tuple[LabelMap, Tensor]


class NonFiniteError(RuntimeError):
    """A loss or a weight became infinite or not a number. Names step, term and the last good checkpoint."""


class Trainer:
    """A training run.

    Everything that can fail for a wrong option or a missing file fails in the constructor, before anything is written.

    Args:
        config: resolved options (`spade_fast.train.config.resolve_config`).
        resume: continue from the newest checkpoint in `config.out`.
        ranks: the processes of the run; by default those of torchrun's environment.

    Raises:
        ConfigError, DataError, RunDirectoryError, VGGWeightsError, MissingExtraError: see the modules of each.
    """

    def __init__(self, config: ResolvedConfig, resume: bool = False, ranks: Ranks | None = None) -> None:
        self.directory = RunDirectory(config.out)
        self.ranks = ranks or Ranks(config.device)
        if resume:
            self.directory.require_run()
        elif self.ranks.is_main:
            self.directory.require_new()
        if self.ranks.is_main:
            self.directory.lock()
        try:
            if not resume and self.ranks.is_main:
                self.directory.require_new()  # again: another process may have been faster
            self._prepare(config, resume)
        except BaseException:
            self.directory.unlock()
            raise

    def _prepare(self, config: ResolvedConfig, resume: bool) -> None:
        """Checks the paths, the data and the batch; then builds the networks; VGG's weights, a download, come last."""
        self.device = self.ranks.device
        if config.wandb is not None and self.ranks.is_main:
            import_wandb()
        self.dataset = open_dataset(config, "train")
        config, chosen = fit_batch_size(config, self.dataset, self.device, self.ranks.world)
        self.ranks.same(config.batch_size, "the batch size that fits their device; give --batch-size")
        self.config = config
        self.steps_per_epoch = setup.steps_per_epoch(config, self.dataset)
        self.total_steps, self.epochs = setup.length(config, self.steps_per_epoch)
        setup.check_batch(config, self.ranks.world)
        setup.check_sharing(config, self.ranks)
        fixed = FixedSamples(config, self.dataset) if self.ranks.is_main else None

        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        if config.tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.nets = setup.build_networks(config, self.dataset.label_nc)
        self.generator, self.discriminator = setup.generator_of(self.nets), self.nets["discriminator"]
        setup.check_size(config, self.dataset, self.generator)
        setup.check_statistics(config, self.generator, self.ranks.world)
        for net in self.nets.values():
            models.init_weights(net, config.init)
            net.to(self.device).train()
        self.training = TrainingStep(self.nets, config, self._load_vgg(config), self.ranks)
        self.recalibration = Recalibration(config, self.training)
        self.sheets = None if fixed is None else SampleSheets(config, fixed, self.training, self.directory.samples)

        self.step = self.epoch = self.batch = 0  # steps done; where the next batch is
        self.lost = 0  # consecutive steps with a loss that is not finite
        self.saved_step: int | None = None
        self.last_checkpoint: Path | None = None
        lines = opening(config, self.training, len(self.dataset), self.total_steps, chosen, fixed)
        self.notes = lines  # for the user, at the start of training
        if resume:
            self._restore()
        self.ranks.same(self.step, "the step to start from")

    def _load_vgg(self, config: ResolvedConfig) -> nn.Module | None:
        if not config.lambda_vgg > 0:
            return None
        with torch.random.fork_rng(devices=[]):  # the network draws weights before it gets the real ones
            return models.load_vgg19(config.vgg_weights).to(self.device)

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """Generator step, then discriminator step.

        Returns:
            This process's shares of the losses, still on the device.
        """
        self.training.set_lr(lr_factor(self.epoch, self.epochs, self.config.decay_from))
        return self.training(*batch, self.step)

    def _check_finite(self, terms: dict[str, float]) -> None:
        """Raises NonFiniteError. With a loss scale a step may be lost to overflow, but not many in a row."""
        wrong = next((name for name, value in terms.items() if not np.isfinite(value)), None)
        self.lost = 0 if wrong is None else self.lost + 1
        if wrong is not None and self.lost > (NON_FINITE_LIMIT if self.training.amp == torch.float16 else 0):
            row = f", as in the {self.lost - 1} steps before it" if self.lost > 1 else ""
            raise self._non_finite(f"the loss term {wrong!r} is {terms[wrong]}{row}", self.step + 1)

    def _non_finite(self, what: str, step: int) -> NonFiniteError:
        last = self.last_checkpoint or "none was saved yet"
        return NonFiniteError(f"step {step}: {what}. Last good checkpoint: {last}")

    # The loop

    def train(self, profile: int | None = None) -> str:
        """Trains to the end.

        Args:
            profile: after this many steps, write where the time of the next ones goes to profile/
                (`spade_fast.train.profiling`).

        Returns:
            Why it stopped; the run is saved. "finished", "time", a signal's name, or "fault" when another process has
            a sample that can't be used.

        Raises:
            DataError: a sample can't be used. The run is saved, and can be resumed once the file is repaired.
            NonFiniteError: a loss or a weight is not finite. Nothing is saved.
        """
        try:
            return self._train(profile)
        finally:
            self.directory.unlock()

    def _train(self, profile: int | None) -> str:
        self._open_directory()
        with contextlib.ExitStack() as stack:
            # Signals, progress and batches. Closing the batches ends the loading processes.
            stop = stack.enter_context(StopSignals())
            monitor = stack.enter_context(self._monitor())
            source = device_batches(self.dataset, self.config, self.generator, self.ranks, self.epoch, self.batch)
            stack.callback(source.close)
            traces = self.directory.path / "profile"
            before_step = stack.enter_context(profiled(profile, traces, self.ranks.is_main, monitor.note))
            for note in self.notes:
                monitor.note(note)
            monitor.start()
            deadline = time.monotonic() + 60 * (self.config.max_minutes or float("inf"))
            if self.sheets is not None:
                self.sheets.start()

            # The first batch. The processes tell each other whether all of them have one.
            batch = self._next(source)
            _, reason, _ = self._exchange({}, stop, False, batch)
            if self.step >= self.total_steps:  # a resumed run was at its end
                reason = "finished"

            # A step at a time, until there is a reason to stop.
            while reason is None:
                assert isinstance(batch, tuple)  # a fault is a reason to stop
                before_step()
                shares = self.train_step(batch)
                batch = self._next(source, ahead=1)  # it is loaded while the device works
                terms, reason, picture = self._exchange(shares, stop, time.monotonic() > deadline, batch)
                self._check_finite(terms)
                self._count_step()
                monitor.step(self.step, self.epoch, terms, self.training.lrs())
                if self.step == self.total_steps:
                    reason = "finished"
                if reason is None and picture:
                    self._draw_samples(monitor)
                if reason is None and self.step % self.config.save_every == 0:
                    self.save()

            # The end: a last picture, and a checkpoint whatever the reason is.
            if reason == "finished" and self.config.sample_every:
                self._draw_samples(monitor)
            self.save()
            if reason == "fault" and stop.received:  # a SIGTERM to the process group ended the loading processes too
                return stop.received.name
            if reason == "fault" and isinstance(batch, Exception):
                raise batch
            return reason

    def _open_directory(self) -> None:
        """Makes the run directory and writes the options to it, in one process."""
        if self.ranks.is_main:
            self.directory.lock()
            self.directory.create()
            with writing(self.directory.config):
                self.config.save(self.directory.config)

    def _monitor(self) -> Monitor:
        place = self.directory.path, self.directory.stats
        return Monitor(self.config, *place, self.step, self.total_steps, quiet=not self.ranks.is_main)

    def _next(self, source: Iterator[Batch | Exception], ahead: int = 0) -> Batch | Exception | None:
        """The batch of the step after `ahead` more, or None when that is beyond the end."""
        if self.step + ahead >= self.total_steps:
            return None
        try:
            with span("data"):
                return next(source)
        except Exception as fault:  # of a loading process, of a file, ...: raised when the others know
            return fault

    def _exchange(
        self, terms: dict[str, Tensor], stop: StopSignals, late: bool, batch: Batch | Exception | None
    ) -> tuple[dict[str, float], str | None, bool]:
        """`spade_fast.train.exchange.exchange`, with what this process has to tell."""
        picture = self.sheets is not None and bool(terms) and self.sheets.due(self.step + 1)
        return exchange(self.ranks, terms, stop.received, late, isinstance(batch, Exception), picture)

    def _count_step(self) -> None:
        self.step += 1
        self.batch += 1
        if self.batch == self.steps_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0

    # Saving and resuming

    def state(self) -> dict[str, Any]:
        """The checkpoint: see `spade_fast.models.checkpoint.training_checkpoint`."""
        training = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "dataset_size": len(self.dataset),
            **self.training.state(),
            "random": random_state(),
        }
        return training_checkpoint(self._saved_nets(), training)

    def save(self) -> None:
        """Writes a checkpoint unless this step has one.

        Raises:
            NonFiniteError: a weight is not finite. Nothing is written.
        """
        if self.step == self.saved_step:
            return
        self.recalibrate()
        for name, net in self._saved_nets().items():  # in every process, so that all of them stop
            for key, value in net.state_dict().items():
                if value.is_floating_point() and not torch.isfinite(value).all():
                    raise self._non_finite(f"the {name}'s {key} is not finite", self.step)
        if self.ranks.is_main:
            self.directory.save(self.step, self.state(), self.config.keep)
        self.last_checkpoint = checkpoint_path(self.directory.path, self.step)
        self.saved_step = self.step

    def _saved_nets(self) -> dict[str, nn.Module]:
        ema = self.training.ema
        return self.nets if ema is None else {**self.nets, "ema": ema.net}

    def recalibrate(self) -> None:
        """Sets the statistics of the averaged generator. Every process calls it at the same step."""
        self.recalibration(self.step)

    def _restore(self) -> None:
        loaded = self.directory.load_newest()
        if loaded is None:
            if self.ranks.is_main:
                self.directory.truncate_stats(0)
            self.notes.append(f"{self.directory.path} has no checkpoint yet: starting from step 0")
            return
        state, path = loaded
        training = state["training"]
        before = {**BEFORE_INIT, **migrate(training["config"])}
        for name in RESUME_FIXED:
            if name in before and before[name] != getattr(self.config, name):
                raise RunDirectoryError(
                    f"--resume: {flag(name)} is {getattr(self.config, name)!r}, but {path} was trained with "
                    f"{before[name]!r}"
                )
        for name, net in self._saved_nets().items():
            # A run that kept no average before starts one from its weights.
            net.load_state_dict(state[name if name in state else "generator"]["state_dict"])
        self.training.load_state(training)
        self.step, self.epoch, self.batch = training["step"], training["epoch"], training["batch"]
        if training["dataset_size"] != len(self.dataset):
            self.notes.append(
                f"the dataset had {training['dataset_size']} samples and has {len(self.dataset)} now: epoch "
                f"{self.epoch} starts over, and the run is not the one it would have been"
            )
            self.batch = 0
        restore_random_state(training["random"])
        self.last_checkpoint, self.saved_step = path, self.step
        if self.ranks.is_main:
            self.directory.truncate_stats(self.step)
        self.notes.append(f"resuming from {path}, step {self.step} of {self.total_steps}")

    # Pictures

    def _draw_samples(self, monitor: Monitor) -> None:
        with monitor.unless_full("pictures of samples"):
            path = self.draw_samples()
            if path is not None:
                monitor.picture(path, self.step)

    def draw_samples(self) -> Path | None:
        """Writes samples/step_{step:08d}.png. Every process calls it; one writes.

        Returns:
            The picture's path, or None in the processes that write nothing.
        """
        start = time.monotonic()
        self.recalibrate()
        if self.sheets is None:
            return None
        path = self.sheets.draw(self.step)
        self.sheets.pause(time.monotonic() - start)
        return path
