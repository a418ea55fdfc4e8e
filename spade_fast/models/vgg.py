# SPDX-License-Identifier: Apache-2.0
"""VGG19 features for the perceptual loss, loading weights in torchvision's format without torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.files import load_tensors

URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"  # the name ends with the first digits of its SHA-256
# (index in torchvision's `features`, channels) of every convolution up to relu5_1. A pool precedes each group but the
# first.
GROUPS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256), (16, 256)),
    ((19, 512), (21, 512), (23, 512), (25, 512)),
    ((28, 512),),
)


class VGGWeightsError(RuntimeError):
    """VGG19 weights cannot be read from a file or downloaded."""


class VGG19Features(nn.Module):
    """VGG19 (Simonyan and Zisserman, ICLR 2015) up to relu5_1.

    Parameters have torchvision's names, ``features.N.weight``, and are never trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        fin = 3
        for group in GROUPS:
            for index, channels in group:
                self.features[str(index)] = nn.Conv2d(fin, channels, 3, padding=1)
                fin = channels
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of images.

        The images are not normalized as for classification. The authors train with features of such input, and the
        weights of the loss belong to it.

        Args:
            image: [N, 3, H, W] in [-1, 1], H and W at least 16.

        Returns:
            relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1; number i is [N, 64·2^i (at most 512), H/2^i, W/2^i].
        """
        x, outputs = image, []
        for g, group in enumerate(GROUPS):
            if g:
                x = F.max_pool2d(x, 2)
            for i, (index, _) in enumerate(group):
                x = F.relu(self.features[str(index)](x), inplace=True)
                if i == 0:
                    outputs.append(x)
        return outputs


def load_vgg19(path: str | Path | None = None) -> VGG19Features:
    """VGG19 features with ImageNet weights.

    Args:
        path: a file in torchvision's format. None downloads it with torch.hub, which checks the hash.

    Raises:
        VGGWeightsError: the weights cannot be read or are others. The message says what to do.
    """
    ways = (
        f"Give a file in torchvision's format (vgg19-dcbb9e9d.pth) with --vgg-weights FILE, or let {URL} "
        "be downloaded, or train without the perceptual loss: --lambda-vgg 0."
    )
    state: object
    try:
        if path is None:
            state = torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True, weights_only=True)
        else:
            state = load_tensors(path)
    except Exception as error:  # of network, hash, file or format: what to do is the same
        source = "downloaded" if path is None else f"read from {path}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VGGWeightsError(f"VGG19 weights could not be {source} ({reason}). {ways}") from error
    net = VGG19Features()
    wanted = net.state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise VGGWeightsError(f"{path or URL} is not torchvision's VGG19: it holds no state dict of tensors. {ways}")
    missing = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
    if missing:
        raise VGGWeightsError(f"{path or URL} is not torchvision's VGG19: {missing[0]} is missing or misshapen. {ways}")
    net.load_state_dict({name: state[name] for name in wanted})
    return net.eval()
