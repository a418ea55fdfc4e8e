# SPDX-License-Identifier: Apache-2.0
"""What a map that conditions a layer stands for: labels, labels behind constant channels, or itself."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from spade_fast.labels.label_map import LabelMap
from spade_fast.labels.map_scope import as_label_map, recognized


@dataclasses.dataclass
class ConstantsAndLabels:
    """A map whose first channels are constant in each image. Its other channels are one-hot, without edges."""

    constants: Tensor  # [N, number of constant channels]
    labels: LabelMap


def conditioning(labels: LabelMap | Tensor) -> LabelMap | ConstantsAndLabels | Tensor:
    """What a map stands for: a LabelMap, a LabelMap behind constant channels, or itself.

    Args:
        labels: LabelMap, or a map [N, L, h, w].
    """
    label_map = as_label_map(labels)
    if isinstance(label_map, LabelMap) or isinstance(labels, LabelMap):
        return label_map
    if labels.requires_grad or labels.is_meta or torch.compiler.is_compiling() or not labels.is_floating_point():
        return labels
    found = recognized(labels, _behind_constants)
    return labels if found is None else found


def _behind_constants(labels: Tensor) -> ConstantsAndLabels | None:
    if labels.dim() != 4 or labels.numel() == 0:
        return None
    values = labels.detach()
    if not bool((values[:, :1] == values[:, :1, :1, :1]).all()):
        return None
    constant = (values == values[:, :, :1, :1]).all(3).all(2).all(0)
    count = int(constant.to(torch.uint8).cummin(0).values.sum())
    # A label that no image has, or that every pixel of an image has, is constant too. Channels of 0 and 1 at the end of
    # the constant ones belong to the labels.
    first = values[:, :count, 0, 0]
    plain = ((first == 0) | (first == 1)).all(0).tolist()
    while count and plain[count - 1]:
        count -= 1
    if count == 0 or count == values.shape[1]:
        return None
    rest = LabelMap.from_segmap(values[:, count:])
    return None if rest is None or rest.has_edges else ConstantsAndLabels(first[:, :count].clone(), rest)
