# SPDX-License-Identifier: Apache-2.0
"""Norms by the names that the authors' options give them: norm_G of the generator, norm_D and norm_E of the others."""

from __future__ import annotations

import re

from torch import nn

from spade_fast.layers.spectral import SpectralConv2d, has_spectral_norm
from spade_fast.reference import InstanceNorm2d, check_layer_options

SPECTRAL = "spectral"
# Of the discriminator and the encoder.
CONV_NORMS = tuple(prefix + norm for prefix in (SPECTRAL, "") for norm in ("instance", "batch", "syncbatch", "none"))


def conv_norm(name: str) -> tuple[bool, str]:
    """(whether convolutions are spectrally normalized, the norm after them) of a norm_D or norm_E.

    Args:
        name: one of CONV_NORMS; ``spectral`` alone is ``spectralnone``, and ``sync_batch`` is ``syncbatch``.

    Raises:
        ValueError: name is none of them.
    """
    known = name.replace("sync_batch", "syncbatch")
    known = known + "none" if known == SPECTRAL else known
    if known not in CONV_NORMS:
        raise ValueError(f"norm must be one of {', '.join(CONV_NORMS)}, got {name!r}")
    return known.startswith(SPECTRAL), known.removeprefix(SPECTRAL)


def current_norm(name: str, network: nn.Module) -> str:
    """A norm_D or norm_E of a network as it now is: without ``spectral`` once ``torch.nn.utils.remove_spectral_norm``
    was called on its convolutions."""
    spectral, norm = conv_norm(name)
    return norm if spectral and not has_spectral_norm(network) else name


def norm_g_options(norm_g: str) -> dict[str, str | int | bool]:
    """Options of :class:`spade_fast.models.SPADEGenerator` for a norm_G of the authors' code.

    Args:
        norm_g: as ``spectralspadesyncbatch3x3`` or ``spadeinstance5x5``: ``spectral`` for spectral norm, ``spade``, its
            norm, its kernel.

    Returns:
        norm, kernel_size and spectral_norm.

    Raises:
        ValueError: norm_g is no such name, or its norm or kernel is none that SPADE has.
    """
    found = re.fullmatch(r"spade([a-z]+)(\d)x\2", norm_g.replace(SPECTRAL, ""))
    if found is None:
        raise ValueError(f"norm_G must be like 'spectralspadesyncbatch3x3' or 'spadeinstance5x5', got {norm_g!r}")
    options = {"norm": found[1], "kernel_size": int(found[2])}
    try:
        check_layer_options(**options)
    except ValueError as error:
        raise ValueError(f"norm_G {norm_g!r}: {error}") from None
    return {**options, "spectral_norm": SPECTRAL in norm_g}


def normalized_conv(fin: int, fout: int, kernel_size: int, stride: int, padding: int, norm: str) -> nn.Module:
    """A convolution and the norm after it. Without a norm it is the convolution alone, with a bias; batch norm
    learns a scale and a shift."""
    spectral, norm = conv_norm(norm)
    kind = SpectralConv2d if spectral else nn.Conv2d
    conv = kind(fin, fout, kernel_size, stride=stride, padding=padding, bias=norm == "none")
    if norm == "none":
        return conv
    return nn.Sequential(conv, InstanceNorm2d(fout) if norm == "instance" else nn.BatchNorm2d(fout))
