# SPDX-License-Identifier: Apache-2.0
"""What the loaded extension says about itself, through its pybind11 module. No operation needs the module."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from spade_fast.native import loader, toolchain

NAME = "spade_fast._native_info"


def about() -> dict[str, Any]:
    """The loaded library's `key`, `architectures` and `instruction_set` (both text), and its number of `cuda_kernels`.

    Raises:
        RuntimeError: There is no extension, or no module of its build beside it. The message says what to do.
    """
    path = loader.load()["path"]
    result: dict[str, Any] = _module(path).about(path)
    return result


def kernels() -> list[dict[str, Any]]:
    """Each CUDA kernel of the library as the present device runs it.

    Returns:
        A dict for each kernel: `kernel` (its name), `variant` (name and template arguments), `registers` and
        `local_bytes` of a thread, `shared_bytes` of a block, and `occupancy`, the resident share of the most threads
        that a multiprocessor holds.

    Raises:
        RuntimeError: As for `about`, or CUDA's words, without a device for example.
    """
    path = loader.load()["path"]
    rows = []
    for row in _module(path).kernels(path):
        variant = re.sub(r"^.*\bkernel = (?:[^<]*::)?(\w+_kernel.*)\]$", r"\1", row.pop("name"))
        rows.append({"kernel": variant.partition("<")[0], "variant": variant, **row})
    return rows


def _module(library: str) -> ModuleType:
    path = Path(library).with_name(toolchain.INFO_MODULE)
    if not path.is_file():
        raise RuntimeError(
            f"{path} is missing: it was not built beside the extension, or was built for another Python. "
            "`python -m spade_fast.native.build` builds one"
        )
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, path)
        assert spec is not None and spec.loader is not None
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise RuntimeError(f"{path} does not load: {error}") from None
        sys.modules[NAME] = module
    return sys.modules[NAME]
