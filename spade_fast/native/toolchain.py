# SPDX-License-Identifier: Apache-2.0
"""What the native extension is built from and with: sources, compilers, architectures, and the key of the result.

setup.py uses this module where nothing is installed yet. So it imports only the standard library, and torch inside the
functions that need it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

DEFAULT_ARCHITECTURES = ("80", "90a", "100", "120")
INFO_SOURCE = Path("python", "native_info.cpp")
INFO_MODULE = f"_native_info{sysconfig.get_config_var('EXT_SUFFIX')}"  # beside the library; for this Python alone
_PACKAGE = Path(__file__).resolve().parents[1]


class BuildError(RuntimeError):
    """The extension can not be built. The message says why, and what to do."""


def csrc() -> Path:
    """The directory of the sources, in an installed package or in a checkout.

    Raises:
        BuildError: Neither has the sources.
    """
    for directory in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (directory / "library.cpp").is_file():
            return directory
    raise BuildError(f"the sources csrc/ are neither in {_PACKAGE} nor beside it")


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, CUDA_PATH, the PATH or /usr/local/cuda, in that order."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return Path(found).resolve() if Path(found).is_file() else None


def cuda_home(nvcc: Path) -> Path:
    """The directory of nvcc's toolkit. nvcc itself is asked, because the nvcc on the PATH may be a script or a link."""
    command = [str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(found.group(1)).resolve() if found else nvcc.parent.parent


def architectures(nvcc: Path, otherwise: str = "") -> list[str]:
    """The -gencode options of nvcc.

    Args:
        nvcc: The compiler.
        otherwise: Architectures to take when TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") is not set, in the same form. Empty:
            the architectures of DEFAULT_ARCHITECTURES that nvcc knows.

    Raises:
        BuildError: The list has another form, or nvcc does not run.
    """
    asked = (os.environ.get("TORCH_CUDA_ARCH_LIST") or otherwise).replace(" ", ";")
    if asked:
        real = [a.removesuffix("+PTX").replace(".", "") for a in asked.split(";") if a]
        ptx = [a.removesuffix("+PTX").replace(".", "") for a in asked.split(";") if a.endswith("+PTX")]
        for code in real:
            if not re.fullmatch(r"\d{2,3}[af]?", code):
                raise BuildError(f"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0a+PTX', got {asked!r}")
    else:
        known = _output([str(nvcc), "--list-gpu-code"])
        real = [a for a in DEFAULT_ARCHITECTURES if f"sm_{a.rstrip('a')}" in known]
        ptx = real[-1:]
    options = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in real]
    return options + [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Everything that decides what the extension is. Equal parameters and sources give the same extension."""

    torch_version: str
    torch_directory: str
    abi: int  # _GLIBCXX_USE_CXX11_ABI of torch
    cxx: str
    cxx_version: str
    nvcc: str | None
    nvcc_version: str | None
    gencode: tuple[str, ...]

    def key(self) -> str:
        """Hash of the parameters and of the sources."""
        return hashlib.sha256(f"{dataclasses.astuple(self)} {sources_hash(bool(self.nvcc))}".encode()).hexdigest()[:16]

    def stamp(self) -> dict[str, Any]:
        """What is written beside the library, for loading and for `spade_fast.info`."""
        return {**dataclasses.asdict(self), "sources": sources_hash(bool(self.nvcc)), "key": self.key()}


def source_files(cuda: bool, *suffixes: str) -> list[Path]:
    """The files of csrc with these suffixes that an extension with or without CUDA kernels is made of."""
    directories = [csrc(), csrc() / "cpu", *([csrc() / "cuda"] if cuda else [])]
    return sorted(path for directory in directories for path in directory.iterdir() if path.suffix in suffixes)


def sources_hash(cuda: bool) -> str:
    """Hash of the sources of an extension with or without CUDA kernels, and of its Python module."""
    digest = hashlib.sha256()
    for path in (*source_files(cuda, ".cpp", ".h", ".cu", ".cuh"), csrc() / INFO_SOURCE):
        digest.update(path.relative_to(csrc()).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def parameters(cuda: bool = True, otherwise: str = "") -> Parameters:
    """The parameters for this machine and its torch.

    Args:
        cuda: Whether CUDA kernels are built where nvcc is found.
        otherwise: See `architectures`.

    Raises:
        BuildError: There is no torch or no C++ compiler, a compiler does not run, or TORCH_CUDA_ARCH_LIST is wrong.
    """
    try:
        import torch
    except ImportError as error:
        raise BuildError(f"torch is not installed where the extension is built ({error})") from None
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not cxx:
        raise BuildError("no C++ compiler: none of c++, g++ and clang++ is on the PATH (set CXX to another)")
    nvcc = find_nvcc() if cuda else None
    return Parameters(
        torch_version=torch.__version__.partition("+")[0],
        torch_directory=str(Path(torch.__file__).resolve().parent),
        abi=int(torch._C._GLIBCXX_USE_CXX11_ABI),
        cxx=cxx,
        cxx_version=_output([*cxx.split(), "--version"]).partition("\n")[0],
        nvcc=str(nvcc) if nvcc else None,
        nvcc_version=_output([str(nvcc), "--version"]).strip().rpartition("\n")[2] if nvcc else None,
        gencode=tuple(architectures(nvcc, otherwise)) if nvcc else (),
    )


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or str(error)
        raise BuildError(f"{command[0]} does not run: {words.strip()}") from None


def codes(gencode: list[str] | tuple[str, ...]) -> str:
    """The architectures of -gencode options, as text.

    Examples:
        >>> codes(["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=compute_90a"])
        'sm_80, compute_90a'
    """
    return ", ".join(option.rpartition("=")[2] for option in gencode)


def local_parameters() -> Parameters:
    """Parameters for this machine alone: CUDA kernels for the GPUs that are present, none without a GPU.

    Raises:
        BuildError: See `parameters`.
    """
    import torch

    if not torch.cuda.is_available():
        return parameters(cuda=False)
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    names = [f"{major}.{minor}" + ("a" if major == 9 else "") for major, minor in sorted(found)]
    return parameters(otherwise=";".join(names))
