# SPDX-License-Identifier: Apache-2.0
"""Draws docs/pictures/how_it_works.png, and counts the distinct patches of real label maps.

    python -m spade_fast.quickstart --minutes 16 --crop-size 128 --out runs/pictures     # a small generator
    python -m docs.make_pictures --checkpoint runs/pictures
    python -m docs.make_pictures --count      # writes benchmarks/results/patches.json

The label map is docs/pictures/labels.png with edges.png: one of COCO-Stuff (annotations CC BY 4.0), 256×256. The
generator was trained on the built-in landscapes, so each class of COCO-Stuff becomes the landscape class most like it.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.common import ROOT, label_maps, stamp, write_json
from spade_fast import LabelMap, load_generator
from spade_fast.data.coco import CLASS_NAMES
from spade_fast.data.synthetic.scenery import CLASS_NAMES as LANDSCAPE
from spade_fast.data.synthetic.scenery import PALETTE
from spade_fast.functional import ModulationNetwork, gamma_beta
from spade_fast.pictures import to_uint8

PICTURES = ROOT / "docs" / "pictures"
SIZES = (256, 128, 64, 32, 16)
LIKE = {"truck": "car", "clouds": "sky", "grass": "grass", "road": "road", "tree": "tree", "unknown": "building"}
CELL, GAP, LINE, INK = 320, 24, 26, (40, 40, 40)
SPOT, CROP = (46, 166), 20  # the part that is shown enlarged: left, top, side, in pixels of the map


def read_map() -> LabelMap:
    """The committed COCO-Stuff map: 183 classes and an edge channel."""
    labels = np.asarray(Image.open(PICTURES / "labels.png")).astype(np.int64)
    edges = np.asarray(Image.open(PICTURES / "edges.png")).astype(bool)
    return LabelMap(torch.from_numpy(labels)[None], 183, torch.from_numpy(edges)[None])


def landscape(labels: LabelMap) -> LabelMap:
    """The same map in the classes of the built-in landscapes."""
    table = torch.full((184,), LANDSCAPE.index("grass"))
    for name, like in LIKE.items():
        table[CLASS_NAMES.index(name)] = LANDSCAPE.index(like)
    return LabelMap(table[labels.codes.long() >> 1], len(LANDSCAPE), labels.codes & 1)


def distinct(labels: LabelMap, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which distinct 3×3 and which distinct 5×5 patch each pixel has, [size, size] each, counted from 0."""
    codes = labels.resized(size, size)[0].numpy()
    found = []
    for reach in (1, 2):
        padded = np.pad(codes, reach, constant_values=-1)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
        rows = windows.reshape(size * size, -1)
        found.append(np.unique(rows, axis=0, return_inverse=True)[1].reshape(size, size))
    return found[0], found[1]


def count() -> dict:
    """Distinct patches of the picture's map, and their mean share of the pixels over the sample maps."""
    labels, (maps, source) = read_map(), label_maps()
    rows, means = [], []
    for size in SIZES:
        hidden, patterns = (int(ids.max()) + 1 for ids in distinct(labels, size))
        rows.append({"size": size, "pixels": size * size, "hidden": hidden, "patterns": patterns})
        shares = [distinct(m, size)[1].max() + 1 for m in maps]
        means.append({"size": size, "patterns_per_pixel": float(np.mean(shares)) / size**2})
    return {"stamp": stamp(), "labels": source.rpartition("/")[2], "maps": len(maps), "picture": rows, "mean": means}


def colors_of(labels: LabelMap) -> np.ndarray:
    """uint8 [H, W, 3]: each class in a shade of the landscape class it is like."""
    shade = np.random.default_rng(3).integers(-28, 29, (184, 1))
    table = np.array([PALETTE[LANDSCAPE.index(LIKE.get(name, "grass"))] for name in [*CLASS_NAMES, "ignored"]])
    return np.clip(table + shade, 0, 255).astype(np.uint8)[labels.codes[0].numpy() >> 1]


