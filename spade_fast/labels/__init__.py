# SPDX-License-Identifier: Apache-2.0
"""Label maps and their distinct patches: what a SPADE layer is conditioned on."""

from spade_fast.labels.label_map import LabelMap

__all__ = ["LabelMap"]
