# SPDX-License-Identifier: Apache-2.0
"""Training options: one dataclass, read from defaults < preset < JSON file < command line.

The presets hold the schedules of Park et al., CVPR 2019, section 4 and appendix A: Adam with two time-scales,
batch 32 (Cityscapes 16), 200 epochs with linear decay from epoch 100 for Cityscapes and ADE20K, 100 for COCO-Stuff, 50
for Flickr Landscapes. The paper prints beta2 = 0.999; the authors' training with two time-scales uses beta1 = 0 and
beta2 = 0.9.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from spade_fast import data
from spade_fast.cli import ConfigError
from spade_fast.models.generator import UPSAMPLING_LAYERS, start_size
from spade_fast.models.init import INITS
from spade_fast.models.norms import CONV_NORMS
from spade_fast.reference import KERNEL_SIZES, NORMS
from spade_fast.train.losses import GAN_MODES

PRESETS: dict[str, dict[str, Any]] = {
    "coco": {"dataset": "coco", "epochs": 100},
    "ade20k": {"dataset": "ade20k", "epochs": 200, "decay_from": 100},
    "ade20k-outdoor": {"dataset": "ade20k-outdoor", "epochs": 200, "decay_from": 100},
    "cityscapes": {
        "dataset": "cityscapes",
        "epochs": 200,
        "decay_from": 100,
        "batch_size": 16,
        "num_upsampling_layers": "more",
    },
    "flickr": {"dataset": "flickr", "epochs": 50},
    # Needs no download: no VGG weights; small enough to be tried on a CPU.
    "synthetic": {
        "dataset": "synthetic",
        "epochs": 20,
        "batch_size": 8,
        "crop_size": 128,
        "ngf": 16,
        "ndf": 16,
        "lambda_vgg": 0.0,
        "lambda_l1": 10.0,
    },
}
PATHS = ("dataroot", "image_dir", "label_dir", "instance_dir", "file_list", "vgg_weights", "out")
MAX_SEED = 2**43 - 1  # seed * 1_000_003 + step, which seeds each step's noise, has to fit 64 bits
AMP_MODES = ("auto", "bf16", "fp16", "fp32")


def _option(default: Any, help: str, choices: tuple | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class TrainConfig:
    """Every option of a training run; None means that the dataset (or another option) decides, see `resolve`."""

    # What to train on
    preset: str | None = _option(None, "the paper's schedule for a dataset (default: the dataset's)", tuple(PRESETS))
    dataset: str = _option("synthetic", "kind of dataset", data.DATASETS)
    dataroot: str | None = _option(None, "root directory of the dataset")
    image_dir: str | None = _option(None, "directory of images, instead of the one below dataroot")
    label_dir: str | None = _option(None, "directory of label maps, instead of the one below dataroot")
    instance_dir: str | None = _option(None, "directory of instance maps, instead of the one below dataroot")
    file_list: str | None = _option(None, "text file naming the samples to use, one a line")
    num_classes: int | None = _option(None, "number of label classes (dataset folder)")
    ignore_value: int | None = _option(None, "label value that contributes nothing")
    shift_labels: bool = _option(False, "ADE20K: label v becomes class v - 1 and 0 class 150; the default is as stored")
    use_edges: bool | None = _option(None, "add the instance-edge channel where there are instance maps")
    crop_size: int | None = _option(None, "width of the synthesized image in pixels")
    load_size: int | None = _option(None, "size images are resized to before the crop")
    aspect_ratio: float | None = _option(None, "width / height of the synthesized image")
    preprocess: str | None = _option(None, "how images are resized and cropped", data.PREPROCESS_MODES)
    flip: bool = _option(True, "mirror half of the training samples")
    synthetic_size: int | None = _option(None, "samples in an epoch of the synthetic dataset")

    # Networks
    ngf: int = _option(64, "width of the generator and encoder")
    ndf: int = _option(64, "width of the discriminator")
    num_upsampling_layers: str = _option("normal", "upsampling layers in the generator", tuple(UPSAMPLING_LAYERS))
    z_dim: int | None = _option(None, "size of the noise vector the generator starts from (default: the label map)")
    use_vae: bool = _option(False, "train an image encoder too, for style from a photo (z_dim 256 unless given)")
    norm: str = _option("syncbatch", "SPADE's parameter-free norm", NORMS)
    kernel_size: int = _option(3, "kernel of SPADE's convolutions", KERNEL_SIZES)
    spectral_norm: bool = _option(True, "spectral norm in the generator")
    norm_d: str = _option("spectralinstance", "spectral norm and norm in the discriminator", CONV_NORMS)
    norm_e: str = _option("spectralinstance", "spectral norm and norm in the encoder", CONV_NORMS)
    spade: str = _option("fused", "SPADE layer; both are the same function", ("fused", "reference"))
    init: str = _option("released", "first weights: as the released networks started, or as the paper says", INITS)
    n_layers_d: int = _option(4, "convolutions in each discriminator before the last")
    num_d: int = _option(2, "discriminator scales")

    # Losses
    gan_mode: str = _option("hinge", "adversarial loss", GAN_MODES)
    lambda_feat: float = _option(10.0, "weight of discriminator feature matching")
    lambda_vgg: float = _option(10.0, "weight of the VGG19 perceptual loss; 0 needs no VGG weights")
    lambda_kl: float = _option(0.05, "weight of the encoder's KL divergence (use_vae)")
    lambda_l1: float = _option(0.0, "weight of the mean absolute difference to the real image; not in the paper")
    vgg_weights: str | None = _option(None, "file of VGG19 weights in torchvision's format (default: download)")

    # Schedule
    batch_size: int = _option(32, "images in a step, of all processes together")
    epochs: int | None = _option(50, "passes over the dataset")
    steps: int | None = _option(None, "iterations, instead of epochs")
    d_steps_per_g: int = _option(
        1,
        "iterations, each an update of the discriminator, for one update of the generator; counted from the start of "
        "the run, not anew in each epoch",
    )
    decay_from: int | None = _option(None, "epoch from which the learning rates fall linearly to 0 (default: never)")
    lr: float = _option(2e-4, "Adam's learning rate; with ttur the generator gets half, the discriminator twice")
    ttur: bool = _option(True, "two time-scale learning rates")
    beta1: float | None = _option(None, "Adam's beta1 (default: 0 with ttur, else 0.5)")
    beta2: float | None = _option(None, "Adam's beta2 (default: 0.9 with ttur, else 0.999)")
    ema: float = _option(0.9999, "decay of the moving average of the generator's weights; 0 keeps none")
    ema_samples: int = _option(256, "label maps that set the average's batch-norm statistics before it is used")
    max_minutes: float | None = _option(None, "save and stop after so many minutes of training in this process")

    # Speed and memory
    amp: str = _option("auto", "what networks compute in; auto: bf16 on GPUs that have it, else fp32", AMP_MODES)
    tf32: bool = _option(False, "let float32 matrix products and convolutions on GPUs round their input to TF32")
    compile: bool = _option(False, "torch.compile generator and discriminator")
    accumulate: int = _option(1, "micro-batches whose gradients add up to a step's; batch norm sees one at a time")
    checkpoint_blocks: bool = _option(False, "keep only the input of each residual block and compute it again backward")
    share_fake: bool = _option(
        False, "discriminator learns on the images of the generator's step: not the paper's order"
    )

    # The run
    out: str = _option("runs/train", "directory of the run")
    seed: int = _option(0, "seed of weights, order, augmentation and noise")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...")
    workers: int = _option(2, "data-loading processes; 0 loads in the training process")
    save_every: int = _option(1000, "steps between checkpoints")
    keep: int = _option(3, "newest checkpoints kept")
    sample_every: int = _option(500, "steps between pictures of fixed samples; 0 draws none")
    num_samples: int = _option(4, "samples in those pictures")
    log_every: int = _option(10, "steps between lines of stats.jsonl")
    tensorboard: bool = _option(True, "write TensorBoard events, where it is installed")

    def lrs(self) -> tuple[float, float]:
        """Base learning rates of generator (and encoder) and of discriminator."""
        return (self.lr / 2, self.lr * 2) if self.ttur else (self.lr, self.lr)

    def save(self, path: str | Path) -> None:
        """Writes the options as JSON, readable with `--config`."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
