# SPDX-License-Identifier: Apache-2.0
"""The training step of the paper, fused against plain: ``python -m benchmarks.step``.

Generator step (hinge, feature matching, VGG features with random weights), discriminator step on a new fake,
both Adam updates; COCO-Stuff labels, random images. Baselines: the plain system as the authors run it (NCHW), and in
channels-last memory with torch.compile. The fused system gets labels whose patterns a data-loading worker has found;
on a GPU its step is first run with every host synchronisation made an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import interleave, label_maps, stamp, with_torch_spectral_norm, write_json
from spade_fast import LabelMap
from spade_fast.losses import GANLoss, VGGLoss, feature_matching_loss
from spade_fast.models import MultiscaleDiscriminator, SPADEGenerator, VGG19Features, init_weights


class System(nn.Module):
    """Generator, discriminator, losses and optimisers of one training run."""

    def __init__(self, spade: str, ngf: int, crop: int, device: str, amp: torch.dtype | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = SPADEGenerator(184, ngf=ngf, crop_size=crop, spade=spade)
        self.discriminator = MultiscaleDiscriminator(184, ndf=ngf)
        for net in (self.generator, self.discriminator):
            init_weights(net)
        self.vgg = VGGLoss(VGG19Features())
        self.gan, self.amp = GANLoss("hinge"), amp
        self.to(device)

    def optimize(self) -> None:
        """Make the optimisers; after the parameters are where and how they will stay."""
        options = {"betas": (0.0, 0.9), "fused": next(self.parameters()).is_cuda}
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=1e-4, **options)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), lr=4e-4, **options)

    def losses_g(self, labels, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, self.amp, enabled=self.amp is not None):
            fake = self.generator(labels)
            fakes, reals = self._features(labels, fake, image)
            return self.gan.generator(fakes) + 10 * feature_matching_loss(fakes, reals) + 10 * self.vgg(fake, image)

    def losses_d(self, labels, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, self.amp, enabled=self.amp is not None):
            with torch.no_grad():
                fake = self.generator(labels)
            fakes, reals = self._features(labels, fake, image)
            return self.gan.discriminator(fakes, False) + self.gan.discriminator(reals, True)

    def _features(self, labels, fake: Tensor, image: Tensor) -> tuple[list, list]:
        scales = self.discriminator(labels, torch.cat([fake, image.to(fake.dtype)]))
        halves = [[f.chunk(2) for f in scale] for scale in scales]
        return [[f[0] for f in scale] for scale in halves], [[f[1] for f in scale] for scale in halves]

    def step(self, labels, image: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration; the two losses, still on the device."""
        self.optimizer_g.zero_grad()
        loss_g = self.losses_g(labels, image)
        loss_g.backward()
        self.optimizer_g.step()
        self.optimizer_d.zero_grad()
        loss_d = self.losses_d(labels, image)
        loss_d.backward()
        self.optimizer_d.step()
        return loss_g.detach(), loss_d.detach()


def systems(options: argparse.Namespace, labels: LabelMap, image: Tensor) -> dict[str, tuple[System, Callable]]:
    """name -> (system, one step). Plain systems get the one-hot map made for them outside the timing."""
    device, amp = options.device, torch.bfloat16 if options.amp else None
    dense = labels.one_hot()
    made: dict[str, tuple[System, Callable]] = {}
    names = (
        ["plain NCHW", "plain channels-last"]
        + (["plain compiled channels-last"] if options.compile else [])
        + ["fused"]
    )
    for name in names:
        system = System("fused" if name == "fused" else "reference", options.ngf, options.crop, device, amp)
        if name == "fused":
            made["fused"] = (system, lambda s=system: s.step(labels, image))
        else:
            with_torch_spectral_norm(system)
            segmap = dense
            if "channels-last" in name:
                system.to(memory_format=torch.channels_last)
                segmap = dense.contiguous(memory_format=torch.channels_last)
            system.to(device)
            if "compiled" in name:
                system.generator.compile()
                system.discriminator.compile()
            made[name] = (system, lambda s=system, m=segmap: s.step(m, image))
        system.optimize()
    made["fused"][0].load_state_dict(made["plain NCHW"][0].state_dict())
    return made


def measure(options: argparse.Namespace) -> dict:
    device, cuda = options.device, torch.device(options.device).type == "cuda"
    maps, source = label_maps(options.crop)
    sizes = {(h, h) for h in (options.crop >> i for i in range(6))}
    worker = LabelMap.cat([maps[i % len(maps)].build(sizes, backward=True) for i in range(options.batch)])
    labels = (worker.pin_memory() if cuda else worker).to(device, non_blocking=True)
    image = torch.rand(options.batch, 3, options.crop, options.crop, device=device) * 2 - 1
    made = systems(options, labels, image)
    config = {name: getattr(options, name) for name in ("ngf", "crop", "batch", "amp")} | {"labels": source}
    result: dict = {"stamp": stamp(device), "config": config}
    # Correctness first: the same weights give the same losses (the second after one update of the generator).
    losses = {name: torch.stack(step()) for name, (_, step) in made.items() if name in ("plain NCHW", "fused")}
    error = ((losses["fused"] - losses["plain NCHW"]).abs() / losses["plain NCHW"].abs()).max().item()
    if not error < (5e-2 if options.amp else 1e-3):
        raise RuntimeError(f"training step: losses {losses} differ by {error:.2e}; nothing is timed")
    result["loss_error"] = error
    if cuda:
        made["fused"][1]()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        made["fused"][1]()
        torch.cuda.set_sync_debug_mode("default")
        result["host_synchronisations"] = 0
        result["peak_memory_bytes"] = {}
        for name, (_, step) in made.items():
            step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            result["peak_memory_bytes"][name] = torch.cuda.max_memory_allocated() - before
    times = interleave({name: step for name, (_, step) in made.items()}, device, options.seconds)
    fused = times["fused"]["median_ms"]
    result["times"] = times
    result["ratios"] = {name: round(t["median_ms"] / fused, 3) for name, t in times.items() if name != "fused"}
    result["images_per_second"] = {name: options.batch / t["median_ms"] * 1e3 for name, t in times.items()}
    for name, time in times.items():
        print(f"  {name:32s} {time['median_ms']:9.2f} ms   {result['ratios'].get(name, 1.0):6.2f}×")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=None, help="default: 16 on a GPU, 1 on a CPU")
    parser.add_argument("--ngf", type=int, default=64)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, default=None, help="bfloat16 (default on a GPU)"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="(default on a GPU)")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true", help="a small system and a short run")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    cuda = torch.device(options.device).type == "cuda"
    options.amp = cuda if options.amp is None else options.amp
    options.compile = cuda if options.compile is None else options.compile
    options.batch = options.batch or (16 if cuda else 1)
    if options.quick:
        options.seconds = 10.0 if cuda else 3.0
        if not cuda:
            options.ngf, options.crop = 8, 64
    write_json(options.json, measure(options))


if __name__ == "__main__":
    main()
