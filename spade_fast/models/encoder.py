# SPDX-License-Identifier: Apache-2.0
"""The image encoder of the variational autoencoder (Park et al., CVPR 2019, Figure 15)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.layers.plain import SLOPE
from spade_fast.models.norms import current_norm, normalized_conv

INPUT_SIZE = 256


class ConvEncoder(nn.Module):
    """From an image to the mean and log-variance of its latent code (Park et al., CVPR 2019, Figure 15).

    Six normalized stride-2 convolutions with ngf, 2·, 4·, 8·, 8· and 8·ngf channels, then two linear layers.

    Examples:
        >>> mu, logvar = ConvEncoder(ngf=1, z_dim=8)(torch.zeros(2, 3, 64, 64))
        >>> mu.shape
        torch.Size([2, 8])

    Args:
        ngf: channels of the first layer.
        z_dim: size of the latent code.
        norm: the authors' norm_E, with the same values as norm of
            :class:`spade_fast.models.MultiscaleDiscriminator`.

    Raises:
        ValueError: norm is unknown.
    """

    def __init__(self, ngf: int = 64, z_dim: int = 256, norm: str = "spectralinstance") -> None:
        super().__init__()
        self._options: dict[str, Any] = dict(ngf=ngf, z_dim=z_dim, norm=norm)
        widths = [3, ngf, 2 * ngf, 4 * ngf, 8 * ngf, 8 * ngf, 8 * ngf]
        for i in range(1, 7):
            self.add_module(f"layer{i}", normalized_conv(widths[i - 1], widths[i], 3, 2, 1, norm))
        side = INPUT_SIZE // 2**6
        self.fc_mu = nn.Linear(widths[-1] * side * side, z_dim)
        self.fc_var = nn.Linear(widths[-1] * side * side, z_dim)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a network that this one's state dict fits.

        They are the arguments given, but norm is the current one, see :func:`spade_fast.models.norms.current_norm`.
        """
        return {**self._options, "norm": current_norm(self._options["norm"], self)}

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images.

        Args:
            image: [N, 3, H, W] in [-1, 1]; resized to 256×256 pixels by bilinear interpolation.

        Returns:
            (mu, logvar), each [N, z_dim].

        Raises:
            ValueError: image has another shape.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image must have shape [N, 3, H, W], got {list(image.shape)}")
        if image.shape[2:] != (INPUT_SIZE, INPUT_SIZE):
            image = F.interpolate(image, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear")
        x = self.get_submodule("layer1")(image)
        for i in range(2, 7):
            x = self.get_submodule(f"layer{i}")(F.leaky_relu(x, SLOPE))
        x = F.leaky_relu(x, SLOPE).flatten(1)
        return self.fc_mu(x), self.fc_var(x)


def reparameterize(mu: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
    """Samples z ~ N(mu, exp(logvar)), differentiably (Kingma and Welling, ICLR 2014).

    Args:
        mu, logvar: [N, z_dim].
        noise: [N, z_dim], standard normal; drawn if None.

    Returns:
        z [N, z_dim].
    """
    noise = torch.randn_like(mu) if noise is None else noise
    return mu + noise * torch.exp(0.5 * logvar)
