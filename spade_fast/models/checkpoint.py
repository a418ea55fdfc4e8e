# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: their schema, safe loading, and writing that a crash cannot break.

A checkpoint of a training run is one dict of plain containers and tensors, written by `torch.save`:

    format          FORMAT
    generator       {"options": arguments of SPADEGenerator, "state_dict": tensors by name}
    ema             the same, of the moving average of the generator's weights; absent without one
    discriminator   the same, of MultiscaleDiscriminator
    encoder         the same, of ConvEncoder; absent without --use-vae
    training        what a run needs to resume:
      config          the options of the run, as in its config.json
      step, epoch     int, the position
      batch           int, batches of the epoch that are done
      dataset_size    int, samples of the dataset
      optimizers      state dict of each optimizer, by network
      scalers         state dict of each gradient scaler, by network
      random          states of the random generators of torch, CUDA, NumPy and Python

`training_checkpoint` makes the dict. `load_generator`, `load_encoder`, `load_training_checkpoint` and `training_config`
read it. The authors' released files hold a bare state dict instead, see `spade_fast.models.released`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeGuard, cast

import torch
from torch import Tensor

from spade_fast.files import load_tensors, writing
from spade_fast.models import ConvEncoder, SPADEGenerator, released
from spade_fast.models.norms import SPECTRAL, conv_norm
from spade_fast.models.released import (
    ENCODER_CONVOLUTIONS,
    GENERATOR_CONVOLUTIONS,
    PRESETS,
    has_spectral_norm,
    is_state_dict,
    strip,
)

FORMAT = "spade_fast.checkpoint/1"
WEIGHTS = ("auto", "ema", "last")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable, or does not say enough."""


class _Recording:
    """A file that keeps the system's error, which torch.save replaces by one of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def atomic_save(obj: object, path: str | Path) -> None:
    """torch.save that leaves either the old file or the complete new one, also after a crash or a power cut.

    Args:
        obj: tensors and plain containers.
        path: the file; its directory exists.

    Raises:
        WriteError: the file can't be written; the old one is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                recording = _Recording(file)
                try:
                    torch.save(obj, cast(IO[bytes], recording))  # torch.save calls write and flush alone
                except Exception:
                    if recording.error is not None:
                        raise recording.error from None
                    raise
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def remove_leftovers(directory: Path) -> None:
    """Removes the half-written files of saves that were killed. Only the one process that saves there may call it."""
    for path in directory.glob(".checkpoint_*.pt.*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def safe_load(path: str | Path) -> object:
    """Load tensors and plain containers on the CPU. A file whose pickle would run code is refused.

    Raises:
        CheckpointError: the file is missing, truncated or not a plain checkpoint.
    """
    try:
        return load_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error


def training_checkpoint(nets: Mapping[str, torch.nn.Module], training: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of a training run, as `atomic_save` writes it.

    Args:
        nets: networks with constructor `options`: generator, discriminator, and perhaps encoder and ema.
        training: what resuming needs besides the networks: options, position, optimizers, random states.
    """
    held = {name: {"options": net.options, "state_dict": net.state_dict()} for name, net in nets.items()}
    return {"format": FORMAT, **held, "training": training}


