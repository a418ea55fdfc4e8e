# SPDX-License-Identifier: Apache-2.0
"""The COCO-Stuff generator: the same weights and label maps for every variant."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases.ops import channels_last
from benchmarks.common import TORCH, in_layout, on_backend, with_torch_spectral_norm
from benchmarks.tools.class_table import ClassLabels, replace_spade
from spade_fast import LabelMap
from spade_fast.models import SPADEGenerator, init_weights

PLAIN = ("plain NCHW", "plain channels-last")
AS_BUILT = "fused, as built"
CLASS_TABLE = "class table"


def build(device: str, ngf: int, crop: int, compiled: bool = False) -> dict[str, SPADEGenerator]:
    """The same weights in every generator, except for those of the class table.

    compiled: the plain generators compiled too.
    """
    torch.manual_seed(0)
    plain = SPADEGenerator(184, ngf=ngf, crop_size=crop, spade="reference")
    init_weights(plain, "glorot", gain=1.0)  # activations of order one, at which errors show
    nets = {PLAIN[0]: plain}
    kinds = {PLAIN[1]: "reference", "fused": "fused", AS_BUILT: "fused", CLASS_TABLE: "fused"}
    for name, spade in kinds.items():
        nets[name] = SPADEGenerator(184, ngf=ngf, crop_size=crop, spade=spade)
        nets[name].load_state_dict(plain.state_dict())
    for name in PLAIN:
        with_torch_spectral_norm(nets[name])
    for name in (PLAIN[1], "fused", CLASS_TABLE):
        in_layout(nets[name], torch.channels_last)
    replace_spade(nets[CLASS_TABLE])
    nets[TORCH] = nets["fused"]
    for name in PLAIN if compiled else ():
        nets[f"compiled {name}"] = copy.deepcopy(nets[name])
        nets[f"compiled {name}"].compile()
    return {name: net.to(device) for name, net in nets.items()}


def serve(nets: dict[str, SPADEGenerator]) -> None:
    """Puts every network into evaluation mode, "fused" and the class table frozen."""
    for name, net in nets.items():
        if name in ("fused", TORCH, CLASS_TABLE):
            net.freeze()
        else:
            net.eval()


def forward(
    nets: dict[str, SPADEGenerator], labels: LabelMap, amp: torch.dtype | None = None
) -> dict[str, Callable[[], Tensor]]:
    """name -> call that makes the images.

    Plain networks get the one-hot map that they need, made beforehand. Fused networks get a map whose patterns are not
    found yet.
    """
    dense = labels.one_hot()
    dense_last = channels_last(dense)
    parts = (labels.codes, labels.num_classes, labels.has_edges)

    def call(name: str) -> Tensor:
        segmap: LabelMap | Tensor
        if "plain" in name:
            segmap = dense if "NCHW" in name else dense_last
        else:
            segmap = (ClassLabels if name == CLASS_TABLE else LabelMap).from_codes(*parts)
        with on_backend(name), torch.autocast(labels.device.type, amp, enabled=amp is not None):
            return nets[name](segmap)

    return {name: functools.partial(call, name) for name in nets}


def train(net: SPADEGenerator, call: Callable[[], Tensor], name: str, gradient: Tensor) -> Tensor:
    """One forward and backward of a network, whose weights then have gradients. Returns the images."""
    for p in net.parameters():
        p.grad = None
    out = call()
    with on_backend(name):
        out.backward(gradient)
    return out.detach()
