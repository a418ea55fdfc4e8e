# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: real label maps, interleaved timing, saved bytes, and the stamp of a results file."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from spade_fast import LabelMap, __version__
from spade_fast.data import make_dataset
from spade_fast.layers.spectral import SpectralConv2d
from spade_fast.ops import _backend as backend

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = Path(os.environ.get("SPADE_FAST_SAMPLES", ROOT.parent / "shared" / "coco_stuff_sample"))


TORCH = "fused, torch backend"  # the variant that needs no compiler, beside the fastest backend of every op


def on_backend(variant: str) -> contextlib.AbstractContextManager:
    """The backend that a fused variant runs on."""
    return backend.use("torch") if variant == TORCH else contextlib.nullcontext()


def label_maps(size: int = 256, count: int | None = None) -> tuple[list[LabelMap], str]:
    """Single-image COCO-Stuff LabelMaps (183 classes + edge) of size×size, and where they come from.

    The 17 sample images where they are at hand; otherwise procedural landscapes, whose labels are spread over the
    183 classes, so that every benchmark still runs (and says so).
    """
    if SAMPLES.is_dir():
        sets = [make_dataset("coco", p, dataroot=SAMPLES, crop_size=size, need_images=False) for p in ("val", "train")]
        for dataset in sets:
            dataset.geometry = sets[0].geometry  # the whole image, unflipped, for training images too
        source = "coco_stuff_sample"
    else:
        sets = [make_dataset("synthetic", "val", crop_size=size, need_images=False, size=17)]
        source = "synthetic"
    items = [dataset[i] for dataset in sets for i in range(len(dataset))][:count]
    return [LabelMap(item["label"][None] % 183, 183, item["edges"][None]) for item in items], source


def noise_map(size: int = 256) -> LabelMap:
    """Every pixel a random label and edge: the worst case for patterns."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(183, (1, size, size), generator=generator)
    return LabelMap(ids, 183, torch.randint(2, (1, size, size), generator=generator))


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def interleave(
    variants: dict[str, Callable[[], object]],
    device: str = "cpu",
    seconds: float = 10.0,
    rounds: tuple[int, int] = (5, 50),
) -> dict[str, dict]:
    """Median milliseconds of each variant, all timed in turn within the same rounds so that drift hits them alike.

    Args:
        variants: name -> call. Each is called twice before timing.
        seconds: stop after this long (but not before the least number of rounds).
        rounds: least and most rounds.
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


def saved_bytes(forward: Callable[[], object], parameters=()) -> int:
    """Bytes that autograd keeps for backward after a forward, each storage once, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep = forward()  # alive while counting: a freed storage's address could come again
    del keep
    return sum(storages.values())


def with_torch_spectral_norm(net: nn.Module) -> nn.Module:
    """The plain system as the authors run it: torch's own hook spectral norm instead of SpectralConv2d, in place."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, SpectralConv2d):
                options = {k: getattr(child, k) for k in ("kernel_size", "stride", "padding")}
                conv = nn.Conv2d(child.in_channels, child.out_channels, bias=child.bias is not None, **options)
                conv = nn.utils.spectral_norm(conv)
                conv.load_state_dict(child.state_dict())
                setattr(module, name, conv)
    return net


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN counts as infinitely wrong."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def check(name: str, actual: torch.Tensor, expected: torch.Tensor, bound: float) -> float:
    """The relative error, or RuntimeError: no speed is reported for a wrong result."""
    error = relative_error(actual, expected)
    if error > bound:
        raise RuntimeError(f"{name}: relative error {error:.2e} is above {bound:.0e}; nothing is timed")
    return error


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def stamp(device: str = "cpu") -> dict:
    """Device, versions, commit and date of a results file."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "capability": torch.backends.cpu.get_cpu_capability()
        if not cuda
        else ".".join(map(str, torch.cuda.get_device_capability())),
        "spade_fast": __version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_json(path: str | Path | None, result: dict) -> None:
    """Write a results file (nothing when path is None)."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
