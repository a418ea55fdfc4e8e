# SPDX-License-Identifier: Apache-2.0
"""The SPADE generator (Park et al., CVPR 2019, section 3 and Figure 14)."""

from __future__ import annotations

import contextlib
import functools
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spade_fast.labels.label_map import LabelMap
from spade_fast.labels.map_scope import as_label_map, map_scope
from spade_fast.layers.as_built import changed, changed_convolution, torch_only
from spade_fast.layers.block import SPADEResnetBlock
from spade_fast.layers.normalization import recomputing
from spade_fast.layers.patches import weight_table
from spade_fast.layers.plain import SLOPE
from spade_fast.layers.spectral import SpectralConv2d, has_spectral_norm
from spade_fast.ops.label_conv import label_conv
from spade_fast.reference import as_segmap, segmap_shape

# Doublings from the first feature map to the image, by the option's name.
UPSAMPLING_LAYERS = {"normal": 5, "more": 6, "most": 7}


def start_size(crop_size: int, aspect_ratio: float, num_upsampling_layers: str) -> tuple[int, int]:
    """(height, width) in pixels of the generator's first feature map.

    Examples:
        >>> start_size(256, 1.0, "normal")
        (8, 8)

    Args:
        crop_size: width of the image in pixels.
        aspect_ratio: width / height of the image.
        num_upsampling_layers: ``normal``, ``more`` or ``most``.

    Raises:
        ValueError: num_upsampling_layers is unknown, its doublings do not divide crop_size, or aspect_ratio is not
            positive.
    """
    if num_upsampling_layers not in UPSAMPLING_LAYERS:
        names = ", ".join(UPSAMPLING_LAYERS)
        raise ValueError(f"num_upsampling_layers must be one of {names}, got {num_upsampling_layers!r}")
    scale = 2 ** UPSAMPLING_LAYERS[num_upsampling_layers]
    if crop_size < scale or crop_size % scale:
        raise ValueError(
            f"crop_size must be a multiple of {scale} with num_upsampling_layers={num_upsampling_layers!r}, "
            f"got {crop_size}"
        )
    if aspect_ratio <= 0:
        raise ValueError(f"aspect_ratio must be positive, got {aspect_ratio}")
    width = crop_size // scale
    return max(1, round(width / aspect_ratio)), width


