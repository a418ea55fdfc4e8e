# SPDX-License-Identifier: Apache-2.0
"""Loads the native extension on first use: one built at installation, or one built now and kept."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from spade_fast.native import toolchain

PACKAGE = Path(__file__).resolve().parents[1]
NOT_BUILT = (
    "it is not built yet for this machine. It is built at first use, in a minute or two. "
    "`python -m spade_fast.native.build` builds it now"
)
_lock = threading.RLock()
_state: dict[str, Any] = {}  # after the first attempt: "stamp" of the loaded library, or "error"
_may_build = True


def load() -> dict[str, Any]:
    """The stamp of the loaded extension (see `toolchain.Parameters`), and its path.

    Raises:
        RuntimeError: Why there is no extension. The failure is remembered: a second call does not try again.
    """
    with _lock:
        if not _state:
            try:
                _state["stamp"] = _load()
            except RuntimeError as error:
                if not _may_build:  # another call may build it
                    raise
                _state["error"] = str(error)
    if "error" in _state:
        raise RuntimeError(_state["error"])
    return _state["stamp"]


@contextlib.contextmanager
def without_building() -> Iterator[None]:
    """Inside, `load` takes an extension that exists already, and builds none."""
    global _may_build
    with _lock:
        before, _may_build = _may_build, False
        try:
            yield
        finally:
            _may_build = before


def _load() -> dict[str, Any]:
    reasons = []
    for library, where in _installed():
        try:
            return _open(library)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reasons.append(f"{where}: {error}")
    if not reasons:
        reasons.append("none was built at installation")
    if os.environ.get("SPADE_FAST_BUILD") == "0":
        reasons.append("building one at first use is switched off (SPADE_FAST_BUILD=0)")
    else:
        try:
            return _open(_built("; ".join(reasons)))
        except NotBuiltError as error:
            reasons.append(str(error))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reasons.append(f"building one: {error}")
    raise RuntimeError("no native extension: " + "; ".join(reasons))


class NotBuiltError(RuntimeError):
    """The extension is built at first use, and this is not a use."""


def _built(reason: str) -> Path:
    """The library of the cache for this machine, built now where that is allowed. reason: why none was found."""
    from spade_fast.native import build  # here, because `python -m` runs a module that is not imported yet

    p = toolchain.local_parameters()
    library = build.cached(p)
    if library is None and not _may_build and not build.failure(p):
        raise NotBuiltError(NOT_BUILT)
    return library or build.build_cached(p, reason=reason)


def _installed() -> Iterator[tuple[Path, str]]:
    """Libraries that were built at an installation, and words for each.

    A checkout imports this package from its own tree when Python is started in it, even where the package is installed
    elsewhere. The installation's library is as good if it was built from the same sources.
    """
    seen = {PACKAGE}
    if (PACKAGE / "_C.so").is_file():
        yield PACKAGE / "_C.so", "the one built at installation"
    for distribution in importlib.metadata.distributions(name="spade-fast"):
        package = Path(str(distribution.locate_file("spade_fast"))).resolve()
        if package in seen or not (package / "_C.so").is_file():
            continue
        seen.add(package)
        words = (
            f"Python imports spade_fast from {PACKAGE}, which shadows the installation in {package}. To use the "
            "installation, start Python in another directory. To use the tree, install it with "
            "`pip install --no-build-isolation -e .`. The installation's extension does not fit the tree"
        )
        yield package / "_C.so", words


def _open(library: Path) -> dict[str, Any]:
    stamp = json.loads(library.with_suffix(".json").read_text())
    version = torch.__version__.partition("+")[0]
    if stamp["torch_version"] != version:
        raise RuntimeError(f"{library} was built for torch {stamp['torch_version']}, this is torch {version}")
    if stamp["sources"] != toolchain.sources_hash(bool(stamp["nvcc"])):
        raise RuntimeError(f"{library} was built from other sources than those in {toolchain.csrc()}")
    torch.ops.load_library(str(library))
    return {**stamp, "path": str(library)}
