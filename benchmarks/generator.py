# SPDX-License-Identifier: Apache-2.0
"""The COCO-Stuff generator, fused against plain: ``python -m benchmarks.generator``.

Baselines are the plain generator as the authors run it (NCHW), the same in channels-last memory, and both compiled
where the compiler works. "class table" looks gamma and beta up by class: a floor, and another function.

"fused" is in channels-last memory and, for the forward, frozen as for serving. "fused, as built" is neither. "fused,
torch backend" needs no compiler. Every forward finds the patterns of its label map. Ratios are of medians of
interleaved rounds in one run.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.cases.generator import PLAIN, build, forward, serve, train
from benchmarks.common import check, full_precision, interleave, label_maps, saved_bytes, stamp, write_json
from spade_fast import LabelMap


def ratios(times: dict[str, dict]) -> dict[str, float]:
    fused = times["fused"]["median_ms"]
    return {name: round(t["median_ms"] / fused, 3) for name, t in times.items() if name != "fused"}


def measure(options: argparse.Namespace) -> dict:
    device, amp = options.device, torch.bfloat16 if options.amp else None
    maps, source = label_maps(options.crop)
    print(f"label maps: {source}")
    labels = LabelMap.cat([maps[i % len(maps)] for i in range(options.batch)]).to(device)
    nets = build(device, options.ngf, options.crop, options.compile)
    config = {name: getattr(options, name) for name in ("ngf", "crop", "batch", "amp")}
    result: dict = {"stamp": stamp(device), "config": {**config, "labels": source}}

    serve(nets)
    calls = forward(nets, labels, amp)
    with torch.no_grad():
        with full_precision():
            expected, actual = calls[PLAIN[0]](), calls["fused"]()
        result["forward_error"] = check("generator forward", actual, expected, 2e-2 if options.amp else 1e-4)
        times = interleave(calls, device, options.seconds)
    result["forward"] = {"times": times, "ratios": ratios(times)}
    report("forward", result["forward"])

    for net in nets.values():
        net.train()
    gradient = torch.randn_like(expected)
    saved = {name: saved_bytes(calls[name], nets[name].parameters()) for name in (PLAIN[0], "fused")}
    result["saved_bytes"] = {**saved, "ratio": round(saved["fused"] / saved[PLAIN[0]], 4)}
    print(f"saved for backward: {result['saved_bytes']}")
    steps = {name: partial(train, net, calls[name], name, gradient) for name, net in nets.items()}
    times = interleave(steps, device, options.seconds)
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
