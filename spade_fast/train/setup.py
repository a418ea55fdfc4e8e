# SPDX-License-Identifier: Apache-2.0
"""What a run is made of, from its options: dataset, networks, length."""

from __future__ import annotations

from typing import Any

from torch import nn

from spade_fast import data, models
from spade_fast.cli import ConfigError
from spade_fast.train.config import TrainConfig


def open_dataset(config: TrainConfig, phase: str, **changes: Any) -> data.SegmentationDataset:
    """The dataset of a resolved configuration."""
    names = (
        *("dataroot", "image_dir", "label_dir", "instance_dir", "num_classes", "ignore_value", "shift_labels"),
        *("file_list", "use_edges", "crop_size", "load_size", "aspect_ratio", "preprocess", "flip", "seed"),
    )
    options = {name: getattr(config, name) for name in names}
    options["size"] = config.synthetic_size if phase == "train" else None
    return data.make_dataset(config.dataset, phase, **{**options, **changes})


def build_networks(config: TrainConfig, label_nc: int) -> dict[str, nn.Module]:
    """generator, discriminator and, with use_vae, encoder; weights not initialized yet."""
    nets: dict[str, nn.Module] = {
        "generator": models.SPADEGenerator(
            label_nc,
            ngf=config.ngf,
            crop_size=config.crop_size,
            aspect_ratio=config.aspect_ratio,
            num_upsampling_layers=config.num_upsampling_layers,
            z_dim=config.z_dim,
            norm=config.norm,
            kernel_size=config.kernel_size,
            spade=config.spade,
            spectral_norm=config.spectral_norm,
        ),
        "discriminator": models.MultiscaleDiscriminator(
            label_nc, ndf=config.ndf, n_layers=config.n_layers_d, num_d=config.num_d, norm=config.norm_d
        ),
    }
    if config.use_vae:
        nets["encoder"] = models.ConvEncoder(ngf=config.ngf, z_dim=config.z_dim, norm=config.norm_e)
    return nets


def steps_per_epoch(config: TrainConfig, dataset: data.SegmentationDataset) -> int:
    """Batches in an epoch. Raises ConfigError when there is not one."""
    if len(dataset) < config.batch_size:
        raise ConfigError(f"--batch-size {config.batch_size} is more than the {len(dataset)} samples of the dataset")
    return len(dataset) // config.batch_size


def length(config: TrainConfig, per_epoch: int) -> tuple[int, int]:
    """(steps, epochs) of the whole run; the last epoch may be cut short."""
    if config.steps is not None:
        return config.steps, -(-config.steps // per_epoch)
    return config.epochs * per_epoch, config.epochs


def check_size(config: TrainConfig, dataset: data.SegmentationDataset, generator: nn.Module) -> None:
    """Raises ConfigError unless every sample has the size the generator makes."""
    if dataset.output_size != generator.output_size:
        got = dataset.output_size or "sizes that differ from image to image"
        raise ConfigError(
            f"the generator makes images of (height, width) {generator.output_size}, but --preprocess "
            f"{config.preprocess} with --crop-size {config.crop_size} and --aspect-ratio {config.aspect_ratio} "
            f"gives {got}"
        )
