# SPDX-License-Identifier: Apache-2.0
"""The build of the native extension: its parameters, its cache, and what a user is told when it fails."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from installed import copy_package, environment_of

from spade_fast.native import build, toolchain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nvcc(tmp_path):
    """A stand-in that knows fewer architectures than the default list."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n'\n")
    path.chmod(0o755)
    return path


def test_default_architectures_are_those_that_nvcc_knows(nvcc, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert toolchain.architectures(nvcc) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_architectures_asked_for(nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX")
    assert toolchain.architectures(nvcc) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(
        toolchain.BuildError, match=r"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0a\+PTX', got 'Hopper'"
    ):
        toolchain.architectures(nvcc)


def test_cuda_home_comes_first(nvcc, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    assert toolchain.find_nvcc() == nvcc


def test_without_nvcc_only_the_cpp_sources_are_compiled(tmp_path):
    text = build.ninja_file(toolchain.parameters(cuda=False), tmp_path / "_C.so")
    compiled = set(re.findall(r"^build (\S+\.cpp)\.o:", text, re.MULTILINE))
    directories = (ROOT / "csrc", ROOT / "csrc" / "cpu")
    assert compiled == {f.relative_to(ROOT / "csrc").as_posix() for d in directories for f in d.glob("*.cpp")}
    assert "nvcc " not in text.partition("rule link")[2]


def test_key_follows_sources_and_parameters(monkeypatch, tmp_path):
    p = toolchain.parameters(cuda=False)
    key = p.key()
    copy = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    monkeypatch.setattr(toolchain, "csrc", lambda: copy)
    assert p.key() == key
    for changed, matters in (("cuda/statistics.cu", False), ("cpu/common.h", True), ("python/native_info.cpp", True)):
        (copy / changed).write_bytes((copy / changed).read_bytes() + b"//\n")
        assert (p.key() != key) == matters, changed
        key = p.key()
    assert dataclasses.replace(p, cxx_version="another").key() != key


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(toolchain.BuildError, match=r"no C\+\+ compiler: none of c\+\+, g\+\+ and clang\+\+"):
        toolchain.parameters(cuda=False)


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
    p = toolchain.parameters(cuda=False)
    calls = []
    for retry in (False, False, True):
        with pytest.raises(toolchain.BuildError, match="the disk is made of cheese"):
            build.build_cached(p, retry)
        calls.append((tmp_path / "calls").read_text().count("x"))
    assert calls[0] == calls[1] < calls[2]
    assert not list((tmp_path / "cache").rglob("_C.so"))


def test_broken_compiler_leaves_the_torch_backend(broken_compiler, tmp_path):
    """A user without a usable compiler gets results, and the reason from spade_fast.info."""
    package = copy_package(tmp_path / "site" / "spade_fast")
    environment = {**environment_of(package, tmp_path), "CXX": str(broken_compiler)}
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
    """Four processes ask at the same moment. The compiler, which counts its calls, compiles each source once."""
    compiler = tmp_path / "counting-c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "counting 1.0" && exit 0\n'
        f"echo x >> {tmp_path}/calls\nsleep 0.2\n"
        'for word; do [ "$previous" = -o ] && touch "$word"; previous=$word; done\n'
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "SPADE_FAST_CACHE": str(tmp_path / "cache")}
    code = "from spade_fast.native import build, toolchain; print(build.build_cached(toolchain.parameters(cuda=False)))"
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [process.communicate(timeout=120) for process in running]
    libraries = {out.strip() for out, _ in answers}
    assert all(process.returncode == 0 for process in running)
    assert len(libraries) == 1
    library = Path(libraries.pop())
    assert json.loads(library.with_suffix(".json").read_text())["cxx_version"] == "counting 1.0"
    compiled = toolchain.source_files(False, ".cpp")
    assert (tmp_path / "calls").read_text().count("x") == len(compiled) + 2  # one link, and the Python module
    announced = [error for _, error in answers if "building the native extension for this machine" in error]
    assert len(announced) == 1 and "SPADE_FAST_BUILD=0" in announced[0]
    assert all("waiting for it" in error for _, error in answers if error not in announced)
    assert not list(library.parent.glob("build-*"))


def test_progress_is_told(monkeypatch, capfd):
    monkeypatch.setattr(build, "_TICK_IN_LOG", 0.05)
    code = "import time; print('[7/9] compiled', flush=True); time.sleep(0.5); print('the end'); exit(3)"
    assert build._run_watched([sys.executable, "-c", code]) == (3, "[7/9] compiled\nthe end\n")
    assert re.search(r"^spade_fast: building, step 7 of 9, \d+ s$", capfd.readouterr().err, re.MULTILINE)


def test_a_build_that_is_interrupted_leaves_no_compiler_behind(monkeypatch):
    monkeypatch.setattr(build, "_TICK_IN_LOG", 0.05)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_say", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build._run_watched(["sleep", "60"])
    assert time.monotonic() - start < 30


def test_info_builds_nothing(broken_compiler, tmp_path):
    package = copy_package(tmp_path / "site" / "spade_fast")
    environment = {**environment_of(package, tmp_path), "CXX": str(broken_compiler)}
    code = (
        "from spade_fast import info; print(info.report()); import os, torch; from spade_fast.ops import _backend;"
        f"print('then', os.path.exists({str(tmp_path / 'calls')!r}), _backend.choose('patterns', torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report, _, later = done.stdout.rpartition("then ")
    assert "native extension: none: none was built at installation; it is not built yet for this machine" in report
    assert "`python -m spade_fast.native.build` builds it now" in report
    assert "  patterns: torch" in report
    assert later == "False torch\n"
    assert (tmp_path / "calls").exists()  # the first use did try to build


def test_an_old_command_names_the_new_one():
    done = subprocess.run([sys.executable, "-m", "spade_fast.build"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "spade_fast.build is now spade_fast.native.build: run python -m spade_fast.native.build"
    )
