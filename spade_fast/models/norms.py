# SPDX-License-Identifier: Apache-2.0
"""Norms by the names of the authors' options: norm_G of the generator, norm_D of the discriminator, norm_E of the
encoder."""

from __future__ import annotations

import re

from torch import nn

from spade_fast.layers.spectral import SpectralConv2d, has_spectral_norm
from spade_fast.reference import InstanceNorm2d, check_layer_options

SPECTRAL = "spectral"
# The norms of the discriminator and of the encoder.
CONV_NORMS = tuple(prefix + norm for prefix in (SPECTRAL, "") for norm in ("instance", "batch", "syncbatch", "none"))


def conv_norm(name: str) -> tuple[bool, str]:
    """(whether convolutions are spectrally normalized, the norm after them) of a norm_D or norm_E.

    Examples:
        >>> conv_norm("spectralinstance")
        (True, 'instance')

    Args:
        name: one of CONV_NORMS. ``spectral`` alone is ``spectralnone``, and ``sync_batch`` is ``syncbatch``.

    Raises:
        ValueError: name is unknown.
    """
    known = name.replace("sync_batch", "syncbatch")
    known = known + "none" if known == SPECTRAL else known
    if known not in CONV_NORMS:
        raise ValueError(f"norm must be one of {', '.join(CONV_NORMS)}, got {name!r}")
    return known.startswith(SPECTRAL), known.removeprefix(SPECTRAL)


def current_norm(name: str, network: nn.Module) -> str:
    """The norm_D or norm_E that a network has now.

    It is without ``spectral`` once ``torch.nn.utils.remove_spectral_norm`` was called on the network's convolutions.

    Args:
        name: the norm with which the network was built.
        network: the network.
    """
    spectral, norm = conv_norm(name)
    return norm if spectral and not has_spectral_norm(network) else name


def norm_g_options(norm_g: str) -> dict[str, str | int | bool]:
    """Options of :class:`spade_fast.models.SPADEGenerator` for a norm_G of the authors' code.

    Examples:
        >>> norm_g_options("spectralspadesyncbatch3x3")
        {'norm': 'syncbatch', 'kernel_size': 3, 'spectral_norm': True}

    Args:
        norm_g: such as ``spectralspadesyncbatch3x3`` or ``spadeinstance5x5``. It is ``spectral`` for spectral norm,
            then ``spade``, then the norm of SPADE, then its kernel.

    Returns:
        norm, kernel_size and spectral_norm.

    Raises:
        ValueError: norm_g has another form, or its norm or kernel is unknown.
    """
    found = re.fullmatch(r"spade([a-z]+)(\d)x\2", norm_g.replace(SPECTRAL, ""))
    if found is None:
        raise ValueError(f"norm_G must be like 'spectralspadesyncbatch3x3' or 'spadeinstance5x5', got {norm_g!r}")
    norm, kernel_size = found[1], int(found[2])
    try:
        check_layer_options(norm, kernel_size)
    except ValueError as error:
        raise ValueError(f"norm_G {norm_g!r}: {error}") from None
    return {"norm": norm, "kernel_size": kernel_size, "spectral_norm": SPECTRAL in norm_g}


def normalized_conv(fin: int, fout: int, kernel_size: int, stride: int, padding: int, norm: str) -> nn.Module:
    """A convolution and the norm after it; without a norm, the convolution alone, with a bias.

    Batch norm learns a scale and a shift.

    Args:
        fin, fout: channels in and out.
        kernel_size, stride, padding: of the convolution, in pixels.
        norm: one of CONV_NORMS.

    Raises:
        ValueError: norm is unknown.
    """
    spectral, norm = conv_norm(norm)
    kind = SpectralConv2d if spectral else nn.Conv2d
    conv = kind(fin, fout, kernel_size, stride=stride, padding=padding, bias=norm == "none")
    if norm == "none":
        return conv
    return nn.Sequential(conv, InstanceNorm2d(fout) if norm == "instance" else nn.BatchNorm2d(fout))
