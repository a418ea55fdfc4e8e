# SPDX-License-Identifier: Apache-2.0
"""One iteration of training: the generator's update, then the discriminator's (paper, section 4), on any number of
processes, in mixed precision, in micro-batches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast import models
from spade_fast.cli import ConfigError
from spade_fast.labels.label_map import LabelMap
from spade_fast.layers.spectral import hold_power_iteration
from spade_fast.ops._register import accumulation_dtype
from spade_fast.train import losses
from spade_fast.train.adam import Adam
from spade_fast.train.config import TrainConfig, flag
from spade_fast.train.ema import EMA
from spade_fast.train.profiling import span
from spade_fast.train.ranks import Ranks, no_sync


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in, or None for float32. auto: bfloat16 on GPUs that have it (sm_80 and newer)."""
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if bf16 else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]


class Part:
    """A micro-batch: samples start..stop-1 of this process's batch, which are `share` of the whole batch."""

    def __init__(self, labels: LabelMap, image: Tensor, start: int, stop: int, share: float, last: bool) -> None:
        whole = (start, stop) == (0, image.shape[0])
        self.labels = labels if whole else labels[start:stop]
        self.image = image if whole else image[start:stop]
        self.start, self.stop, self.share, self.first, self.last = start, stop, share, start == 0, last


