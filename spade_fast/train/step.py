# SPDX-License-Identifier: Apache-2.0
"""One iteration of training: the generator's update, then the discriminator's (paper, section 4).

It runs on any number of processes, in mixed precision, and in micro-batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast import models
from spade_fast.labels.label_map import LabelMap
from spade_fast.layers.spectral import hold_power_iteration
from spade_fast.ops._register import accumulation_dtype
from spade_fast.train import losses
from spade_fast.train.adam import Adam
from spade_fast.train.config import ResolvedConfig
from spade_fast.train.ema import EMA
from spade_fast.train.micro_batches import MicroBatch, micro_batches
from spade_fast.train.profiling import span
from spade_fast.train.ranks import Ranks, no_sync
from spade_fast.train.setup import check_batch, generator_of, share_statistics


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in, or None for float32.

    ``auto`` is bfloat16 on GPUs that have it (sm_80 and newer), and float32 elsewhere.
    """
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if bf16 else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]


class TrainingStep:
    """Networks, losses and optimizers, and what an iteration does with them.

    The losses that the methods return are this process's shares: the loss of the whole batch is their sum over
    processes.

    Args:
        nets: generator, discriminator and perhaps encoder, on their device. They are put into channels-last memory.
        config: resolved options.
        vgg: VGG19 features, or None without the perceptual loss.
        ranks: the processes. Each calls the methods with its share of the batch, at the same time.

    Raises:
        ConfigError: the batch is too small for the processes, or a norm can't be synchronized on CPUs.
    """

    def __init__(self, nets: dict[str, nn.Module], config: ResolvedConfig, vgg: nn.Module | None, ranks: Ranks) -> None:
        check_batch(config, ranks.world)
        share_statistics(config, nets, ranks)
        self.nets, self.config, self.ranks = nets, config, ranks
        self.generator, self.discriminator = generator_of(nets), nets["discriminator"]
        self.encoder = nets.get("encoder")
        self.vgg_loss = None if vgg is None else losses.VGGLoss(_channels_last(vgg))
        self.gan_loss = losses.GANLoss(config.gan_mode)
        self.device = ranks.device
        self.amp = amp_dtype(config.amp, self.device)
        for net in nets.values():
            _channels_last(net)
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

    def set_lr(self, factor: float) -> None:
        """Sets the learning rates to `factor` times their base."""
        for optimizer, lr in zip(self.optimizers.values(), self.base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor

    def lrs(self) -> dict[str, float]:
        """The present learning rates, as "lr_generator" and "lr_discriminator"."""
        return {f"lr_{name}": optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}

    def __call__(self, labels: LabelMap, image: Tensor, step: int) -> dict[str, Tensor]:
        """Both updates of iteration `step`, counted from 0.

        The generator is updated in one of d_steps_per_g iterations, first in iteration 0. Iterations are counted over
        the whole run: neither the end of an epoch nor a resume changes the count.

        Returns:
            The weighted losses: detached scalars that are still on the device.
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
        """Draws the latent noise of an iteration for the whole batch, from (seed, step) alone.

        Neither a resume nor the number of processes changes it.
        """
        if self.config.z_dim is not None:
            self._generator.manual_seed(self.config.seed * 1_000_003 + step)
            shape = (2, self.config.batch_size, self.config.z_dim)
            self._noise = torch.randn(shape, generator=self._generator, device=self.device)

    def _noise_of(self, update: int, micro_batch: MicroBatch) -> Tensor | None:
        if self._noise is None:
            return None
        first = self.ranks.share(self.config.batch_size)[0]
        return self._noise[update, first + micro_batch.start : first + micro_batch.stop]

    def generate(self, labels: LabelMap, image: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Images from label maps, in the style of real images where there is an encoder.

        Args:
            labels: N label maps.
            image: [N, 3, H, W], what the encoder sees.
            noise: [N, z_dim], or None: the encoder's is drawn then.

        Returns:
            The synthesized images [N, 3, H, W], and the KL divergence of the encoder's posterior or None.
        """
        parallel = self._parallel if torch.is_grad_enabled() else {}
        generator = parallel.get("generator", self.generator)
        if self.encoder is None:
            return generator(labels, noise), None
        encoder = parallel.get("encoder", self.encoder)
        mu, logvar = (t.to(accumulation_dtype(t.dtype)) for t in encoder(image))
        return generator(labels, models.reparameterize(mu, logvar, noise)), losses.kl_loss(mu, logvar)

    def _discriminate(self, net: nn.Module, micro_batch: MicroBatch, fake: Tensor) -> tuple[list, list]:
        """Features of fake and of real images, which go through the discriminator in one batch."""
        with span("discriminator"):
            features = net(micro_batch.labels, torch.cat([fake, micro_batch.image.to(fake.dtype)]))
        halves = [[f.chunk(2) for f in scale] for scale in features]
        return [[f for f, _ in scale] for scale in halves], [[r for _, r in scale] for scale in halves]

    @contextlib.contextmanager
    def _within(self, micro_batch: MicroBatch, *names: str) -> Iterator[None]:
        """Around a micro-batch's forward and backward, which involve the named networks.

        The first micro-batch iterates spectral norm. The last one shares the gradients of all.
        """
        with contextlib.ExitStack() as stack:
            if not micro_batch.first:
                stack.enter_context(hold_power_iteration())
            if not micro_batch.last:
                for name in names:
                    if name in self._parallel:
                        stack.enter_context(no_sync(self._parallel[name]))
            yield

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def _backward(self, name: str, terms: list[Tensor], *gradients: tuple[Tensor, Tensor]) -> None:
        """Adds the gradients of the terms' sum.

        DistributedDataParallel averages over processes, but the terms are shares to be added: hence × world.

        Args:
            name: the network whose loss scale applies.
            terms: losses.
            gradients: pairs of a tensor and its gradient, which is scaled already; they are propagated too.
        """
        with span("backward"):
            scaled = [self.scalers[name].scale(t * self.ranks.world if self.ranks.world > 1 else t) for t in terms]
            roots = [*scaled, *(tensor for tensor, _ in gradients)]
            torch.autograd.backward(roots, [*(None for _ in scaled), *(gradient for _, gradient in gradients)])

    def _free_gradients(self) -> None:
        """Frees the gradients of both optimizers: those of the other network's update are used up."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def _update(self, name: str) -> None:
        with span("optimizer"):
            for group in self.optimizers[name].param_groups:
                for p in group["params"]:
                    if p.grad is not None and p.grad.stride() != p.stride():
                        p.grad = _with_strides_of(p, p.grad)
            self.scalers[name].step(self.optimizers[name])
            self.scalers[name].update()

    def _perceptual_loss(self, fake: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        if self.vgg_loss is None:
            return {}
        with span("VGG"):
            return {"vgg": micro_batch.weight * self.config.lambda_vgg * self.vgg_loss(fake, micro_batch.image)}

    def _adversarial_losses(self, fake: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        fake_features, real_features = self._discriminate(self.discriminator, micro_batch, fake)
        with span("losses"):
            terms = {"gan": micro_batch.weight * self.gan_loss.generator(_in_float32(fake_features))}
            if self.config.lambda_feat > 0:
                matching = losses.feature_matching_loss(fake_features, real_features)
                terms["feat"] = micro_batch.weight * self.config.lambda_feat * matching
        return terms

    def _pixel_loss(self, fake: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        if not self.config.lambda_l1 > 0:
            return {}
        with span("losses"):
            return {"l1": micro_batch.weight * self.config.lambda_l1 * losses.l1_loss(fake, micro_batch.image)}

    def generator_step(self, labels: LabelMap, image: Tensor) -> dict[str, Tensor]:
        """One update of generator and encoder (paper, section 4).

        Args:
            labels: N label maps, this process's share of the batch.
            image: the real images [N, 3, H, W] in [-1, 1].

        Returns:
            The weighted losses, detached: "gan" and, by option, "feat", "vgg", "l1", "kl".
        """
        c = self.config
        self.discriminator.requires_grad_(False)
        self._free_gradients()
        self._fakes = []
        total: dict[str, Tensor] = {}
        for micro_batch in micro_batches(labels, image, self.config):
            with self._within(micro_batch, "generator", "encoder"):
                with self.autocast(), span("generator"):
                    fake, kl = self.generate(micro_batch.labels, micro_batch.image, self._noise_of(0, micro_batch))
                # Each loss is propagated to the image at once. Only one judging network's activations are alive then.
                leaf = fake.detach().requires_grad_()
                terms: dict[str, Tensor] = {}
                for loss in (self._perceptual_loss, self._adversarial_losses, self._pixel_loss):
                    with self.autocast():
                        some = loss(leaf, micro_batch)
                    if some:
                        self._backward("generator", [*some.values()])
                        terms.update(some)
                if kl is not None:
                    terms["kl"] = c.lambda_kl * kl  # a sum over samples, not a mean
                assert leaf.grad is not None  # the adversarial loss is always there
                self._backward("generator", [terms["kl"]] if kl is not None else [], (fake, leaf.grad))
            if c.share_fake:
                self._fakes.append(fake.detach())
            _add(total, terms)
        self._update("generator")
        self.discriminator.requires_grad_(True)
        return total

    def discriminator_step(self, labels: LabelMap, image: Tensor) -> dict[str, Tensor]:
        """One update of the discriminator, on new images of the updated generator.

        With share_fake it sees those of the generator's step instead.

        Args:
            labels: N label maps, this process's share of the batch.
            image: the real images [N, 3, H, W] in [-1, 1].

        Returns:
            The losses "d_fake" and "d_real", detached.
        """
        self._free_gradients()
        net = self._parallel.get("discriminator", self.discriminator)
        total: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(micro_batches(labels, image, self.config)):
            with self._within(micro_batch, "discriminator"):
                with self.autocast():
                    if self._fakes:
                        fake = self._fakes[i]
                    else:
                        with torch.no_grad(), span("generator"):
                            fake, _ = self.generate(
                                micro_batch.labels, micro_batch.image, self._noise_of(1, micro_batch)
                            )
                    fake_features, real_features = self._discriminate(net, micro_batch, fake)
                    with span("losses"):
                        fakes, reals = _in_float32(fake_features), _in_float32(real_features)
                        terms = {
                            "d_fake": micro_batch.weight * self.gan_loss.discriminator(fakes, False),
                            "d_real": micro_batch.weight * self.gan_loss.discriminator(reals, True),
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
        """Puts back what `state` returned."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name, scaler in self.scalers.items():
            if state.get("scalers", {}).get(name) and scaler.is_enabled():
                scaler.load_state_dict(state["scalers"][name])


def _channels_last(net: nn.Module) -> nn.Module:
    """Puts a network's weights into channels-last memory, in place."""
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs lack this overload


def _with_strides_of(p: Tensor, gradient: Tensor) -> Tensor:
    """The parameter's gradient with the parameter's strides, which the optimizer needs.

    Autograd gives the gradient of a 1×1 kernel the right memory order, but that order has several strides.
    """
    if all(size == 1 or a == b for size, a, b in zip(p.shape, p.stride(), gradient.stride(), strict=True)):
        return gradient.as_strided(p.shape, p.stride())
    return torch.empty_like(p).copy_(gradient)


def _in_float32(features: list) -> list[Tensor]:
    """The predictions of every scale, in float32 at least: half precision can't average thousands of values."""
    predictions = [scale[-1] for scale in features]
    return [p.to(accumulation_dtype(p.dtype)) for p in predictions]


def _add(total: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
    for name, term in terms.items():
        total[name] = total[name] + term.detach() if name in total else term.detach()