class SPADEGenerator(nn.Module):
    """The SPADE generator (Park et al., CVPR 2019, section 3 and Figure 14).

    It sends a latent code, or the downsampled label map, through SPADE residual blocks. Between blocks it enlarges the
    features twice by nearest neighbor.

    Examples:
        >>> net = SPADEGenerator(label_nc=3, ngf=1, crop_size=64)
        >>> net(LabelMap(torch.zeros(1, 64, 64, dtype=torch.uint8), num_classes=3)).shape
        torch.Size([1, 3, 64, 64])

    Args:
        label_nc: channels of the map: classes, one more for "unknown", one more for instance edges (COCO-Stuff: 184).
        ngf: width. The first blocks have 16·ngf channels, the last ngf, or ngf/2 with ``most``.
        crop_size: width in pixels of the images it is trained on. A label map of another size gives an image of that
            size where it can, see :meth:`image_size`.
        aspect_ratio: width / height of the images it is trained on.
        num_upsampling_layers: ``normal`` (5 doublings), ``more`` (6) or ``most`` (7, with one more block).
        z_dim: size of the latent code. None starts from the map, downsampled by nearest neighbor.
        norm, kernel_size: see :class:`spade_fast.reference.SPADE`.
        spectral_norm: whether the blocks' convolutions are spectrally normalized.
            :func:`spade_fast.models.norm_g_options` gives norm, kernel_size and spectral_norm of a norm_G of the
            authors' code.
        spade: ``fused`` for :class:`spade_fast.FusedSPADE`, ``reference`` for the plain layers. Function and parameter
            names are the same.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        label_nc: int,
        ngf: int = 64,
        crop_size: int = 256,
        aspect_ratio: float = 1.0,
        num_upsampling_layers: str = "normal",
        z_dim: int | None = None,
        norm: str = "syncbatch",
        kernel_size: int = 3,
        spade: str = "fused",
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        self.fused = spade == "fused"
        self.checkpoint_blocks = False  # True: backward computes each block again from the block's input
        self._options: dict[str, Any] = dict(
            label_nc=label_nc,
            ngf=ngf,
            crop_size=crop_size,
            aspect_ratio=aspect_ratio,
            num_upsampling_layers=num_upsampling_layers,
            z_dim=z_dim,
            norm=norm,
            kernel_size=kernel_size,
            spectral_norm=spectral_norm,
        )
        self.start = start_size(crop_size, aspect_ratio, num_upsampling_layers)
        self.z_dim = z_dim
        self._warned = False  # whether it has warned that an image has not the size of its label map

        def block(fin: int, fout: int) -> SPADEResnetBlock:
            return SPADEResnetBlock(fin, fout, label_nc, norm, kernel_size, spade, spectral_norm)

        self.fc: nn.Conv2d | nn.Linear
        if z_dim is None:
            self.fc = nn.Conv2d(label_nc, 16 * ngf, 3, padding=1)
        else:
            self.fc = nn.Linear(z_dim, 16 * ngf * self.start[0] * self.start[1])
        self.head_0 = block(16 * ngf, 16 * ngf)
        self.G_middle_0 = block(16 * ngf, 16 * ngf)
        self.G_middle_1 = block(16 * ngf, 16 * ngf)
        self.up_0 = block(16 * ngf, 8 * ngf)
        self.up_1 = block(8 * ngf, 4 * ngf)
        self.up_2 = block(4 * ngf, 2 * ngf)
        self.up_3 = block(2 * ngf, ngf)
        if num_upsampling_layers == "most":
            self.up_4 = block(ngf, ngf // 2)
        self.conv_img = nn.Conv2d(ngf // 2 if num_upsampling_layers == "most" else ngf, 3, 3, padding=1)

    def freeze(self) -> SPADEGenerator:
        """Prepares for serving: evaluation mode, with spectrally normalized weights divided and packed once.

        Later writes to weights show after ``unfreeze()``, ``train()`` or ``load_state_dict()``.

        Returns:
            The generator.
        """
        self.eval()
        for module in self.modules():
            if isinstance(module, SpectralConv2d):
                module.freeze()
        return self

    def unfreeze(self) -> SPADEGenerator:
        """Takes back `freeze`: every forward computes from the weights as they then are.

        Returns:
            The generator.
        """
        for module in self.modules():
            if isinstance(module, SpectralConv2d):
                module.unfreeze()
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a network that this one's state dict fits.

        They are the arguments given, but spectral_norm is False once ``torch.nn.utils.remove_spectral_norm`` was called
        on the network's convolutions.
        """
        return {**self._options, "spectral_norm": self._options["spectral_norm"] and has_spectral_norm(self)}

    @property
    def scale(self) -> int:
        """Pixels of the image along one side of a pixel of the first features: 32, 64 or 128."""
        return 2 ** UPSAMPLING_LAYERS[self._options["num_upsampling_layers"]]

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the images it is trained on, in pixels."""
        return self.start[0] * self.scale, self.start[1] * self.scale

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the image that a label map of height × width pixels gives.

        A generator that starts from the map (z_dim None) makes images of every size whose sides are multiples of
        :attr:`scale`, but with instance norm none of a single first pixel. From any other map, and with a z_dim, the
        image has :attr:`output_size`.

        Examples:
            >>> SPADEGenerator(3, ngf=1, crop_size=64).image_size(96, 32)
            (96, 32)
            >>> SPADEGenerator(3, ngf=1, crop_size=64).image_size(120, 160)
            (64, 64)
        """
        return self.output_size if self.size_refusal(height, width) else (height, width)

    def size_refusal(self, height: int, width: int) -> str:
        """Why a label map of height × width pixels cannot give an image of its size; empty where it can."""
        if self.z_dim is not None:
            return "the generator starts from z, which fixes the size"
        if height % self.scale or width % self.scale:
            return f"its sides are no multiples of {self.scale}"
        if self._options["norm"] == "instance" and (height, width) == (self.scale, self.scale):
            return "instance norm needs more than one pixel to start from"
        return ""

    def _start_of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the first features for a label map; warns once where the image has another size."""
        size = self.image_size(height, width)
        if not torch.compiler.is_compiling() and not self._warned and size != (height, width):
            self._warned = True
            warnings.warn(
                f"a label map of {height}×{width} pixels (height×width) gives an image of {size[0]}×{size[1]}: "
                f"{self.size_refusal(height, width)}",
                stacklevel=7,  # the caller of the generator, above the two frames of torch.nn.Module
            )
        return size[0] // self.scale, size[1] // self.scale

    def blocks(self) -> list[tuple[SPADEResnetBlock, int]]:
        """The residual blocks in order, each with the factor by which its input is enlarged."""
        middle = 1 if self._options["num_upsampling_layers"] == "normal" else 2
        blocks = [(self.head_0, 1), (self.G_middle_0, 2), (self.G_middle_1, middle)]
        blocks += [(self.up_0, 2), (self.up_1, 2), (self.up_2, 2), (self.up_3, 2)]
        return [*blocks, (self.up_4, 2)] if self._options["num_upsampling_layers"] == "most" else blocks

    def _first_features(self, labels: LabelMap | Tensor, z: Tensor | None) -> Tensor:
        weight, (n, _, height, width) = next(self.fc.parameters()), segmap_shape(labels)
        start = self._start_of(height, width)
        if self.z_dim is None:
            if z is not None:
                raise ValueError("z was given, but this generator starts from the segmentation map (z_dim=None)")
            channels = self._options["label_nc"], 16 * self._options["ngf"]
            if isinstance(labels, LabelMap) and changed_convolution(self.fc, *channels, 3):
                labels = labels.one_hot(weight.dtype)
            if isinstance(labels, Tensor):
                return self.fc(F.interpolate(labels, size=start, mode="nearest"))
            assert isinstance(self.fc, nn.Conv2d)
            codes, table = labels.resized(*start), weight_table(weight)
            return label_conv(codes, table, self.fc.bias, labels.has_edges, 3, padding=1)
        if z is None:
            z = torch.randn(n, self.z_dim, dtype=weight.dtype, device=weight.device)
        if z.shape != (n, self.z_dim):
            raise ValueError(f"z must have shape [{n}, {self.z_dim}], got {list(z.shape)}")
        x = self.fc(z).unflatten(1, (-1, *self.start))
        return x.contiguous(memory_format=torch.channels_last) if self.fused else x

    def forward(self, segmap: LabelMap | Tensor, z: Tensor | None = None) -> Tensor:
        """Synthesizes images.

        Args:
            segmap: :class:`spade_fast.LabelMap` or tensor [N, label_nc, h, w]. Layers resize it by nearest neighbor.
            z: latent codes [N, z_dim]. With None, a generator with a z_dim draws them from N(0, 1).

        Returns:
            Images [N, 3, H, W] in [-1, 1], of the map's size where h and w are multiples of :attr:`scale` and the
            generator has no z_dim. Otherwise they have :attr:`output_size`, and a warning says so once.

        Raises:
            ValueError: segmap or z has a wrong shape.
        """
        shape, want = segmap_shape(segmap), self._options["label_nc"]
        if len(shape) != 4 or shape[1] != want:
            raise ValueError(f"segmap must have shape [N, {want}, h, w] (label_nc={want}), got {list(shape)}")
        with map_scope():
            return self._synthesize(segmap, z)

    def _synthesize(self, segmap: LabelMap | Tensor, z: Tensor | None) -> Tensor:
        fused = self.fused and not torch_only()
        labels = as_label_map(segmap) if fused else segmap
        if not fused or isinstance(labels, Tensor):
            labels = as_segmap(labels, next(self.parameters()).dtype)
        x = self._first_features(labels, z)
        for block, upsample in self.blocks():
            if (
                upsample != 1 and changed(block, SPADEResnetBlock) is not None
            ):  # a changed block gets the x that a plain network gives it
                x, upsample = F.interpolate(x, scale_factor=float(upsample), mode="nearest"), 1
            if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
                x = checkpoint(
                    block,
                    x,
                    labels,
                    *([upsample] if upsample != 1 else []),
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=functools.partial(_checkpoint_contexts, block),
                )
            else:
                x = block(x, labels, upsample) if upsample != 1 else block(x, labels)
        # Nothing but this function holds the output of a block that is as built.
        in_place = changed(block, SPADEResnetBlock) is None
        return torch.tanh(self.conv_img(F.leaky_relu(x, SLOPE, inplace=in_place)))


def _checkpoint_contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of a checkpointed block's first forward and of those that repeat it."""
    return contextlib.nullcontext(), recomputing(block)
