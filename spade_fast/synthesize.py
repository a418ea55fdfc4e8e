# SPDX-License-Identifier: Apache-2.0
"""Images from label maps, with a trained or a released generator: `spade-fast synthesize`.

The generator runs in evaluation mode: batch normalization uses the running statistics of training. An image does not
depend on which others are made with it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from spade_fast import data, models, pictures
from spade_fast.cli import ConfigError, parse, pick_device
from spade_fast.data.options import migrate
from spade_fast.data.reading import read_image
from spade_fast.data.transforms import image_to_tensor
from spade_fast.files import WriteError, one_line, program, require_writable, run_command, writing
from spade_fast.image_sizes import Resized, fit
from spade_fast.labels.batch import batch_labels
from spade_fast.models.checkpoint import (
    WEIGHTS,
    CheckpointError,
    find_checkpoint,
    load_encoder,
    load_generator,
    training_config,
)
from spade_fast.models.generator import UPSAMPLING_LAYERS
from spade_fast.models.released import PRESETS
from spade_fast.reference import NORMS

# A checkpoint of this package knows these of its data. The command line may say otherwise.
DATA_OPTIONS = ("num_classes", "ignore_value", "shift_labels", "use_edges")
EXAMPLES = """\
examples:
  a folder of label maps, with a run of training:
    {program} --checkpoint runs/mine --label-dir labels --out made
  the authors' weights:
    {program} --checkpoint latest_net_G.pth --preset coco --dataroot PATH --out made
  three images of each label map, in the style of a photo:
    {program} --checkpoint runs/vae --label-dir labels --samples 3 --style-image photo.jpg --out made
"""
GENERATOR_OPTIONS = ("crop_size", "aspect_ratio", "num_upsampling_layers", "norm")


def open_maps(args: argparse.Namespace) -> data.SegmentationDataset:
    """The label maps to synthesize from. Real images come along where they are asked for.

    Raises:
        ConfigError: no dataset is given.
        DataError: the dataset cannot be opened.
    """
    if args.dataset is None and args.label_dir is None:
        raise ConfigError("what to synthesize from is not given: --dataset with --dataroot, or --label-dir")
    return data.make_dataset(
        args.dataset or "folder",
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
        flip=False,
        need_images=not args.labels_only and (args.label_dir is None or args.image_dir is not None),
    )


def draw_z(count: int, z_dim: int, seed: int, name: str) -> Tensor:
    """[count, z_dim] standard normal noise of a label map; depends on seed and name, not on what else is made."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(63))
    return torch.randn(count, z_dim, generator=generator)


def read_style(path: str) -> Tensor:
    """A photo as float32 [1, 3, H, W] in [-1, 1].

    Raises:
        DataError: the file cannot be read.
    """
    return image_to_tensor(np.asarray(read_image(os.path.expanduser(path))))[None]


def choose_z(count: int, noise: Tensor, style: tuple[Tensor, Tensor] | None) -> Tensor:
    """The z of each image of one label map, [count, z_dim].

    Args:
        count: number of images.
        noise: standard normal [count, z_dim].
        style: (mu, logvar), each [1, z_dim], of the style photo's posterior. One image takes its mean, several are
            draws from it. None takes the noise.
    """
    if style is None:
        return noise
    mu, logvar = style
    return mu if count == 1 else mu + noise * torch.exp(0.5 * logvar)


def unique_name(path: str, taken: set[str]) -> str:
    """The file name without suffix. If that is taken, the folder stands before it or a number after it."""
    stem, parent = Path(path).stem, Path(path).parent.name
    for name in (stem, f"{parent}_{stem}"):
        if name not in taken:
            return name
    return next(name for i in range(2, len(taken) + 3) if (name := f"{stem}_{i}") not in taken)


def run(args: argparse.Namespace) -> Path:
    """Makes the images and the contact sheet; returns the sheet's path."""
    # What needs no weights is checked first.
    device = pick_device(args.device)
    args.out = Path(os.path.expanduser(args.out))
    require_writable(args.out)
    if args.encoder_checkpoint:
        find_checkpoint(args.encoder_checkpoint)
    recall(args)
    dataset = open_maps(args)
    photo = read_style(args.style_image) if args.style_image else None

    generator, style = load_networks(args, photo, device)
    fit(dataset, generator, args)
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    return synthesize(args, dataset, generator, style, device)


def recall(args: argparse.Namespace) -> None:
    """Fills what the command line leaves open with what the checkpoint was trained on, or with the preset's dataset."""
    known = migrate(training_config(args.checkpoint))
    if args.dataset is None:
        args.dataset = args.preset
    if args.dataset is None and args.label_dir is None:
        args.dataset = known.get("dataset")
    if args.dataset in (None, known.get("dataset")):
        for name in DATA_OPTIONS:
            if getattr(args, name) is None:
                setattr(args, name, known.get(name))


def load_networks(
    args: argparse.Namespace, photo: Tensor | None, device: torch.device
) -> tuple[models.SPADEGenerator, tuple[Tensor, Tensor] | None]:
    """The generator, and (mu, logvar), each [1, z_dim], of the style photo.

    Raises:
        CheckpointError: a checkpoint cannot be loaded.
        ConfigError: options ask for a z that the generator does not have, or encoder and generator differ in z.
    """
    overrides = {name: getattr(args, name) for name in GENERATOR_OPTIONS if getattr(args, name) is not None}
    generator = load_generator(args.checkpoint, args.weights, args.preset, **overrides).to(device)
    if generator.z_dim is None and (args.samples > 1 or photo is not None):
        option = f"--samples {args.samples}" if args.samples > 1 else "--style-image"
        raise ConfigError(
            f"{option}: the generator in {args.checkpoint} starts from the label map and has no z, so there is one "
            "image per label map; train with --z-dim 256 or --use-vae"
        )
    if photo is None:
        return generator, None
    encoder = load_encoder(args.encoder_checkpoint or args.checkpoint).to(device)
    if encoder.options["z_dim"] != generator.z_dim:
        raise ConfigError(
            f"--encoder-checkpoint: the encoder's z_dim is {encoder.options['z_dim']}, the generator's "
            f"{generator.z_dim}"
        )
    with torch.inference_mode():
        mu, logvar = encoder(photo.to(device))
    return generator, (mu.cpu(), logvar.cpu())