class TrainingStep:
    """Networks, losses and optimizers, and what an iteration does with them.

    Args:
        nets: generator, discriminator and perhaps encoder, on their device; put into channels-last memory here.
        config: resolved options.
        vgg: VGG19 features, or None without the perceptual loss.
        ranks: the processes; each calls the methods with its part of the batch, at the same time.

    The losses returned are this process's share of those of the whole batch: their sum over processes is the loss.
    """

    def __init__(self, nets: dict[str, nn.Module], config: TrainConfig, vgg: nn.Module | None, ranks: Ranks) -> None:
        if config.batch_size < ranks.world * config.accumulate:
            raise ConfigError(
                f"--batch-size {config.batch_size} (of all processes together) is too small for {ranks.world} "
                f"processes with --accumulate {config.accumulate}"
            )
        self.nets, self.config, self.ranks = nets, config, ranks
        self._share_statistics()
        self.generator, self.discriminator = nets["generator"], nets["discriminator"]
        self.encoder = nets.get("encoder")
        self.vgg_loss = None if vgg is None else losses.VGGLoss(vgg.to(memory_format=torch.channels_last))
        self.gan_loss = losses.GANLoss(config.gan_mode)
        self.device = ranks.device
        self.amp = amp_dtype(config.amp, self.device)
        for net in nets.values():
            net.to(memory_format=torch.channels_last)
        self.generator.checkpoint_blocks = config.checkpoint_blocks
        if config.compile:
            self.generator.compile(fullgraph=True)
            self.discriminator.compile(fullgraph=True)
        self._parallel = {name: ranks.parallel(net) for name, net in nets.items()} if ranks.world > 1 else {}
        self.ema = EMA(self.generator, config.ema) if config.ema > 0 else None
        self.base_lrs = config.lrs()
        trained = [p for name, net in nets.items() if name != "discriminator" for p in net.parameters()]
        betas = (config.beta1, config.beta2)
        self.optimizers = {
            "generator": Adam(trained, self.base_lrs[0], betas),
            "discriminator": Adam(self.discriminator.parameters(), self.base_lrs[1], betas),
        }
        scaled = self.amp == torch.float16
        self.scalers = {name: torch.amp.GradScaler(self.device.type, enabled=scaled) for name in self.optimizers}
        self._generator = torch.Generator(self.device)
        self._noise: Tensor | None = None  # [2, batch_size, z_dim], for the generator's and the discriminator's update
        self._fakes: list[Tensor] = []

    def _share_statistics(self) -> None:
        """Of the discriminator's and the encoder's batch norms, by torch's own synchronized norm, which is for GPUs."""
        for name, option in (("discriminator", "norm_d"), ("encoder", "norm_e")):
            norm = getattr(self.config, option)
            if self.ranks.world == 1 or name not in self.nets or not norm.endswith("syncbatch"):
                continue
            if self.ranks.device.type != "cuda":
                raise ConfigError(
                    f"{flag(option)} {norm} on several processes needs GPUs (torch.nn.SyncBatchNorm); take "
                    f"{norm.replace('sync', '')}, whose statistics are each process's own"
                )
            nn.SyncBatchNorm.convert_sync_batchnorm(self.nets[name])  # in place

    def set_lr(self, factor: float) -> None:
        for optimizer, lr in zip(self.optimizers.values(), self.base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor

    def __call__(self, labels: LabelMap, image: Tensor, step: int) -> dict[str, Tensor]:
        """Both updates of iteration `step`, counted from 0; the weighted losses, detached, still on the device.

        The generator is updated in one of d_steps_per_g iterations, first in iteration 0. Iterations are counted over
        the whole run: where an epoch ends changes nothing, nor does a resume.
        """
        self.draw_noise(step)
        update, pause = divmod(step, self.config.d_steps_per_g)
        terms = {} if pause else self.generator_step(labels, image)
        terms.update(self.discriminator_step(labels, image))
        if self.ema is not None and not pause:
            with span("optimizer"):
                self.ema.update(update)
        return terms

    def draw_noise(self, step: int) -> None:
        """The latent noise of an iteration: of the whole batch, from (seed, step) alone, so that neither a resume nor
        the number of processes changes it."""
        if self.config.z_dim is not None:
            self._generator.manual_seed(self.config.seed * 1_000_003 + step)
            shape = (2, self.config.batch_size, self.config.z_dim)
            self._noise = torch.randn(shape, generator=self._generator, device=self.device)

    def _noise_of(self, update: int, part: Part) -> Tensor | None:
        if self._noise is None:
            return None
        first = self.ranks.part(self.config.batch_size)[0]
        return self._noise[update, first + part.start : first + part.stop]

    def generate(self, labels: LabelMap, image: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(synthesized images, KL divergence of the encoder's posterior or None). noise [N, z_dim]: drawn if None."""
        training = torch.is_grad_enabled()
        generator, encoder = (
            self._parallel.get(name, net) if training else net
            for name, net in (("generator", self.generator), ("encoder", self.encoder))
        )
        if encoder is None:
            return generator(labels, noise), None
        mu, logvar = (t.to(accumulation_dtype(t.dtype)) for t in encoder(image))
        return generator(labels, models.reparameterize(mu, logvar, noise)), losses.kl_loss(mu, logvar)

    def _discriminate(self, net: nn.Module, part: Part, fake: Tensor) -> tuple[list, list]:
        """Features of fake and of real images, through the discriminator in one batch."""
        with span("discriminator"):
            features = net(part.labels, torch.cat([fake, part.image.to(fake.dtype)]))
        halves = [[f.chunk(2) for f in scale] for scale in features]
        return [[f for f, _ in scale] for scale in halves], [[r for _, r in scale] for scale in halves]

    def _parts(self, labels: LabelMap, image: Tensor) -> list[Part]:
        n, k = image.shape[0], self.config.accumulate
        bounds = [n * i // k for i in range(k + 1)]
        return [
            Part(labels, image, start, stop, (stop - start) / self.config.batch_size, stop == n)
            for start, stop in itertools.pairwise(bounds)
        ]

    @contextlib.contextmanager
    def _micro_batch(self, part: Part, *names: str) -> Iterator[None]:
        """Autocast; spectral norms iterate once an update; gradients are shared once, with the last micro-batch."""
        with contextlib.ExitStack() as stack:
            if not part.first:
                stack.enter_context(hold_power_iteration())
            if not part.last:
                for name in names:
                    if name in self._parallel:
                        stack.enter_context(no_sync(self._parallel[name]))
            yield

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def _backward(self, name: str, terms: list[Tensor], *gradients: tuple[Tensor, Tensor]) -> None:
        """Adds the gradient of the terms' sum, and of given (tensor, its gradient), which is scaled already.

        DistributedDataParallel averages over processes, and the terms are shares: × world.
        """
        with span("backward"):
            scaled = [self.scalers[name].scale(t * self.ranks.world if self.ranks.world > 1 else t) for t in terms]
            roots = [(t, None) for t in scaled] + list(gradients)
            torch.autograd.backward([t for t, _ in roots], [g for _, g in roots])

    def _free_gradients(self) -> None:
        """Of both networks: those of the other one's update are used up."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def _update(self, name: str) -> None:
        with span("optimizer"):
            for group in self.optimizers[name].param_groups:
                for p in group["params"]:
                    if p.grad is not None and p.grad.stride() != p.stride():
                        p.grad = _with_strides_of(p)
            self.scalers[name].step(self.optimizers[name])
            self.scalers[name].update()

    def _perceptual_loss(self, fake: Tensor, part: Part) -> dict[str, Tensor]:
        if self.vgg_loss is None:
            return {}
        with span("VGG"):
            return {"vgg": part.share * self.config.lambda_vgg * self.vgg_loss(fake, part.image)}

    def _adversarial_losses(self, fake: Tensor, part: Part) -> dict[str, Tensor]:
        fake_features, real_features = self._discriminate(self.discriminator, part, fake)
        with span("losses"):
            terms = {"gan": part.share * self.gan_loss.generator(_in_float32(fake_features))}
            if self.config.lambda_feat > 0:
                matching = losses.feature_matching_loss(fake_features, real_features)
                terms["feat"] = part.share * self.config.lambda_feat * matching
        return terms

    def _pixel_loss(self, fake: Tensor, part: Part) -> dict[str, Tensor]:
        if not self.config.lambda_l1 > 0:
            return {}
        with span("losses"):
            return {"l1": part.share * self.config.lambda_l1 * losses.l1_loss(fake, part.image)}

    def generator_step(self, labels: LabelMap, image: Tensor) -> dict[str, Tensor]:
        """One update of generator and encoder. Returns the weighted losses, detached."""
        c = self.config
        self.discriminator.requires_grad_(False)
        self._free_gradients()
        self._fakes = []
        total: dict[str, Tensor] = {}
        for part in self._parts(labels, image):
            with self._micro_batch(part, "generator", "encoder"):
                with self.autocast(), span("generator"):
                    fake, kl = self.generate(part.labels, part.image, self._noise_of(0, part))
                # Each loss goes back to the image at once: only one network's activations live beside the generator's.
                leaf = fake.detach().requires_grad_()
                terms: dict[str, Tensor] = {}
                for loss in (self._perceptual_loss, self._adversarial_losses, self._pixel_loss):
                    with self.autocast():
                        some = loss(leaf, part)
                    if some:
                        self._backward("generator", [sum(some.values())])
                        terms.update(some)
                if kl is not None:
                    terms["kl"] = c.lambda_kl * kl  # a sum over samples, not a mean
                self._backward("generator", [terms["kl"]] if kl is not None else [], (fake, leaf.grad))
            if c.share_fake:
                self._fakes.append(fake.detach())
            _add(total, terms)
        self._update("generator")
        self.discriminator.requires_grad_(True)
        return total

    def discriminator_step(self, labels: LabelMap, image: Tensor) -> dict[str, Tensor]:
        """One update of the discriminator, on images the updated generator makes anew (with share_fake: on those of
        the generator's step). Returns the losses, detached."""
        self._free_gradients()
        net = self._parallel.get("discriminator", self.discriminator)
        total: dict[str, Tensor] = {}
        for i, part in enumerate(self._parts(labels, image)):
            with self._micro_batch(part, "discriminator"):
                with self.autocast():
                    if self._fakes:
                        fake = self._fakes[i]
                    else:
                        with torch.no_grad(), span("generator"):
                            fake, _ = self.generate(part.labels, part.image, self._noise_of(1, part))
                    fake_features, real_features = self._discriminate(net, part, fake)
                    with span("losses"):
                        fakes, reals = _in_float32(fake_features), _in_float32(real_features)
                        terms = {
                            "d_fake": part.share * self.gan_loss.discriminator(fakes, False),
                            "d_real": part.share * self.gan_loss.discriminator(reals, True),
                        }
                self._backward("discriminator", list(terms.values()))
            _add(total, terms)
        self._update("discriminator")
        return total

    def state(self) -> dict[str, Any]:
        """Optimizers and loss scales."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scalers": {name: scaler.state_dict() for name, scaler in self.scalers.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name, scaler in self.scalers.items():
            if state.get("scalers", {}).get(name) and scaler.is_enabled():
                scaler.load_state_dict(state["scalers"][name])


def _with_strides_of(p: Tensor) -> Tensor:
    """p's gradient with p's strides, which the optimizer insists on. Autograd sees to the memory order, but of a 1×1
    kernel that allows several strides."""
    if all(size == 1 or a == b for size, a, b in zip(p.shape, p.stride(), p.grad.stride(), strict=True)):
        return p.grad.as_strided(p.shape, p.stride())
    return torch.empty_like(p).copy_(p.grad)


def _in_float32(features: list) -> list[Tensor]:
    """The predictions of every scale: a mean of thousands of values, which half precision does not hold."""
    predictions = [scale[-1] for scale in features]
    return [p.to(accumulation_dtype(p.dtype)) for p in predictions]


def _add(total: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
    for name, term in terms.items():
        total[name] = total[name] + term.detach() if name in total else term.detach()
