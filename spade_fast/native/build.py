# SPDX-License-Identifier: Apache-2.0
"""Builds the native extension: one set of parameters for setup.py and for building at first use.

`python -m spade_fast.native.build` builds it now for this machine, and shows the compiler's own words when it fails.

The extension is a library of torch operators and links to no Python. It holds C++ for the CPU, and CUDA kernels
whenever nvcc is found, also beside a torch without CUDA. A small pybind11 module beside it (csrc/python) says what the
library is made of; everything but that report works without the module.

setup.py uses this module where nothing is installed yet. So it imports only the standard library, and torch and
pybind11 inside the functions that need them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

from .toolchain import (
    INFO_MODULE,
    INFO_SOURCE,
    BuildError,
    Parameters,
    codes,
    csrc,
    cuda_home,
    local_parameters,
    source_files,
)

_TICK, _TICK_IN_LOG = 1, 15  # seconds between two reports of progress


def ninja_file(p: Parameters, library: Path) -> str:
    """The text of a ninja file that builds `library`."""
    source, torch = csrc(), Path(p.torch_directory)
    includes = [source, torch / "include"]
    defines = [f"-D_GLIBCXX_USE_CXX11_ABI={p.abi}"]
    link = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    if p.nvcc:
        home = cuda_home(Path(p.nvcc))
        includes.append(home / "include")
        link += [f"-L{home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    include = " ".join(f"-isystem {_escape(i)}" if i != source else f"-I{_escape(i)}" for i in includes)
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {p.cxx} -MMD -MF $out.d -std=c++20 -O3 -fPIC -fvisibility=hidden -fopenmp -Wall"
        " -fno-math-errno -fno-trapping-math"  # results stay the same, branches in loops vectorize
        f" {' '.join(defines)} $defines {include} -c $in -o $out",
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
    for file in source_files(bool(p.nvcc), ".cpp", ".cu"):
        objects.append(f"{file.relative_to(source)}.o")
        lines.append(f"build {objects[-1]}: {'nvcc' if file.suffix == '.cu' else 'cxx'} {_escape(file)}")
        if file.name == "about.cpp":
            lines.append(f"  defines = {_text_macro('KEY', p.key())} {_text_macro('ARCHITECTURES', codes(p.gencode))}")
    lines += [f"build {_escape(library)}: link {' '.join(objects)}", f"default {_escape(library)}", ""]
    return "\n".join(lines)


def _text_macro(name: str, text: str) -> str:
    return f"'-DSPADE_FAST_{name}=\"{text}\"'"


def _escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def build(directory: Path, p: Parameters) -> Path:
    """Compiles the extension, and shows on stderr how far it is.

    Args:
        directory: Where to compile. It keeps the objects.
        p: What to build.

    Returns:
        The library. Its stamp lies beside it.

    Raises:
        BuildError: The message has the end of the compiler's output.
    """
    ninja = _ninja()
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / "_C.so"
    (directory / "build.ninja").write_text(ninja_file(p, library))
    command = [ninja, "-C", str(directory)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    code, output = _run_watched(command)
    if code:
        raise BuildError(f"compiling the extension failed:\n{output[-4000:]}")
    library.with_suffix(".json").write_text(json.dumps(p.stamp(), indent=1) + "\n")
    return library


def _run_watched(command: list[str]) -> tuple[int, str]:
    """Runs ninja and reports its progress. Returns its exit status and its output."""
    output: list[str] = []
    start, on_terminal = time.monotonic(), sys.stderr.isatty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                output.append(line)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while True:
                try:
                    process.wait(timeout=_TICK if on_terminal else _TICK_IN_LOG)
                    break
                except subprocess.TimeoutExpired:
                    done = [found for line in output[-20:] if (found := re.match(r"\[(\d+)/(\d+)\]", line))]
                    steps = f"step {done[-1][1]} of {done[-1][2]}" if done else "starting"
                    _say(f"building, {steps}, {time.monotonic() - start:.0f} s", "\r" if on_terminal else "\n")
        except BaseException:
            process.terminate()  # ninja ends its compilers first
            raise
        reader.join()
    if on_terminal and time.monotonic() - start >= 1:
        print(file=sys.stderr)
    return process.returncode, "".join(output)


def _say(text: str, end: str = "\n") -> None:
    print(f"spade_fast: {text}", end=end, file=sys.stderr, flush=True)


def build_info_module(directory: Path, p: Parameters) -> None:
    """Compiles the Python module that reports on the library, into directory.

    Raises:
        BuildError: pybind11 or Python's headers are missing, or the compiler fails.
    """
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise BuildError(f"Python.h is not in {python}: install Python's development files")
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is not installed: pip install pybind11") from None
    with_key = f'-DSPADE_FAST_KEY="{p.key()}"'
    options = ["-shared", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", with_key]
    includes = [f"-I{csrc()}", "-isystem", pybind11.get_include(), "-isystem", str(python)]
    command = [*p.cxx.split(), *options, *includes, str(csrc() / INFO_SOURCE), "-o", str(directory / INFO_MODULE)]
    done = subprocess.run([*command, "-ldl"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"compiling {INFO_SOURCE} failed:\n{done.stdout[-4000:]}")


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
    """Where extensions built at first use are kept: SPADE_FAST_CACHE, else spade_fast in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("SPADE_FAST_CACHE") or os.path.join(cache, "spade_fast"))