def load_training_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `training_checkpoint` made.

    Raises:
        CheckpointError: the file is missing, truncated, or has no training state.
    """
    loaded = safe_load(path)
    if not isinstance(loaded, dict) or not isinstance(loaded.get("training"), dict):
        raise CheckpointError(f"{path} holds no training state")
    return loaded


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return directory / f"checkpoint_{step:08d}.pt"


def list_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    pattern = re.compile(r"checkpoint_\d{8,}\.pt")
    found = [p for p in Path(directory).glob("checkpoint_*.pt") if pattern.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.stem.rpartition("_")[2]))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file of a path: the path itself, or the newest checkpoint of a run directory.

    Args:
        path: a file or a run directory; ~ is the home directory.

    Raises:
        CheckpointError: there is no such path, or no checkpoint in the directory.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        found = list_checkpoints(path)
        if not found:
            raise CheckpointError(f"no checkpoint_*.pt in the directory {path}")
        return found[-1]
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    return path


def training_config(path: str | Path) -> dict[str, Any]:
    """The options that the run of a checkpoint was trained with, as its version wrote them; {} if the file has none.

    Raises:
        CheckpointError: the file is missing or unreadable.
    """
    loaded = safe_load(find_checkpoint(path))
    training = loaded.get("training") if _is_ours(loaded) else None
    return dict(training.get("config") or {}) if isinstance(training, Mapping) else {}


def load_generator(
    path: str | Path, weights: str = "auto", preset: str | None = None, **overrides: Any
) -> SPADEGenerator:
    """A generator in evaluation mode from a checkpoint, a run directory, or a released ``*_net_G.pth``.

    Args:
        path: checkpoint file, run directory (its newest checkpoint), or a bare state dict in the authors' format.
        weights: ``ema`` for the moving average, ``last`` for the weights as trained last; ``auto`` takes the average
            where the checkpoint has one.
        preset: which released weights these are: ``coco``, ``ade20k`` or ``cityscapes``. It sets what the tensors of
            a bare state dict cannot tell: crop_size, aspect_ratio and the number of upsampling layers.
        overrides: options of :class:`SPADEGenerator`, for a bare state dict without a preset. Its tensors tell
            label_nc, ngf, kernel_size, z_dim, spectral_norm, syncbatch and ``most``. They cannot tell crop_size,
            ``normal`` from ``more`` upsampling, ``instance`` from ``none``, nor aspect_ratio (1 unless given; it must
            be given for 35 or 36 channels, which look like Cityscapes').

    Raises:
        CheckpointError: the file is unreadable, holds no generator or not the weights asked for, contradicts the
            preset, or needs an option that is not given.
        ValueError: weights or preset is unknown.

    Examples:
        >>> load_generator("latest_net_G.pth", preset="coco")  # doctest: +SKIP
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    path = find_checkpoint(path)
    loaded = safe_load(path)
    if weights == "ema" and not (isinstance(loaded, Mapping) and "ema" in loaded):
        raise CheckpointError(f"{path} holds no moving average of the generator's weights")
    with _naming(path):
        if is_state_dict(loaded):
            state = strip(loaded)
            options = released.generator_options(state, preset, overrides)
        elif _is_ours(loaded):
            held = loaded.get("ema" if weights != "last" and "ema" in loaded else "generator")
            if not isinstance(held, Mapping) or not held.keys() >= {"state_dict", "options"}:
                raise ValueError("holds no generator with its options")
            if preset is not None:
                released.check_preset(preset, held["options"], overrides)
            state, options = held["state_dict"], {**held["options"], **overrides}
            # Spectral norm may have been removed since the options were written.
            options["spectral_norm"] = has_spectral_norm(state, GENERATOR_CONVOLUTIONS)
        else:
            raise ValueError(f"is neither a checkpoint of this package ({FORMAT}) nor a bare state dict")
    net = SPADEGenerator(**options)
    _load_strictly(net, state, path, options)
    return net.eval()


def load_encoder(path: str | Path) -> ConvEncoder:
    """An image encoder in evaluation mode.

    Args:
        path: checkpoint file with an encoder, run directory, or a released ``*_net_E.pth``.

    Raises:
        CheckpointError: the file is unreadable, or there is no encoder in it.
    """
    path = find_checkpoint(path)
    loaded = safe_load(path)
    with _naming(path):
        if is_state_dict(loaded):
            state = strip(loaded)
            options = released.encoder_options(state)
        elif _is_ours(loaded) and loaded.get("encoder"):
            state, options = loaded["encoder"]["state_dict"], dict(loaded["encoder"]["options"])
            if not has_spectral_norm(state, ENCODER_CONVOLUTIONS):  # it may have been removed
                options["norm"] = conv_norm(options.get("norm", SPECTRAL + "instance"))[1]
        else:
            raise ValueError("holds no encoder; train one with --use-vae")
    net = ConvEncoder(**options)
    _load_strictly(net, state, path, options)
    return net.eval()


def _is_ours(loaded: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(loaded, Mapping) and loaded.get("format") == FORMAT


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file before the message of what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from None


def _load_strictly(net: torch.nn.Module, state: Mapping[str, Tensor], path: Path, options: dict[str, Any]) -> None:
    try:
        net.load_state_dict(released.complete_state_dict(state), strict=True)
    except RuntimeError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        first, *others = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" (and {len(others)} more)" if others else ""
        raise CheckpointError(f"{path} does not fit a {type(net).__name__}({given}): {first}{more}") from None
