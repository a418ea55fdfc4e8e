# SPDX-License-Identifier: Apache-2.0
"""One SPADE layer with batch statistics, fused against plain: ``python -m benchmarks.layer``.

It measures every layer size of the COCO-Stuff generator, on real label maps and on noise. Where the sample of real maps
is missing, synthetic ones take their place; the output and the results file name the source.

Baselines are the plain layer in NCHW and in channels-last memory, and compiled where asked. "class table" looks gamma
and beta up by class: a floor, and another function. "fused, new map" finds the patterns in every call; a network finds
them once for all its layers of one resolution. "fused, torch backend" needs no compiler.

A time is the mean over maps of the medians of interleaved rounds. A ratio is the time of the faster plain layer in
eager mode over the variant's. Output and every gradient are checked first.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import mean

import torch

from benchmarks.cases.layer import NEW_MAP, PARTS, PLAIN, SIZES, LayerCase
from benchmarks.common import (
    SYNTHETIC,
    check,
    full_precision,
    interleave,
    label_maps,
    noise_map,
    read_size,
    stamp,
    write_json,
)
from spade_fast import LabelMap


def measure(channels: int, size: int, maps: list[LabelMap], options: argparse.Namespace) -> dict:
    """One row of the table: means over the maps."""
    amp = torch.bfloat16 if options.amp else None
    found: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS}
    errors, densities, saved = [], [], []
    for labels in maps:
        case = LayerCase(channels, size, labels, options.device, amp, options.compile)
        with full_precision():
            expected, actual = case.training(PLAIN[0]), case.training("fused")
        for name, a, e in zip(case.names(), actual, expected, strict=True):
            errors.append(check(f"{name} of {channels}@{size}", a, e, 2e-2 if options.amp else 1e-4))
        densities.append(case.labels.patterns(size, size).density)
        saved.append({name: case.saved(name) for name in (PLAIN[0], "fused")})
        for part in PARTS:
            calls = {name: partial(case.run, part, name) for name in case.layers}
            times = interleave(calls, options.device, options.seconds / len(maps), rounds=(3, 50))
            found[part].append({name: t["median_ms"] for name, t in times.items()})
    result: dict = {"channels": channels, "size": size, "patterns_per_pixel": round(mean(densities), 4)}
    result["largest_relative_error"] = max(errors)
    for part, rows in found.items():
        means = {name: round(mean(row[name] for row in rows), 3) for name in rows[0]}
        plain = min(means[name] for name in PLAIN)
        result[part] = {"ms": means, "ratios": {name: round(plain / ms, 3) for name, ms in means.items()}}
    result["saved_bytes"] = {name: round(mean(row[name] for row in saved)) for name in saved[0]}
    return result


def report(kind: str, row: dict) -> None:
    saved = row["saved_bytes"]["fused"] / row["saved_bytes"][PLAIN[0]]
    parts = []
    for name in PARTS:
        milliseconds, ratios = row[name]["ms"]["fused"], row[name]["ratios"]
        parts.append(f"{name} {milliseconds:8.2f} ms {ratios['fused']:6.2f}× ({ratios[NEW_MAP]:.2f}× new map)")
    layer = f"{row['channels']:5d}@{row['size']:<4d} patterns/pixel {row['patterns_per_pixel']:.3f}"
    print(f"{kind:9s} {layer}  {'  '.join(parts)}  saved {saved:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = "channels@size of x; default: all of the generator"
    parser.add_argument("--sizes", nargs="+", type=read_size, default=SIZES, metavar="C@S", help=sizes)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--maps", type=int, default=4, help="batches of label maps, spread over the samples")
    parser.add_argument("--noise", action=argparse.BooleanOptionalAction, default=True, help="noise maps too")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="compiled baselines too"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each measurement of each size")
    parser.add_argument("--quick", action="store_true", help="two sizes, one map, a short run")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.maps, options.sizes = 0.5, 1, options.sizes[::5]
    found, source = label_maps()
    print(f"label maps: {source}")
    batches = []
    for i in range(options.maps):
        first = i * len(found) // options.maps
        batches.append(LabelMap.cat([found[(first + j) % len(found)] for j in range(options.batch)]))
    config = {name: getattr(options, name) for name in ("batch", "maps", "amp", "compile", "seconds")}
    result: dict = {"stamp": stamp(options.device), "config": {**config, "labels": source}}
    kinds = {"synthetic" if source == SYNTHETIC else "real": batches}
    if options.noise:
        kinds["noise"] = [LabelMap.cat([noise_map()] * options.batch)]
    for kind, maps in kinds.items():
        result[kind] = []
        for channels, size in options.sizes:
            result[kind].append(measure(channels, size, maps, options))
            report(kind, result[kind][-1])
    write_json(options.json, result)


if __name__ == "__main__":
    main()
