# SPDX-License-Identifier: Apache-2.0
"""One SPADE layer with batch statistics, fused against plain: ``python -m benchmarks.layer``.

Every layer size of the COCO-Stuff generator, on real label maps and on noise. Baselines: the plain layer in NCHW and in
channels-last memory, compiled too where asked, and as the floor gamma and beta looked up by class (what CLADE costs;
another function). "fused, new map" finds the patterns anew each time, which a network does once for its layers of one
resolution; "fused, torch backend" needs no compiler. Times are means over maps of medians of interleaved rounds; ratios
are to the faster plain layer in eager mode. Output and every gradient are checked first.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from benchmarks.class_table import ClassLabels, ClassTableSPADE
from benchmarks.common import (
    TORCH,
    check,
    interleave,
    label_maps,
    noise_map,
    on_backend,
    saved_bytes,
    stamp,
    write_json,
)
from spade_fast import FusedSPADE, LabelMap
from spade_fast.reference import SPADE

SIZES = (
    (1024, 8),
    (1024, 16),
    (1024, 32),
    (512, 32),
    (512, 64),
    (256, 64),
    (256, 128),
    (128, 128),
    (128, 256),
    (64, 256),
)
PLAIN = ("plain NCHW", "plain channels-last")


class Case:
    """One size and one batch of maps: the same weights and inputs for every variant."""

    def __init__(self, channels: int, size: int, labels: LabelMap, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        device, self.size, self.channels = options.device, size, channels
        self.labels = labels.to(device)
        self.amp = torch.bfloat16 if options.amp else None
        plain = SPADE(channels, labels.label_nc)
        self.layers: dict[str, nn.Module] = {"plain NCHW": plain}
        self.layers["plain channels-last"] = SPADE(channels, labels.label_nc).to(memory_format=torch.channels_last)
        self.layers["fused"] = FusedSPADE(channels, labels.label_nc)
        for layer in self.layers.values():
            layer.load_state_dict(plain.state_dict())
        self.layers["class table"] = ClassTableSPADE(self.layers["fused"])
        self.layers = {name: layer.to(device) for name, layer in self.layers.items()}
        if options.compile:
            for name in PLAIN:
                self.layers[f"compiled {name}"] = torch.compile(self.layers[name])
        self.layers["fused, new map"] = self.layers[TORCH] = self.layers["fused"]
        dtype = torch.float32 if self.amp is None else self.amp  # a block hands the layer what its convolution gave
        x = torch.randn(len(labels), channels, size, size, device=device).to(dtype)
        gradient = torch.randn_like(x)
        self.x = {True: x.contiguous(memory_format=torch.channels_last), False: x}
        self.gradient = {True: gradient.contiguous(memory_format=torch.channels_last), False: gradient}
        self.labels.build([(size, size)], backward=True)
        dense = self.labels.one_hot()
        self.dense = {True: dense.contiguous(memory_format=torch.channels_last), False: dense}

    def inputs(self, name: str) -> tuple[Tensor, LabelMap | Tensor, Tensor]:
        """x, labels and the gradient of the output, in the variant's layout."""
        channels_last = "NCHW" not in name
        parts = (self.labels.codes, self.labels.num_classes, self.labels.has_edges)
        if "plain" in name:
            labels = self.dense[channels_last]
        elif name == "class table":
            labels = ClassLabels.from_codes(*parts)
        else:
            labels = LabelMap.from_codes(*parts) if name == "fused, new map" else self.labels
        return self.x[channels_last], labels, self.gradient[channels_last]

    def forward(self, name: str) -> Tensor:
        x, labels, _ = self.inputs(name)
        with on_backend(name), torch.no_grad(), torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
            return self.layers[name](x, labels)

    def training(self, name: str) -> list[Tensor]:
        """Forward and backward; output and gradients of x and the weights."""
        x, labels, gradient = self.inputs(name)
        x = x.detach().requires_grad_()
        for p in self.layers[name].parameters():
            p.grad = None
        with on_backend(name):
            with torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
                out = self.layers[name](x, labels)
            out.backward(gradient.to(out.dtype))
        return [out.detach(), x.grad, *(p.grad for p in self.layers[name].parameters())]

    def saved(self, name: str) -> int:
        x, labels, _ = self.inputs(name)
        x = x.detach().requires_grad_()
        return saved_bytes(lambda: self.layers[name](x, labels), self.layers[name].parameters())


