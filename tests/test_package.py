# SPDX-License-Identifier: Apache-2.0
"""The wheel: built without torch, compiler or network, with everything that is imported at run time."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what git tracks: no build/, egg-info or compiled extension of the working tree is picked up."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine without torch and without a compiler."""
    out = tmp_path_factory.mktemp("no_torch")
    (out / "torch").mkdir()
    (out / "torch" / "__init__.py").write_text("raise ImportError('no torch while building')")
    return {**os.environ, "PATH": "/nonexistent", "PYTHONPATH": str(out)}


def pip_wheel(what: Path, out: Path, environment: dict[str, str]) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(out)]
    done = subprocess.run([*command, str(what)], env=environment, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("spade_fast-*.whl"))


@pytest.fixture(scope="module")
def wheel(source, bare, tmp_path_factory) -> zipfile.ZipFile:
    return zipfile.ZipFile(pip_wheel(source, tmp_path_factory.mktemp("wheel"), bare))


def test_wheel_holds_every_module(wheel, source):
    names = set(wheel.namelist())
    modules = {p.relative_to(source).as_posix() for p in (source / "spade_fast").rglob("*.py")}
    modules |= {f"spade_fast/kernels/{p.name}" for p in (source / "kernels").glob("*.py")}
    modules |= {f"spade_fast/csrc/{p.relative_to(source / 'csrc').as_posix()}" for p in (source / "csrc").rglob("*.*")}
    assert modules <= names
    assert "spade_fast/py.typed" in names
    # nothing at the top level but the package: `tests` or `benchmarks` would clash with other packages
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"spade_fast"}


def test_metadata(wheel):
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.10" in text
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", text, re.MULTILINE)
    assert sorted(required) == ["ninja", "numpy", "pillow", "pybind11", "torch", "triton"]
    assert set(re.findall(r"^Provides-Extra: (\w+)", text, re.MULTILINE)) >= {"train", "dev"}


SMALL_LAYER = """
import torch, spade_fast
from spade_fast.ops import _backend
print(spade_fast.__file__)
print(_backend.choose("patterns", torch.device("cpu")))
torch.manual_seed(0)
layer = spade_fast.FusedSPADE(4, 3)
plain = spade_fast.reference.SPADE(4, 3)
plain.load_state_dict(layer.state_dict())
labels = spade_fast.LabelMap(torch.randint(3, (2, 8, 8)), 3)
x = torch.randn(2, 4, 8, 8)
print((layer(x, labels) - plain(x, labels.one_hot())).abs().max().item() < 1e-5)
"""


def run_installed(wheel_file: Path, place: Path, **changes: str) -> list[str]:
    """What SMALL_LAYER prints with the wheel installed in a directory of its own, beside this torch."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", str(place / "site")]
    subprocess.run([*command, str(wheel_file)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(place / "site"), "SPADE_FAST_CACHE": str(place / "cache"), **changes}
    for name in ("TRITON_INTERPRET", "SPADE_FAST_BACKEND"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", SMALL_LAYER], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(place / "site/spade_fast/__init__.py")
    return lines[1:]


def test_a_wheel_built_with_a_compiler_runs_its_cpp_ops(source, tmp_path):
    """The extension comes out of the build cache when it was built on this machine before."""
    built = pip_wheel(source, tmp_path, dict(os.environ))
    assert "linux" in built.name
    assert run_installed(built, tmp_path, SPADE_FAST_BUILD="0") == ["cpp", "True"]
    package = tmp_path / "site" / "spade_fast"
    stamp = json.loads((package / "_C.json").read_text())
    code = "from spade_fast.native import details; import json; print(json.dumps(details.about()))"
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "SPADE_FAST_BUILD": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert about["key"] == stamp["key"] and (about["cuda_kernels"] > 100) == bool(stamp["nvcc"])


def test_an_sdist_installs_without_a_compiler_and_runs_on_torch(source, bare, tmp_path):
    code = "import setuptools.build_meta as b; print(b.build_sdist('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sdist = source / done.stdout.split()[-1]
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    top = sdist.name.removesuffix(".tar.gz")
    assert {f"{top}/{p.relative_to(source).as_posix()}" for p in (source / "csrc").rglob("*.*")} <= set(names)
    built = pip_wheel(sdist, tmp_path, bare)
    assert built.name.endswith("-py3-none-any.whl")
    assert run_installed(built, tmp_path, PATH="/nonexistent") == ["torch", "True"]


def test_formatter_versions_agree():
    """The pre-commit hooks and the configuration of clang-format name the versions that `make lint` uses."""
    project = dict(re.findall(r'"(ruff|clang-format)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert set(project) == {"ruff", "clang-format"}
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool, repository in (("ruff", "ruff-pre-commit"), ("clang-format", "mirrors-clang-format")):
        assert re.findall(rf"/{repository}\s+rev: v([\d.]+)", hooks) == [project[tool]]
    assert f"clang-format=={project['clang-format']}," in (ROOT / ".clang-format").read_text()
