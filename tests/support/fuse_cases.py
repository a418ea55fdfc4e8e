# SPDX-License-Identifier: Apache-2.0
"""What the tests of fuse() share."""

import pytest
import torch
import torch.nn.functional as F
from standins import STANDINS
from torch import nn

from spade_fast.fusion.forward import FusedForward

FUSED = [s for s in STANDINS if s.fused]


LEFT = [s for s in STANDINS if not s.fused]


WITH_FIXTURE = [s for s in FUSED if s.fixture]


def named(items):
    return pytest.mark.parametrize("standin", items, ids=[s.name for s in items])


def by_width(x, maps, size=None):
    return x, maps[str(x.shape[-1])]


def plain(name="NVlabs", dtype=torch.float64):
    """A stand-in with weights at which every term matters, a one-hot map, and activations."""
    torch.manual_seed(0)
    model = next(s for s in STANDINS if s.name == name).build().to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    ids = torch.randint(5, (2, 6, 5)).repeat_interleave(3, 1).repeat_interleave(3, 2)
    return model, torch.randn(2, 6, 9, 8, dtype=dtype), F.one_hot(ids, 5).movedim(-1, 1).to(dtype)


class Network(nn.Module):
    """Two layers on the same map."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.second = layer(), layer()

    def forward(self, x, labels):
        return self.second(F.relu(self.first(x, labels)), labels)


def ran_fused(model, *args):
    """Whether some fused layer's own function ran in model(*args)."""
    ran = []
    layers = [m.forward for m in model.modules() if isinstance(m.__dict__.get("forward"), FusedForward)]
    for layer in layers:
        layer.compute = lambda *a, layer=layer: (ran.append(1), FusedForward.compute(layer, *a))[1]
    try:
        model(*args)
    finally:
        for layer in layers:
            del layer.compute
    return bool(ran)