def measure(channels: int, size: int, maps: list[LabelMap], options: argparse.Namespace) -> dict:
    """One row of the table: means over the maps."""
    parts: dict[str, list[dict[str, float]]] = {"forward": [], "training": []}
    errors, densities, saved = [], [], []
    for labels in maps:
        case = Case(channels, size, labels, options)
        bound = 2e-2 if options.amp else 1e-4
        names = ["output", "gradient of x", *(n for n, _ in case.layers["fused"].named_parameters())]
        expected, actual = case.training("plain NCHW"), case.training("fused")
        for name, a, e in zip(names, actual, expected, strict=True):
            errors.append(check(f"{name} of {channels}@{size}", a, e, bound))
        densities.append(case.labels.patterns(size, size).density)
        saved.append({name: case.saved(name) for name in ("plain NCHW", "fused")})
        for part, call in (("forward", case.forward), ("training", case.training)):
            variants = {name: (lambda n=name, c=call: c(n)) for name in case.layers}
            times = interleave(variants, options.device, options.seconds / len(maps), rounds=(3, 50))
            parts[part].append({name: t["median_ms"] for name, t in times.items()})
    result: dict = {"channels": channels, "size": size, "patterns_per_pixel": round(_mean(densities), 4)}
    result["largest_relative_error"] = max(errors)
    for part, times in parts.items():
        means = {name: round(_mean([t[name] for t in times]), 3) for name in times[0]}
        plain = min(means[name] for name in PLAIN)
        result[part] = {"ms": means, "ratios": {name: round(plain / ms, 3) for name, ms in means.items()}}
    result["saved_bytes"] = {name: round(_mean([s[name] for s in saved])) for name in saved[0]}
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def report(kind: str, row: dict) -> None:
    saved = row["saved_bytes"]["fused"] / row["saved_bytes"]["plain NCHW"]
    parts = []
    for name in ("forward", "training"):
        milliseconds, ratios = row[name]["ms"]["fused"], row[name]["ratios"]
        parts.append(f"{name} {milliseconds:8.2f} ms {ratios['fused']:6.2f}× ({ratios['fused, new map']:.2f}× new map)")
    layer = f"{row['channels']:5d}@{row['size']:<4d} patterns/pixel {row['patterns_per_pixel']:.3f}"
    print(f"{kind:6s} {layer}  {'  '.join(parts)}  saved {saved:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--sizes", nargs="+", metavar="C@S", help="channels@size, all sizes of the generator by default"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--maps", type=int, default=4, help="batches of real label maps, spread over the samples")
    parser.add_argument("--noise", action=argparse.BooleanOptionalAction, default=True, help="noise maps too")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="compiled baselines too"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each measurement of each size")
    parser.add_argument("--quick", action="store_true", help="two sizes, one map, a short run")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    sizes = SIZES if options.sizes is None else [tuple(map(int, size.split("@"))) for size in options.sizes]
    if options.quick:
        options.seconds, options.maps, sizes = 0.5, 1, sizes[::5]
    found, source = label_maps()
    batches = []
    for i in range(options.maps):
        first = i * len(found) // options.maps
        batches.append(LabelMap.cat([found[(first + j) % len(found)] for j in range(options.batch)]))
    config = {name: getattr(options, name) for name in ("batch", "maps", "amp", "compile", "seconds")}
    result: dict = {"stamp": stamp(options.device), "config": {**config, "labels": source}, "real": [], "noise": []}
    for channels, size in sizes:
        result["real"].append(measure(channels, size, batches, options))
        report("real", result["real"][-1])
    for channels, size in sizes if options.noise else ():
        result["noise"].append(measure(channels, size, [LabelMap.cat([noise_map()] * options.batch)], options))
        report("noise", result["noise"][-1])
    write_json(options.json, result)


if __name__ == "__main__":
    main()
