# SPDX-License-Identifier: Apache-2.0
"""The figures of README.md and docs/, written from the committed results files: ``python -m benchmarks.readme``.

A page marks the place of a block of figures with ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``. NAME is
one of BLOCKS. ``--check`` writes nothing and says which pages are out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def source(name: str, result: dict[str, Any], command: str) -> str:
    """Where figures come from. The link is from the repository's root; `updated` adapts it to the page."""
    stamp = result["stamp"]
    where = f"{stamp['device']}, torch {stamp['torch']}, commit {stamp['commit']}, {stamp['date'][:10]}"
    return f"[{name}](benchmarks/results/{name}): `python {command}`; {where}."


def macs() -> list[str]:
    result = read("macs.json")
    plain, total = result["plain"]["total"], result["total"]
    return [
        f"Multiply-adds of the COCO-Stuff generator at 256×256, mean over {result['maps']} real label maps: "
        f"{plain:.1f} G plain, {total['gather']:.1f} G with patterns by gather, {total['factored']:.1f} G factored "
        f"({plain / total['factored']:.1f}× fewer).",
        source("macs.json", result, "-m benchmarks.macs"),
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
        source("generator_cpu.json", result, "-m benchmarks.generator"),
    ]


def layer() -> list[str]:
    result = read("layer_cpu.json")
    rows = [
        "| SPADE layer, batch 1, fp32 | patterns a pixel | forward | + backward | noise: forward | noise: + backward |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    noise = {(row["channels"], row["size"]): row for row in result["noise"]}
    for row in result["real"]:
        worst = noise[row["channels"], row["size"]]
        cells = [f"{row[part]['ratios']['fused']:.1f}×" for part in ("forward", "training")]
        cells += [f"{worst[part]['ratios']['fused']:.2f}×" for part in ("forward", "training")]
        name = f"C = {row['channels']} at {row['size']}×{row['size']}"
        rows.append(f"| {name} | {row['patterns_per_pixel']:.2f} | {' | '.join(cells)} |")
    return [
        *rows,
        "",
        "How many times faster than the plain layer in its faster memory format, forward and forward + backward, "
        "on two CPU cores. Label maps are real ones of COCO-Stuff. In the last columns they are noise: each patch is "
        "distinct.",
        source("layer_cpu.json", result, "-m benchmarks.layer"),
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
        source("train_step_cpu.json", result, "-m benchmarks.train_step --crop 128 --ngf 32 --batch 2"),
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
        source("init.json", result, "-m benchmarks.init"),
    ]


def parts() -> list[str]:
    """Of the plain generator's multiply-adds, what each part takes; and what remains with patterns."""
    result = read("macs.json")
    plain, chosen = result["plain"], result["mlp_gamma and mlp_beta"]
    mean = result["total"]["factored"] - chosen["factored"]
    total = f"**{plain['total']:.1f}** | **{result['total']['factored']:.1f}**"
    return [
        "| part | plain layers, GMAC | by patterns, GMAC |",
        "| --- | --- | --- |",
        f"| all other convolutions | {plain['other convolutions']:.1f} | {mean:.1f} |",
        f"| `mlp_shared` on the one-hot map | {plain['mlp_shared']:.1f} | 0 (table rows are added) |",
        f"| `mlp_gamma` and `mlp_beta` | {plain['mlp_gamma and mlp_beta']:.1f} | {chosen['factored']:.1f} |",
        f"| sum | {total} |",
        "",
        f"COCO-Stuff generator, one 256×256 image, mean over {result['maps']} real label maps.",
        source("macs.json", result, "-m benchmarks.macs"),
    ]


def patches() -> list[str]:
    """Distinct patches at each resolution, of the map in the picture and on average."""
    result = read("patches.json")
    rows = [
        "| size | pixels | distinct 3×3 patches | distinct 5×5 patches | 5×5 patches a pixel | mean over "
        f"{result['maps']} maps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["picture"]:
        mean = next(other for other in result["mean"] if other["size"] == row["size"])
        rows.append(
            f"| {row['size']}×{row['size']} | {row['pixels']} | {row['hidden']} | {row['patterns']} | "
            f"{row['patterns'] / row['pixels']:.1%} | {mean['patterns_per_pixel']:.1%} |"
        )
    return [*rows, "", source("patches.json", result, "-m docs.make_pictures --count")]


def frozen() -> list[str]:
    """The generator as built and frozen for serving."""
    result = read("generator_drop_in_cpu.json")
    forward, training = ({k: v["median_ms"] for k, v in result[p]["times"].items()} for p in ("forward", "training"))
    names = {
        "plain NCHW": "plain",
        "plain channels-last": "plain, channels-last memory",
        "fused, as built": "as built",
        "fused": "frozen, channels-last memory",
    }
    rows = [f"| {title} | {forward[name]:.0f} ms | {training[name]:.0f} ms |" for name, title in names.items()]
    return [
        "| COCO-Stuff generator, 256×256, batch 1, two CPU cores | forward | forward + backward |",
        "| --- | --- | --- |",
        *rows,
        "",
        "Medians of one run. In training nothing is frozen: there the last row says what channels-last memory gives.",
        source("generator_drop_in_cpu.json", result, "-m benchmarks.generator --no-compile"),
    ]


def dense() -> list[str]:
    """Dense conditioning: ratios of the better memory format of each side."""
    result = read("dense_cpu.json")
    channels, size = result["map"]
    kinds = ("forward", "forward+backward")
    rows = [
        f"| dense map, {channels} channels at {size}×{size} | forward | forward + backward |",
        "| --- | --- | --- |",
    ]
    for name, layer in result["layers"].items():
        ratios = []
        for kind in kinds:
            times = {variant: t["median_ms"] for variant, t in layer[kind].items()}
            best = {side: min(t for v, t in times.items() if v.startswith(side)) for side in ("plain", "ours")}
            ratios.append(f"{best['plain'] / best['ours']:.2f}×")
        rows.append(f"| {name} | {' | '.join(ratios)} |")
    return [
        *rows,
        "",
        "How many times faster than the plain layer, each in its faster memory format. C512@64: 512 channels at 64×64.",
        source("dense_cpu.json", result, "-m benchmarks.dense"),
    ]


FUSE = "tests/support/standins/report.py --json benchmarks/results/fuse_cpu.json"


def fuse_wide() -> list[str]:
    """Layers of foreign models at real sizes."""
    result = read("fuse_cpu.json")
    rows = [f"| {name} | {layer['how']} | {layer['ratio']:.1f}× |" for name, layer in result["wide"].items()]
    return [
        "| layer | how it is evaluated | forward |",
        "| --- | --- | --- |",
        *rows,
        "",
        "128 channels at 128×128 (OASIS 64, with 64 noise channels; LivePortrait 256 at 64×64), one-hot maps of 35 "
        f"labels in cells of 16×16, one CPU thread, float32. Medians of {result['config']['runs']} runs.",
        source("fuse_cpu.json", result, FUSE),
    ]


def fuse_layers() -> list[str]:
    """What fuse() does with each stand-in."""
    result = read("fuse_cpu.json")
    rows = []
    for layer in result["layers"]:
        numbers = [f"{layer[f'{kind}_difference']:.0e}" if layer["fused"] else "" for kind in DIFFERENCES]
        how = layer["how"] if layer["fused"] else f"left: {layer['how']}"
        rows.append(f"| {layer['name'].removeprefix('layers.')} | {how} | {' | '.join(numbers)} |")
    fused = sum(layer["fused"] for layer in result["layers"])
    return [
        "| layer | how, or why not | evaluation | training | gradients |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"{fused} of {len(rows)} fused. Numbers are the largest differences in float32, relative to the largest value.",
        source("fuse_cpu.json", result, FUSE),
    ]


DIFFERENCES = ("eval", "train", "gradient")
BLOCKS: dict[str, Callable[[], list[str]]] = {
    "macs": macs,
    "generator": generator,
    "layer": layer,
    "train-step": train_step,
    "initialization": initialization,
    "parts": parts,
    "patches": patches,
    "frozen": frozen,
    "dense": dense,
    "fuse-wide": fuse_wide,
    "fuse-layers": fuse_layers,
}


def pages() -> Iterator[Path]:
    """The texts that hold figures."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def updated(page: Path) -> str:
    """The page's text with the figures of the results files."""
    up = "../" * (len(page.relative_to(ROOT).parts) - 1)

    def fill(match: re.Match[str]) -> str:
        lines = [line.replace("](benchmarks/", f"]({up}benchmarks/") for line in BLOCKS[match[2]]()]
        return f"{match[1]}{chr(10).join(lines)}\n{match[4]}"

    return BLOCK.sub(fill, page.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say which pages disagree with the results")
    check = parser.parse_args().check
    stale = [page for page in pages() if page.read_text() != updated(page)]
    for page in stale:
        print(page.relative_to(ROOT))
        if not check:
            page.write_text(updated(page))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
