# SPDX-License-Identifier: Apache-2.0
"""The COCO-Stuff generator, fused against plain: ``python -m benchmarks.generator``.

Baselines: the plain generator as the authors run it (NCHW), the same in channels-last memory, both compiled where the
compiler works, and as the floor a generator whose gamma and beta are looked up by class (what CLADE costs; another
function). "fused" is in channels-last memory and, for the forward, frozen, as served; "fused, as built" is neither.
"fused, torch backend" needs no compiler. Forward builds the patterns anew each time. Ratios are of medians of
interleaved rounds in one run.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from benchmarks.class_table import ClassLabels, replace_spade
from benchmarks.common import (
    TORCH,
    check,
    interleave,
    label_maps,
    on_backend,
    saved_bytes,
    stamp,
    with_torch_spectral_norm,
    write_json,
)
from spade_fast import LabelMap
from spade_fast.models import SPADEGenerator, init_weights

AS_BUILT = "fused, as built"


def build(device: str, ngf: int, crop: int) -> dict[str, nn.Module]:
    """The same weights in every generator (but for the class table's)."""
    torch.manual_seed(0)
    plain = SPADEGenerator(184, ngf=ngf, crop_size=crop, spade="reference")
    init_weights(plain, "glorot", gain=1.0)  # activations of order one, so that errors show
    nets: dict[str, nn.Module] = {"plain NCHW": plain}
    kinds = {"plain channels-last": "reference", "fused": "fused", AS_BUILT: "fused", "class table": "fused"}
    for name, spade in kinds.items():
        nets[name] = SPADEGenerator(184, ngf=ngf, crop_size=crop, spade=spade)
        nets[name].load_state_dict(plain.state_dict())
    for name in ("plain NCHW", "plain channels-last"):
        with_torch_spectral_norm(nets[name])
    for name in ("plain channels-last", "fused", "class table"):
        nets[name].to(memory_format=torch.channels_last)
    replace_spade(nets["class table"])
    nets[TORCH] = nets["fused"]
    return {name: net.to(device) for name, net in nets.items()}


def forward(nets: dict[str, nn.Module], labels: LabelMap, amp: torch.dtype | None) -> dict:
    """name -> call that makes the image. Plain networks get the one-hot map they need, made beforehand; the fused one a
    map whose patterns are not found yet."""
    dense = labels.one_hot()
    dense_cl = dense.contiguous(memory_format=torch.channels_last)
    parts = (labels.codes, labels.num_classes, labels.has_edges)
    inputs = {
        "plain NCHW": lambda: dense,
        "plain channels-last": lambda: dense_cl,
        "fused": lambda: LabelMap.from_codes(*parts),
        AS_BUILT: lambda: LabelMap.from_codes(*parts),
        TORCH: lambda: LabelMap.from_codes(*parts),
        "class table": lambda: ClassLabels.from_codes(*parts),
    }

    def call(name: str, net: nn.Module) -> Tensor:
        segmap = inputs[name.removeprefix("compiled ")]()
        with on_backend(name), torch.autocast(labels.device.type, amp, enabled=amp is not None):
            return net(segmap)

    return {name: (lambda n=name, m=net: call(n, m)) for name, net in nets.items()}


def ratios(times: dict[str, dict]) -> dict[str, float]:
    fused = times["fused"]["median_ms"]
    return {name: round(t["median_ms"] / fused, 3) for name, t in times.items() if name != "fused"}


def measure(options: argparse.Namespace) -> dict:
    device, amp = options.device, torch.bfloat16 if options.amp else None
    maps, source = label_maps(options.crop)
    labels = LabelMap.cat([maps[i % len(maps)] for i in range(options.batch)]).to(device)
    nets = build(device, options.ngf, options.crop)
    if options.compile:
        for name in ("plain NCHW", "plain channels-last"):
            nets[f"compiled {name}"] = torch.compile(nets[name])
    result: dict = {
        "stamp": stamp(device),
        "config": {
            "ngf": options.ngf,
            "crop": options.crop,
            "batch": options.batch,
            "amp": options.amp,
            "labels": source,
        },
    }
    bound = 2e-2 if options.amp else 1e-4

    for name, net in nets.items():
        net.freeze() if name in ("fused", "class table") else net.eval()
    calls = forward(nets, labels, amp)
    with torch.no_grad():
        expected = calls["plain NCHW"]()
        result["forward_error"] = check("generator forward", calls["fused"](), expected, bound)
        times = interleave(calls, device, options.seconds)
    result["forward"] = {"times": times, "ratios": ratios(times)}
    report("forward", result["forward"])

    for net in nets.values():
        net.train()
    gradient = torch.randn_like(expected)

    def backward(name: str) -> None:
        for p in nets[name].parameters():
            p.grad = None
        out = calls[name]()
        with on_backend(name):
            out.backward(gradient)

    result["saved_bytes"] = {
        name: saved_bytes(calls[name], nets[name].parameters()) for name in ("plain NCHW", "fused")
    }
    result["saved_bytes"]["ratio"] = round(result["saved_bytes"]["fused"] / result["saved_bytes"]["plain NCHW"], 4)
    print(f"saved for backward: {result['saved_bytes']}")
    times = interleave({name: (lambda n=name: backward(n)) for name in nets}, device, options.seconds)
    result["training"] = {"times": times, "ratios": ratios(times)}
    report("forward + backward", result["training"])
    return result


def report(title: str, part: dict) -> None:
    print(title)
    for name, time in part["times"].items():
        print(f"  {name:32s} {time['median_ms']:9.2f} ms   {part['ratios'].get(name, 1.0):6.2f}×")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generator", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ngf", type=int, default=64)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="the compiled baselines")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each of the two measurements")
    parser.add_argument("--quick", action="store_true", help="a small generator and a short run")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 5.0
        if options.device == "cpu":
            options.ngf, options.crop, options.compile = 8, 64, False
    write_json(options.json, measure(options))


if __name__ == "__main__":
    main()