def patch_colors(ids: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Each distinct patch in a color of its own; those of more than 64 pixels in that of their class, paler."""
    sizes = np.bincount(ids.ravel())
    vivid = np.random.default_rng(1).integers(0, 256, (len(sizes), 3), dtype=np.uint8)
    pale = (base.astype(np.int64) + 510) // 3
    return np.where((sizes[ids] > 64)[..., None], pale, vivid[ids]).astype(np.uint8)


def diverging(values: np.ndarray) -> np.ndarray:
    """Blue below 0, white at 0, red above, up to the 99th percentile."""
    scaled = np.clip(values / np.quantile(np.abs(values), 0.99), -1, 1)[..., None]
    ends = np.where(scaled < 0, np.array([33, 102, 172]), np.array([178, 24, 43]))
    return (255 + np.abs(scaled) * (ends - 255.0)).astype(np.uint8)


def enlarged(base: np.ndarray) -> Image.Image:
    """The marked part of the map with its pixels as a grid, and two 5×5 patches in it that are the same."""
    left, top = SPOT
    zoom = CELL // CROP
    part = Image.fromarray(base[top : top + CROP, left : left + CROP]).resize((CELL, CELL), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(part)
    for i in range(0, CELL, zoom):
        draw.line((i, 0, i, CELL), fill=(255, 255, 255))
        draw.line((0, i, CELL, i), fill=(255, 255, 255))
    for column, row in _twins(base[top : top + CROP, left : left + CROP]):
        draw.rectangle((column * zoom, row * zoom, (column + 5) * zoom, (row + 5) * zoom), outline=(0, 0, 0), width=4)
    return part


def _twins(part: np.ndarray) -> list[tuple[int, int]]:
    """(column, row) of two 5×5 patches apart from each other that are equal and whose pixels differ most in label."""
    seen: dict[bytes, tuple[int, int]] = {}
    best: tuple[int, list[tuple[int, int]]] = (0, [])
    for row in range(len(part) - 4):
        for column in range(part.shape[1] - 4):
            patch = part[row : row + 5, column : column + 5]
            first = seen.setdefault(patch.tobytes(), (column, row))
            apart = max(abs(first[0] - column), abs(first[1] - row)) >= 8
            mixed = 25 - np.unique(patch.reshape(-1, 3), axis=0, return_counts=True)[1].max()
            if apart and mixed > best[0]:
                best = int(mixed), [first, (column, row)]
    return best[1]


def draw(checkpoint: str) -> Image.Image:
    """The six panels."""
    labels = read_map()
    base = colors_of(labels)
    hidden, patterns = distinct(labels, 256)
    generator = load_generator(checkpoint, crop_size=256)
    scene = landscape(labels)
    layer = generator.up_3.norm_0
    shared = layer.mlp_shared[0]
    weights = (shared.weight, shared.bias, layer.mlp_gamma.weight, layer.mlp_gamma.bias)
    network = ModulationNetwork(*weights, layer.mlp_beta.weight, layer.mlp_beta.bias)
    with torch.inference_mode():
        gamma = gamma_beta(scene, network)[0][0].numpy()
        image = to_uint8(generator(scene)[0])
    channel = gamma[gamma.var(axis=(1, 2)).argmax()]
    marked = Image.fromarray(base).resize((CELL, CELL), Image.Resampling.NEAREST)
    box = [side * CELL / 256 for side in (*SPOT, SPOT[0] + CROP, SPOT[1] + CROP)]
    ImageDraw.Draw(marked).rectangle(box, outline=(0, 0, 0), width=3)
    panels: list[tuple[str, str, Image.Image]] = [
        ("1  label map", f"{256 * 256} pixels, {len(labels.ids.unique())} of 183 classes", marked),
        ("2  a part of it", "equal 5x5 patches: equal gamma and beta", enlarged(base)),
        ("3  distinct 3x3 patches", f"{hidden.max() + 1} rows of the hidden layer", _image(patch_colors(hidden, base))),
        ("4  distinct 5x5 patches", f"{patterns.max() + 1} patterns, {(patterns.max() + 1) / 65536:.1%} of the pixels",
         _image(patch_colors(patterns, base))),
        ("5  gamma", "computed once a pattern, looked up by pixel", _image(diverging(channel))),
        ("6  image", "of a generator trained for minutes", _image(image)),
    ]  # fmt: skip
    width, height = 3 * CELL + 4 * GAP, 2 * (CELL + 2 * LINE + GAP) + GAP
    picture = Image.new("RGB", (width, height), (255, 255, 255))
    pen, bold, plain = ImageDraw.Draw(picture), ImageFont.load_default(20), ImageFont.load_default(16)
    for number, (title, words, panel) in enumerate(panels):
        x, y = GAP + number % 3 * (CELL + GAP), GAP + number // 3 * (CELL + 2 * LINE + GAP)
        picture.paste(panel, (x, y + 2 * LINE))
        pen.text((x, y), title, fill=INK, font=bold)
        pen.text((x, y + LINE), words, fill=INK, font=plain)
    return picture


def _image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).resize((CELL, CELL), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m docs.make_pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="run of a generator of the built-in landscapes: draws the picture")
    parser.add_argument("--count", action="store_true", help="writes benchmarks/results/patches.json")
    options = parser.parse_args()
    if options.count:
        write_json(ROOT / "benchmarks" / "results" / "patches.json", count())
    if options.checkpoint:
        draw(options.checkpoint).save(PICTURES / "how_it_works.png", optimize=True)


if __name__ == "__main__":
    main()
