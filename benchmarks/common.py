# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: label maps, interleaved timing, saved bytes, and the stamp of a results file."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from spade_fast import LabelMap, __version__
from spade_fast.data import SegmentationDataset, make_dataset
from spade_fast.layers.spectral import SpectralConv2d
from spade_fast.ops import _backend as backend

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = Path(os.environ.get("SPADE_FAST_SAMPLES") or ROOT.parent / "shared" / "coco_stuff_sample")
SYNTHETIC = "synthetic landscapes"  # the source of label maps that are not real

TORCH = "fused, torch backend"  # the variant that needs no compiler, beside the fastest backend of every op

Net = TypeVar("Net", bound=nn.Module)


def on_backend(variant: str) -> contextlib.AbstractContextManager:
    """The backend that a fused variant runs on."""
    return backend.use("torch") if variant == TORCH else contextlib.nullcontext()


def label_maps(size: int = 256, count: int | None = None) -> tuple[list[LabelMap], str]:
    """Single-image LabelMaps of 183 classes and an edge channel, for the COCO-Stuff networks.

    Args:
        size: height and width.
        count: how many at most; None for all 17.

    Returns:
        The maps, and their source in words. They are the sample images' in the folder ``$SPADE_FAST_SAMPLES``, by
        default ``../shared/coco_stuff_sample``. Without that folder they are procedural landscapes, and the source is
        `SYNTHETIC`.

    Raises:
        SystemExit: ``$SPADE_FAST_SAMPLES`` is set and is no folder.
    """
    sets: list[SegmentationDataset] = []
    if SAMPLES.is_dir():
        sets += [make_dataset("coco", p, dataroot=SAMPLES, crop_size=size, need_images=False) for p in ("val", "train")]
        for dataset in sets:
            dataset.geometry = sets[0].geometry  # the whole image, unflipped, for training images too
        source = f"COCO-Stuff sample at {os.path.relpath(SAMPLES, ROOT)}"
    elif os.environ.get("SPADE_FAST_SAMPLES"):
        raise SystemExit(f"SPADE_FAST_SAMPLES must name the folder of the COCO-Stuff sample, got {SAMPLES}")
    else:
        sets.append(make_dataset("synthetic", "val", crop_size=size, need_images=False, size=17))
        source = SYNTHETIC
    items = itertools.islice((dataset[i] for dataset in sets for i in range(len(dataset))), count)
    return [LabelMap(item["label"][None] % 183, 183, item["edges"][None]) for item in items], source


def read_size(text: str) -> tuple[int, int]:
    """The two numbers of "C@S".

    >>> read_size("64@256")
    (64, 256)
    """
    channels, _, size = text.partition("@")
    if not (channels.isdecimal() and size.isdecimal() and int(channels) and int(size)):
        raise argparse.ArgumentTypeError(f"expected two positive numbers as in 64@256, got {text!r}")
    return int(channels), int(size)


def noise_map(size: int = 256) -> LabelMap:
    """One size×size map with a random label and edge at every pixel: the worst case for patterns."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(183, (1, size, size), generator=generator)
    return LabelMap(labels, 183, torch.randint(2, (1, size, size), generator=generator))


def synchronize(device: torch.device | str) -> None:
    """Waits for the GPU; nothing to do on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def interleave(
    variants: Mapping[str, Callable[[], object]],
    device: str = "cpu",
    seconds: float = 10.0,
    rounds: tuple[int, int] = (5, 50),
) -> dict[str, dict]:
    """Milliseconds of each variant. A round times every variant once, so drift of the machine hits them alike.

    Args:
        variants: name -> call. Each is called twice before timing.
        device: where the calls compute.
        seconds: stop after this long, but not before the least number of rounds.
        rounds: least and most rounds.

    Returns:
        name -> median_ms, min_ms, max_ms and rounds.
    """
    for call in variants.values():
        call(), call()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    names = list(variants)
    for i in range(rounds[1]):
        if i >= rounds[0] and time.perf_counter() > end:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            variants[name]()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t), "rounds": len(t)}
        for name, t in times.items()
    }


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward after a forward. Each storage counts once; parameters do not count."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep = forward()  # The output stays alive while counting: a freed storage's address could come again.
    del keep
    return sum(storages.values())


def in_layout(net: Net, memory_format: torch.memory_format) -> Net:
    """The network with its weights in a memory format, in place."""
    return net.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's types leave this argument out


def with_torch_spectral_norm(net: Net) -> Net:
    """The plain system as the authors run it: torch's own hook spectral norm instead of SpectralConv2d, in place."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, SpectralConv2d):
                options = {k: getattr(child, k) for k in ("kernel_size", "stride", "padding")}
                plain = nn.Conv2d(child.in_channels, child.out_channels, bias=child.bias is not None, **options)
                conv = nn.utils.spectral_norm(plain)
                conv.load_state_dict(child.state_dict())
                setattr(module, name, conv)
    return net


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; infinity where a value is not finite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def check(name: str, actual: Tensor, expected: Tensor, bound: float) -> float:
    """The relative error of a result. Nobody times a wrong one.

    Raises:
        RuntimeError: the error is above bound, or the shapes differ.
    """
    if actual.shape != expected.shape:
        raise RuntimeError(f"{name}: shape {list(actual.shape)} instead of {list(expected.shape)}; nothing is timed")
    error = relative_error(actual, expected)
    if error > bound:
        raise RuntimeError(f"{name}: relative error {error:.2e} is above {bound:.0e}; nothing is timed")
    return error


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """For comparisons on a GPU: inside, its convolutions do not round float32 to TF32, as they do by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def stamp(device: str = "cpu") -> dict:
    """Device, versions, commit and date of a results file."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "capability": torch.backends.cpu.get_cpu_capability()
        if not cuda
        else ".".join(map(str, torch.cuda.get_device_capability())),
        "spade_fast": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_json(path: str | Path | None, result: dict) -> None:
    """Writes a results file; nothing when path is None."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
