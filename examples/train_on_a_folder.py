# SPDX-License-Identifier: Apache-2.0
"""Checks a folder of images and label maps, trains a small generator on it, and synthesizes from the label maps.

    python examples/train_on_a_folder.py --images photos --labels labels --num-classes 20 --out runs/mine
    python examples/train_on_a_folder.py --out runs/tiny       # makes a tiny folder of landscapes first

Each step is a command that you can run by itself; the script prints it.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

from spade_fast.data import make_dataset
from spade_fast.pictures import save_png, to_uint8


def make_folder(folder: Path, count: int, size: int) -> int:
    """Writes landscapes as images/*.png and labels/*.png. Returns the number of classes."""
    dataset = make_dataset("synthetic", crop_size=size, size=count)
    for i in range(count):
        sample = dataset[i]
        save_png(to_uint8(sample["image"]), folder / "images" / f"{i:03d}.png")
        save_png(Image.fromarray(sample["label"].numpy().astype("uint8")), folder / "labels" / f"{i:03d}.png")
    return dataset.num_classes


def run(*command: str) -> None:
    """Runs ``python -m`` with a command of the package; ends the script when it fails."""
    print(f"\n$ python -m {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, "-m", *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of photographs")
    parser.add_argument("--labels", type=Path, help="folder of label maps with the same names")
    parser.add_argument("--num-classes", type=int, help="labels are 0..N-1")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the run")
    parser.add_argument("--crop-size", type=int, default=64, help="size of the images in pixels (default: 64)")
    parser.add_argument("--steps", type=int, default=200, help="steps of training (default: 200)")
    args = parser.parse_args(argv)

    images, labels, num_classes = args.images, args.labels, args.num_classes
    if images is None or labels is None or num_classes is None:
        folder = args.out.with_name(args.out.name + "-data")
        num_classes = make_folder(folder, 12, args.crop_size)
        images, labels = folder / "images", folder / "labels"

    data = ["--dataset", "folder", "--label-dir", str(labels), "--num-classes", str(num_classes)]
    run("spade_fast.data", "check", *data, "--image-dir", str(images))
    run(
        *("spade_fast.train", *data, "--image-dir", str(images), "--out", str(args.out)),
        *("--crop-size", str(args.crop_size), "--steps", str(args.steps), "--batch-size", "4"),
        # A small network without perceptual loss, so that a CPU can do it. On a GPU leave these out.
        *("--ngf", "16", "--ndf", "16", "--lambda-vgg", "0", "--lambda-l1", "10", "--lr", "1e-3", "--workers", "0"),
    )
    run("spade_fast.synthesize", "--checkpoint", str(args.out), *data, "--out", str(args.out / "images"))


if __name__ == "__main__":
    main()
