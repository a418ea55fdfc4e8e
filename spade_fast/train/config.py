# SPDX-License-Identifier: Apache-2.0
"""Training options: one dataclass, read from defaults < preset < file < command line.

The presets hold the schedules of Park et al., CVPR 2019, section 4 and appendix A: Adam with two time-scales,
batch 32 (Cityscapes 16), 200 epochs with linear decay from epoch 100 for Cityscapes and ADE20K, 100 for COCO-Stuff, 50
for Flickr Landscapes. The paper prints beta2 = 0.999; the authors' training with two time-scales uses beta1 = 0 and
beta2 = 0.9.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spade_fast import data
from spade_fast.cli import ConfigError, flag, option, read_options
from spade_fast.data.options import DataOptions, migrate
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
PAPERS_BATCH_SIZE = 32
PATHS = (
    *("dataroot", "image_dir", "label_dir", "instance_dir", "val_image_dir", "val_label_dir", "val_instance_dir"),
    *("file_list", "vgg_weights", "out"),
)
MAX_SEED = 2**43 - 1  # seed * 1_000_003 + step, which seeds each step's noise, has to fit 64 bits
AMP_MODES = ("auto", "bf16", "fp16", "fp32")


_schedule = functools.partial(option, "Schedule")
_network = functools.partial(option, "Networks")
_loss = functools.partial(option, "Losses")
_speed = functools.partial(option, "Speed and memory")
_run = functools.partial(option, "The run")


@dataclass
class TrainConfig(DataOptions):
    """Every option of a training run.

    None means that the dataset or another option decides; `resolve_config` fills it in.
    """

    preset: str | None = _schedule(None, "the paper's schedule for a dataset (default: the dataset's)", tuple(PRESETS))
    batch_size: int | None = _schedule(
        None,
        "images in a step, of all processes together (default: the paper's 32, or 16 for Cityscapes; for the dataset "
        "folder what fits the data and the device)",
    )
    epochs: int | None = _schedule(50, "passes over the dataset")
    steps: int | None = _schedule(None, "iterations, instead of epochs")
    max_minutes: float | None = _schedule(None, "save and stop after this many minutes of training in this process")
    d_steps_per_g: int = _schedule(
        1,
        "discriminator updates for one update of the generator; each is an iteration, and iterations are counted from "
        "the start of the run, not anew in each epoch",
    )
    decay_from: int | None = _schedule(
        None, "epoch from which the learning rates fall linearly to 0 (default: the learning rates are constant)"
    )
    lr: float = _schedule(
        2e-4, "Adam's learning rate; with ttur the generator gets half of it, the discriminator twice"
    )
    ttur: bool = _schedule(True, "two time-scale learning rates")
    beta1: float | None = _schedule(None, "Adam's beta1 (default: 0 with ttur, else 0.5)")
    beta2: float | None = _schedule(None, "Adam's beta2 (default: 0.9 with ttur, else 0.999)")
    ema: float = _schedule(0.9999, "decay of the moving average of the generator's weights; 0 keeps no average")
    ema_samples: int = _schedule(256, "label maps that set the average's batch-norm statistics before it is used")

    ngf: int = _network(64, "width of the generator and encoder")
    ndf: int = _network(64, "width of the discriminator")
    num_upsampling_layers: str = _network("normal", "upsampling layers in the generator", tuple(UPSAMPLING_LAYERS))
    z_dim: int | None = _network(None, "size of the noise vector the generator starts from (default: the label map)")
    use_vae: bool = _network(False, "train an image encoder too, for style from a photo (z_dim 256 unless given)")
    norm: str = _network("syncbatch", "SPADE's parameter-free norm", NORMS)
    kernel_size: int = _network(3, "kernel of SPADE's convolutions", KERNEL_SIZES)
    spectral_norm: bool = _network(True, "spectral norm in the generator")
    norm_d: str = _network("spectralinstance", "spectral norm and norm in the discriminator", CONV_NORMS)
    norm_e: str = _network("spectralinstance", "spectral norm and norm in the encoder", CONV_NORMS)
    spade: str = _network("fused", "SPADE layer; both are the same function", ("fused", "reference"))
    init: str = _network("released", "first weights: as the released networks started, or as the paper says", INITS)
    n_layers_d: int = _network(4, "convolutions in each discriminator before the last")
    num_d: int = _network(2, "discriminator scales")

    gan_mode: str = _loss("hinge", "adversarial loss", GAN_MODES)
    lambda_feat: float = _loss(10.0, "weight of discriminator feature matching")
    lambda_vgg: float = _loss(10.0, "weight of the VGG19 perceptual loss; 0 needs no VGG weights")
    lambda_kl: float = _loss(0.05, "weight of the encoder's KL divergence (use_vae)")
    lambda_l1: float = _loss(0.0, "weight of the mean absolute difference to the real image; not in the paper")
    vgg_weights: str | None = _loss(None, "file of VGG19 weights in torchvision's format (default: download)")

    device: str = _speed("auto", "auto, cpu, cuda, cuda:1, ...")
    amp: str = _speed("auto", "what networks compute in; auto: bf16 on GPUs that have it, else fp32", AMP_MODES)
    tf32: bool = _speed(False, "let float32 matrix products and convolutions on GPUs round their input to TF32")
    compile: bool = _speed(False, "torch.compile generator and discriminator; the first steps then take minutes")
    accumulate: int = _speed(1, "micro-batches whose gradients add up to a step's; batch norm sees one at a time")
    checkpoint_blocks: bool = _speed(False, "keep only the input of each residual block and compute it again backward")
    share_fake: bool = _speed(
        False, "the discriminator learns on the images of the generator's step: not the paper's order of updates"
    )

    out: str = _run("runs/train", "directory of the run")
    save_every: int = _run(1000, "steps between checkpoints")
    keep: int = _run(3, "newest checkpoints kept")
    sample_every: int = _run(500, "steps between pictures of fixed samples; 0 draws none")
    sample_minutes: float = _run(
        5.0, "minutes between pictures at most; the first is drawn after 5 steps or one minute; 0 counts steps alone"
    )
    num_samples: int = _run(4, "samples in those pictures")
    log_every: int = _run(10, "steps between lines of stats.jsonl")
    tensorboard: bool = _run(True, "write TensorBoard events, if TensorBoard is installed")
    wandb: str | None = _run(None, "project of Weights & Biases to log to as well; needs the package wandb")

    def lrs(self) -> tuple[float, float]:
        """Base learning rates of the generator (and encoder) and of the discriminator."""
        return (self.lr / 2, self.lr * 2) if self.ttur else (self.lr, self.lr)

    def save(self, path: str | Path) -> None:
        """Writes the options as JSON, which `--config` reads."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


