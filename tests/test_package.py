# SPDX-License-Identifier: Apache-2.0
"""The wheel: built without torch, compiler or network, with everything that is imported at run time."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    (out / "no_torch" / "torch").mkdir(parents=True)
    (out / "no_torch" / "torch" / "__init__.py").write_text("raise ImportError('no torch while building')")
    environment = {**os.environ, "PATH": "/nonexistent", "PYTHONPATH": str(out / "no_torch")}
    # a copy of what git tracks, so that no build/ or egg-info of the working tree is picked up or left behind
    source = out / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-q",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("spade_fast-*.whl")))


def test_wheel_holds_every_module(wheel):
    names = set(wheel.namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "spade_fast").rglob("*.py")}
    modules |= {f"spade_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert modules <= names
    assert "spade_fast/py.typed" in names
    # nothing at the top level but the package: `tests` or `benchmarks` would clash with other packages
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"spade_fast"}


def test_metadata(wheel):
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.10" in text
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", text, re.MULTILINE)
    assert sorted(required) == ["numpy", "pillow", "torch", "triton"]
    assert set(re.findall(r"^Provides-Extra: (\w+)", text, re.MULTILINE)) >= {"train", "dev"}


def test_formatter_versions_agree():
    """The pre-commit hook runs the version that the tests use."""
    project = re.search(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    hook = re.search(r"rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert project and hook and project[1] == hook[1]
