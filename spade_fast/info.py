# SPDX-License-Identifier: Apache-2.0
"""`python -m spade_fast.info`: versions, devices, the backends of each device with the reason for each that is missing,
and which backend each operation takes."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from spade_fast import __version__
from spade_fast.native import loader as native
from spade_fast.ops import _backend


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> list[str]:
    try:
        stamp = native.load()
    except RuntimeError as error:
        return [f"native extension: {error}"]
    lines = [f"native extension: {stamp['path']} ({stamp['cxx_version']})"]
    if stamp["nvcc"]:
        codes = [option.rpartition("=")[2] for option in stamp["gencode"]]
        lines.append(f"  CUDA kernels for {', '.join(codes)} ({stamp['nvcc_version']})")
    else:
        lines.append("  without CUDA kernels: nvcc was not found, or no GPU is here to build them for")
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
    lines += _extension()
    for device in devices:
        lines.append(f"backends for {device} tensors:")
        for name in _backend.NAMES:
            lines.append(f"  {name}: {_backend.why_not(name, device) or 'available'}")
        lines.append(f"operations on {device} tensors run on:")
        for op in _backend.OPS:
            try:
                lines.append(f"  {op}: {_backend.choose(op, torch.device(device))}")
            except RuntimeError as error:
                lines.append(f"  {op}: {error}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(print(report()))
