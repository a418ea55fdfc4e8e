# SPDX-License-Identifier: Apache-2.0
"""The training loop: networks, optimisers, one generator and one discriminator step an iteration, exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from spade_fast import data, losses, models, pictures
from spade_fast.building import (
    build_networks,
    check_size,
    label_map,
    length,
    open_dataset,
    pick_device,
    steps_per_epoch,
)
from spade_fast.checkpoint import FORMAT
from spade_fast.config import RESUME_FIXED, TrainConfig, flag
from spade_fast.label_map import LabelMap
from spade_fast.monitor import Monitor, import_tqdm
from spade_fast.run_directory import RunDirectory, RunDirectoryError, random_state, restore_random_state
from spade_fast.schedule import EpochBatches, lr_factor
from spade_fast.stopping import StopSignals, worker_signals


class NonFiniteError(RuntimeError):
    """A loss or a weight became infinite or not a number. Names step, term and the last good checkpoint."""


class _FaultsAsItems(Dataset):
    """Hands a DataError over as an item, so that one raised in a worker reaches the loop with its message intact."""

    def __init__(self, dataset: data.SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | data.DataError:
        try:
            return self.dataset[index]
        except data.DataError as e:
            return e


def _collate(items: list) -> Any:
    return next((item for item in items if isinstance(item, data.DataError)), None) or default_collate(items)


class Trainer:
    """A training run.

    Args:
        config: resolved options (`spade_fast.config.resolve`).
        resume: continue from the newest checkpoint in `config.out`.

    Everything that can fail for a wrong option or missing file fails here, before anything is written.
    """

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        self.config = config
        self.directory = RunDirectory(config.out)
        self.directory.require_run() if resume else self.directory.require_new()
        import_tqdm()  # fails now if it is missing, not after the data is read
        self.device = pick_device(config.device)
        vgg = models.load_vgg19(config.vgg_weights).to(self.device) if config.lambda_vgg > 0 else None
        self.vgg_loss = losses.VGGLoss(vgg) if vgg is not None else None
        self.gan_loss = losses.GANLoss(config.gan_mode)

        self.dataset = open_dataset(config, "train")
        self.steps_per_epoch = steps_per_epoch(config, self.dataset)
        self.total_steps, self.epochs = length(config, self.steps_per_epoch)
        self.fixed = self._fixed_samples()

        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.nets = build_networks(config, self.dataset.label_nc)
        check_size(config, self.dataset, self.nets["generator"])
        for net in self.nets.values():
            models.init_weights(net)
            net.to(self.device).train()
        self.generator, self.discriminator = self.nets["generator"], self.nets["discriminator"]
        self.encoder = self.nets.get("encoder")
        self.base_lrs = config.lrs()
        trained = itertools.chain(self.generator.parameters(), self.encoder.parameters() if self.encoder else ())
        betas = (config.beta1, config.beta2)
        self.optimizers = {
            "generator": torch.optim.Adam(list(trained), lr=self.base_lrs[0], betas=betas),
            "discriminator": torch.optim.Adam(self.discriminator.parameters(), lr=self.base_lrs[1], betas=betas),
        }
        self.step = self.epoch = self.batch = 0  # steps done; where the next batch is
        self.saved_step: int | None = None
        self.last_checkpoint = None
        self.notes: list[str] = []  # for the user, once the progress bar is there
        if resume:
            self._restore()

    # One iteration

    def generate(self, labels: LabelMap, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """(synthesized images, KL divergence of the encoder's posterior or None)."""
        if self.encoder is None:
            return self.generator(labels), None
        mu, logvar = self.encoder(image)
        return self.generator(labels, models.reparameterize(mu, logvar)), losses.kl_loss(mu, logvar)

    def _discriminate(self, labels: LabelMap, fake: Tensor, image: Tensor) -> tuple[list, list]:
        """Features of fake and of real images, through the discriminator in one batch."""
        features = self.discriminator(labels, torch.cat([fake, image]))
        halves = [[f.chunk(2) for f in scale] for scale in features]
        return [[f for f, _ in scale] for scale in halves], [[r for _, r in scale] for scale in halves]

    def generator_step(self, labels: LabelMap, image: Tensor) -> dict[str, Tensor]:
        """One update of generator and encoder. Returns the weighted losses, detached."""
        c, terms = self.config, {}
        self.discriminator.requires_grad_(False)
        fake, kl = self.generate(labels, image)
        fake_features, real_features = self._discriminate(labels, fake, image)
        terms["gan"] = self.gan_loss.generator(fake_features)
        if c.lambda_feat > 0:
            terms["feat"] = c.lambda_feat * losses.feature_matching_loss(fake_features, real_features)
        if self.vgg_loss is not None:
            terms["vgg"] = c.lambda_vgg * self.vgg_loss(fake, image)
        if kl is not None:
            terms["kl"] = c.lambda_kl * kl
        if c.lambda_l1 > 0:
            terms["l1"] = c.lambda_l1 * (fake - image).abs().mean()
        self.optimizers["generator"].zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizers["generator"].step()
        self.discriminator.requires_grad_(True)
        return {name: term.detach() for name, term in terms.items()}

    def discriminator_step(self, labels: LabelMap, image: Tensor) -> dict[str, Tensor]:
        """One update of the discriminator, on images the updated generator makes anew. Returns the losses, detached."""
        with torch.no_grad():
            fake, _ = self.generate(labels, image)
        fake_features, real_features = self._discriminate(labels, fake, image)
        terms = {
            "d_fake": self.gan_loss.discriminator(fake_features, False),
            "d_real": self.gan_loss.discriminator(real_features, True),
        }
        self.optimizers["discriminator"].zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizers["discriminator"].step()
        return {name: term.detach() for name, term in terms.items()}

    def train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """Generator step, then discriminator step. Raises NonFiniteError."""
        labels = label_map(batch, self.dataset.num_classes, self.device)
        image = batch["image"].to(self.device, non_blocking=True)
        terms = {**self.generator_step(labels, image), **self.discriminator_step(labels, image)}
        values = torch.stack(list(terms.values())).tolist()  # the step's one wait for the GPU
        for name, value in zip(terms, values, strict=True):
            if not np.isfinite(value):
                raise self._non_finite(f"the loss term {name!r} is {value}", self.step + 1)
        return dict(zip(terms, values, strict=True))

    def _non_finite(self, what: str, step: int) -> NonFiniteError:
        last = self.last_checkpoint or "none was saved yet"
        return NonFiniteError(f"step {step}: {what}. Last good checkpoint: {last}")

    # The loop

    def train(self) -> str:
        """Trains to the end. Returns why it stopped: "finished", "time", "SIGTERM" or "SIGINT"; it has saved then.

        Raises:
            data.DataError: a sample can't be used; the run is saved and can be resumed once the file is repaired.
            NonFiniteError: see there; nothing is saved.
        """
        self.directory.create()
        self.config.save(self.directory.config)
        deadline = time.monotonic() + 60 * (self.config.max_minutes or float("inf"))
        # Closing the batches ends the loading processes, also when an exception keeps this frame alive.
        with StopSignals() as stop, Monitor(self) as monitor, contextlib.closing(self._batches()) as batches:
            for note in self.notes:
                monitor.note(note)
            while self.step < self.total_steps:
                try:
                    batch = next(batches)
                    if isinstance(batch, data.DataError):
                        raise batch
                except Exception:
                    self.save()
                    if stop.received:  # a SIGTERM to the whole process group ended the loading processes too
                        return stop.received.name
                    raise
                terms = self.train_step(batch)
                self.step += 1
                self.batch += 1
                if self.batch == self.steps_per_epoch:
                    self.epoch, self.batch = self.epoch + 1, 0
                monitor.step(terms)
                if self.config.sample_every and self.step % self.config.sample_every == 0:
                    self.draw_samples()
                reason = stop.received.name if stop.received else "time" if time.monotonic() > deadline else None
                if reason or self.step % self.config.save_every == 0:
                    self.save()
                if reason and self.step < self.total_steps:
                    return reason
            if self.config.sample_every and self.step % self.config.sample_every:
                self.draw_samples()
            self.save()
        return "finished"

    def _batches(self):
        """Batches from where the run stands, without end; sets epoch and learning rates on the way."""
        c = self.config
        order = EpochBatches(len(self.dataset), c.batch_size, c.seed, self.epoch, self.batch)
        loader = DataLoader(
            _FaultsAsItems(self.dataset),
            batch_sampler=order,
            num_workers=c.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=c.workers > 0,
            worker_init_fn=worker_signals,
            generator=torch.Generator(),  # its own: the loader must not draw from the state that a resume restores
        )
        while True:
            self.dataset.set_epoch(self.epoch)
            order.epoch, order.start = self.epoch, self.batch
            factor = lr_factor(self.epoch, self.epochs, c.decay_from)
            for optimizer, lr in zip(self.optimizers.values(), self.base_lrs, strict=True):
                optimizer.param_groups[0]["lr"] = lr * factor
            yield from loader

    # Saving and resuming

    def state(self) -> dict[str, Any]:
        """The checkpoint: see `spade_fast.checkpoint`."""
        nets = {name: {"options": net.options, "state_dict": net.state_dict()} for name, net in self.nets.items()}
        training = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "dataset_size": len(self.dataset),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "random": random_state(),
        }
        return {"format": FORMAT, **nets, "training": training}

    def save(self) -> None:
        """Writes a checkpoint unless this step has one. Raises NonFiniteError rather than save broken weights."""
        if self.step == self.saved_step:
            return
        for name, net in self.nets.items():
            for key, value in net.state_dict().items():
                if value.is_floating_point() and not torch.isfinite(value).all():
                    raise self._non_finite(f"the {name}'s {key} is not finite", self.step)
        self.last_checkpoint = self.directory.save(self.step, self.state(), self.config.keep)
        self.saved_step = self.step

    def _restore(self) -> None:
        loaded = self.directory.load_newest()
        if loaded is None:
            self.directory.truncate_stats(0)
            self.notes.append(f"{self.directory.path} has no checkpoint yet: starting from step 0")
            return
        state, path = loaded
        training = state["training"]
        before = training["config"]
        for name in RESUME_FIXED:
            if name in before and before[name] != getattr(self.config, name):
                raise RunDirectoryError(
                    f"--resume: {flag(name)} is {getattr(self.config, name)!r}, but {path} was trained with "
                    f"{before[name]!r}"
                )
        for name, net in self.nets.items():
            net.load_state_dict(state[name]["state_dict"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(training["optimizers"][name])
        self.step, self.epoch, self.batch = training["step"], training["epoch"], training["batch"]
        if training["dataset_size"] != len(self.dataset):
            self.notes.append(
                f"the dataset had {training['dataset_size']} samples and has {len(self.dataset)} now: epoch "
                f"{self.epoch} starts over, and the run is not the one it would have been"
            )
            self.batch = 0
        restore_random_state(training["random"])
        self.last_checkpoint, self.saved_step = path, self.step
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
        """Images [N, 3, H, W] of the fixed samples, with the statistics and noise of evaluation. Draws no random
        number from the state that training uses."""
        noise = torch.Generator().manual_seed(self.config.seed)
        self.generator.eval()
        images = []
        for sample in self.fixed:
            labels = label_map(default_collate([sample]), self.dataset.num_classes, self.device)
            z = None
            if self.config.z_dim is not None:
                z = torch.randn(1, self.config.z_dim, generator=noise).to(self.device)
            images.append(self.generator(labels, z).cpu())
        self.generator.train()
        return torch.cat(images)

    def draw_samples(self) -> Path:
        """Writes samples/step_{step:08d}.png, label map, synthesized, real, and returns its path."""
        rows, names = [], []
        for sample, fake in zip(self.fixed, self.synthesize_fixed(), strict=True):
            colours = pictures.colorize(sample["label"], self.dataset.palette)
            rows.append([colours, pictures.to_uint8(fake), pictures.to_uint8(sample["image"])])
            names.append(sample["path"])
        sheet = pictures.sheet(rows, ("label map", "synthesized", "real"), names)
        path = self.directory.samples / f"step_{self.step:08d}.png"
        pictures.save_png(sheet, path)
        return path
