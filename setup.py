# SPDX-License-Identifier: Apache-2.0
"""kernels/ and csrc/ are installed as spade_fast.kernels and spade_fast.csrc: a top-level `kernels` would clash.

The extension is built where torch, a compiler and ninja are there (pip install --no-build-isolation); elsewhere the
package installs without it and builds it at first use. SPADE_FAST_BUILD=0 leaves it out.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python in it, so no Python version in its name

    def build_extension(self, ext: Extension) -> None:
        native = runpy.run_path(str(ROOT / "spade_fast" / "native" / "build.py"), run_name="spade_fast_build")
        target = self.target(ext)
        for cuda in (True, False):
            try:
                library = native["build_cached"](native["parameters"](cuda), retry=True)
            except native["BuildError"] as error:
                print(f"spade-fast: {'CUDA and C++' if cuda else 'C++'} extension not built: {error}", file=sys.stderr)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            for suffix in (".so", ".json"):
                shutil.copy(library.with_suffix(suffix), target.with_suffix(suffix))
            return
        print("spade-fast: installed without it; it is built at first use where that is possible", file=sys.stderr)

    def target(self, ext: Extension) -> Path:
        """In an editable installation the package is used where it is."""
        return (ROOT if self.editable_mode else Path(self.build_lib)) / self.get_ext_filename(ext.name)

    def get_outputs(self) -> list[str]:
        libraries = [self.target(ext) for ext in self.extensions]
        return [str(p.with_suffix(s)) for p in libraries for s in (".so", ".json") if p.with_suffix(s).exists()]

    def copy_extensions_to_source(self) -> None:
        pass  # they are built there


def native_extension() -> list[Extension]:
    """The extension if torch is there to build it against; a wheel without it is for any machine."""
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
    package_data={"spade_fast": ["py.typed"], "spade_fast.csrc": ["*.cpp", "*.h", "*.cu", "*.cuh"]},
    ext_modules=native_extension(),
    cmdclass={"build_ext": BuildNative},
)
