# SPDX-License-Identifier: Apache-2.0
"""The state dicts that the SPADE authors released: which network each is of, and what files of old torch lack.

A released file holds tensors alone. Their shapes tell most options of the network. The rest is named by a preset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.layers.spectral import EPS
from spade_fast.models.norms import SPECTRAL

# Names of the convolutions that have spectral norm where their network has it.
GENERATOR_CONVOLUTIONS = r"\w+\.conv_[01s]"
ENCODER_CONVOLUTIONS = r"layer\d(?:\.0)?"


@dataclass(frozen=True)
class Preset:
    """The network of a released generator (paper, section 4 and appendix A; options of the authors' test command).

    Args:
        label_nc: channels of its label map, without and with instance edges.
        crop_size: width of its images in pixels.
        aspect_ratio: width / height of its images.
        num_upsampling_layers: ``normal`` (5 doublings) or ``more`` (6).
    """

    label_nc: tuple[int, ...]
    crop_size: int
    aspect_ratio: float
    num_upsampling_layers: str
    norm: str = "syncbatch"
    kernel_size: int = 3

    def options(self) -> dict[str, Any]:
        """What it fixes among the options of :class:`SPADEGenerator`, but for label_nc."""
        return {
            "crop_size": self.crop_size,
            "aspect_ratio": self.aspect_ratio,
            "num_upsampling_layers": self.num_upsampling_layers,
            "norm": self.norm,
            "kernel_size": self.kernel_size,
        }


PRESETS = {
    "coco": Preset((183, 184), 256, 1.0, "normal"),
    "ade20k": Preset((151,), 256, 1.0, "normal"),
    "cityscapes": Preset((35, 36), 512, 2.0, "more"),
}


def check_preset(name: str, known: Mapping[str, Any], overrides: Mapping[str, Any]) -> Preset:
    """The preset of a name, if it contradicts nothing.

    Args:
        name: one of PRESETS.
        known: options of the generator that its file tells.
        overrides: options that the caller gives.

    Raises:
        ValueError: the preset contradicts the file or the caller. The message, which follows the name of the file,
            names the option and both values.
    """
    preset = PRESETS[name]
    if "label_nc" in known and known["label_nc"] not in preset.label_nc:
        wanted = " or ".join(map(str, preset.label_nc))
        raise ValueError(f"does not fit preset {name!r}: it is for label_nc {wanted}, the file has {known['label_nc']}")
    for option, value in preset.options().items():
        if option in known and known[option] != value:
            raise ValueError(
                f"does not fit preset {name!r}: it is for {option} {value!r}, the file has {known[option]!r}"
            )
        if overrides.get(option) not in (None, value):
            raise ValueError(
                f"cannot have both preset {name!r}, which is for {option} {value!r}, and {option} "
                f"{overrides[option]!r}: leave one out"
            )
    return preset


def is_state_dict(loaded: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether what a file holds is tensors by name, and nothing else."""
    return isinstance(loaded, Mapping) and bool(loaded) and all(isinstance(v, Tensor) for v in loaded.values())


def strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that they have without DataParallel."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def complete_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that loads strictly: adds what files of old torch versions lack, and drops what they have too much.

    Spectral norm: a missing ``weight_v`` is computed from ``weight_u``. If the divided weight was saved too, v makes
    weight_orig / (uᵀ W v) equal to it. Otherwise v is one half step of the power iteration. Batch norm:
    ``num_batches_tracked`` becomes 0.
    """
    state = strip(state)
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


def known_generator_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of :class:`SPADEGenerator` that the tensors of a bare state dict tell.

    Raises:
        ValueError: it is not a SPADE generator's, or mixes convolutions with and without spectral norm.
    """
    try:
        shared = state["head_0.norm_0.mlp_shared.0.weight"]
        spectral_norm = has_spectral_norm(state, GENERATOR_CONVOLUTIONS)
        width = state[f"head_0.conv_0.weight{'_orig' if spectral_norm else ''}"].shape[0]
        fc = state["fc.weight"]
    except KeyError as error:
        raise ValueError(f"is not a SPADE generator's state dict: {error.args[0]} is missing") from None
    options: dict[str, Any] = dict(
        label_nc=shared.shape[1],
        ngf=width // 16,
        kernel_size=shared.shape[2],
        z_dim=None if fc.ndim == 4 else fc.shape[1],
        spectral_norm=spectral_norm,
    )
    if "head_0.norm_0.param_free_norm.running_mean" in state:
        options["norm"] = "syncbatch"
    if any(name.startswith("up_4.") for name in state):
        options["num_upsampling_layers"] = "most"
    return options


def generator_options(state: Mapping[str, Tensor], preset: str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the generator that a bare state dict is of.

    Args:
        state: the tensors, without DataParallel's prefix.
        preset: a name of PRESETS, or None.
        overrides: options that the caller gives; None stands for not given.

    Raises:
        ValueError: it is no generator's, the preset contradicts it, or an option is missing that the tensors do not
            tell. Names each.
    """
    known = known_generator_options(state)
    options = {**known, **{name: value for name, value in overrides.items() if value is not None}}
    if preset is not None:
        return {**check_preset(preset, known, overrides).options(), **options}
    needed = {
        "crop_size": "the width of the images it was trained on",
        "norm": "'instance' or 'none'",
        "num_upsampling_layers": "'normal' or 'more'",
    }
    if options["label_nc"] in PRESETS["cityscapes"].label_nc:
        needed["aspect_ratio"] = "width / height; its labels look like Cityscapes', which is 2"
    missing = [f"{name} ({what})" for name, what in needed.items() if name not in options]
    if missing:
        fitting = [name for name, of in PRESETS.items() if known["label_nc"] in of.label_nc]
        hint = f"; if these are the authors' weights, preset={fitting[0]!r} (--preset {fitting[0]})" if fitting else ""
        raise ValueError(
            f"is a bare state dict, whose tensors do not tell {', '.join(missing)}: pass it as an argument{hint}"
        )
    return options


def encoder_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of the :class:`ConvEncoder` that a bare state dict is of.

    Raises:
        ValueError: it is not an encoder's, or mixes convolutions with and without spectral norm.
    """
    spectral = has_spectral_norm(state, ENCODER_CONVOLUTIONS)
    ending = "weight_orig" if spectral else "weight"
    normed = f"layer1.{ending}" not in state
    try:
        ngf = state[f"layer1.0.{ending}" if normed else f"layer1.{ending}"].shape[0]
        z_dim = state["fc_mu.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"is not an encoder's state dict: {error.args[0]} is missing") from None
    norm = "none" if not normed else "batch" if "layer1.1.running_mean" in state else "instance"
    return dict(ngf=ngf, z_dim=z_dim, norm=(SPECTRAL if spectral else "") + norm)


def has_spectral_norm(state: Mapping[str, Tensor], convolutions: str) -> bool:
    """Whether convolutions of a state dict have spectral norm.

    Args:
        state: tensors by name.
        convolutions: a regular expression for the names of the convolutions that could have it.

    Raises:
        ValueError: some are and some are not.
    """
    kinds: dict[bool, str] = {}
    for name in state:
        found = re.fullmatch(rf"({convolutions})\.weight(_orig)?", name)
        if found is not None and (found[2] or name + "_orig" not in state):  # old files hold the divided weight too
            kinds.setdefault(found[2] is not None, name)
    if len(kinds) == 2:
        raise ValueError(
            f"mixes convolutions with spectral norm ({kinds[True]}) and without ({kinds[False]}): it must be in "
            "all or in none"
        )
    return kinds.get(True) is not None
