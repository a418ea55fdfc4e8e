# SPDX-License-Identifier: Apache-2.0
"""Which built extension is loaded, and what it says about itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native.test_build import copy_package, environment_of

from spade_fast import info
from spade_fast.native import details, loader, toolchain


@pytest.fixture(scope="module")
def stamp() -> dict:
    try:
        return loader.load()
    except RuntimeError as error:
        pytest.skip(str(error))


def install(site: Path, stamp: dict, **changes: object) -> Path:
    """Metadata and the extension of an installation in `site`."""
    package, metadata = site / "spade_fast", site / "spade_fast-0.1.0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: spade-fast\nVersion: 0.1.0\n")
    shutil.copy(stamp["path"], package / "_C.so")
    (package / "_C.json").write_text(json.dumps(stamp | changes))
    return package


def load_in_tree(tmp_path: Path) -> subprocess.CompletedProcess:
    """Loads the extension where a tree without one shadows the installation, and none may be built."""
    tree = copy_package(tmp_path / "tree" / "spade_fast")
    environment = environment_of(tree, tmp_path) | {"SPADE_FAST_BUILD": "0"}
    environment["PYTHONPATH"] += f":{tmp_path / 'site'}"
    command = [sys.executable, "-c", "from spade_fast.native import loader; print(loader.load()['path'])"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_a_tree_uses_the_extension_of_the_installation_that_it_shadows(stamp, tmp_path):
    package = install(tmp_path / "site", stamp)
    done = load_in_tree(tmp_path)
    assert done.stdout == f"{package / '_C.so'}\n", done.stderr


def test_a_tree_that_differs_from_the_installation_says_so(stamp, tmp_path):
    package = install(tmp_path / "site", stamp, sources="0123456789abcdef")
    done = load_in_tree(tmp_path)
    last = done.stderr.splitlines()[-1]
    tree = tmp_path / "tree" / "spade_fast"
    assert last.startswith("RuntimeError: no native extension: Python imports spade_fast from ")
    assert f" from {tree}, which shadows the installation in {package}." in last
    assert "`pip install --no-build-isolation -e .`" in last
    assert f"{package / '_C.so'} was built from other sources than those in {tree / 'csrc'}" in last
    assert last.endswith("building one at first use is switched off (SPADE_FAST_BUILD=0)")


def test_the_library_says_what_it_is(stamp):
    try:
        about = details.about()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert about["key"] == stamp["key"]
    assert about["architectures"] == toolchain.codes(stamp["gencode"])
    assert about["instruction_set"] in ("default", "x86-64-v3", "x86-64-v4")
    assert (about["cuda_kernels"] > 0) == bool(stamp["nvcc"])
    assert f"build {stamp['key']}; its CPU loops use the {about['instruction_set']} instructions" in info.report()


@pytest.mark.parametrize("path", ["", "/nonexistent/_C.so", "libc.so.6", "x" * 100_000, "a\0b"], ids=range(5))
def test_no_path_ends_the_process(stamp, path):
    try:
        module = details._module(stamp["path"])
    except RuntimeError as error:
        pytest.skip(str(error))
    for function in (module.about, module.kernels):
        with pytest.raises(RuntimeError, match=r"no library is loaded from|has no spade_fast_key"):
            function(path)
        with pytest.raises(TypeError):
            function(3)


def test_names_of_kernels_are_those_in_the_sources(stamp, monkeypatch):
    start = "const char* spade_fast::kernel_text() [with auto kernel = "
    names = {
        "_GLOBAL__N__e8_13_statistics_cu_08::statistics_rows_kernel<__half, 8>": "statistics_rows_kernel",
        "spade_fast::{anonymous}::statistics_merge_kernel": "statistics_merge_kernel",
    }

    class Module:
        @staticmethod
        def kernels(path: str) -> list[dict]:
            return [{"name": f"{start}{name}]", "registers": 40} for name in names]

    monkeypatch.setattr(details, "_module", lambda path: Module)
    rows = details.kernels()
    assert [row["kernel"] for row in rows] == list(names.values())
    assert [row["variant"] for row in rows] == [name.rpartition("::")[2] for name in names]
    assert all(row["registers"] == 40 and "name" not in row for row in rows)


def test_without_the_module_everything_else_works(stamp, monkeypatch):
    monkeypatch.setattr(toolchain, "INFO_MODULE", "_native_info.no-such-python.so")
    report = info.report()
    assert "no further details: " in report and "`python -m spade_fast.native.build` builds one" in report
    assert "  cpp: available" in report
