# SPDX-License-Identifier: Apache-2.0
"""Synthesizes an image with released weights, the authors' `latest_net_G.pth`.

    python examples/released_weights.py latest_net_G.pth --labels 000000000139.png --out image.png
    python examples/released_weights.py --out image.png      # without a file: a small untrained network

The weights are not part of this package and have a license of their own. Labels are those of COCO-Stuff: 0..181, and
255 for unknown.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from spade_fast import LabelMap, SPADEGenerator, load_generator
from spade_fast.data.reading import read_labels
from spade_fast.pictures import save_png, to_uint8

CLASSES = 183  # COCO-Stuff's 182, and unknown; with the edge channel the network's label_nc is 184


def untrained() -> SPADEGenerator:
    """A small generator whose statistics are those of two forwards, in evaluation mode."""
    torch.manual_seed(0)
    network = SPADEGenerator(label_nc=CLASSES + 1, ngf=4)
    with torch.no_grad():
        for _ in range(2):
            network(label_map(None))
    return network.eval()


def stand_in(folder: str) -> Path:
    """A file as the authors save theirs: the bare state dict of a generator."""
    path = Path(folder) / "latest_net_G.pth"
    torch.save(untrained().state_dict(), path)
    return path


def label_map(path: Path | None) -> LabelMap:
    """A label map file as the network takes it; without one, blocks of random labels."""
    if path is None:
        ids = torch.randint(CLASSES, (8, 8)).repeat_interleave(32, 0).repeat_interleave(32, 1)
    else:
        stored = read_labels(path)
        ids = torch.from_numpy(np.where(stored == 255, CLASSES - 1, stored))
    edges = torch.zeros_like(ids, dtype=torch.bool)  # no instance map at hand
    return LabelMap(ids[None], CLASSES, edges[None])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", type=Path, nargs="?", help="latest_net_G.pth of COCO-Stuff")
    parser.add_argument("--labels", type=Path, help="label map (PNG)")
    parser.add_argument("--out", type=Path, required=True, help="the image to write (PNG)")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or stand_in(folder)
        # Label channels and width are read from the tensors. The preset tells the size and the upsampling layers.
        generator = load_generator(weights, preset="coco")
    generator.freeze()
    with torch.inference_mode():
        image = generator(label_map(args.labels))
    save_png(to_uint8(image[0]), args.out)
    print(f"{args.out}: {image.shape[3]}×{image.shape[2]} pixels, generator of {generator.options}")


if __name__ == "__main__":
    main()
