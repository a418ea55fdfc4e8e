# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written atomically, loaded without executing pickled code, and the authors' released files."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.files import load_tensors, writing
from spade_fast.layers.spectral import EPS
from spade_fast.models import ConvEncoder, SPADEGenerator
from spade_fast.models.norms import SPECTRAL, conv_norm

FORMAT = "spade_fast.checkpoint/1"
WEIGHTS = ("auto", "ema", "last")
CITYSCAPES_LABELS = (35, 36)  # channels of its label map, without and with instance edges
RELEASED = "released: COCO-Stuff, ADE20K crop_size=256, 'normal'; Cityscapes crop_size=512, aspect_ratio=2, 'more'"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable, or does not say enough."""


class _Recording:
    """A file that keeps the system's error, which torch.save replaces by one of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.error = file, None

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
                    torch.save(obj, recording)
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
    """Removes what saves that were killed left half-written. Only for the one process that saves there."""
    for path in directory.glob(".checkpoint_*.pt.*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def safe_load(path: str | Path) -> object:
    """Load tensors and plain containers on the CPU; a file that needs arbitrary code to unpickle is refused.

    Raises:
        CheckpointError: the file is missing, truncated or not a plain checkpoint.
    """
    try:
        return load_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return directory / f"checkpoint_{step:08d}.pt"


def list_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    pattern = re.compile(r"checkpoint_\d{8,}\.pt")
    found = [p for p in Path(directory).glob("checkpoint_*.pt") if pattern.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.stem.rpartition("_")[2]))


