# SPDX-License-Identifier: Apache-2.0
"""`python -m spade_fast.data check`: reads every file of a dataset and lists every fault."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from spade_fast.train import config as training

from . import PHASES, make_dataset
from .base import FileDataset, SegmentationDataset
from .reading import DataError

_DATA_OPTIONS = (
    "dataroot image_dir label_dir instance_dir num_classes ignore_value shift_labels file_list use_edges crop_size "
    "load_size aspect_ratio preprocess seed"
).split()


def _progress(items: Iterable, total: int, label: str) -> Iterator:
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, total=total, desc=label, unit="sample", leave=False))


@dataclasses.dataclass
class Scan:
    """What a dataset holds: faults, warnings, pixels of each class int64 [num_classes], samples in which each class
    occurs int64 [num_classes]."""

    faults: list[str]
    warnings: list[str]
    pixels: np.ndarray
    samples: np.ndarray


def scan(dataset: SegmentationDataset, workers: int = 0, label: str = "check") -> Scan:
    """Reads every file of a dataset opened with strict=False.

    Args:
        dataset: what to read.
        workers: threads that read; decoding runs beside Python.
        label: of the progress bar.
    """
    faults = [*getattr(dataset, "absent", ()), *getattr(dataset, "faults", ())]
    pixels = np.zeros(dataset.num_classes, dtype=np.int64)
    samples = np.zeros(dataset.num_classes, dtype=np.int64)
    seen: dict[int, tuple[tuple[int, int, int], str]] = {}  # stored value -> its color in the first file that has it
    differing: dict[int, str] = {}
    total = len(dataset) + len(getattr(dataset, "incomplete", ()))  # files without a partner may have other faults too
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for found in _progress(pool.map(dataset.inspect, range(total)), total, label):
            faults += found.faults
            if found.counts is not None:
                pixels += found.counts
                samples += found.counts > 0
            for value, color in found.colors.items():
                first, path = seen.setdefault(value, (color, found.path))
                if first != color:
                    differing.setdefault(
                        value, f"label {value} has color {color} in the palette of {found.path}, {first} in {path}"
                    )
    warnings = []
    if differing:
        more = f" (and {len(differing) - 1} more labels)" if len(differing) > 1 else ""
        warnings.append(
            f"palettes differ: {differing[min(differing)]}{more}. Labels are the indices, not the colors: do they "
            "number the classes alike?"
        )
    return Scan(faults, warnings, pixels, samples)


def histogram(dataset: SegmentationDataset, pixels: np.ndarray, samples: np.ndarray) -> list[str]:
    """Lines with the share of pixels and the number of samples of each class, the commonest first."""
    total = max(int(pixels.sum()), 1)
    lines = [f"{'class':>7}  {'pixels':>8}  {'samples':>7}  name"]
    for number in np.argsort(-pixels, kind="stable"):
        if pixels[number]:
            name = dataset.class_names[number] if dataset.class_names else ""
            lines.append(f"{number:>7}  {pixels[number] / total:>8.3%}  {samples[number]:>7}  {name}".rstrip())
    absent = int((pixels == 0).sum())
    if absent:
        lines.append(f"{absent} of {dataset.num_classes} classes do not occur")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 without faults, 1 with."""
    parser = argparse.ArgumentParser(
        prog="python -m spade_fast.data check",
        description="Reads every file of a dataset and lists every fault. Takes the options of training.",
    )
    training.add_arguments(parser)
    parser.add_argument("--config", metavar="FILE", help="options of a training run, as JSON")
    parser.add_argument("--phase", choices=(*PHASES, "all"), default="all", help="what to read (default: all)")
    parser.add_argument("--labels-only", action="store_true", help="without images, as for synthesis")
    args, given = training.parse(parser, argv)
    try:
        options = training.merge(training.read_file(args.config) if args.config else {}, given)
    except training.ConfigError as error:
        parser.error(str(error))
    values = {key: value for key, value in dataclasses.asdict(options).items() if key in _DATA_OPTIONS}
    phases = PHASES if args.phase == "all" else (args.phase,)
    if options.dataset == "folder" and options.dataroot is None:
        phases = phases[:1]  # the folders are the same in both
    number, told = 0, set()
    for phase in phases:
        number += _check_phase(options, phase, not args.labels_only, values, told)
    print(f"{number} faults" if number != 1 else "1 fault")
    return int(number > 0)


def _check_phase(options: training.TrainConfig, phase: str, need_images: bool, values: dict, told: set[str]) -> int:
    """Print what one phase holds, but for faults told already; returns its number of faults."""
    print(f"{options.dataset}, {phase}:")
    try:
        dataset = make_dataset(
            options.dataset, phase, need_images=need_images, size=options.synthetic_size, strict=False, **values
        )
    except DataError as error:
        print(f"fault: {error}")
        return 1
    found = scan(dataset, options.workers, phase)
    faults = [fault for fault in found.faults if fault not in told]
    told.update(dataset.absent if isinstance(dataset, FileDataset) else ())
    for fault in faults:
        print(f"fault: {fault}")
    for warning in found.warnings:
        print(f"warning: {warning}")
    edges = ", instance edges" if isinstance(dataset, FileDataset) and dataset.has_edges else ""
    warned = f", {len(found.warnings)} warning" if found.warnings else ""
    print(f"{len(dataset)} samples, {dataset.num_classes} classes{edges}, {len(faults)} faults{warned}")
    print("\n".join(histogram(dataset, found.pixels, found.samples)))
    return len(faults)