def cached(p: Parameters) -> Path | None:
    """The library for these parameters if it was built before, else None."""
    library = cache_directory() / p.key() / "_C.so"
    return library if library.exists() and library.with_suffix(".json").exists() else None


def failure(p: Parameters) -> str | None:
    """Why the last build with these parameters failed, or None."""
    try:
        return (cache_directory() / p.key() / "failed.txt").read_text()
    except FileNotFoundError:
        return None


def build_cached(p: Parameters, retry: bool = False, reason: str = "") -> Path:
    """The library for these parameters, built now unless it was built before. Safe under several processes.

    A failure is remembered until sources, torch or compiler change.

    Args:
        p: What to build.
        retry: Whether to try again after a remembered failure, and to add the Python module where it is missing.
        reason: Why no other library serves, for the line that announces the build.

    Raises:
        BuildError: See `build`.
    """
    import fcntl

    directory = cache_directory() / p.key()
    failed = directory / "failed.txt"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:  # the system releases it when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process builds the native extension; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if retry:
            failed.unlink(missing_ok=True)
        if known := failure(p):
            raise BuildError(f"{known}\n(remembered; try again with `python -m spade_fast.native.build`)")
        library = cached(p)
        if library is None or (retry and not (directory / INFO_MODULE).exists()):
            work = directory / f"build-{os.getpid()}"
            try:
                if library is None:
                    library = _build_into(directory, work, p, reason)
                _add_info_module(directory, work, p)
            except BuildError as error:
                failed.write_text(str(error))
                raise
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return library


def _build_into(directory: Path, work: Path, p: Parameters, reason: str) -> Path:
    """Builds the library in work and moves it to directory."""
    start = time.monotonic()
    why = f" ({reason})" if reason else ""
    _say(f"building the native extension for this machine, once{why}. It takes a minute or two.")
    _say("SPADE_FAST_BUILD=0 in the environment leaves it out: operations then run on slower backends.")
    finished, library = build(work, p), directory / "_C.so"
    os.replace(finished.with_suffix(".json"), library.with_suffix(".json"))
    os.replace(finished, library)
    _say(f"built in {time.monotonic() - start:.0f} s: {library}")
    return library


def _add_info_module(directory: Path, work: Path, p: Parameters) -> None:
    """Builds the Python module beside the library. The library works without the module, so a failure is only told."""
    work.mkdir(exist_ok=True)
    try:
        build_info_module(work, p)
        os.replace(work / INFO_MODULE, directory / INFO_MODULE)
    except BuildError as error:
        _say(f"the module that reports on the extension was not built: {error}")


def main() -> int:
    """Builds the extension for this machine and prints the library's path. Returns the exit status."""
    try:
        print(build_cached(local_parameters(), retry=True))
    except BuildError as error:
        print(f"spade_fast.native.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
