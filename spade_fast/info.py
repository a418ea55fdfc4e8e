# SPDX-License-Identifier: Apache-2.0
"""`python -m spade_fast.info`: versions, devices, the native extension, and the backend that each operation takes.

A backend that can not run is listed with the reason. The command builds nothing.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from spade_fast import __version__
from spade_fast.native import details, loader, toolchain
from spade_fast.ops import _backend


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> list[str]:
    try:
        stamp = loader.load()
    except RuntimeError as error:
        return [str(error).replace("no native extension:", "native extension: none:", 1)]
    lines = [f"native extension: {stamp['path']} ({stamp['cxx_version']})"]
    try:
        about = details.about()
        lines.append(f"  build {about['key']}; its CPU loops use the {about['instruction_set']} instructions")
    except RuntimeError as error:
        lines.append(f"  no further details: {error}")
    if not stamp["nvcc"]:
        return [*lines, "  without CUDA kernels: nvcc was not found, or there is no GPU to build them for"]
    lines.append(f"  CUDA kernels for {toolchain.codes(stamp['gencode'])} ({stamp['nvcc_version']})")
    return lines + _kernels()


def _kernels() -> list[str]:
    """A line for each CUDA kernel: the most registers and local bytes and the least occupancy of its variants."""
    try:
        rows = details.kernels()
    except RuntimeError as error:
        return [f"  the kernels' registers and occupancy were not measured: {error}"]
    lines = []
    for kernel in sorted({row["kernel"] for row in rows}):
        same = [row for row in rows if row["kernel"] == kernel]
        registers, local = (max(row[key] for row in same) for key in ("registers", "local_bytes"))
        occupancy = min(row["occupancy"] for row in same)
        lines.append(f"  {kernel}: {registers} registers, {local} local bytes, occupancy {occupancy:.0%}")
    return lines


def _backends(device: str) -> list[str]:
    lines = [f"backends for {device} tensors:"]
    lines += [f"  {name}: {_backend.why_not(name, device) or 'available'}" for name in _backend.NAMES]
    lines.append(f"operations on {device} tensors run on:")
    for op in _backend.OPS:
        try:
            lines.append(f"  {op}: {_backend.choose(op, torch.device(device))}")
        except RuntimeError as error:
            lines.append(f"  {op}: {error}")
    return lines


def report() -> str:
    """The whole text."""
    lines = [f"spade_fast {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(f"torch {torch.__version__} (CUDA {torch.version.cuda}), triton {_version('triton')}")
    devices = ["cpu"]
    lines.append(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        devices.append("cuda")
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    else:
        lines.append("cuda: no GPU is visible to torch")
    with loader.without_building():
        try:
            lines += _extension()
            for device in devices:
                lines += _backends(device)
        finally:
            _backend.forget_choices()  # an extension that is built later changes them
    return "\n".join(lines)


def main() -> int:
    """Prints the report. Returns the exit status."""
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
