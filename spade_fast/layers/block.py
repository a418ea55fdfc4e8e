# SPDX-License-Identifier: Apache-2.0
"""The SPADE residual block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast import reference
from spade_fast.labels.label_map import LabelMap
from spade_fast.layers.as_built import changed, torch_only
from spade_fast.layers.plain import SLOPE
from spade_fast.layers.spade import FusedSPADE, modulate
from spade_fast.layers.spectral import Recompute, SpectralConv2d


class SPADEResnetBlock(nn.Module):
    """SPADE residual block (Park et al., CVPR 2019, Figure 4a): twice SPADE, LeakyReLU and a convolution.

    The shortcut is learned when the number of channels changes, and the identity otherwise.

    Args:
        fin, fout: channels in and out.
        label_nc: channels of the segmentation map.
        norm, kernel_size: see :class:`spade_fast.reference.SPADE`.
        spade: ``fused`` for :class:`FusedSPADE`, ``reference`` for the plain layer.
        spectral_norm: whether the convolutions are spectrally normalized.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        fin: int,
        fout: int,
        label_nc: int,
        norm: str = "syncbatch",
        kernel_size: int = 3,
        spade: str = "fused",
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        kinds = {"fused": FusedSPADE, "reference": reference.SPADE}
        if spade not in kinds:
            raise ValueError(f"spade must be one of {', '.join(kinds)}, got {spade!r}")
        self.fused = spade == "fused"
        layer, convolution = kinds[spade], SpectralConv2d if spectral_norm else nn.Conv2d
        middle = min(fin, fout)
        self.conv_0 = convolution(fin, middle, 3, padding=1)
        self.conv_1 = convolution(middle, fout, 3, padding=1)
        self.norm_0 = layer(fin, label_nc, norm, kernel_size)
        self.norm_1 = layer(middle, label_nc, norm, kernel_size)
        self.learned_shortcut = fin != fout
        if self.learned_shortcut:
            self.conv_s = convolution(fin, fout, 1, bias=False)
            self.norm_s = layer(fin, label_nc, norm, kernel_size)

    def forward(self, x: Tensor, segmap: LabelMap | Tensor, upsample: int = 1) -> Tensor:
        """The block on x enlarged ``upsample`` times by nearest neighbor.

        Args:
            x: [N, fin, h, w].
            segmap: a map [N, label_nc, ·, ·]. Fused layers take a :class:`spade_fast.LabelMap`, too.
            upsample: 1 or 2.

        Returns:
            [N, fout, h·upsample, w·upsample].
        """
        norms = [self.norm_0, self.norm_1, *([self.norm_s] if self.learned_shortcut else [])]
        if torch_only() or any(changed(norm, FusedSPADE) is not None for norm in norms):
            return self._forward_plain(x, segmap, upsample)
        if self.learned_shortcut:
            outs, again = modulate(x, segmap, [self.norm_0, self.norm_s], [SLOPE, None], upsample)
            shortcut = _convolve(self.conv_s, outs[1], again[1])
        else:
            outs, again = modulate(x, segmap, [self.norm_0], [SLOPE], upsample)
        out = _convolve(self.conv_0, outs[0], again[0])
        outs, again = modulate(out, segmap, [self.norm_1], [SLOPE])
        out = _convolve(self.conv_1, outs[0], again[0])
        if changed(self.conv_1, SpectralConv2d) is not None:  # something else may hold conv_1's output
            out = out.clone()
        return out.add_(shortcut) if self.learned_shortcut else _add_enlarged(out, x, upsample)

    def _forward_plain(self, x: Tensor, segmap: LabelMap | Tensor, upsample: int) -> Tensor:
        if upsample != 1:
            x = F.interpolate(x, scale_factor=float(upsample), mode="nearest")
        shortcut = self.conv_s(self.norm_s(x, segmap)) if self.learned_shortcut else x
        out = self.conv_0(F.leaky_relu(self.norm_0(x, segmap), SLOPE))
        out = self.conv_1(F.leaky_relu(self.norm_1(out, segmap), SLOPE))
        return shortcut + out


def _convolve(convolution: nn.Module, x: Tensor, recompute: Recompute | None) -> Tensor:
    if recompute is None or changed(convolution, SpectralConv2d) is not None:
        return convolution(x)
    return convolution(x, recompute)


def _add_enlarged(out: Tensor, x: Tensor, upsample: int) -> Tensor:
    """out + x enlarged by nearest neighbor. The enlarged x is not built."""
    if upsample == 1:
        return out.add_(x)
    h, w = x.shape[2:]
    cells = out.unflatten(3, (w, upsample)).unflatten(2, (h, upsample))
    return (cells + x[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)
