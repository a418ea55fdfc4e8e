# SPDX-License-Identifier: Apache-2.0
"""Small stand-ins of the SPADE layers of public models, from published facts, each with the fixture it meets."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "fixtures"))
import rule

from standins.others import MONAISPADE, CoCosNetSPADE, ImaginaireNorm, MobileSPADE, MONAIBlock, SIGEFusedSPADE
from standins.plain import (
    CLADESPADE,
    OASISSPADE,
    SEANACE,
    SEANSPADE,
    SPADE,
    HiFaceGANSPADE,
    LivePortraitBlock,
    StableSRSPADE,
)

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


@dataclass
class StandIn:
    name: str
    build: Callable[[], nn.Module]
    fixture: str | None = None
    fused: int = 1  # how many layers fuse() takes


def _group():
    return nn.GroupNorm(4, 8, affine=False)


STANDINS = [
    StandIn("NVlabs", lambda: SPADE(6, 5), "layer_spadesyncbatch3x3"),
    StandIn("NVlabs 5x5", lambda: SPADE(6, 5, kernel_size=5), "layer_spadebatch5x5"),
    StandIn("NVlabs 1x1", lambda: SPADE(6, 5, kernel_size=1), "layer_spadesyncbatch1x1"),
    StandIn("NVlabs instance", lambda: SPADE(6, 5, "instance"), "layer_spadeinstance3x3"),
    StandIn("LivePortrait", lambda: SPADE(6, 5, "instance"), "layer_liveportrait_spade"),
    StandIn("LivePortrait block", lambda: LivePortraitBlock(6, 4, 5), "layer_liveportrait_resblock", 3),
    StandIn("GAN Compression", lambda: SPADE(6, 5), "layer_gancompression_spade"),
    StandIn("ASAPNet", lambda: SPADE(6, 5), "layer_asapnet_spade"),
    StandIn("ASAPNet slim", lambda: SPADE(6, 5, hidden=16), "layer_asapnet_slim_spade"),
    StandIn("CLADE", lambda: CLADESPADE(6, 5)),
    StandIn("OASIS", lambda: OASISSPADE(6, 5), "layer_oasis_spade_syncbatch"),
    StandIn("imaginaire", lambda: ImaginaireNorm(6, 5)),
    StandIn("imaginaire plain", lambda: ImaginaireNorm(6, 5, 3, spectral=False, affine=False)),
    StandIn("StableSR", lambda: StableSRSPADE(32, 5), "layer_stablesr_spade"),
    StandIn("StableSR 64", lambda: StableSRSPADE(64, 5), "layer_stablesr_spade_64"),
    StandIn("HiFaceGAN", lambda: HiFaceGANSPADE(6, 5), "layer_hifacegan_spade"),
    StandIn("HiFaceGAN instance", lambda: HiFaceGANSPADE(6, 5, "instance"), "layer_hifacegan_spade_instance"),
    StandIn("SEAN", lambda: SEANSPADE(6, 5), "layer_sean_spade"),
    StandIn("SEAN ACE", lambda: SEANACE(6, 5), "layer_sean_ace_without_style"),
    StandIn("MobileSPADE", lambda: MobileSPADE(6, 5), "layer_gancompression_mobile_spade"),
    StandIn("MONAI", lambda: MONAISPADE(5, 6, hidden=16), "layer_monai_spade"),
    StandIn("MONAI batch", lambda: MONAISPADE(5, 6, 2, 16, nn.BatchNorm2d(6, affine=False)), "layer_monai_spade_batch"),
    StandIn("MONAI group", lambda: MONAISPADE(5, 8, 2, 16, _group()), "layer_monai_spade_group"),
    StandIn("MONAI block", lambda: MONAIBlock(6, 4, 5, 16), "layer_monai_resblock", 3),
    StandIn("CoCosNet", lambda: CoCosNetSPADE(6, 5), "layer_cocosnet_spade"),
    StandIn("CoCosNet PONO", lambda: CoCosNetSPADE(6, 5, True), "layer_cocosnet_spade_pono"),
    StandIn("CoCosNet similarity", lambda: CoCosNetSPADE(6, 5), "layer_cocosnet_spade_similarity"),
    StandIn(
        "MobileSPADE instance", lambda: MobileSPADE(6, 5, norm="instance"), "layer_gancompression_mobile_spade_instance"
    ),
    StandIn("SubMobileSPADE", lambda: MobileSPADE(6, 5, norm="instance"), "layer_gancompression_sub_mobile_spade"),
    # Left, by name.
    StandIn("SIGE", lambda: SIGEFusedSPADE(6, 5), None, 0),
    StandIn("MONAI 3-D", lambda: MONAISPADE(3, 4, 3, 8), "layer_monai_spade_3d", 0),
    StandIn("MONAI 1-D", lambda: MONAISPADE(5, 6, 1, 8), None, 0),
]


def load(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


def filled(standin, fixture, dtype):
    """The stand-in with the fixture's weights, loaded strictly by its keys."""
    model = standin.build().to(dtype)
    state = rule.fill(fixture["keys"], fixture["base"], fixture["gain"])
    model.load_state_dict({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, strict=True)
    return model


def arguments(standin, fixture, kind, dtype):
    """What the layer is called with: the fixture's activations, and its one-hot or real map."""
    inputs = {e["name"]: rule.make(**e) for e in fixture["inputs"]}
    if kind == "onehot":
        entry = next(e for e in fixture["inputs"] if e["name"] == "label")
        labels = F.one_hot(inputs["label"], entry["classes"]).movedim(-1, 1).to(dtype)
    else:
        labels = inputs["seg"].to(dtype)
    x = inputs["x"].to(dtype)
    if standin.name == "SEAN":
        return (labels,)
    if standin.name.startswith("StableSR"):
        return x, {str(x.shape[-1]): labels}
    if "similarity" in inputs:
        return x, labels, inputs["similarity"].to(dtype)
    return x, labels


def run(model, standin, fixture, output, dtype):
    """{name: tensor} of the fixture's outputs "mode_kind_name" that share a mode and a kind."""
    mode, kind = output
    model.train(mode == "train")
    for module in model.modules():
        if isinstance(module, SEANACE):
            entry = next(e for e in fixture["inputs"] if e["name"] == "noise")
            module.noise = rule.make(**entry).to(dtype)
    out = model(*arguments(standin, fixture, kind, dtype))
    return {"gamma": out[0], "beta": out[1]} if isinstance(out, tuple) else {"out": out}


def difference(tensors, fixture, output):
    """The largest difference from the fixture's probes, relative to the largest probed value."""
    worst = 0.0
    for name, tensor in tensors.items():
        want, got = fixture["outputs"]["_".join((*output, name))], rule.probe(tensor)
        assert got["shape"] == want["shape"] and got["index"] == want["index"]
        largest = max(abs(v) for v in want["value"])
        worst = max(worst, *(abs(a - b) / largest for a, b in zip(got["value"], want["value"], strict=True)))
    return worst


def modes(fixture):
    """The distinct (mode, kind) of a fixture's outputs."""
    return sorted({tuple(key.split("_")[:2]) for key in fixture["outputs"]})
