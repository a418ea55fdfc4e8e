# SPDX-License-Identifier: Apache-2.0
"""Training: `python -m spade_fast.train`."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """`main` and `start` of the command; reached by name, as this was one module before."""
    if name in ("main", "start"):
        return getattr(importlib.import_module("spade_fast.train.__main__"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
