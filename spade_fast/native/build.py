# SPDX-License-Identifier: Apache-2.0
"""Builds the native extension: one set of parameters for setup.py and for building at first use.

`python -m spade_fast.native.build` builds it now for this machine, and shows the compiler's own words when it fails.

The extension is a library of torch operators and links to no Python: C++ for the CPU always; CUDA kernels whenever nvcc
is found, also beside a torch without CUDA. setup.py runs this file by its path where nothing is installed yet, so it
imports nothing but the standard library, and torch when parameters are asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

DEFAULT_ARCHITECTURES = ("80", "90a", "100", "120")
_PACKAGE = Path(__file__).resolve().parents[1]


class BuildError(RuntimeError):
    """The extension can not be built; the message says why and what to do."""


def csrc() -> Path:
    """The directory of the sources, in an installed package or in a checkout.

    Raises:
        BuildError: it is in neither.
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
    """Where nvcc's toolkit is, by its own word: the nvcc on the PATH may be a script or a link."""
    command = [str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(found.group(1)).resolve() if found else nvcc.parent.parent


def architectures(nvcc: Path, otherwise: str = "") -> list[str]:
    """-gencode options for TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"), without it for `otherwise`, a list of the same form,
    and without either for those of the default list that nvcc knows.

    Raises:
        BuildError: a list of another form, or nvcc does not run.
    """
    asked = (os.environ.get("TORCH_CUDA_ARCH_LIST") or otherwise).replace(" ", ";")
    if asked:
        codes = [a.removesuffix("+PTX").replace(".", "") for a in asked.split(";") if a]
        ptx = [a.removesuffix("+PTX").replace(".", "") for a in asked.split(";") if a.endswith("+PTX")]
        for code in codes:
            if not re.fullmatch(r"\d{2,3}[af]?", code):
                raise BuildError(f"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0a+PTX', got {asked!r}")
    else:
        known = _output([str(nvcc), "--list-gpu-code"])
        codes = [a for a in DEFAULT_ARCHITECTURES if f"sm_{a.rstrip('a')}" in known]
        ptx = codes[-1:]
    options = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in codes]
    return options + [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Everything that decides what the extension is; equal parameters and sources give the same extension."""

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

    def stamp(self) -> dict:
        """What is written beside the library, for loading and for `spade_fast.info`."""
        return {**dataclasses.asdict(self), "sources": sources_hash(bool(self.nvcc))}


def sources_hash(cuda: bool) -> str:
    """Hash of the files of csrc that an extension with or without CUDA kernels is made of."""
    digest = hashlib.sha256()
    for path in sorted(csrc().glob("*.*")):
        if path.suffix in (".cpp", ".h") + ((".cu", ".cuh") if cuda else ()) and (cuda or path.name not in _CUDA_ONLY):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


_CUDA_ONLY = ("cuda_bindings.cpp", "launchers.h")


def parameters(cuda: bool = True, otherwise: str = "") -> Parameters:
    """The parameters for this machine and its torch. otherwise: see `architectures`.

    Raises:
        BuildError: no torch, no C++ compiler, one that does not run, or a wrong TORCH_CUDA_ARCH_LIST.
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


def ninja_file(p: Parameters, library: Path) -> str:
    """The build as text for ninja."""
    source, torch = csrc(), Path(p.torch_directory)
    includes = [source, torch / "include"]
    defines = [f"-D_GLIBCXX_USE_CXX11_ABI={p.abi}"]
    link = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    files = sorted(source.glob("*.cpp"))
    if p.nvcc:
        home = cuda_home(Path(p.nvcc))
        includes.append(home / "include")
        defines.append("-DSPADE_FAST_CUDA")
        link += [f"-L{home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        files += sorted(source.glob("*.cu"))
    else:
        files = [f for f in files if f.name not in _CUDA_ONLY]
    include = " ".join(f"-isystem {_escape(i)}" if i != source else f"-I{_escape(i)}" for i in includes)
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {p.cxx} -MMD -MF $out.d -std=c++20 -O3 -fPIC -fvisibility=hidden -fopenmp -Wall"
        " -fno-math-errno -fno-trapping-math"  # results stay the same, branches in loops vectorize
        f" {' '.join(defines)} {include} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {p.nvcc} -std=c++17 -O3 --threads 2 -MD -MF $out.d -Xcompiler -fPIC,-fvisibility=hidden"
        f" {' '.join(p.gencode)} -I{_escape(source)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {p.cxx} -shared -fopenmp $in -o $out {' '.join(link)}",
    ]
    objects = []
    for file in files:
        objects.append(f"{file.name}.o")
        lines.append(f"build {objects[-1]}: {'nvcc' if file.suffix == '.cu' else 'cxx'} {_escape(file)}")
    lines += [f"build {_escape(library)}: link {' '.join(objects)}", f"default {_escape(library)}", ""]
    return "\n".join(lines)


def _escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def build(directory: Path, p: Parameters) -> Path:
    """Compiles the extension in directory (which keeps the objects) and returns the library.

    Raises:
        BuildError: with the end of the compiler's output.
    """
    ninja = _ninja()
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / "_C.so"
    (directory / "build.ninja").write_text(ninja_file(p, library))
    command = [ninja, "-C", str(directory)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"compiling the extension failed:\n{done.stdout[-4000:]}")
    (directory / "_C.json").write_text(json.dumps(p.stamp(), indent=1) + "\n")
    return library


def _ninja() -> str:
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found:
            return found
    raise BuildError("ninja is not installed: pip install ninja")


def cache_directory() -> Path:
    """Where extensions built at first use are kept: SPADE_FAST_CACHE, or spade_fast in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("SPADE_FAST_CACHE") or os.path.join(cache, "spade_fast"))


def build_cached(p: Parameters, retry: bool = False) -> Path:
    """The library for these parameters, built now unless it was before; safe under several processes.

    A failure is remembered until sources, torch or compiler change; retry tries again nevertheless.

    Raises:
        BuildError: see `build`.
    """
    import fcntl

    directory = cache_directory() / p.key()
    library, failure = directory / "_C.so", directory / "failed.txt"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:  # released by the system when the process ends, however it ends
        fcntl.flock(lock, fcntl.LOCK_EX)
        if retry:
            failure.unlink(missing_ok=True)
        if failure.exists():
            raise BuildError(f"{failure.read_text()}\n(remembered; try again with `python -m spade_fast.native.build`)")
        if not (library.exists() and (directory / "_C.json").exists()):
            print("spade_fast: building the native extension, once (a minute or two) ...", file=sys.stderr, flush=True)
            try:
                finished = build(directory / f"build-{os.getpid()}", p)
                os.replace(finished.with_suffix(".json"), directory / "_C.json")
                os.replace(finished, library)
            except BuildError as error:
                failure.write_text(str(error))
                raise
            finally:
                shutil.rmtree(directory / f"build-{os.getpid()}", ignore_errors=True)
    return library


def local_parameters() -> Parameters:
    """Parameters for this machine alone: CUDA kernels for the GPUs that are there, none without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return parameters(cuda=False)
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    names = [f"{major}.{minor}" + ("a" if major == 9 else "") for major, minor in sorted(found)]
    return parameters(otherwise=";".join(names))


def main() -> int:
    try:
        print(build_cached(local_parameters(), retry=True))
    except BuildError as error:
        print(f"spade_fast.native.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
