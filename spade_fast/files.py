# SPDX-License-Identifier: Apache-2.0
"""Files and streams of the commands: one line for an error of the system, files of tensors, closed pipes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


class WriteError(RuntimeError):
    """A file or directory can't be written. The message names it and the cause."""


def cause(error: OSError) -> str:
    """What the system says about an error, without its number and path."""
    return error.strerror or str(error) or type(error).__name__


def one_line(error: OSError) -> str:
    """Path and cause of an error of the system."""
    return cause(error) if error.filename is None else f"{os.fsdecode(error.filename)}: {cause(error)}"


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError into a WriteError that names the path. The system's error on a full disk does not."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {cause(error)}") from error


def require_writable(directory: str | os.PathLike) -> None:
    """Checks that a directory can be written, or made where it is missing. Writes nothing.

    Raises:
        WriteError: it can't, or the path is not a directory.
    """
    path = Path(os.path.abspath(directory))
    with writing(directory):
        while True:
            try:
                os.stat(path)
                break
            except FileNotFoundError:
                path = path.parent
        if not path.is_dir():
            raise NotADirectoryError(None, f"{path} is not a directory")
        if not os.access(path, os.W_OK | os.X_OK):
            read_only = os.statvfs(path).f_flag & os.ST_RDONLY
            raise OSError(None, f"{path} is on a read-only file system" if read_only else f"no permission in {path}")


def load_tensors(path: str | os.PathLike) -> object:
    """Tensors and plain containers of a file, on the CPU. No code in the file is run.

    Args:
        path: a file of `torch.save`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file can't be read. The message is one line and says what the file seems to be.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # an error follows, which says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many types for broken files
        raise ValueError(_why_unreadable(path, error)) from error


def _why_unreadable(path: str | os.PathLike, error: Exception) -> str:
    """What a file seems to be. The message of torch is not shown: it advises to run the code in the file."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            size = os.fstat(file.fileno()).st_size
        archive = zipfile.is_zipfile(path)
    except OSError as unreadable:
        return cause(unreadable)
    if size == 0:
        return "it is empty"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, not the file that was to be downloaded"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: the file itself was not downloaded"
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < size:
        return "it is a safetensors file, not one of torch.save"
    if head.startswith(b"PK"):
        if not archive:
            return "it is cut off or damaged"
        with zipfile.ZipFile(path) as file:
            if not any(name.endswith("data.pkl") for name in file.namelist()):
                return "it is a zip archive, not a file of torch.save"
    kind = re.search(r"GLOBAL ([\w.]+)|(?:class|type|Unsupported \w+) ([\w.]+)", str(error))
    if head.startswith(b"PK") or head[:1] == b"\x80":
        if "nsupported" in str(error) or "GLOBAL" in str(error):
            name = f" ({kind[1] or kind[2]})" if kind else ""
            return f"it holds objects other than tensors and plain containers{name}, which could run code: not loaded"
        return "it is cut off or damaged"
    return "it is not a file of torch.save"


def program(command: str) -> str:
    """How a user starts a command of the package, the way this process was started.

    Args:
        command: a module of the package that is a command, with further words: "data check".
    """
    started = Path(sys.argv[0])
    if started.name == "spade-fast":
        return f"spade-fast {command}"
    if started.name == "__main__.py" and started.parent.name == "spade_fast":
        return f"python -m spade_fast {command}"
    return f"python -m spade_fast.{command}"


def run_command(main: Callable[[], int]) -> int:
    """Runs a command whose output may be closed early (`| head`), may not know every character, or that Ctrl-C ends.

    Args:
        main: the command; returns its exit status.

    Returns:
        The exit status: that of the command, 141 for a closed output, 130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())  # Python flushes once more at its end: that must not fail again
        return 141  # 128 + SIGPIPE, as of a program that the signal ends
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return 130  # 128 + SIGINT
