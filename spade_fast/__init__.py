# SPDX-License-Identifier: Apache-2.0
"""spade-fast: exact, fast SPADE (semantic image synthesis with spatially-adaptive normalization)."""

from spade_fast.fusion import fuse, unfuse
from spade_fast.label_map import LabelMap
from spade_fast.layers import FusedSPADE

__version__ = "0.1.0"
__all__ = ["FusedSPADE", "LabelMap", "__version__", "fuse", "unfuse"]
