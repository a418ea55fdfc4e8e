# SPDX-License-Identifier: Apache-2.0
"""Copies of the package, as an installation has it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def copy_package(package: Path) -> Path:
    """The package as it is installed, without a built extension."""
    for directory, name in ((ROOT / "spade_fast", "."), (ROOT / "csrc", "csrc"), (ROOT / "kernels", "kernels")):
        for file in directory.rglob("*.*"):
            if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                target = package / name / file.relative_to(directory)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    return package


def environment_of(package: Path, place: Path) -> dict[str, str]:
    """An environment that imports this package and has an empty cache."""
    changes = {"SPADE_FAST_CACHE": str(place / "cache"), "PYTHONPATH": str(package.parent)}
    return {k: v for k, v in (os.environ | changes).items() if k not in ("TRITON_INTERPRET", "SPADE_FAST_BUILD")}
