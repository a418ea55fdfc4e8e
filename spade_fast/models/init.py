# SPDX-License-Identifier: Apache-2.0
"""Weight initialization and parameter counts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from spade_fast.layers.spectral import EPS, SpectralConv2d

INITS = ("released", "glorot")


def init_weights(net: nn.Module, init: str = "released", gain: float = 0.02) -> None:
    """Draws the weights of a generator, discriminator or encoder anew, in place.

    Glorot-normal weights (Park et al., CVPR 2019, section 4) have the standard deviation
    gain·sqrt(2 / (fan_in + fan_out)). Biases become zero. The scales of affine batch norms are normal with mean 1 and
    standard deviation gain, as the authors draw them.

    ``released`` is how the networks behind the released weights started. On a GPU, the authors' Glorot draw misses
    spectrally normalized convolutions: it lands on the normalized weight, which every forward computes anew. Their
    ``weight_orig`` keeps torch's default, uniform in ±1 / sqrt(fan_in). Their u and v are random unit vectors, and the
    first training forwards turn them to the largest singular value. All other convolutions and linear layers are
    Glorot-normal. The network's function does not depend on the scale of ``weight_orig``, but Adam's step in it does.

    ``glorot`` is what the paper says: every layer is Glorot-normal. Spectral norms are estimated at once.

    Args:
        net: the network.
        init: one of INITS.
        gain: factor of the Glorot-normal weights; the authors take 0.02.

    Raises:
        ValueError: init is unknown.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, gain)
            nn.init.zeros_(module.bias)
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if not isinstance(module, SpectralConv2d):
            nn.init.xavier_normal_(module.weight, gain=gain)
        elif init == "glorot":
            nn.init.xavier_normal_(module.weight_orig, gain=gain)
            module.settle()
        else:
            nn.init.kaiming_uniform_(module.weight_orig, a=math.sqrt(5))  # torch's default for convolutions
            with torch.no_grad():
                for vector in (module.weight_u, module.weight_v):
                    vector.copy_(F.normalize(torch.randn_like(vector), dim=0, eps=EPS))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def count_parameters(net: nn.Module) -> int:
    """Number of trainable values of a network."""
    return sum(p.numel() for p in net.parameters())
