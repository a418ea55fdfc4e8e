# SPDX-License-Identifier: Apache-2.0
"""Reads every file of a dataset and lists every fault. The command is in `spade_fast.data.__main__`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .base import FileDataset, Inspection, SegmentationDataset
from .options import DataOptions, open_dataset, phases_are_one
from .reading import DataError


def _progress(items: Iterable[Inspection], total: int, label: str) -> Iterator[Inspection]:
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, total=total, desc=label, unit="sample", leave=False))


@dataclasses.dataclass
class Scan:
    """What a dataset holds.

    Attributes:
        faults: a message for each fault; training would end with it.
        warnings: a message for each thing that may be wrong.
        pixels: int64 [num_classes], pixels of each class.
        samples: int64 [num_classes], samples in which each class occurs.
    """

    faults: list[str]
    warnings: list[str]
    pixels: np.ndarray
    samples: np.ndarray


def scan(dataset: SegmentationDataset, workers: int = 0, label: str = "check") -> Scan:
    """Reads every file of a dataset opened with strict=False.

    Args:
        dataset: what to read.
        workers: threads that read; Pillow decodes without Python's lock.
        label: stands before the progress bar.
    """
    faults = [*getattr(dataset, "absent", ()), *getattr(dataset, "faults", ())]
    pixels = np.zeros(dataset.num_classes, dtype=np.int64)
    samples = np.zeros(dataset.num_classes, dtype=np.int64)
    seen: dict[
        int, tuple[tuple[int, int, int], str | None]
    ] = {}  # stored value -> its color in the first file that has it
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
    """Lines with the share of pixels and the number of samples of each class, the most frequent class first."""
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


def run(options: DataOptions, phases: Sequence[str], need_images: bool = True) -> int:
    """Prints what each phase of a dataset holds.

    Args:
        options: which dataset.
        phases: "train", "val" or both.
        need_images: False to read label maps alone.

    Returns:
        The number of faults.
    """
    if options.val_split is not None or phases_are_one(options):
        options = dataclasses.replace(options, val_split=None)
        phases = phases[:1]  # both read the same files
    number, told = 0, set[str]()
    for phase in phases:
        number += _check_phase(options, phase, need_images, told)
    print(f"{number} faults" if number != 1 else "1 fault")
    return number


def _check_phase(options: DataOptions, phase: str, need_images: bool, told: set[str]) -> int:
    """Prints what one phase holds, without the faults in `told`, and adds to them. Returns its number of faults."""
    print(f"{options.dataset}, {phase}:")
    try:
        dataset = open_dataset(options, phase, need_images=need_images, strict=False)
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