# What a run can't change half-way: how its networks started, their shapes, and what "the same position in the same
# epoch" means.
RESUME_FIXED = (
    *("dataset", "num_classes", "ignore_value", "shift_labels", "use_edges", "crop_size", "aspect_ratio"),
    *("synthetic_size", "ngf", "ndf", "num_upsampling_layers", "z_dim", "use_vae", "norm", "kernel_size"),
    *("spectral_norm", "norm_d", "norm_e", "init", "n_layers_d", "num_d", "batch_size", "seed"),
)


# What a run did whose configuration is older than the option.
BEFORE_INIT = {"init": "glorot", "spectral_norm": True, "norm_d": "spectralinstance", "norm_e": "spectralinstance"}


def flag(name: str) -> str:
    """The option as it is written on the command line."""
    return "--" + name.replace("_", "-")


def _kinds(name: str) -> tuple[type, ...]:
    hint = get_type_hints(TrainConfig)[name]
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _convert(name: str, value: Any, where: str) -> Any:
    """Value as the field's type; a JSON 1 is fine for a float, a JSON "32" is not an int."""
    kinds = _kinds(name)
    ok = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    if not ok and float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value, ok = float(value), True
    if not ok:
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise ConfigError(f"{where}: {name} must be {wanted}, got {value!r}")
    choices = FIELDS[name].metadata["choices"]
    if choices and value is not None and value not in choices:
        raise ConfigError(f"{where}: {name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    return value


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """Options that an earlier version wrote, in today's names: its raw_labels is the opposite of shift_labels."""
    values = dict(values)
    raw = values.get("raw_labels")
    if not isinstance(raw, bool):
        return values
    del values["raw_labels"]
    # The other datasets' configurations carried it too, where it meant nothing.
    if str(values.get("dataset") or values.get("preset")).startswith("ade20k"):
        values.setdefault("shift_labels", not raw)
    return values


def read_run(path: str | Path) -> dict[str, Any]:
    """`read_file` of a run's config.json."""
    return {**BEFORE_INIT, **read_file(path)}


def read_file(path: str | Path) -> dict[str, Any]:
    """Options of a JSON file. Raises ConfigError for a file that can't be read, an unknown key or a wrong type."""
    try:
        values = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ConfigError(f"{path}: not a readable JSON file: {e}") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold one JSON object, got {type(values).__name__}")
    values = migrate(values)
    for name in values:
        if name not in FIELDS:
            raise ConfigError(f"{path}: unknown option {name!r}{_suggest(name, list(FIELDS))}")
    return {name: _convert(name, value, str(path)) for name, value in values.items()}


def merge(file: dict[str, Any], command_line: dict[str, Any]) -> TrainConfig:
    """Defaults < preset < file < command line. Without a preset, the dataset's own applies where there is one.

    `steps` and `epochs` exclude each other: the one in the later place wins, both in one place is an error.
    """
    given = {**file, **command_line}
    preset = given.get("preset") or given.get("dataset", TrainConfig.dataset)
    merged: dict[str, Any] = {}
    for where, layer in (("preset", PRESETS.get(preset, {})), ("file", file), ("command line", command_line)):
        if layer.get("steps") is not None and layer.get("epochs") is not None:
            raise ConfigError(
                f"{where}: steps and epochs exclude each other, got steps {layer['steps']}, epochs "
                f"{layer['epochs']}: leave one out"
            )
        merged.update(layer)
        if layer.get("steps") is not None:
            merged["epochs"] = None
        elif layer.get("epochs") is not None:
            merged["steps"] = None
    config = TrainConfig(**merged)
    if given.get("preset") and config.dataset != PRESETS[given["preset"]]["dataset"]:
        raise ConfigError(
            f"preset {config.preset!r} is for the dataset {PRESETS[config.preset]['dataset']!r}, but "
            f"dataset is {config.dataset!r}: leave one of {flag('preset')}, {flag('dataset')} out"
        )
    return config


def resolve(config: TrainConfig) -> TrainConfig:
    """A copy in which the dataset's defaults and dependent options are filled in and everything is checked.

    Raises ConfigError naming the option.
    """
    c = dataclasses.replace(config)
    for name in PATHS:
        if getattr(c, name) is not None:
            # Absolute, so that a run can be resumed in another working directory.
            setattr(c, name, os.path.abspath(os.path.expanduser(getattr(c, name))))
    defaults = data.default_options(c.dataset)
    for name in ("crop_size", "aspect_ratio", "preprocess"):
        if getattr(c, name) is None:
            setattr(c, name, defaults[name])
    if c.load_size is None:
        c.load_size = data.default_load_size(c.preprocess, c.crop_size)
    if c.use_vae and c.z_dim is None:
        c.z_dim = 256
    if c.beta1 is None:
        c.beta1 = 0.0 if c.ttur else 0.5
    if c.beta2 is None:
        c.beta2 = 0.9 if c.ttur else 0.999
    _check(c)
    return c


def _check(c: TrainConfig) -> None:
    def need(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ConfigError(f"{flag(name)} must be {rule}, got {getattr(c, name)!r}")

    for name in (
        *("ngf", "ndf", "batch_size", "accumulate", "n_layers_d", "num_d", "save_every", "keep", "log_every"),
        *("num_samples", "ema_samples", "d_steps_per_g"),
    ):
        need(getattr(c, name) >= 1, name, "at least 1")
    for name in ("lambda_feat", "lambda_vgg", "lambda_kl", "lambda_l1", "workers", "sample_every", "seed"):
        need(getattr(c, name) >= 0, name, "0 or more")
    for name in ("z_dim", "num_classes", "synthetic_size", "steps", "epochs", "max_minutes", "aspect_ratio", "lr"):
        need(getattr(c, name) is None or getattr(c, name) > 0, name, "above 0")
    need(c.seed <= MAX_SEED, "seed", f"at most {MAX_SEED}")
    for name in ("beta1", "beta2", "ema"):
        need(0 <= getattr(c, name) < 1, name, "in [0, 1)")
    need(c.decay_from is None or c.decay_from >= 0, "decay_from", "0 or more")
    if c.checkpoint_blocks and (c.compile or c.spade == "reference"):
        other = flag("compile") if c.compile else "--spade reference"
        raise ConfigError(f"{flag('checkpoint_blocks')} does not go with {other}: leave one out")
    if c.share_fake and c.d_steps_per_g > 1:
        raise ConfigError(
            f"{flag('share_fake')} does not go with {flag('d_steps_per_g')} {c.d_steps_per_g}: iterations without a "
            "generator step have no images to share; leave one out"
        )
    if c.steps is None and c.epochs is None:
        raise ConfigError(f"one of {flag('steps')} and {flag('epochs')} is needed")
    try:
        height, width = start_size(c.crop_size, c.aspect_ratio, c.num_upsampling_layers)
    except ValueError as e:
        raise ConfigError(f"{flag('crop_size')}: {e}") from None
    values = height * width * (1 if c.norm == "instance" else c.batch_size)
    if values == 1 and c.norm != "none":
        raise ConfigError(
            f"{flag('norm')} {c.norm} has one value a channel to normalize: the generator starts from {height * width} "
            f"pixel with {flag('crop_size')} {c.crop_size}, {flag('batch_size')} is {c.batch_size}; take a larger crop"
        )
    need(c.load_size >= c.crop_size, "load_size", f"at least {flag('crop_size')} {c.crop_size}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every field; one that is not given leaves no trace in the namespace."""
    for name, field in FIELDS.items():
        kind = next(k for k in _kinds(name) if k is not type(None))
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            text += f" (default: {field.default})"
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(
                flag(name),
                type=kind,
                choices=field.metadata["choices"],
                metavar=None if field.metadata["choices"] else kind.__name__.upper(),
                **common,
            )


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(the parser's other options, the config options given). An unknown option ends the program, naming close ones."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [s for action in parser._actions for s in action.option_strings]
        name = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
        parser.error(f"unknown option {name}{_suggest(name, known)}")
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    return args, given
