# SPDX-License-Identifier: Apache-2.0
"""One SPADE layer with batch statistics at one size: the same weights and inputs for every variant."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.cases.ops import HIDDEN, TAPS, channels_last, nbytes
from benchmarks.common import TORCH, in_layout, on_backend, saved_bytes
from benchmarks.macs import pattern_macs
from benchmarks.tools.class_table import ClassLabels, replace_spade
from spade_fast import FusedSPADE, LabelMap
from spade_fast.reference import SPADE

# Channels and size of x of every SPADE layer of the COCO-Stuff generator.
SIZES = (
    (1024, 8),
    (1024, 16),
    (1024, 32),
    (512, 32),
    (512, 64),
    (256, 64),
    (256, 128),
    (128, 128),
    (128, 256),
    (64, 256),
)
PLAIN = ("plain NCHW", "plain channels-last")
NEW_MAP = "fused, new map"
CLASS_TABLE = "class table"
PARTS = ("forward", "training")


class LayerCase:
    """The variants of a layer on one batch of label maps.

    Args:
        channels: channels of x.
        size: height and width of x.
        labels: N label maps, of any size.
        device: where it runs.
        amp: what autocast computes in; None for float32.
        compiled: whether the plain layers run compiled too.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        labels: LabelMap,
        device: str,
        amp: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.size, self.channels, self.labels, self.amp = size, channels, labels.to(device), amp
        plain, fused = SPADE(channels, labels.label_nc), FusedSPADE(channels, labels.label_nc)
        fused.load_state_dict(plain.state_dict())
        table = replace_spade(copy.deepcopy(fused))
        layers: dict[str, nn.Module] = {PLAIN[0]: plain}
        layers |= {PLAIN[1]: in_layout(copy.deepcopy(plain), torch.channels_last), "fused": fused, CLASS_TABLE: table}
        for name in PLAIN if compiled else ():
            layers[f"compiled {name}"] = copy.deepcopy(layers[name])
        self.layers = {name: layer.to(device) for name, layer in layers.items()}
        for name in self.layers:
            if name.startswith("compiled"):
                self.layers[name].compile()
        self.layers[NEW_MAP] = self.layers[TORCH] = self.layers["fused"]
        # A block hands the layer what its convolution gave.
        x = torch.randn(len(labels), channels, size, size, device=device).to(amp or torch.float32)
        gradient = torch.randn_like(x)
        self.x = {True: channels_last(x), False: x}
        self.gradient = {True: channels_last(gradient), False: gradient}
        self.labels.build([(size, size)], backward=True)
        dense = self.labels.one_hot()
        self.dense = {True: channels_last(dense), False: dense}

    def inputs(self, name: str) -> tuple[Tensor, LabelMap | Tensor, Tensor]:
        """x, labels and the gradient of the output, in the variant's layout."""
        last = "NCHW" not in name
        parts = (self.labels.codes, self.labels.num_classes, self.labels.has_edges)
        labels: LabelMap | Tensor = self.labels
        if "plain" in name:
            labels = self.dense[last]
        elif name == CLASS_TABLE:
            labels = ClassLabels.from_codes(*parts)
        elif name == NEW_MAP:
            labels = LabelMap.from_codes(*parts)
        return self.x[last], labels, self.gradient[last]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.labels.device.type, self.amp, enabled=self.amp is not None)

    def forward(self, name: str) -> list[Tensor]:
        """The output, without a graph."""
        x, labels, _ = self.inputs(name)
        with on_backend(name), torch.no_grad(), self.autocast():
            return [self.layers[name](x, labels)]

    def training(self, name: str) -> list[Tensor]:
        """Forward and backward: the output, and the gradients of x and of the weights."""
        x, labels, gradient = self.inputs(name)
        x = x.detach().requires_grad_()
        layer = self.layers[name]
        for p in layer.parameters():
            p.grad = None
        with on_backend(name):
            with self.autocast():
                out = layer(x, labels)
            out.backward(gradient.to(out.dtype))
        gradients = [t.grad for t in (x, *layer.parameters()) if t.grad is not None]
        return [out.detach(), *gradients]

    def run(self, part: str, name: str) -> list[Tensor]:
        """`forward` or `training`."""
        return self.forward(name) if part == "forward" else self.training(name)

    def names(self) -> list[str]:
        """Of the results of `training`."""
        return ["output", "gradient of x", *(f"gradient of {n}" for n, _ in self.layers["fused"].named_parameters())]

    def exact(self) -> list[Tensor]:
        """The results of `training` in float64, by the plain layer."""
        layer = copy.deepcopy(self.layers[PLAIN[0]]).double()
        x = self.x[False].double().requires_grad_()
        out = layer(x, self.dense[False].double())
        out.backward(self.gradient[False].double())
        gradients = [t.grad for t in (x, *layer.parameters()) if t.grad is not None]
        return [out.detach(), *gradients]

    def saved(self, name: str) -> int:
        """Bytes that autograd keeps for backward."""
        x, labels, _ = self.inputs(name)
        x = x.detach().requires_grad_()
        return saved_bytes(lambda: self.layers[name](x, labels), self.layers[name].parameters())

    def floor_bytes(self, part: str) -> int:
        """Bytes that any implementation moves.

        Forward reads x for the statistics and again for the modulation, and writes the output. Backward reads x and the
        output's gradient for the sums of the statistics and again for the gradient of x, and writes that. Labels and
        weights are read once in each pass, and the gradients of the weights are written once.
        """
        x, weights = nbytes(self.x[True]), nbytes(*self.layers["fused"].parameters())
        labels = nbytes(self.labels.resized(self.size, self.size))
        return 3 * x + labels + weights if part == "forward" else 8 * x + 2 * labels + 3 * weights

    def flops(self, part: str, name: str) -> int:
        """Of the variant's convolutions, or of what replaces them; a multiply-add is two.

        Backward costs twice forward. In the first convolution it costs as much: the one-hot map needs no gradient.
        """
        layer = (self.channels, self.size, self.size, HIDDEN)
        if "plain" not in name:
            shared, modulation = 0, pattern_macs(self.labels, [layer], 3)["chosen"]
        else:
            weights = TAPS * HIDDEN * self.size**2 * len(self.labels)
            shared, modulation = weights * self.labels.label_nc, weights * 2 * self.channels
        return 2 * (shared + modulation if part == "forward" else 2 * shared + 3 * modulation)
