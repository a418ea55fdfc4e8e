# SPDX-License-Identifier: Apache-2.0
"""`python -m spade_fast.synthesize`: images from label maps, with a trained or a released generator.

The generator runs in evaluation mode: batch normalization uses the running statistics of training, so an image does not
depend on which others are made with it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from spade_fast import data, models, pictures
from spade_fast.cli import ConfigError, parse, pick_device
from spade_fast.data.options import migrate
from spade_fast.data.reading import read_image
from spade_fast.data.transforms import image_to_tensor
from spade_fast.files import WriteError, one_line, require_writable, run_command, writing
from spade_fast.labels.batch import batch_labels
from spade_fast.models.checkpoint import (
    FORMAT,
    WEIGHTS,
    CheckpointError,
    find_checkpoint,
    load_encoder,
    load_generator,
    safe_load,
)
from spade_fast.models.generator import UPSAMPLING_LAYERS
from spade_fast.reference import NORMS

# What a checkpoint of this package knows of its data, and the command line may say otherwise.
DATA_OPTIONS = ("dataset", "num_classes", "ignore_value", "shift_labels", "use_edges")


def open_maps(args: argparse.Namespace, generator: models.SPADEGenerator) -> data.SegmentationDataset:
    """The label maps to synthesize from, at the generator's size; real images come along where they are asked for.

    Raises ConfigError when their channels are not the generator's.
    """
    name = args.dataset or ("folder" if args.label_dir else None)
    if name is None:
        raise ConfigError("what to synthesize from is not given: --dataset with --dataroot, or --label-dir")
    height, width = generator.output_size
    dataset = data.make_dataset(
        name,
        args.phase,
        dataroot=args.dataroot,
        image_dir=args.image_dir,
        label_dir=args.label_dir,
        instance_dir=args.instance_dir,
        num_classes=args.num_classes,
        ignore_value=args.ignore_value,
        shift_labels=bool(args.shift_labels),
        file_list=args.file_list,
        use_edges=args.use_edges,
        crop_size=width,
        load_size=width,
        aspect_ratio=width / height,
        preprocess=args.preprocess,
        flip=False,
        need_images=not args.labels_only and (args.label_dir is None or args.image_dir is not None),
    )
    wanted = generator.options["label_nc"]
    if dataset.label_nc != wanted:
        edges = " + 1 instance-edge channel" if dataset.has_edges else " and no instance edges"
        raise ConfigError(
            f"the dataset {name} has {dataset.label_nc} channels ({dataset.num_classes} classes{edges}), but the "
            f"checkpoint {args.checkpoint} was trained with {wanted} (label_nc): see --dataset, --num-classes and "
            "--use-edges / --no-use-edges"
        )
    return dataset


def draw_z(count: int, z_dim: int, seed: int, name: str) -> Tensor:
    """[count, z_dim] standard normal noise of a label map; depends on seed and name, not on what else is made."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(63))
    return torch.randn(count, z_dim, generator=generator)


def style_of(path: str, encoder: models.ConvEncoder, device: torch.device) -> tuple[Tensor, Tensor]:
    """(mu, logvar), each [1, z_dim], of a photo."""
    image = image_to_tensor(np.asarray(read_image(os.path.expanduser(path))))[None].to(device)
    with torch.inference_mode():
        mu, logvar = encoder(image)
    return mu.cpu(), logvar.cpu()


def choose_z(count: int, noise: Tensor, style: tuple[Tensor, Tensor] | None) -> Tensor:
    """The z of each sample: the noise itself; with a style its posterior's mean, or draws from it for several."""
    if style is None:
        return noise
    mu, logvar = style
    return mu if count == 1 else mu + noise * torch.exp(0.5 * logvar)


def unique_name(path: str, taken: set[str]) -> str:
    """The file name without suffix; with the folder before it, or a number after it, where that is taken."""
    stem, parent = Path(path).stem, Path(path).parent.name
    for name in (stem, f"{parent}_{stem}"):
        if name not in taken:
            return name
    return next(name for i in range(2, len(taken) + 3) if (name := f"{stem}_{i}") not in taken)


