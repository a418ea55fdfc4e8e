# SPDX-License-Identifier: Apache-2.0
"""Loads the native extension on first use: the one built at installation, or one built now and kept."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import torch

from spade_fast.native import build

_lock = threading.Lock()
_state: dict = {}  # after the first attempt: "stamp" of the loaded library, or "error"


def load() -> dict:
    """The stamp of the loaded extension (see `build.Parameters`), with its path.

    Raises:
        RuntimeError: why it can not be had. Remembered: the second call does not try again.
    """
    with _lock:
        if not _state:
            try:
                _state["stamp"] = _load()
            except RuntimeError as error:
                _state["error"] = str(error)
    if "error" in _state:
        raise RuntimeError(_state["error"])
    return _state["stamp"]


def _load() -> dict:
    prebuilt, reasons = Path(__file__).resolve().parents[1] / "_C.so", []
    if prebuilt.is_file():
        try:
            return _open(prebuilt)
        except (OSError, RuntimeError, ValueError) as error:
            reasons.append(f"the one built at installation: {error}")
    else:
        reasons.append("none was built at installation")
    if os.environ.get("SPADE_FAST_BUILD") == "0":
        reasons.append("building one at first use is switched off (SPADE_FAST_BUILD=0)")
    else:
        try:
            return _open(build.build_cached(build.local_parameters()))
        except (OSError, RuntimeError, ValueError) as error:
            reasons.append(f"building one: {error}")
    raise RuntimeError("no native extension: " + "; ".join(reasons))


def _open(library: Path) -> dict:
    stamp = json.loads(library.with_suffix(".json").read_text())
    version = torch.__version__.partition("+")[0]
    if stamp["torch_version"] != version:
        raise RuntimeError(f"{library} was built for torch {stamp['torch_version']}, this is torch {version}")
    if stamp["sources"] != build.sources_hash(bool(stamp["nvcc"])):
        raise RuntimeError(f"{library} was built from other sources than those in {build.csrc()}")
    torch.ops.load_library(str(library))
    return {**stamp, "path": str(library)}