def synthesize(
    args: argparse.Namespace,
    dataset: data.SegmentationDataset,
    generator: models.SPADEGenerator,
    style: tuple[Tensor, Tensor] | None,
    device: torch.device,
) -> Path:
    """Writes the images of every label map, and the contact sheet. Prints how many maps were resized, and why."""
    rows: list[list[np.ndarray]] = []
    captions: list[str] = []
    taken: set[str] = {"contact_sheet"}
    resized = Resized(dataset, generator, args)
    for index in _progress(range(len(dataset))):
        sample = dataset[index]
        name = unique_name(sample["path"], taken)
        taken.add(name)
        labels = batch_labels(default_collate([sample]), dataset.num_classes, device)
        z = None
        if generator.z_dim is not None:
            z = choose_z(args.samples, draw_z(args.samples, generator.z_dim, args.seed, name), style)
        made = []
        for k in range(args.samples):
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "a label map of")  # `resized` says it
                image = generator(labels, None if z is None else z[k : k + 1].to(device))
            made.append(pictures.to_uint8(image[0]))
            pictures.save_png(made[-1], args.out / (f"{name}.png" if args.samples == 1 else f"{name}_{k}.png"))
        resized.note(sample, (made[-1].shape[0], made[-1].shape[1]))
        if len(rows) < args.sheet_rows:
            real = [pictures.to_uint8(sample["image"])] if "image" in sample else []
            rows.append([pictures.colorize(sample["label"], dataset.palette), *made, *real])
            captions.append(name)
    titles = ["synthesized"] if args.samples == 1 else [f"sample {k}" for k in range(args.samples)]
    sheet = args.out / "contact_sheet.png"
    pictures.save_png(pictures.sheet(rows, ["label map", *titles, "real"], captions), sheet)
    maps = f" ({resized.count} of {len(dataset)} label maps resized)" if resized.count else ""
    print(f"{len(dataset) * args.samples} images in {args.out}{maps}; contact sheet: {sheet}")
    return sheet


def _progress(items: Iterable[int]) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with the extra `train`
        return items
    return tqdm(items, unit="map")


def parser() -> argparse.ArgumentParser:
    """The command line of synthesis."""
    p = argparse.ArgumentParser(
        prog=program("synthesize"),
        description="Makes images from label maps, with a trained or a released generator.",
        epilog=EXAMPLES.format(program=program("synthesize")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--checkpoint", required=True, help="run directory, checkpoint, or released *_net_G.pth")
    p.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="these are the authors' weights for a dataset: sets sizes, upsampling and --dataset",
    )
    p.add_argument("--out", type=Path, required=True, help="directory for the images and contact_sheet.png")
    p.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="ema: moving average; last: as trained last; auto: the average if there is one (default: auto)",
    )
    p.add_argument("--dataset", choices=data.DATASETS, help="kind of dataset (default: the checkpoint's)")
    p.add_argument("--dataroot", help="root directory of the dataset")
    p.add_argument("--phase", choices=("train", "val"), default="val", help="part of the dataset (default: val)")
    p.add_argument("--label-dir", help="directory of label maps")
    p.add_argument("--instance-dir", help="directory of instance maps")
    p.add_argument("--image-dir", help="directory of real images, for the contact sheet")
    p.add_argument("--file-list", help="text file with the name of one sample on each line; only those are used")
    p.add_argument("--num-classes", type=int, help="number of label classes (default: the checkpoint's)")
    p.add_argument("--ignore-value", type=int, help="stored label value of pixels without a class")
    p.add_argument(
        "--shift-labels",
        action=argparse.BooleanOptionalAction,
        help="ADE20K: label v becomes class v - 1 and 0 class 150 (default: the checkpoint's, else as stored)",
    )
    p.add_argument("--use-edges", action=argparse.BooleanOptionalAction, help="instance-edge channel")
    p.add_argument("--labels-only", action="store_true", help="do not read real images")
    p.add_argument(
        "--preprocess",
        choices=data.PREPROCESS_MODES,
        help="how label maps are resized (default: a folder's keep their size where the generator can make it)",
    )
    p.add_argument("--samples", type=int, default=1, help="images per label map, each from another z (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="seed of z (default: 0)")
    p.add_argument("--style-image", help="photo whose style the images take, by the encoder")
    p.add_argument("--encoder-checkpoint", help="run or *_net_E.pth with the encoder (default: --checkpoint)")
    p.add_argument("--crop-size", type=int, help="width of the images; sets the size of all")
    p.add_argument("--aspect-ratio", type=float, help="width / height of the images")
    p.add_argument("--num-upsampling-layers", choices=tuple(UPSAMPLING_LAYERS), help="for a bare state dict")
    p.add_argument("--norm", choices=NORMS, help="for a bare state dict without batch norm")
    p.add_argument("--sheet-rows", type=int, default=50, help="label maps on the contact sheet at most (default: 50)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Makes images. Returns the exit status: 0, or 1 with a message."""
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
