# SPDX-License-Identifier: Apache-2.0
"""The operations of the label-pattern algorithm, registered as torch.ops.spade_fast.*; one file each."""

from spade_fast.ops import backend
from spade_fast.ops.embedding_sum import embedding_sum
from spade_fast.ops.label_conv import label_conv
from spade_fast.ops.modulation import modulation
from spade_fast.ops.pattern_params import pattern_params, tap_segments
from spade_fast.ops.patterns import patterns, segments
from spade_fast.ops.recognize import recognize
from spade_fast.ops.statistics import statistics
from spade_fast.ops.sync_modulation import combine_statistics, merge_statistics, normalisation_gradient, sync_modulation

__all__ = [
    "backend",
    "combine_statistics",
    "embedding_sum",
    "label_conv",
    "merge_statistics",
    "modulation",
    "normalisation_gradient",
    "pattern_params",
    "patterns",
    "recognize",
    "segments",
    "statistics",
    "sync_modulation",
    "tap_segments",
]
