# SPDX-License-Identifier: Apache-2.0
"""What a run is made of, from its options: networks, steps, and checks that the data fit them."""

from __future__ import annotations

from torch import nn

from spade_fast import data, models
from spade_fast.cli import ConfigError, flag
from spade_fast.train.config import ResolvedConfig
from spade_fast.train.ranks import Ranks


def build_networks(config: ResolvedConfig, label_nc: int) -> dict[str, nn.Module]:
    """The networks of a run; their weights are not initialized yet.

    Args:
        config: resolved options.
        label_nc: channels of the label maps, with edges.

    Returns:
        "generator", "discriminator" and, with use_vae, "encoder".
    """
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
        assert config.z_dim is not None  # resolve_config gives it with use_vae
        nets["encoder"] = models.ConvEncoder(ngf=config.ngf, z_dim=config.z_dim, norm=config.norm_e)
    return nets


def generator_of(nets: dict[str, nn.Module]) -> models.SPADEGenerator:
    """The generator among the networks of `build_networks`."""
    generator = nets["generator"]
    assert isinstance(generator, models.SPADEGenerator)
    return generator


def check_batch(config: ResolvedConfig, world: int) -> None:
    """Raises ConfigError unless a batch has an image for each micro-batch of each process."""
    if config.batch_size < world * config.accumulate:
        raise ConfigError(
            f"--batch-size {config.batch_size} (of all processes together) is too small for {world} "
            f"processes with --accumulate {config.accumulate}"
        )


def steps_per_epoch(config: ResolvedConfig, dataset: data.SegmentationDataset) -> int:
    """Batches in an epoch. Raises ConfigError when the samples do not fill one."""
    if len(dataset) < config.batch_size:
        raise ConfigError(f"--batch-size {config.batch_size} is more than the {len(dataset)} samples of the dataset")
    return len(dataset) // config.batch_size


def length(config: ResolvedConfig, per_epoch: int) -> tuple[int, int]:
    """(steps, epochs) of the whole run; the last epoch may be cut short."""
    if config.steps is not None:
        return config.steps, -(-config.steps // per_epoch)
    assert config.epochs is not None  # resolve_config needs one of the two
    return config.epochs * per_epoch, config.epochs


def check_size(config: ResolvedConfig, dataset: data.SegmentationDataset, generator: models.SPADEGenerator) -> None:
    """Raises ConfigError unless every sample has the size that the generator makes."""
    if dataset.output_size != generator.output_size:
        got = dataset.output_size or "sizes that differ from image to image"
        raise ConfigError(
            f"the generator makes images of (height, width) {generator.output_size}, but --preprocess "
            f"{config.preprocess} with --crop-size {config.crop_size} and --aspect-ratio {config.aspect_ratio} "
            f"gives {got}"
        )


def check_statistics(config: ResolvedConfig, generator: models.SPADEGenerator, world: int) -> None:
    """Raises ConfigError if a norm of the generator would see one value a channel in a micro-batch."""
    if config.norm not in ("batch", "syncbatch"):
        return
    share = config.batch_size // (world if config.norm == "batch" else 1) // config.accumulate
    height, width = generator.start
    if height * width * share == 1:
        raise ConfigError(
            f"--norm {config.norm} has one value a channel to normalize: the generator starts from 1 pixel with "
            f"--crop-size {config.crop_size}, and a micro-batch is 1 image with --batch-size {config.batch_size}, "
            f"--accumulate {config.accumulate} and {world} processes; take a larger crop or batch"
        )


def check_sharing(config: ResolvedConfig, ranks: Ranks) -> None:
    """Raises ConfigError if CPUs would have to synchronize torch's own batch norms.

    torch.nn.SyncBatchNorm is for GPUs. FusedSPADE synchronizes by itself on any device.
    """
    if ranks.world == 1 or ranks.device.type == "cuda":
        return
    if config.spade == "reference" and config.norm == "syncbatch":
        raise ConfigError(
            "--spade reference --norm syncbatch on several processes needs GPUs (torch.nn.SyncBatchNorm); take "
            "--spade fused or --norm batch"
        )
    for name, norm in (("norm_d", config.norm_d), ("norm_e", config.norm_e if config.use_vae else "")):
        if norm.endswith("syncbatch"):
            raise ConfigError(
                f"{flag(name)} {norm} on several processes needs GPUs (torch.nn.SyncBatchNorm); take "
                f"{norm.replace('sync', '')}, whose statistics are each process's own"
            )


def share_statistics(config: ResolvedConfig, nets: dict[str, nn.Module], ranks: Ranks) -> None:
    """Makes torch's own batch norms synchronized over the processes, in place. Raises what `check_sharing` does."""
    check_sharing(config, ranks)
    shared = {
        "generator": config.spade == "reference" and config.norm == "syncbatch",
        "discriminator": config.norm_d.endswith("syncbatch"),
        "encoder": config.norm_e.endswith("syncbatch"),
    }
    for name, net in nets.items():
        if ranks.world > 1 and shared[name]:
            nn.SyncBatchNorm.convert_sync_batchnorm(net)