def run(args: argparse.Namespace) -> Path:
    """Makes the images and the contact sheet; returns the sheet's path."""
    device = pick_device(args.device)
    args.out = Path(os.path.expanduser(args.out))
    require_writable(args.out)
    recall(args)
    overrides = {
        name: getattr(args, name)
        for name in ("crop_size", "aspect_ratio", "num_upsampling_layers", "norm")
        if getattr(args, name) is not None
    }
    generator = load_generator(args.checkpoint, args.weights, **overrides).to(device)
    z_dim = generator.options["z_dim"]
    if z_dim is None and (args.samples > 1 or args.style_image):
        option = f"--samples {args.samples}" if args.samples > 1 else "--style-image"
        raise ConfigError(
            f"{option}: the generator in {args.checkpoint} starts from the label map and has no z, so there is one "
            "image a map; train with --z-dim 256 or --use-vae"
        )
    style = None
    if args.style_image:
        encoder = load_encoder(args.encoder_checkpoint or args.checkpoint).to(device)
        if encoder.options["z_dim"] != z_dim:
            raise ConfigError(
                f"--encoder-checkpoint: the encoder's z_dim is {encoder.options['z_dim']}, the generator's {z_dim}"
            )
        style = style_of(args.style_image, encoder, device)
    dataset = open_maps(args, generator)

    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    rows: list[list[np.ndarray]] = []
    captions: list[str] = []
    taken: set[str] = {"contact_sheet"}
    for index in _progress(range(len(dataset))):
        sample = dataset[index]
        name = unique_name(sample["path"], taken)
        taken.add(name)
        labels = batch_labels(default_collate([sample]), dataset.num_classes, device)
        z = None if z_dim is None else choose_z(args.samples, draw_z(args.samples, z_dim, args.seed, name), style)
        made = []
        for k in range(args.samples):
            with torch.inference_mode():
                image = generator(labels, None if z is None else z[k : k + 1].to(device))
            made.append(pictures.to_uint8(image[0]))
            pictures.save_png(made[-1], args.out / (f"{name}.png" if args.samples == 1 else f"{name}_{k}.png"))
        if len(rows) < args.sheet_rows:
            real = [pictures.to_uint8(sample["image"])] if "image" in sample else []
            rows.append([pictures.colorize(sample["label"], dataset.palette), *made, *real])
            captions.append(name)
    titles = ["synthesized"] if args.samples == 1 else [f"sample {k}" for k in range(args.samples)]
    sheet = args.out / "contact_sheet.png"
    pictures.save_png(pictures.sheet(rows, ["label map", *titles, "real"], captions), sheet)
    print(f"{len(dataset) * args.samples} images in {args.out}; contact sheet: {sheet}")
    return sheet


def recall(args: argparse.Namespace) -> None:
    """Fills what the command line leaves open with what the checkpoint was trained on."""
    loaded: Any = safe_load(find_checkpoint(args.checkpoint))
    ours = isinstance(loaded, Mapping) and loaded.get("format") == FORMAT  # anything else is load_generator's to refuse
    training = loaded.get("training") if ours else None
    known = migrate(training.get("config") or {}) if isinstance(training, Mapping) else {}
    if args.dataset is None and args.label_dir is None:
        args.dataset = known.get("dataset")
    same = args.dataset == known.get("dataset") or args.dataset is None
    for name in DATA_OPTIONS[1:]:
        if getattr(args, name) is None and same:
            setattr(args, name, known.get(name))


def _progress(items: Iterable[int]) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError:  # in the extra `train`; synthesis does without
        return items
    return tqdm(items, unit="map")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m spade_fast.synthesize", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    p.add_argument("--checkpoint", required=True, help="run directory, checkpoint, or released *_net_G.pth")
    p.add_argument("--out", type=Path, required=True, help="directory for the images and contact_sheet.png")
    p.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="moving average, or last; auto: the average if there is one",
    )
    p.add_argument("--dataset", choices=data.DATASETS, help="kind of dataset (default: the checkpoint's)")
    p.add_argument("--dataroot", help="root directory of the dataset")
    p.add_argument("--phase", choices=("train", "val"), default="val", help="part of the dataset (default: val)")
    p.add_argument("--label-dir", help="directory of label maps")
    p.add_argument("--instance-dir", help="directory of instance maps")
    p.add_argument("--image-dir", help="directory of real images, for the contact sheet")
    p.add_argument("--file-list", help="text file naming the samples to use, one a line")
    p.add_argument("--num-classes", type=int, help="number of label classes (default: the checkpoint's)")
    p.add_argument("--ignore-value", type=int, help="label value that contributes nothing")
    p.add_argument(
        "--shift-labels",
        action=argparse.BooleanOptionalAction,
        help="ADE20K: label v becomes class v - 1 and 0 class 150 (default: the checkpoint's, else as stored)",
    )
    p.add_argument("--use-edges", action=argparse.BooleanOptionalAction, help="instance-edge channel")
    p.add_argument("--labels-only", action="store_true", help="do not read real images")
    p.add_argument("--preprocess", choices=data.PREPROCESS_MODES, default="fixed", help="(default: fixed)")
    p.add_argument("--samples", type=int, default=1, help="images a map, each of its own z")
    p.add_argument("--seed", type=int, default=0, help="seed of z")
    p.add_argument("--style-image", help="photo whose style the encoder puts into z")
    p.add_argument("--encoder-checkpoint", help="run or *_net_E.pth with the encoder (default: --checkpoint)")
    p.add_argument("--crop-size", type=int, help="width of the images; needed for a released file")
    p.add_argument("--aspect-ratio", type=float, help="width / height, for a released file")
    p.add_argument("--num-upsampling-layers", choices=tuple(UPSAMPLING_LAYERS), help="for a released file")
    p.add_argument("--norm", choices=NORMS, help="for a released file")
    p.add_argument("--sheet-rows", type=int, default=50, help="rows of the contact sheet at most (default: 50)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 with a message."""
    args, _ = parse(parser(), argv)
    try:
        for name in ("samples", "sheet_rows"):
            if getattr(args, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        run(args)
    except BrokenPipeError:
        raise
    except (ConfigError, data.DataError, CheckpointError, WriteError, OSError) as error:
        text = one_line(error) if isinstance(error, OSError) else str(error)
        print(f"error: {text}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
