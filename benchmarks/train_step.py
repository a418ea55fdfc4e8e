# SPDX-License-Identifier: Apache-2.0
"""The training step of the paper, fused against plain: ``python -m benchmarks.train_step``.

A step is the generator's update (hinge, feature matching, VGG features with random weights) and the discriminator's
update on a new fake, each by Adam, as `spade_fast.train.step` runs them in training. Labels are COCO-Stuff's, and
images are random. Baselines are the plain system as the authors run it (`benchmarks.tools.plain`: NCHW, eager,
float32), and with everything torch offers: channels-last memory, AMP, torch.compile.

The fused system gets labels whose patterns a data-loading process has found. On a GPU its step is first run with every
host synchronization made an error. On a CPU, memory is measured in a process that runs one system alone: the most it
holds, less what it held with libraries loaded and before it built the system.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import (
    ROOT,
    full_precision,
    in_layout,
    interleave,
    label_maps,
    stamp,
    with_torch_spectral_norm,
    write_json,
)
from benchmarks.tools.plain import PlainTrainingStep
from spade_fast import LabelMap
from spade_fast.models import SPADEGenerator, VGG19Features, init_weights
from spade_fast.train import config as cfg
from spade_fast.train.batches import pattern_sizes
from spade_fast.train.profiling import PARTS, timed
from spade_fast.train.ranks import Ranks
from spade_fast.train.setup import build_networks
from spade_fast.train.step import TrainingStep

LABEL_NC = 184
PLAIN = "plain eager"
COMPILED = "plain AMP channels-last compiled"
# name -> (fused, mixed precision, channels-last, compiled)
SYSTEMS = {
    PLAIN: (False, False, False, False),
    "plain channels-last": (False, False, True, False),
    COMPILED: (False, True, True, True),
    "fused": (True, False, True, False),
    "fused AMP": (True, True, True, False),
    "fused AMP compiled": (True, True, True, True),
}


def names(options: argparse.Namespace) -> list[str]:
    """The systems to measure. The options decide about those in mixed precision and the compiled ones."""
    chosen = []
    for name, (_, amp, _, compiled) in SYSTEMS.items():
        if (options.amp or not amp) and (options.compile or not compiled):
            chosen.append(name)
    return chosen


class System:
    """One system with a batch of its own. Calling it makes an iteration and returns the losses, on the device."""

    def __init__(self, name: str, options: argparse.Namespace, batch: int) -> None:
        fused, amp, channels_last, compiled = SYSTEMS[name]
        config = cfg.resolve_config(
            cfg.merge(
                {},
                {
                    **{"dataset": "coco", "dataroot": "-", "crop_size": options.crop, "ngf": options.ngf},
                    **{"ndf": options.ngf, "batch_size": batch, "spade": "fused" if fused else "reference"},
                    **{"amp": "bf16" if amp else "fp32", "compile": compiled and fused, "ema": 0.0},
                    **{"checkpoint_blocks": options.checkpoint_blocks and fused},
                },
            )
        )
        torch.manual_seed(0)
        self.nets, self.vgg = build_networks(config, LABEL_NC), VGG19Features().to(options.device)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for net in self.nets.values():
            init_weights(net)
            net.to(options.device).train()
        generator = self.nets["generator"]
        assert isinstance(generator, SPADEGenerator)
        labels, image = inputs(batch, options, pattern_sizes(generator))
        image = image.contiguous(memory_format=layout)
        self.step: Callable[[int], dict[str, Tensor]]  # makes an iteration of this number
        self.optimizers: Mapping[str, torch.optim.Optimizer]
        if fused:
            step = TrainingStep(self.nets, config, self.vgg, Ranks(options.device))
            self.step, self.optimizers = partial(step, labels, image), step.optimizers
        else:
            for net in (*map(with_torch_spectral_norm, self.nets.values()), self.vgg):
                in_layout(net, layout)
            plain = PlainTrainingStep(self.nets, config, self.vgg, options.device, torch.bfloat16 if amp else None)
            if compiled:
                plain.compile()
            one_hot = labels.one_hot().contiguous(memory_format=layout)
            self.step, self.optimizers = partial(plain, one_hot, image), plain.optimizers
        self.done = 0

    def __call__(self) -> Tensor:
        self.done += 1
        terms = self.step(self.done)
        return torch.stack([terms[name] for name in ("vgg", "gan", "feat", "d_fake", "d_real")])

    def load(self, other: System) -> None:
        """The weights of another system, and optimizers that have done no step."""
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        for name, net in self.nets.items():
            net.load_state_dict(other.nets[name].state_dict())
        self.vgg.load_state_dict(other.vgg.state_dict())


def inputs(batch: int, options: argparse.Namespace, sizes: list[tuple[int, int]]) -> tuple[LabelMap, Tensor]:
    """Labels as they come from a data-loading process, and images, on the device."""
    maps, _ = label_maps(options.crop)
    made = LabelMap.cat([maps[i % len(maps)][:].build(sizes, backward=True) for i in range(batch)])
    image = torch.rand(batch, 3, options.crop, options.crop, generator=torch.Generator().manual_seed(1)) * 2 - 1
    cuda = torch.device(options.device).type == "cuda"
    made = made.pin_memory() if cuda else made
    return made.to(options.device, non_blocking=True), image.to(options.device)


def largest(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """The largest batch up to limit that fits, to an eighth of itself.

    The batch is doubled while it fits. Then the interval between a batch that fits and one that does not is halved.
    """
    good, bad = 0, start
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    if bad > limit:
        return good
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def largest_batch(name: str, options: argparse.Namespace) -> int:
    """The largest batch of a system on the GPU that makes two iterations. The second has the optimizers' state."""

    def fits(batch: int) -> bool:
        system: System | None = None
        try:
            system = System(name, options, batch)
            system(), system()
            torch.cuda.synchronize()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            system = None
            torch.cuda.empty_cache()

    return largest(fits, options.batch, 1024)


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory now, or the most it had so far (Linux)."""
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory_on_gpu(system: System, before: int) -> int:
    """Bytes at the peak of a system's step, less those before it was built. Those of other systems do not change."""
    system(), system()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    system()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_alone(name: str, options: argparse.Namespace) -> int:
    """Bytes of a system that runs alone in a process of its own on the CPU, less those of the idle process."""
    arguments = ["--memory-of", name, "--ngf", options.ngf, "--crop", options.crop, "--batch", options.batch]
    flags = ["--device", "cpu", *(["--checkpoint-blocks"] if options.checkpoint_blocks else [])]
    command = [sys.executable, "-m", "benchmarks.train_step", *map(str, arguments), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["bytes"]


def print_memory(options: argparse.Namespace) -> None:
    """Prints what `memory_alone` reads."""
    # The idle process has loaded what is loaded at first use.
    LabelMap(torch.zeros(1, 8, 8, dtype=torch.int64), 2).build([(8, 8)], backward=True)
    torch.nn.functional.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    idle = resident()
    system = System(options.memory_of, options, options.batch)
    system(), system()
    print(json.dumps({"bytes": resident(peak=True) - idle}))


def compare_losses(systems: dict[str, System]) -> dict[str, float]:
    """The largest relative difference of each system's losses from the plain system's, with the same weights.

    The discriminator's losses come after an update of the generator.

    Raises:
        RuntimeError: a difference is too large for right gradients.
    """
    for system in systems.values():
        system.load(systems[PLAIN])
    with full_precision():
        losses = {name: system() for name, system in systems.items()}
    expected = losses.pop(PLAIN)
    errors = {}
    for name, found in losses.items():
        errors[name] = ((found - expected).abs() / expected.abs().clamp(min=0.1)).max().item()
        if not errors[name] < (5e-2 if SYSTEMS[name][1] else 1e-3):
            raise RuntimeError(f"{name}: losses differ by {errors[name]:.2e} from those of {PLAIN}; nothing is timed")
    return errors


def measure(options: argparse.Namespace) -> dict:
    cuda = torch.device(options.device).type == "cuda"
    systems, memory = {}, {}
    for name in names(options):
        before = torch.cuda.memory_allocated() if cuda else 0
        systems[name] = System(name, options, options.batch)
        if cuda:
            memory[name] = memory_on_gpu(systems[name], before)
        elif options.memory:
            memory[name] = memory_alone(name, options)
    source = label_maps(options.crop, 1)[1]
    print(f"label maps: {source}")
    config = {name: getattr(options, name) for name in ("ngf", "crop", "batch", "amp", "compile", "checkpoint_blocks")}
    result: dict = {"stamp": stamp(options.device), "config": config | {"labels": source}, "peak_memory_bytes": memory}
    result["loss_error"] = compare_losses(systems)
    if cuda:
        systems["fused"]()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        systems["fused"]()
        torch.cuda.set_sync_debug_mode("default")
        result["host_synchronizations"] = 0
    times = interleave(dict(systems), options.device, options.seconds, rounds=(3, 50))
    result["times"] = times
    result["images_per_second"] = {name: options.batch / t["median_ms"] * 1e3 for name, t in times.items()}
    fused = min((name for name in times if SYSTEMS[name][0]), key=lambda name: times[name]["median_ms"])
    result["fastest"] = fused
    result["ratios"] = {
        name: round(t["median_ms"] / times[fused]["median_ms"], 3) for name, t in times.items() if name != fused
    }
    result["parts_ms"] = {name: parts(system) for name, system in systems.items()}
    show(result)
    if cuda and options.largest:
        systems.clear()
        result["largest_batch"] = {}
        for name in names(options):
            result["largest_batch"][name] = largest_batch(name, options)
            print(f"  largest batch, {name}: {result['largest_batch'][name]}")
    return result


def parts(system: System) -> dict[str, float]:
    """Milliseconds of each part of one iteration. It waits for the device between parts."""
    with timed() as seconds:
        system()
    return {name: round(1e3 * seconds[name], 3) for name in (*PARTS, "step") if name in seconds}


def show(result: dict) -> None:
    for name, time in result["times"].items():
        memory = result["peak_memory_bytes"].get(name)
        print(
            f"  {name:34s} {time['median_ms']:9.1f} ms {result['images_per_second'][name]:8.2f} images/s "
            f"{result['ratios'].get(name, 1.0):6.2f}×" + (f" {memory / 2**30:7.2f} GiB" if memory else "")
        )
        print("      " + ", ".join(f"{part} {value:.0f}" for part, value in result["parts_ms"][name].items()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=None, help="default: 16 on a GPU, 1 on a CPU")
    parser.add_argument("--ngf", type=int, default=64)
    parser.add_argument("--crop", type=int, default=256)
    on_gpu = "(default on a GPU)"
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None, help=f"bfloat16 too {on_gpu}")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help=f"compiled too {on_gpu}")
    parser.add_argument("--checkpoint-blocks", action="store_true", help="the fused systems recompute their blocks")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure it on a CPU too")
    parser.add_argument("--largest", action="store_true", help="on a GPU: the largest batch that fits, of each system")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true", help="a small system and a short run")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--memory-of", metavar="SYSTEM", choices=tuple(SYSTEMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    cuda = torch.device(options.device).type == "cuda"
    options.amp = cuda if options.amp is None else options.amp
    options.compile = cuda if options.compile is None else options.compile
    options.batch = options.batch or (16 if cuda else 1)
    if options.quick:
        options.seconds = 10.0 if cuda else 3.0
        if not cuda:
            options.ngf, options.crop, options.batch = 8, 64, 2
    if options.memory_of:
        print_memory(options)
    else:
        write_json(options.json, measure(options))


if __name__ == "__main__":
    main()
