# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds of the COCO-Stuff generator on given label maps, exactly: ``python -m benchmarks.macs``.

- plain: every convolution over every pixel.
- gather: gamma and beta by one GEMM over the gathered rows of the P distinct patterns.
- factored: a GEMM over the Q distinct hidden rows, then additions. They are listed apart: they are no multiply-adds.
- chosen: what each layer does on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.common import label_maps, stamp, write_json
from spade_fast import LabelMap
from spade_fast.layers.spade import DENSE_ABOVE, SPADEResnetBlock
from spade_fast.models import SPADEGenerator
from spade_fast.ops.pattern_params import choose_method
from spade_fast.reference import SPADE

Layer = tuple[int, int, int, int]  # channels, height and width of the output, channels of the hidden layer


def convolution_macs(net: nn.Module, label_nc: int, size: tuple[int, int]) -> tuple[dict[str, int], list[Layer]]:
    """Multiply-adds of the plain generator by part, and its SPADE layers."""
    parts: dict[str, int] = {"mlp_shared": 0, "mlp_gamma and mlp_beta": 0, "other convolutions": 0}
    layers: list[Layer] = []
    names = {module: name for name, module in net.named_modules()}

    def count(conv: nn.Conv2d, inputs: tuple, out: Tensor) -> None:
        name = names[conv]
        part = "mlp_shared" if "mlp_shared" in name else "other convolutions"
        part = "mlp_gamma and mlp_beta" if name.endswith(("mlp_gamma", "mlp_beta")) else part
        parts[part] += out.numel() * conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        if name.endswith("mlp_gamma"):
            layers.append((conv.out_channels, out.shape[2], out.shape[3], conv.in_channels))

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        net.eval()(torch.empty(1, label_nc, *size, device="meta"))
    return parts, layers


def pattern_macs(labels: LabelMap, layers: list[Layer], kernel_size: int) -> dict[str, int]:
    """Multiply-adds of gamma and beta for one label map by each method, and the additions of the gathers."""
    taps, total = kernel_size**2, dict.fromkeys(("gather", "factored", "chosen", "additions (factored)"), 0)
    for channels, h, w, hidden in layers:
        found = labels.patterns(h, w, kernel_size)
        q, p = found.codes.shape[0], found.taps.shape[0]
        each = taps * hidden * 2 * channels
        total["gather"] += p * each
        total["factored"] += q * each
        total["additions (factored)"] += p * taps * 2 * channels + q * taps * hidden
        if found.density > DENSE_ABOVE:
            total["chosen"] += len(labels) * h * w * each
        else:
            total["chosen"] += {"gather": p, "factored": q}[choose_method(q, p, taps, hidden, channels)] * each
    return total


def measure(maps: list[LabelMap], ngf: int, crop: int) -> dict:
    """GMAC (10⁹ multiply-adds) of the plain generator by part, and the mean over the maps with label patterns."""
    label_nc = maps[0].label_nc
    with torch.device("meta"):
        net = SPADEGenerator(label_nc, ngf=ngf, crop_size=crop, spade="reference")
    kernel_size = next(m for m in net.modules() if isinstance(m, SPADE)).mlp_gamma.kernel_size[0]
    assert all(isinstance(block, SPADEResnetBlock) for block, _ in net.blocks())
    parts, layers = convolution_macs(net, label_nc, net.output_size)
    # The first convolution, on the one-hot map, is a gather too where there are patterns.
    first = net.start[0] * net.start[1] * net.fc.weight.numel()
    others = parts["other convolutions"] - first
    counts = [pattern_macs(m, layers, kernel_size) for m in maps]
    mean = {name: statistics.mean(c[name] for c in counts) / 1e9 for name in counts[0]}
    result = {
        "plain": {**{name: value / 1e9 for name, value in parts.items()}, "total": sum(parts.values()) / 1e9},
        "mlp_gamma and mlp_beta": mean,
        "total": {name: others / 1e9 + mean[name] for name in ("gather", "factored", "chosen")},
        "total of each map": [{n: (others + c[n]) / 1e9 for n in ("gather", "factored", "chosen")} for c in counts],
        "maps": len(maps),
    }
    return result


def read_maps(files: list[Path], crop: int) -> list[LabelMap]:
    """Label maps from PNG files, resized to crop×crop, without edges. Values of 182 and above become class 182."""
    maps = []
    for file in files:
        values = np.array(Image.open(file).resize((crop, crop), Image.Resampling.NEAREST)).astype(np.int64)
        labels = torch.from_numpy(values).clamp(max=182)
        maps.append(LabelMap(labels[None], 183, torch.zeros(1, crop, crop, dtype=torch.bool)))
    return maps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.macs", description=__doc__.split("\n\n")[0])
    parser.add_argument("labels", nargs="*", type=Path, help="COCO-Stuff label maps (default: the sample's)")
    parser.add_argument("--ngf", type=int, default=64)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    maps, source = (read_maps(options.labels, options.crop), "files") if options.labels else label_maps(options.crop)
    result = {"stamp": stamp(), "labels": source, **measure(maps, options.ngf, options.crop)}
    print(f"GMAC, {result['maps']} maps of {source} at {options.crop}×{options.crop}")
    for name, value in result["plain"].items():
        print(f"  plain: {name:24s} {value:8.2f}")
    for name, value in result["mlp_gamma and mlp_beta"].items():
        print(f"  gamma and beta, {name:20s} {value:8.2f}")
    for name, value in result["total"].items():
        print(f"  generator, {name:25s} {value:8.2f}   {result['plain']['total'] / value:.2f}× fewer")
    write_json(options.json, result)


if __name__ == "__main__":
    main()
