# SPDX-License-Identifier: Apache-2.0
"""The operations of the label-pattern algorithm, registered as torch.ops.spade_fast.*; one file each."""

from spade_fast.ops import (
    embedding_sum,
    label_conv,
    modulation,
    modulation_backward,
    normalization_gradient,
    pattern_params,
    patterns,
    recognize,
    segments,
    statistics,
    sync_modulation,
)

__all__ = [
    "embedding_sum",
    "label_conv",
    "modulation",
    "modulation_backward",
    "normalization_gradient",
    "pattern_params",
    "patterns",
    "recognize",
    "segments",
    "statistics",
    "sync_modulation",
]
