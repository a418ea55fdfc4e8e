# SPDX-License-Identifier: Apache-2.0
"""The SPADE layer and residual block, and what they are made of."""

from spade_fast.layers.block import SPADEResnetBlock
from spade_fast.layers.spade import FusedSPADE

__all__ = ["FusedSPADE", "SPADEResnetBlock"]