# What a resumed run can't change: its networks' shapes, how they started, and the order of its samples.
RESUME_FIXED = (
    *("dataset", "num_classes", "ignore_value", "shift_labels", "use_edges", "crop_size", "aspect_ratio"),
    *("synthetic_size", "val_split", "ngf", "ndf", "num_upsampling_layers", "z_dim", "use_vae", "norm", "kernel_size"),
    *("spectral_norm", "norm_d", "norm_e", "init", "n_layers_d", "num_d", "batch_size", "seed"),
)
# What a run did whose configuration is older than these options.
BEFORE_INIT = {"init": "glorot", "spectral_norm": True, "norm_d": "spectralinstance", "norm_e": "spectralinstance"}

if TYPE_CHECKING:

    class ResolvedConfig(TrainConfig):
        """What `resolve_config` returns: these are never None."""

        crop_size: int
        load_size: int
        aspect_ratio: float
        preprocess: str
        batch_size: int  # 0 for the dataset folder until `setup.fit_batch_size` has seen the samples
        beta1: float
        beta2: float
else:
    ResolvedConfig = TrainConfig


def read_file(path: str | Path) -> dict[str, Any]:
    """The options that a JSON or YAML file gives; see `spade_fast.cli.read_options`."""
    return read_options(path, TrainConfig, migrate)


def read_run(path: str | Path) -> dict[str, Any]:
    """`read_file` of a run's config.json."""
    return {**BEFORE_INIT, **read_file(path)}


def merge(file: dict[str, Any], command_line: dict[str, Any]) -> TrainConfig:
    """Defaults < preset < file < command line. Without a preset, the dataset's own applies where there is one.

    `steps` and `epochs` exclude each other. The one in the later place wins.

    Raises:
        ConfigError: one place gives both steps and epochs, or the preset is for another dataset.
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
    if config.preset is not None and config.dataset != PRESETS[config.preset]["dataset"]:
        raise ConfigError(
            f"preset {config.preset!r} is for the dataset {PRESETS[config.preset]['dataset']!r}, but "
            f"dataset is {config.dataset!r}: leave one of {flag('preset')}, {flag('dataset')} out"
        )
    return config


def resolve_config(config: TrainConfig) -> ResolvedConfig:
    """A copy with the dataset's defaults and dependent options filled in, and everything checked.

    Raises:
        ConfigError: an option is out of range or contradicts another. The message names it.
    """
    c = cast(ResolvedConfig, dataclasses.replace(config))
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
    if config.batch_size is None:
        c.batch_size = 0 if c.dataset == "folder" else PAPERS_BATCH_SIZE
    _check_sizes(c)
    return c


def _check(c: ResolvedConfig) -> None:
    def need(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ConfigError(f"{flag(name)} must be {rule}, got {getattr(c, name)!r}")

    for name in (
        *("ngf", "ndf", "batch_size", "accumulate", "n_layers_d", "num_d", "save_every", "keep", "log_every"),
        *("num_samples", "ema_samples", "d_steps_per_g"),
    ):
        need(getattr(c, name) is None or getattr(c, name) >= 1, name, "at least 1")
    for name in (
        *("lambda_feat", "lambda_vgg", "lambda_kl", "lambda_l1", "workers", "sample_every", "sample_minutes", "seed"),
    ):
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
    _check_held_out(c)
    if c.steps is None and c.epochs is None:
        raise ConfigError(f"one of {flag('steps')} and {flag('epochs')} is needed")


def _check_held_out(c: ResolvedConfig) -> None:
    directories = [name for name in ("val_image_dir", "val_label_dir", "val_instance_dir") if getattr(c, name)]
    if c.val_split is not None:
        if not 0 < c.val_split < 1:
            raise ConfigError(f"{flag('val_split')} must be above 0 and below 1, got {c.val_split!r}")
        if directories:
            raise ConfigError(f"{flag('val_split')} does not go with {flag(directories[0])}: leave one out")
        if c.dataset == "synthetic":
            raise ConfigError(
                f"{flag('val_split')}: the dataset synthetic has held-out scenes of its own; leave it out"
            )
    for name in ("val_image_dir", "val_label_dir"):
        if directories and name not in directories:
            raise ConfigError(f"{flag(directories[0])} needs {flag(name)} too: held-out images and their label maps")


def _check_sizes(c: ResolvedConfig) -> None:
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
    if c.load_size < c.crop_size:
        raise ConfigError(f"{flag('load_size')} must be at least {flag('crop_size')} {c.crop_size}, got {c.load_size}")
