# SPDX-License-Identifier: Apache-2.0
"""Weight initialisation and parameter counts."""

from __future__ import annotations

from torch import nn

from spade_fast.spectral import SpectralConv2d


def init_weights(net: nn.Module, gain: float = 0.02) -> None:
    """Glorot-normal weights (paper, section 4) with the authors' gain of 0.02 and zero biases, in place; spectral
    norms are estimated anew."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight_orig if isinstance(module, SpectralConv2d) else module.weight
            nn.init.xavier_normal_(weight, gain=gain)
            if isinstance(module, SpectralConv2d):
                module.settle()
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def count_parameters(net: nn.Module) -> int:
    """Number of trainable values of a network."""
    return sum(p.numel() for p in net.parameters())
