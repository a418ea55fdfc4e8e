# SPDX-License-Identifier: Apache-2.0
"""The build of the native extension: its parameters, its cache, and what a user is told when it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spade_fast.native import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nvcc(tmp_path):
    """A stand-in which knows fewer architectures than the default list."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n'\n")
    path.chmod(0o755)
    return path


def test_default_architectures_are_those_that_nvcc_knows(nvcc, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.architectures(nvcc) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_architectures_asked_for(nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX")
    assert build.architectures(nvcc) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.BuildError, match=r"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0a\+PTX', got 'Hopper'"):
        build.architectures(nvcc)


def test_cuda_home_comes_first(nvcc, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    assert build.find_nvcc() == nvcc


def test_without_nvcc_only_the_cpp_sources_are_compiled(monkeypatch, tmp_path):
    text = build.ninja_file(build.parameters(cuda=False), tmp_path / "_C.so")
    sources = {f.name for f in (ROOT / "csrc").glob("*.cpp")}
    compiled = {
        line.split()[1].removesuffix(".o:")
        for line in text.splitlines()
        if line.startswith("build ") and ".cpp" in line.split(":")[0]
    }
    assert compiled == {name for name in sources if name not in build._CUDA_ONLY}
    assert "SPADE_FAST_CUDA" not in text


def test_key_follows_sources_and_parameters(monkeypatch, tmp_path):
    p = build.parameters(cuda=False)
    key = p.key()
    copy = tmp_path / "csrc"
    copy.mkdir()
    for file in (ROOT / "csrc").glob("*.*"):
        (copy / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(build, "csrc", lambda: copy)
    assert p.key() == key
    (copy / "library.cpp").write_bytes((copy / "library.cpp").read_bytes() + b"//\n")
    assert p.key() != key


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: none of c\+\+, g\+\+ and clang\+\+"):
        build.parameters(cuda=False)


@pytest.fixture
def broken_compiler(tmp_path):
    """A compiler that says its version and then fails, counting its calls."""
    path = tmp_path / "broken-c++"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "broken 1.0" && exit 0\necho x >> {tmp_path}/calls\n'
        'echo "error: the disk is made of cheese" >&2\nexit 1\n'
    )
    path.chmod(0o755)
    return path


def test_failure_is_explained_and_remembered(broken_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(broken_compiler))
    monkeypatch.setenv("SPADE_FAST_CACHE", str(tmp_path / "cache"))
    p = build.parameters(cuda=False)
    calls = []
    for retry in (False, False, True):
        with pytest.raises(build.BuildError, match="the disk is made of cheese"):
            build.build_cached(p, retry)
        calls.append((tmp_path / "calls").read_text().count("x"))
    assert calls[0] == calls[1] < calls[2]
    assert not list((tmp_path / "cache").rglob("_C.so"))


def test_broken_compiler_leaves_the_torch_backend(broken_compiler, tmp_path):
    """A user without a usable compiler gets results, and the reason from spade_fast.info."""
    package = tmp_path / "site" / "spade_fast"
    for directory, name in ((ROOT / "spade_fast", "."), (ROOT / "csrc", "csrc"), (ROOT / "kernels", "kernels")):
        for file in directory.rglob("*.*"):
            if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                target = package / name / file.relative_to(directory)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    environment = {
        **os.environ,
        "CXX": str(broken_compiler),
        "SPADE_FAST_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(package.parent),
    }
    environment.pop("TRITON_INTERPRET", None)
    code = (
        "import torch, spade_fast; print(spade_fast.__file__);"
        "layer = spade_fast.FusedSPADE(4, 3); labels = spade_fast.LabelMap(torch.zeros(1, 4, 4, dtype=torch.int64), 3);"
        "print(tuple(layer(torch.randn(1, 4, 4, 4), labels).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(package / "__init__.py"), "(1, 4, 4, 4)"]
    info = subprocess.run(
        [sys.executable, "-m", "spade_fast.info"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert info.returncode == 0, info.stderr
    assert "none was built at installation; building one: compiling the extension failed" in info.stdout
    assert "the disk is made of cheese" in info.stdout
    assert "  statistics: torch" in info.stdout


def test_several_processes_build_once(tmp_path):
    """Four processes ask at the same moment; a compiler that counts itself runs once a source."""
    compiler = tmp_path / "counting-c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "counting 1.0" && exit 0\n'
        f"echo x >> {tmp_path}/calls\nsleep 0.2\n"
        'for word; do [ "$previous" = -o ] && touch "$word"; previous=$word; done\n'
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "SPADE_FAST_CACHE": str(tmp_path / "cache")}
    code = "from spade_fast import build; print(build.build_cached(build.parameters(cuda=False)))"
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    libraries = {process.communicate(timeout=120)[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(libraries) == 1
    library = Path(libraries.pop())
    assert json.loads(library.with_suffix(".json").read_text())["cxx_version"] == "counting 1.0"
    compiled = [f for f in (ROOT / "csrc").glob("*.cpp") if f.name not in build._CUDA_ONLY]
    assert (tmp_path / "calls").read_text().count("x") == len(compiled) + 1  # and one link
    assert not list(library.parent.glob("build-*"))