def resolve(path: str | Path) -> Path:
    """A checkpoint file: the path itself, or the newest checkpoint of a run directory.

    Raises:
        CheckpointError: neither is there.
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


def _complete_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add what files of old torch versions lack, and drop what they have too much, so that they load strictly.

    Spectral norm: ``weight_v`` is computed so that weight_orig / (uᵀ W v) is the weight that was saved, or, when no
    weight was saved, by one half step of the power iteration. Batch norm: ``num_batches_tracked`` becomes 0.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    for name in [n for n in state if n.endswith("weight_u")]:
        stem = name.removesuffix("_u")
        saved = state.pop(stem, None)
        if stem + "_v" in state:
            continue
        matrix, u = state[stem + "_orig"].flatten(1), state[name]
        if saved is None:
            state[stem + "_v"] = F.normalize(matrix.t() @ u, dim=0, eps=EPS)
        else:
            sigma = (matrix / saved.flatten(1)).nanmedian()
            v = torch.linalg.lstsq(matrix.double(), u.double().unsqueeze(1), driver="gelsd").solution.squeeze(1).to(u)
            state[stem + "_v"] = v * (sigma / torch.dot(u, matrix @ v))
    for name in [n for n in state if n.endswith("running_mean")]:
        state.setdefault(name.removesuffix("running_mean") + "num_batches_tracked", torch.tensor(0))
    return state


def _is_state_dict(obj: object) -> bool:
    return isinstance(obj, Mapping) and bool(obj) and all(isinstance(v, Tensor) for v in obj.values())


def _infer_generator_options(state: Mapping[str, Tensor], overrides: dict, path: Path) -> dict:
    """Constructor options of a bare generator state dict; what the tensors cannot tell must be in overrides."""
    try:
        shared = state["head_0.norm_0.mlp_shared.0.weight"]
        spectral_norm = _spectral_norm(state, r"\w+\.conv_[01s]", path)
        width = state[f"head_0.conv_0.weight{'_orig' if spectral_norm else ''}"].shape[0]
        fc = state["fc.weight"]
    except KeyError as error:
        raise CheckpointError(f"{path} is not a SPADE generator's state dict: {error.args[0]} is missing") from None
    options = dict(
        label_nc=shared.shape[1],
        ngf=width // 16,
        kernel_size=shared.shape[2],
        z_dim=None if fc.ndim == 4 else fc.shape[1],
        spectral_norm=spectral_norm,
    )
    unknown = {"crop_size": "the width of the images it was trained on"}
    if options["label_nc"] in CITYSCAPES_LABELS:
        unknown["aspect_ratio"] = "width / height; its labels look like Cityscapes', which is 2"
    if "head_0.norm_0.param_free_norm.running_mean" in state:
        options["norm"] = "syncbatch"
    else:
        unknown["norm"] = "'instance' or 'none'"
    if any(name.startswith("up_4.") for name in state):
        options["num_upsampling_layers"] = "most"
    else:
        unknown["num_upsampling_layers"] = "'normal' or 'more'"
    options.update({name: value for name, value in overrides.items() if value is not None})
    missing = [f"{name} ({what})" for name, what in unknown.items() if name not in options]
    if missing:
        raise CheckpointError(
            f"{path} is a bare state dict, whose tensors do not tell {', '.join(missing)}: pass it as an argument "
            f"({RELEASED})"
        )
    return options


def _spectral_norm(state: Mapping[str, Tensor], convolution: str, path: Path) -> bool:
    """Whether the convolutions whose names match are spectrally normalized: all, or none (also where there are none).

    Raises:
        CheckpointError: some are and some are not.
    """
    kinds: dict[bool, str] = {}
    for name in state:
        found = re.fullmatch(rf"({convolution})\.weight(_orig)?", name)
        if found is not None and (found[2] or name + "_orig" not in state):  # old files hold the divided weight too
            kinds.setdefault(found[2] is not None, name)
    if len(kinds) == 2:
        raise CheckpointError(
            f"{path} mixes convolutions with spectral norm ({kinds[True]}) and without ({kinds[False]}): it must be in "
            "all or in none"
        )
    return kinds.get(True) is not None


def _load_strictly(net: torch.nn.Module, state: Mapping[str, Tensor], path: Path, options: dict) -> None:
    try:
        net.load_state_dict(_complete_state_dict(state), strict=True)
    except RuntimeError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        first, *others = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" (and {len(others)} more)" if others else ""
        raise CheckpointError(f"{path} does not fit a {type(net).__name__}({given}): {first}{more}") from None


def load_generator(path: str | Path, weights: str = "auto", **overrides) -> SPADEGenerator:
    """A generator in evaluation mode from a checkpoint, a run directory, or a released ``*_net_G.pth``.

    Args:
        path: checkpoint file, run directory (its newest checkpoint), or the bare state dict of the authors' format,
            from which label channels, ngf, kernel size, latent size and ``most`` upsampling are read off the tensors.
        weights: ``ema`` for the moving average, ``last`` for the weights as trained last; ``auto`` takes the average
            where the checkpoint has one.
        overrides: options of :class:`SPADEGenerator`; a bare state dict cannot tell crop_size, ``normal`` from
            ``more`` upsampling, aspect_ratio (1 unless given, but asked for of maps with 35 or 36 channels, which look
            like Cityscapes'), or ``instance`` from ``none``.

    Raises:
        CheckpointError: unreadable, not a generator, without the weights asked for, or an option that only an argument
            can tell is not given.
        ValueError: weights is none of the three.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    path = resolve(path)
    loaded = safe_load(path)
    if weights == "ema" and not (isinstance(loaded, Mapping) and "ema" in loaded):
        raise CheckpointError(f"{path} holds no moving average of the generator's weights")
    if _is_state_dict(loaded):
        state = loaded
        options = _infer_generator_options(_strip(loaded), overrides, path)
    elif isinstance(loaded, Mapping) and loaded.get("format") == FORMAT:
        part = loaded.get("ema" if weights != "last" and "ema" in loaded else "generator")
        if not isinstance(part, Mapping) or not part.keys() >= {"state_dict", "options"}:
            raise CheckpointError(f"{path} holds no generator with its options")
        state, options = part["state_dict"], {**part["options"], **overrides}
        options["spectral_norm"] = _spectral_norm(state, r"\w+\.conv_[01s]", path)  # it may have been removed
    else:
        raise CheckpointError(f"{path} is neither a checkpoint of this package ({FORMAT}) nor a bare state dict")
    net = SPADEGenerator(**options)
    _load_strictly(net, state, path, options)
    return net.eval()


def load_encoder(path: str | Path) -> ConvEncoder:
    """An image encoder in evaluation mode from a checkpoint with one, a run directory, or a released ``*_net_E.pth``.

    Raises:
        CheckpointError: unreadable, or there is no encoder in it.
    """
    path = resolve(path)
    loaded = safe_load(path)
    if _is_state_dict(loaded):
        state = _strip(loaded)
        options = _infer_encoder_options(state, path)
    elif isinstance(loaded, Mapping) and loaded.get("format") == FORMAT and loaded.get("encoder"):
        state, options = loaded["encoder"]["state_dict"], dict(loaded["encoder"]["options"])
        if not _spectral_norm(state, r"layer\d(?:\.0)?", path):  # it may have been removed
            options["norm"] = conv_norm(options.get("norm", SPECTRAL + "instance"))[1]
    else:
        raise CheckpointError(f"{path} holds no encoder; train one with --use-vae")
    net = ConvEncoder(**options)
    _load_strictly(net, state, path, options)
    return net.eval()


def _infer_encoder_options(state: Mapping[str, Tensor], path: Path) -> dict:
    spectral = _spectral_norm(state, r"layer\d(?:\.0)?", path)
    ending = "weight_orig" if spectral else "weight"
    normed = f"layer1.{ending}" not in state
    try:
        ngf = state[f"layer1.0.{ending}" if normed else f"layer1.{ending}"].shape[0]
        z_dim = state["fc_mu.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"{path} is not an encoder's state dict: {error.args[0]} is missing") from None
    norm = "none" if not normed else "batch" if "layer1.1.running_mean" in state else "instance"
    return dict(ngf=ngf, z_dim=z_dim, norm=(SPECTRAL if spectral else "") + norm)


def _strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in state.items()}
