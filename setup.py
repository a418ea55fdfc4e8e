# SPDX-License-Identifier: Apache-2.0
"""kernels/ and csrc/ are installed as spade_fast.kernels and spade_fast.csrc: a top-level `kernels` would clash.

`pip install --no-build-isolation` builds the extension where torch, a compiler and ninja are present. Elsewhere the
package installs without the extension and builds it at first use. SPADE_FAST_BUILD=0 leaves it out.
"""

import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def native_module(name: str) -> ModuleType:
    """spade_fast.native.NAME without its package: importing spade_fast needs torch."""
    package = "spade_fast_native"
    if package not in sys.modules:
        directory = ROOT / "spade_fast" / "native"
        spec = importlib.util.spec_from_file_location(
            package, directory / "__init__.py", submodule_search_locations=[str(directory)]
        )
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{name}")


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python in it, so no Python version in its name

    def build_extension(self, ext: Extension) -> None:
        build, toolchain = native_module("build"), native_module("toolchain")
        target = self.target(ext)
        for cuda in (True, False):
            try:
                library = build.build_cached(toolchain.parameters(cuda), retry=True)
            except toolchain.BuildError as error:
                print(f"spade-fast: {'CUDA and C++' if cuda else 'C++'} extension not built: {error}", file=sys.stderr)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            for source, copy in zip(self.parts(library), self.parts(target), strict=True):
                copy.unlink(missing_ok=True)  # a process that has the old file mapped keeps it
                if source.exists():
                    shutil.copy(source, copy)
            return
        print("spade-fast: installed without it; it is built at first use where that is possible", file=sys.stderr)

    def parts(self, library: Path) -> list[Path]:
        """The library, its stamp, and the Python module that reports on it."""
        return [library, library.with_suffix(".json"), library.with_name(native_module("toolchain").INFO_MODULE)]

    def target(self, ext: Extension) -> Path:
        """Where the library goes. In an editable installation the package is used where it is."""
        return (ROOT if self.editable_mode else Path(self.build_lib)) / self.get_ext_filename(ext.name)

    def get_outputs(self) -> list[str]:
        return [str(part) for ext in self.extensions for part in self.parts(self.target(ext)) if part.exists()]

    def copy_extensions_to_source(self) -> None:
        pass  # they are built there


def native_extension() -> list[Extension]:
    """The extension if torch is present to build it against. A wheel without the extension is for any machine."""
    if os.environ.get("SPADE_FAST_BUILD") == "0":
        return []
    try:
        import torch  # noqa: F401
    except ImportError:
        return []
    return [Extension("spade_fast._C", sources=[], optional=True)]


setup(
    packages=[*find_packages(include=["spade_fast", "spade_fast.*"]), "spade_fast.kernels", "spade_fast.csrc"],
    package_dir={"spade_fast": "spade_fast", "spade_fast.kernels": "kernels", "spade_fast.csrc": "csrc"},
    package_data={
        "spade_fast": ["py.typed"],
        "spade_fast.csrc": [f"{directory}*.{kind}" for directory in ("", "*/") for kind in ("cpp", "h", "cu", "cuh")],
    },
    ext_modules=native_extension(),
    cmdclass={"build_ext": BuildNative},
)
