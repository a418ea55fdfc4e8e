# SPDX-License-Identifier: Apache-2.0
"""The README's figures, written from the committed results files: ``python -m benchmarks.readme [--check]``."""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.common import ROOT

BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->"
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def source(name: str, result: dict, command: str) -> str:
    stamp = result["stamp"]
    where = f"{stamp['device']}, torch {stamp['torch']}, commit {stamp['commit']}, {stamp['date'][:10]}"
    return f"[{name}](benchmarks/results/{name}): `python -m {command}`; {where}."


def macs() -> list[str]:
    result = read("macs.json")
    plain, total = result["plain"]["total"], result["total"]
    return [
        f"Multiply-adds of the COCO-Stuff generator at 256×256, mean over {result['maps']} real label maps: "
        f"{plain:.1f} G plain, {total['gather']:.1f} G with patterns by gather, {total['factored']:.1f} G factored "
        f"({plain / total['factored']:.1f}× fewer).",
        source("macs.json", result, "benchmarks.macs"),
    ]


def generator() -> list[str]:
    result = read("generator_cpu.json")
    rows = [
        "| COCO-Stuff generator, 256×256, batch 1, fp32, two CPU cores | forward | forward + backward |",
        "| --- | --- | --- |",
    ]
    for name in result["forward"]["times"]:
        cells = []
        for part in ("forward", "training"):
            ratio = result[part]["ratios"].get(name)
            cells.append(f"{result[part]['times'][name]['median_ms']:.0f} ms" + (f" ({ratio:.2f}×)" if ratio else ""))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    as_built = "`fused` is in channels-last memory and frozen forward, as for serving; `fused, as built` is neither. "
    note = as_built if "fused, as built" in result["forward"]["times"] else ""
    kept = result["saved_bytes"]
    return [
        *rows,
        "",
        f"In brackets: how many times the fused generator's time. {note}`class table` is a floor and another function: "
        f"gamma and beta looked up by class. Kept for backward: {kept['fused'] / 1e6:.0f} MB fused, "
        f"{kept['plain NCHW'] / 1e6:.0f} MB plain.",
        source("generator_cpu.json", result, "benchmarks.generator"),
    ]


def layer() -> list[str]:
    result = read("layer_cpu.json")
    rows = [
        "| SPADE layer, batch 1, fp32, two CPU cores | patterns a pixel | forward | forward + backward | on noise |",
        "| --- | --- | --- | --- | --- |",
    ]
    noise = {(row["channels"], row["size"]): row for row in result["noise"]}
    for row in result["real"]:
        worst = noise[row["channels"], row["size"]]
        cells = [f"{row[part]['ratios']['fused']:.1f}×" for part in ("forward", "training")]
        cells.append(" / ".join(f"{worst[part]['ratios']['fused']:.2f}×" for part in ("forward", "training")))
        name = f"C = {row['channels']} at {row['size']}×{row['size']}"
        rows.append(f"| {name} | {row['patterns_per_pixel']:.2f} | {' | '.join(cells)} |")
    return [
        *rows,
        "",
        "How many times faster than the plain layer in its faster memory format, on real COCO-Stuff label maps; and on "
        "noise, where every patch is its own pattern (forward / forward + backward).",
        source("layer_cpu.json", result, "benchmarks.layer"),
    ]


def train_step() -> list[str]:
    result = read("train_step_cpu.json")
    config = result["config"]
    size = f"{config['crop']}×{config['crop']}, ngf {config['ngf']}, batch {config['batch']}"
    rows = [f"| training step, {size}, fp32, two CPU cores | time | peak memory |", "| --- | --- | --- |"]
    for name, times in result["times"].items():
        ratio = result["ratios"].get(name)
        memory = result["peak_memory_bytes"][name] / 2**30
        rows.append(
            f"| {name} | {times['median_ms']:.0f} ms" + (f" ({ratio:.2f}×)" if ratio else "") + f" | {memory:.2f} GiB |"
        )
    return [
        *rows,
        "",
        "Both networks' updates with hinge, feature-matching and VGG losses. Peak memory is that of a process over the "
        "same process idle: weights, gradients, Adam's state and VGG are part of it.",
        source("train_step_cpu.json", result, "benchmarks.train_step --crop 128 --ngf 32 --batch 2"),
    ]


def initialization() -> list[str]:
    result = read("init.json")
    config, change = result["config"], result["first step"]
    rows = [
        f"| first weights: L1 to the real images after {config['steps']} steps | "
        + " | ".join(f"seed {i}" for i in range(config["seeds"]))
        + " | mean |",
        "| --- |" + " --- |" * (config["seeds"] + 1),
    ]
    titles = {"coco": "13 COCO-Stuff images", "synthetic": "`synthetic`"}
    for dataset, starts in result["losses"].items():
        for init, losses in starts.items():
            each = [f"{seed['l1']:.3f}" for seed in losses["seeds"]]
            rows.append(
                f"| {titles[dataset]}, `--init {init}` | {' | '.join(each)} | {losses['mean']['l1']:.3f} |",
            )

    def median(init: str) -> str:
        g, d = (change[init][net]["spectral norm"] for net in ("generator", "discriminator"))
        return f"{g:.2g} in the generator and {d:.2g} in the discriminator with `{init}`"

    return [
        *rows,
        "",
        f"{config['crop']}×{config['crop']}, ngf {config['ngf']}, batch {config['batch']}, without VGG loss; early in "
        "training, and of training images. What Adam's first step changes of a spectrally normalized weight (|ΔW| / "
        f"|W|, median over layers, ngf 64): {median('released')}; {median('glorot')}.",
        source("init.json", result, "benchmarks.init"),
    ]


def figures() -> str:
    """The README's text between the markers."""
    return "\n\n".join("\n".join(part()) for part in (macs, generator, layer, train_step, initialization)) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README agrees with the results")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    text = path.read_text()
    head, rest = text.split(BEGIN)
    tail = rest[rest.index(END) :]
    wanted = head + BEGIN + figures() + tail
    if check:
        return int(text != wanted)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
