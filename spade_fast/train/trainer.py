# SPDX-License-Identifier: Apache-2.0
"""The training loop: one process or several, logging, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from spade_fast import data, models, pictures
from spade_fast.cli import ConfigError
from spade_fast.files import writing
from spade_fast.labels.batch import batch_labels
from spade_fast.labels.label_map import LabelMap
from spade_fast.models.checkpoint import FORMAT, checkpoint_path
from spade_fast.train import batches
from spade_fast.train.config import BEFORE_INIT, RESUME_FIXED, TrainConfig, flag, migrate
from spade_fast.train.monitor import Monitor, import_tqdm
from spade_fast.train.profiling import StepProfile, span
from spade_fast.train.ranks import Ranks
from spade_fast.train.run_directory import RunDirectory, RunDirectoryError, random_state, restore_random_state
from spade_fast.train.schedule import lr_factor
from spade_fast.train.setup import build_networks, check_size, length, open_dataset, steps_per_epoch
from spade_fast.train.step import TrainingStep
from spade_fast.train.stopping import STOPPING, StopSignals

NON_FINITE_LIMIT = 20  # consecutive steps whose losses fp16 may lose to overflow before that is no loss scale's doing
SIGNALS = tuple(signal.name for signal in STOPPING)
REASONS = (*SIGNALS, "time", "fault")


class NonFiniteError(RuntimeError):
    """A loss or a weight became infinite or not a number. Names step, term and the last good checkpoint."""


class Trainer:
    """A training run.

    Args:
        config: resolved options (`spade_fast.train.config.resolve`).
        resume: continue from the newest checkpoint in `config.out`.
        ranks: the processes of the run; by default those of torchrun's environment.

    Everything that can fail for a wrong option or missing file fails here, before anything is written.
    """

    def __init__(self, config: TrainConfig, resume: bool = False, ranks: Ranks | None = None) -> None:
        self.config = config
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
            self._prepare(resume)
        except BaseException:
            self.directory.unlock()
            raise

    def _prepare(self, resume: bool) -> None:
        config = self.config
        import_tqdm()  # fails now if it is missing, not after the data is read
        self.device = self.ranks.device
        if config.tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        vgg = models.load_vgg19(config.vgg_weights).to(self.device) if config.lambda_vgg > 0 else None

        self.dataset = open_dataset(config, "train")
        self.steps_per_epoch = steps_per_epoch(config, self.dataset)
        self.total_steps, self.epochs = length(config, self.steps_per_epoch)
        self.fixed = self._fixed_samples() if self.ranks.is_main else []

        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.nets = build_networks(config, self.dataset.label_nc)
        check_size(config, self.dataset, self.nets["generator"])
        self._check_statistics()
        for net in self.nets.values():
            models.init_weights(net, config.init)
            net.to(self.device).train()
        self._share_statistics()
        self.generator, self.discriminator = self.nets["generator"], self.nets["discriminator"]
        self.training = TrainingStep(self.nets, config, vgg, self.ranks)
        self.step = self.epoch = self.batch = 0  # steps done; where the next batch is
        self.lost = 0  # consecutive steps with a loss that is not finite
        self.saved_step: int | None = None
        self._recalibrated: int | None = None  # the step at which the average's statistics were last set
        self._recalibration_maps: list[LabelMap] | None = None
        self.last_checkpoint = None
        self.notes: list[str] = []  # for the user, once the progress bar is there
        if resume:
            self._restore()
        self.ranks.same(self.step, "the step to start from")

    def _check_statistics(self) -> None:
        """Raises ConfigError when a norm of the generator would see one value a channel in some micro-batch."""
        c = self.config
        if c.norm not in ("batch", "syncbatch"):
            return
        share = c.batch_size // (self.ranks.world if c.norm == "batch" else 1) // c.accumulate
        height, width = self.nets["generator"].start
        if height * width * share == 1:
            raise ConfigError(
                f"--norm {c.norm} has one value a channel to normalize: the generator starts from 1 pixel with "
                f"--crop-size {c.crop_size}, and a micro-batch is 1 image with --batch-size {c.batch_size}, "
                f"--accumulate {c.accumulate} and {self.ranks.world} processes; take a larger crop or batch"
            )

    def _share_statistics(self) -> None:
        """Plain layers: torch's own synchronized norm, which is for GPUs. FusedSPADE shares by itself."""
        if self.ranks.world == 1 or self.config.spade != "reference" or self.config.norm != "syncbatch":
            return
        if self.device.type != "cuda":
            raise ConfigError(
                "--spade reference --norm syncbatch on several processes needs GPUs (torch.nn.SyncBatchNorm); take "
                "--spade fused or --norm batch"
            )
        self.nets["generator"] = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.nets["generator"])

    def train_step(self, batch: tuple[LabelMap, Tensor]) -> dict[str, Tensor]:
        """Generator step, then discriminator step: this process's shares of the losses, still on the device."""
        factor = lr_factor(self.epoch, self.epochs, self.config.decay_from)
        self.training.set_lr(factor)
        return self.training(*batch, self.step)

    def _check_finite(self, terms: dict[str, float]) -> None:
        """Raises NonFiniteError. With a loss scale a step may be lost to overflow, but not many in a row."""
        wrong = next((name for name, value in terms.items() if not np.isfinite(value)), None)
        self.lost = 0 if wrong is None else self.lost + 1
        if self.lost > (NON_FINITE_LIMIT if self.training.amp == torch.float16 else 0):
            row = f", as in the {self.lost - 1} steps before it" if self.lost > 1 else ""
            raise self._non_finite(f"the loss term {wrong!r} is {terms[wrong]}{row}", self.step + 1)

    def _non_finite(self, what: str, step: int) -> NonFiniteError:
        last = self.last_checkpoint or "none was saved yet"
        return NonFiniteError(f"step {step}: {what}. Last good checkpoint: {last}")

    # The loop

    def train(self, profile: int | None = None) -> str:
        """Trains to the end. Returns why it stopped: "finished", "time", a signal's name, or "fault" when another
        process has a sample it can't use; it has saved then.

        profile: after so many steps, write where the next ones go (`spade_fast.train.profiling`) to profile/.

        Raises:
            data.DataError: a sample can't be used; the run is saved and can be resumed once the file is repaired.
            NonFiniteError: see there; nothing is saved.
        """
        try:
            return self._train(profile)
        finally:
            self.directory.unlock()

    def _train(self, profile: int | None) -> str:
        if self.ranks.is_main:
            self.directory.lock()
            self.directory.create()
            with writing(self.directory.config):
                self.config.save(self.directory.config)
        profiler, begun = None, self.step
        if profile is not None:
            profiler = StepProfile(profile, self.directory.path / "profile", self.ranks.is_main)
        deadline = time.monotonic() + 60 * (self.config.max_minutes or float("inf"))
        source = batches.load(self.dataset, self.config, self.generator, self.ranks, self.epoch, self.batch)
        # Closing the batches ends the loading processes, also when an exception keeps this frame alive.
        with StopSignals() as stop, Monitor(self) as monitor, contextlib.ExitStack() as stack:
            stack.callback(source.close)
            if profiler is not None:
                stack.callback(profiler.close)
            for note in self.notes:
                monitor.note(note)
            batch = self._next(source) if self.step < self.total_steps else None
            _, reasons = self._exchange({}, stop, False, batch)
            while self.step < self.total_steps and "fault" not in reasons:
                if profiler is not None and (text := profiler.before_step(self.step - begun)):
                    monitor.note(text)
                terms = self.train_step(batch)
                # The next batch comes while the device works; whether every process has one is part of what they tell
                # each other after the step, so that all stop after the same one.
                batch = self._next(source) if self.step + 1 < self.total_steps else None
                terms, reasons = self._exchange(terms, stop, time.monotonic() > deadline, batch)
                self._check_finite(terms)
                self.step += 1
                self.batch += 1
                if self.batch == self.steps_per_epoch:
                    self.epoch, self.batch = self.epoch + 1, 0
                monitor.step(terms)
                if self.config.sample_every and self.step % self.config.sample_every == 0:
                    self._draw_samples(monitor)
                reason = next(iter(reasons), None)
                if reason or self.step % self.config.save_every == 0:
                    self.save()
                if reason and reason != "fault" and self.step < self.total_steps:
                    return reason
            if "fault" in reasons and self.step < self.total_steps:
                self.save()
                if stop.received:  # a SIGTERM to the whole process group ended the loading processes too
                    return stop.received.name
                if isinstance(batch, Exception):
                    raise batch
                return "fault"
            if self.config.sample_every and self.step % self.config.sample_every:
                self._draw_samples(monitor)
            self.save()
        return "finished"

    @staticmethod
    def _next(source) -> tuple[LabelMap, Tensor] | Exception:
        try:
            with span("data"):
                return next(source)
        except Exception as fault:  # of a loading process, of a file, ...: raised when the others know
            return fault

    def _exchange(
        self, terms: dict[str, Tensor], stop: StopSignals, late: bool, batch: object
    ) -> tuple[dict[str, float], list[str]]:
        """(the losses of the whole batch, why to stop), the same in every process: the step's one wait for the GPU."""
        received = stop.received.name if stop.received else None
        flags = [*(received == name for name in SIGNALS), late, isinstance(batch, Exception)]
        mine = torch.tensor(flags, dtype=torch.float32).to(self.device, non_blocking=True)
        values = torch.cat([torch.stack([*terms.values()]).float(), mine]) if terms else mine
        values = self.ranks.sum(values).tolist()
        count = len(terms)
        reasons = [reason for reason, told in zip(REASONS, values[count:], strict=True) if told]
        return dict(zip(terms, values[:count], strict=True)), reasons

    # Saving and resuming

    def state(self) -> dict[str, Any]:
        """The checkpoint: see `spade_fast.models.checkpoint`."""
        nets = {name: {"options": net.options, "state_dict": net.state_dict()} for name, net in self._all_nets()}
        training = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "dataset_size": len(self.dataset),
            **self.training.state(),
            "random": random_state(),
        }
        return {"format": FORMAT, **nets, "training": training}

    def save(self) -> None:
        """Writes a checkpoint unless this step has one. Raises NonFiniteError rather than save broken weights."""
        if self.step == self.saved_step:
            return
        self.recalibrate()
        for name, net in self._all_nets():  # in every process: all are to stop
            for key, value in net.state_dict().items():
                if value.is_floating_point() and not torch.isfinite(value).all():
                    raise self._non_finite(f"the {name}'s {key} is not finite", self.step)
        if self.ranks.is_main:
            self.directory.save(self.step, self.state(), self.config.keep)
        self.last_checkpoint = checkpoint_path(self.directory.path, self.step)
        self.saved_step = self.step

    def _all_nets(self) -> list[tuple[str, torch.nn.Module]]:
        ema = [("ema", self.training.ema.net)] if self.training.ema is not None else []
        return [*self.nets.items(), *ema]

    def recalibrate(self) -> None:
        """Sets the statistics of the averaged generator, from label maps spread over the training set (in the crops of
        the first epoch). Every process does a part of each batch."""
        if self.training.ema is None or self._recalibrated == self.step:
            return
        c, size = self.config, self.config.batch_size
        if self._recalibration_maps is None:
            self._recalibration_maps = batches.recalibration_maps(c, self.ranks)
        first, last = self.ranks.part(size)
        noise = torch.Generator().manual_seed(c.seed)

        def parts():
            for labels in self._recalibration_maps:
                z = None if c.z_dim is None else torch.randn(size, c.z_dim, generator=noise)[first:last].to(self.device)
                yield labels[:].to(self.device), z  # a new one: patterns of hundreds of maps are not to be kept

        with self.training.autocast():
            self.training.ema.recalibrate(parts())
        self._recalibrated = self.step

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
        for name, net in self._all_nets():
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

    def _fixed_samples(self) -> list[dict[str, Any]]:
        """The samples that are drawn every so often: of the validation set, or of the training set without one."""
        try:
            dataset = open_dataset(self.config, "val")
        except data.DataError:
            dataset = open_dataset(self.config, "train", flip=False)
        return [dataset[i] for i in range(min(self.config.num_samples, len(dataset)))]

    @torch.no_grad()
    def synthesize_fixed(self) -> Tensor:
        """Images [N, 3, H, W] of the fixed samples, by the averaged generator (the trained one if there is none), with
        the statistics and noise of evaluation. Draws no random number from the state that training uses."""
        ema, noise = self.training.ema, torch.Generator().manual_seed(self.config.seed)
        net = (self.generator if ema is None else ema.net).eval()
        images = []
        for sample in self.fixed:
            labels = batch_labels(default_collate([sample]), self.dataset.num_classes, self.device)
            z = None
            if self.config.z_dim is not None:
                z = torch.randn(1, self.config.z_dim, generator=noise).to(self.device)
            images.append(net(labels, z).cpu())
        self.generator.train()
        return torch.cat(images)

    def _draw_samples(self, monitor: Monitor) -> None:
        with monitor.unless_full("pictures of samples"):
            self.draw_samples()

    def draw_samples(self) -> Path | None:
        """Writes samples/step_{step:08d}.png, label map, synthesized, real, and returns its path; rank 0 does."""
        self.recalibrate()
        if not self.ranks.is_main:
            return None
        rows, names = [], []
        for sample, fake in zip(self.fixed, self.synthesize_fixed(), strict=True):
            colors = pictures.colorize(sample["label"], self.dataset.palette)
            rows.append([colors, pictures.to_uint8(fake), pictures.to_uint8(sample["image"])])
            names.append(sample["path"])
        sheet = pictures.sheet(rows, ("label map", "synthesized", "real"), names)
        path = self.directory.samples / f"step_{self.step:08d}.png"
        pictures.save_png(sheet, path)
        return path
