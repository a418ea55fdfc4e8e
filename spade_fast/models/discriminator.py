# SPDX-License-Identifier: Apache-2.0
"""The multi-scale PatchGAN discriminator (Park et al., CVPR 2019, appendix A; Wang et al., CVPR 2018)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.labels.label_map import LabelMap
from spade_fast.layers.as_built import changed, changed_convolution, torch_only
from spade_fast.layers.patches import weight_table
from spade_fast.layers.plain import SLOPE
from spade_fast.models.norms import current_norm, normalized_conv
from spade_fast.ops.label_conv import label_conv
from spade_fast.reference import segmap_shape

PADDING = 2  # of every convolution, in pixels


class PatchDiscriminator(nn.Module):
    """A PatchGAN discriminator of one scale.

    It has 4×4 convolutions. The last two have stride 1, the others stride 2. The first and the last are not normalized.

    Args:
        input_nc: channels of map and image together.
        ndf: channels of the first layer.
        n_layers: layers before the prediction.
        norm: see :class:`MultiscaleDiscriminator`.
    """

    def __init__(self, input_nc: int, ndf: int, n_layers: int, norm: str) -> None:
        super().__init__()
        self.n_layers = n_layers
        self.model0 = nn.Sequential(nn.Conv2d(input_nc, ndf, 4, stride=2, padding=2), nn.LeakyReLU(SLOPE))
        width = ndf
        for i in range(1, n_layers):
            fin, width = width, min(2 * width, 512)
            stride = 1 if i == n_layers - 1 else 2
            layer = normalized_conv(fin, width, 4, stride, 2, norm)
            self.add_module(f"model{i}", nn.Sequential(layer, nn.LeakyReLU(SLOPE)))
        self.add_module(f"model{n_layers}", nn.Sequential(nn.Conv2d(width, 1, 4, stride=1, padding=2)))

    def first_convolution(self, labels: LabelMap | Tensor, image: Tensor, pooled: bool) -> Tensor:
        """The first convolution of (labels ⊕ image).

        Its label part is computed once for fake and real images. Of a LabelMap, it is a gather.

        Args:
            labels: N maps; a LabelMap of the full size, or a tensor of this scale's size.
            image: [M·N, image_nc, H, W] of this scale's size.
            pooled: whether this is the second scale, where the LabelMap's one-hot is average-pooled like the image.

        Returns:
            [M·N, ndf, h, w].
        """
        conv = self._first_layer()[0]
        assert isinstance(conv, nn.Conv2d)
        weight, label_nc = conv.weight, segmap_shape(labels)[1]
        image_part = F.conv2d(image, weight[:, label_nc:], None, conv.stride, conv.padding)
        if isinstance(labels, LabelMap):
            table, kernel_size = weight_table(weight[:, :label_nc]), weight.shape[-1]
            label_part = label_conv(labels.codes, table, conv.bias, labels.has_edges, kernel_size, 2, PADDING, pooled)
        else:
            label_part = F.conv2d(labels, weight[:, :label_nc], conv.bias, conv.stride, conv.padding)
        n = label_part.shape[0]
        return (image_part.unflatten(0, (-1, n)) + label_part).flatten(0, 1)

    def _first_layer(self) -> nn.Sequential:
        """The first convolution and its activation, once `_first_changed` has found them as built."""
        layer = self.model0
        assert isinstance(layer, nn.Sequential)
        return layer

    def _first_changed(self, input_nc: int) -> bool:
        """Whether the first layer is not as built, and must run through its own forward."""
        if changed(self.model0, nn.Sequential) is not None or len(self._first_layer()) != 2:
            return True
        conv = self._first_layer()[0]
        width = conv.out_channels if isinstance(conv, nn.Conv2d) else 0
        return changed_convolution(conv, input_nc, width, 4, stride=2, padding=PADDING) is not None

    def forward(self, labels: LabelMap | Tensor, image: Tensor, pooled: bool) -> list[Tensor]:
        """The n_layers feature maps and, last, the prediction. Arguments as in :meth:`first_convolution`."""
        if self._first_changed(segmap_shape(labels)[1] + image.shape[1]):
            x = self.model0(_joined(labels, image, pooled))
        else:
            x = self._first_layer()[1](self.first_convolution(labels, image, pooled))
        features = [x]
        for i in range(1, self.n_layers + 1):
            x = self.get_submodule(f"model{i}")(x)
            features.append(x)
        return features


class MultiscaleDiscriminator(nn.Module):
    """``num_d`` patch discriminators (Park et al., CVPR 2019, appendix A; Wang et al., CVPR 2018).

    Each takes input of half the size of the one before, by a 3×3 average pool with stride 2.

    Examples:
        >>> labels = LabelMap(torch.zeros(2, 64, 64, dtype=torch.uint8), num_classes=3)
        >>> scales = MultiscaleDiscriminator(label_nc=3, ndf=2)(labels, torch.zeros(2, 3, 64, 64))
        >>> [features[-1].shape for features in scales]
        [torch.Size([2, 1, 11, 11]), torch.Size([2, 1, 7, 7])]

    Args:
        label_nc: channels of the segmentation map, as for the generator.
        image_nc: channels of the image.
        ndf: channels of the first layer.
        n_layers: layers of each discriminator before its prediction.
        num_d: number of scales.
        norm: the authors' norm_D: ``instance``, ``batch``, ``syncbatch`` or ``none``, after ``spectral`` where
            convolutions are spectrally normalized. ``syncbatch`` is batch normalization. To take its statistics over
            several processes, convert the network with ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``.

    Raises:
        ValueError: norm is unknown.
    """

    def __init__(
        self,
        label_nc: int,
        image_nc: int = 3,
        ndf: int = 64,
        n_layers: int = 4,
        num_d: int = 2,
        norm: str = "spectralinstance",
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = dict(
            label_nc=label_nc, image_nc=image_nc, ndf=ndf, n_layers=n_layers, num_d=num_d, norm=norm
        )
        for i in range(num_d):
            self.add_module(f"discriminator_{i}", PatchDiscriminator(label_nc + image_nc, ndf, n_layers, norm))

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a network that this one's state dict fits.

        They are the arguments given, but norm is the current one, see :func:`spade_fast.models.norms.current_norm`.
        """
        return {**self._options, "norm": current_norm(self._options["norm"], self)}

    def forward(self, segmap: LabelMap | Tensor, image: Tensor | None = None) -> list[list[Tensor]]:
        """Features of every scale.

        Args:
            segmap: LabelMap or tensor [N, label_nc, H, W]. Without an image, it is one tensor of map and image
                [N, label_nc + image_nc, H, W], as the authors' trainer passes them.
            image: [M·N, image_nc, H, W]. Image i belongs to map i % N. With fake images and then real ones, M is 2, and
                all go through in one batch.

        Returns:
            For each scale, a list of features [M·N, ·, ·, ·] with the prediction last.

        Raises:
            ValueError: segmap or image has a wrong shape.
        """
        if image is None:
            segmap, image = self._parted(segmap)
        if isinstance(segmap, Tensor):
            segmap = segmap.to(image.dtype)
        elif torch_only():
            segmap = segmap.one_hot(image.dtype)
        n, label_nc, *size = segmap_shape(segmap)
        if label_nc != self._options["label_nc"]:
            want = self._options["label_nc"]
            raise ValueError(f"segmap must have {want} channels (label_nc={want}), got {label_nc}")
        image_nc = self._options["image_nc"]
        if image.ndim != 4 or image.shape[0] % n or list(image.shape[1:]) != [image_nc, *size]:
            want = f"[M·{n}, {image_nc}, {size[0]}, {size[1]}]"
            raise ValueError(f"image must have shape {want} to match segmap, got {list(image.shape)}")
        features = []
        for i in range(self._options["num_d"]):
            if i:
                image = _half(image)
                if i == 2 and isinstance(segmap, LabelMap):  # a pool of a pool is no gather of nine codes
                    segmap = _half(segmap.one_hot(image.dtype))
                if isinstance(segmap, Tensor):
                    segmap = _half(segmap)
            features.append(self.get_submodule(f"discriminator_{i}")(segmap, image, pooled=i == 1))
        return features

    def _parted(self, joined: LabelMap | Tensor) -> tuple[Tensor, Tensor]:
        """(segmap, image) of one tensor with the channels of both."""
        label_nc, image_nc = self._options["label_nc"], self._options["image_nc"]
        shape = list(segmap_shape(joined))
        if not isinstance(joined, Tensor) or len(shape) != 4 or shape[1] != label_nc + image_nc:
            raise ValueError(
                f"without an image, segmap must be one tensor [N, {label_nc + image_nc}, H, W] of map and image "
                f"(label_nc={label_nc} + image_nc={image_nc} channels), got a {type(joined).__name__} {shape}"
            )
        return joined[:, :label_nc], joined[:, label_nc:]


def _joined(labels: LabelMap | Tensor, image: Tensor, pooled: bool) -> Tensor:
    """labels ⊕ image [M·N, label_nc + image_nc, h, w]: the input of the plain discriminator."""
    if isinstance(labels, LabelMap):
        labels = labels.one_hot(image.dtype)
        labels = _half(labels) if pooled else labels
    return torch.cat([labels.repeat(image.shape[0] // labels.shape[0], 1, 1, 1), image], dim=1)


def _half(x: Tensor) -> Tensor:
    """Half the size, as each scale sees the one before."""
    return F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
