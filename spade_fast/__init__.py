# SPDX-License-Identifier: Apache-2.0
"""spade-fast: exact, fast SPADE (semantic image synthesis with spatially-adaptive normalization)."""

from spade_fast import _moved
from spade_fast.fusion import fuse, unfuse
from spade_fast.labels.label_map import LabelMap
from spade_fast.layers.block import SPADEResnetBlock
from spade_fast.layers.spade import FusedSPADE
from spade_fast.layers.sync import set_process_group
from spade_fast.models import SPADEGenerator
from spade_fast.models.checkpoint import load_encoder, load_generator
from spade_fast.ops._backend import use as use_backend

_moved.install()
__version__ = "0.1.0"
__all__ = [
    "FusedSPADE",
    "LabelMap",
    "SPADEGenerator",
    "SPADEResnetBlock",
    "__version__",
    "fuse",
    "load_encoder",
    "load_generator",
    "set_process_group",
    "unfuse",
    "use_backend",
]
