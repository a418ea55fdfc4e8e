# SPDX-License-Identifier: Apache-2.0
"""The numbers of the authors' code in fixtures/, and their options in ours."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from fixtures.rule import fill, make, probe
from torch import Tensor, nn

from spade_fast import LabelMap
from spade_fast.data.transforms import instances_to_edges
from spade_fast.models import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator, count_parameters, norm_g_options

FOLDER = Path(__file__).parents[1] / "fixtures"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest probed value
GAN_MODES = {"ls": "lsgan"}  # the others have the same name


def names(pattern: str) -> list[str]:
    """The fixtures of a kind."""
    found = sorted(path.stem for path in FOLDER.glob(f"{pattern}.json"))
    assert found, pattern
    return found


@functools.lru_cache(maxsize=1)  # a file's tests follow each other
def load(name: str) -> dict[str, Any]:
    """A fixture, its inputs made: {"options", "outputs", ..., "inputs": {name: Tensor}}."""
    fixture = json.loads((FOLDER / f"{name}.json").read_text())
    fixture["inputs"] = {entry["name"]: make(**entry) for entry in fixture["inputs"]}
    return fixture


@functools.lru_cache(maxsize=4)
def weights(name: str, network: str | None = None) -> dict[str, Tensor]:
    """The state dict of a fixture's network, in float64."""
    described = load(name) if network is None else load(name)["networks"][network]
    return fill(described["keys"], described["base"], described["gain"])


def prepared(net: nn.Module, name: str, dtype: torch.dtype, network: str | None = None) -> nn.Module:
    """The network with the fixture's weights; names, shapes and number of its parameters are the fixture's."""
    described = load(name) if network is None else load(name)["networks"][network]
    assert count_parameters(net) == described["parameters"]
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == dict(described["keys"])
    net = net.to(dtype)
    net.load_state_dict(weights(name, network))
    return net


def num_classes(options: dict) -> int:
    return options["label_nc"] + options["contain_dontcare_label"]


def label_nc(options: dict) -> int:
    return num_classes(options) + (not options["no_instance"])


def generator(options: dict, spade: str = "fused") -> SPADEGenerator:
    """netG of the authors' options."""
    assert label_nc(options) == options["semantic_nc"]
    return SPADEGenerator(
        label_nc(options),
        ngf=options["ngf"],
        crop_size=options["crop_size"],
        aspect_ratio=options["aspect_ratio"],
        num_upsampling_layers=options["num_upsampling_layers"],
        z_dim=options["z_dim"] if options["use_vae"] else None,
        spade=spade,
        **norm_g_options(options["norm_G"]),
    )


def discriminator(options: dict) -> MultiscaleDiscriminator:
    """netD of the authors' options."""
    return MultiscaleDiscriminator(
        label_nc(options),
        image_nc=options["output_nc"],
        ndf=options["ndf"],
        n_layers=options["n_layers_D"],
        num_d=options["num_D"],
        norm=options["norm_D"],
    )


def encoder(options: dict) -> ConvEncoder:
    """netE of the authors' options."""
    return ConvEncoder(ngf=options["ngf"], z_dim=options.get("z_dim", 256), norm=options["norm_E"])


def edges(instance: Tensor) -> Tensor:
    """[N, H, W] bool: the edges of instance ids [N, 1, H, W]."""
    return torch.stack([torch.from_numpy(instances_to_edges(ids.numpy())) for ids in instance[:, 0]])


def label_map(fixture: dict) -> LabelMap:
    """The networks' conditioning from a fixture's labels and instances."""
    options, inputs = fixture["options"], fixture["inputs"]
    where = None if options["no_instance"] else edges(inputs["instance"])
    return LabelMap(inputs["label"][:, 0], num_classes(options), where)


def check(got: Tensor, want: dict, tolerance: float, what: str = "") -> None:
    """A tensor against its probe."""
    found = probe(got)
    assert found["shape"] == want["shape"], what
    assert found["index"] == want["index"], what
    scale = max(abs(v) for v in want["value"])
    pairs = zip(
        [found["mean"], found["std"], *found["value"]], [want["mean"], want["std"], *want["value"]], strict=True
    )
    for a, b in pairs:  # a NaN fails
        assert abs(a - b) <= tolerance * scale, f"{what}: {a} is not {b}, {abs(a - b) / scale:.3g} off"


def check_sums(got: dict[str, Tensor], want: dict[str, list[float]], tolerance: float, floor: float = 0.0) -> None:
    """Tensors by name against [sum, 2-norm] of each (in either order), to `tolerance` of the larger of both or of
    `floor`."""
    for name, values in want.items():
        flat = got[name].detach().double()
        scale = max(floor, *map(abs, values))
        for a, b in zip((flat.sum().item(), flat.norm().item()), values, strict=True):
            assert abs(a - b) <= tolerance * scale, f"{name}: {a} is not {b}"
