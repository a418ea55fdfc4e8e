# SPDX-License-Identifier: Apache-2.0
"""Registers, spills, shared memory and occupancy of the CUDA kernels in csrc/cuda, as nvcc reports them.

    python -m benchmarks.tools.cuda_resources [--arch 80 90 100 120] [--json FILE]

No GPU is needed. Where there is one, the kernels of the loaded extension are measured on it too. The command fails when
a kernel spills. nvcc's rows are kept in the temporary directory until the sources change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spade_fast.native import details
from spade_fast.native.toolchain import csrc, cuda_home, find_nvcc

Row = dict[str, Any]  # of a kernel's variant: arch, file, kernel, variant, registers, spills, shared, occupancy
THREADS = 256  # of every block: kThreads in csrc/cuda/kernel_list.h
TARGETS = {80: "80", 90: "90a", 100: "100", 120: "120"}
# Warps, blocks and bytes of shared memory of a multiprocessor. All have 65,536 registers.
LIMITS = {80: (64, 32, 167936), 90: (64, 32, 233472), 100: (64, 32, 233472), 120: (48, 24, 102400)}


def occupancy(arch: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's warps that registers, shared memory and the limit of blocks let be resident."""
    warps, most_blocks, shared_bytes = LIMITS[arch]
    of_block = THREADS // 32
    of_warp = -(-registers * 32 // 256) * 256  # registers are allocated 256 at a time
    shared = -(-(shared + 1024) // 128) * 128  # the system needs 1 KiB of a block
    blocks = min(warps // of_block, most_blocks, 65536 // (of_warp * of_block), shared_bytes // shared)
    return blocks * of_block / warps


def kernel_of(mangled: str) -> str | None:
    """The kernel's name in a mangled name of namespace spade_fast, or None. A mangled name is _ZN<length><name>...

    >>> kernel_of("_ZN10spade_fast12_GLOBAL__N_118embedding_x_kernelILi4EEEvv")
    'embedding_x_kernel'
    """
    names, rest = [], mangled.removeprefix("_ZN")
    while found := re.match(r"\d+", rest):
        start, end = found.end(), found.end() + int(found[0])
        names.append(rest[start:end])
        rest = rest[end:]
    return names[-1] if names[:1] == ["spade_fast"] and names[-1].endswith("_kernel") else None


def parse(log: str, file: str) -> list[Row]:
    """Rows of one file's kernels from the output of ptxas -v, without CUB's kernels."""
    rows = []
    pattern = (
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)a?'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
    )
    for match in re.finditer(pattern, log, re.DOTALL):
        kernel = kernel_of(match["name"])
        if kernel is None:
            continue
        arch, registers = int(match["arch"]), int(match["registers"])
        found = re.search(r"(\d+) bytes smem", match["rest"])
        shared = int(found.group(1)) if found else 0
        rows.append(
            {
                "arch": arch,
                "file": file,
                "kernel": kernel,
                "variant": match["name"],
                "registers": registers,
                "spills": int(match["stores"]) + int(match["loads"]),
                "shared": shared,
                "occupancy": occupancy(arch, registers, shared),
            }
        )
    return rows


def compile_file(source: Path, archs: list[int]) -> list[Row]:
    """Rows of every kernel in one .cu file.

    Raises:
        RuntimeError: With nvcc's words, when the file does not compile.
    """
    nvcc = find_nvcc()
    targets = [f"-gencode=arch=compute_{TARGETS[a]},code=sm_{TARGETS[a]}" for a in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc), "-std=c++17", "-O3", "-fatbin", "-Xptxas", "-v", *targets, f"-I{csrc()}", str(source)]
        done = subprocess.run([*command, "-o", f"{folder}/out"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source}:\n{done.stderr[-4000:]}")
    return parse(done.stdout + done.stderr, source.name)


def measure(archs: list[int], jobs: int | None = None) -> list[Row]:
    """Rows of every kernel for the architectures, compiled in parallel or taken from the last time."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("benchmarks.tools.cuda_resources: nvcc was not found")
    directory = csrc() / "cuda"
    sources = sorted(directory.glob("*.cu"))
    digest = hashlib.sha256(f"{archs} {cuda_home(nvcc)}".encode() + Path(__file__).read_bytes())
    for file in (*sources, *sorted(directory.glob("*.cuh")), *sorted(directory.glob("*.h"))):
        digest.update(file.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"spade_fast_cuda_resources_{os.getuid()}_{digest.hexdigest()[:16]}.json"
    if kept.exists():
        rows: list[Row] = json.loads(kept.read_text())
        return rows
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        order = sorted(sources, key=lambda s: s.stat().st_size, reverse=True)  # the longest first
        rows = [row for found in pool.map(lambda s: compile_file(s, archs), order) for row in found]
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(rows))
    os.replace(part, kept)
    return rows


def measure_on_device() -> list[Row]:
    """Rows of every kernel of the loaded extension, as CUDA's runtime reports them on the present GPU.

    Raises:
        RuntimeError: There is no extension with CUDA kernels, no module that reports on it, or no GPU.
    """
    rows = details.kernels()
    if not rows:
        raise RuntimeError("the native extension has no CUDA kernels")
    import torch

    major, minor = torch.cuda.get_device_capability()
    return [
        {
            "arch": 10 * major + minor,
            "file": "on this device",
            "kernel": row["kernel"],
            "variant": row["variant"],
            "registers": row["registers"],
            "spills": row["local_bytes"],
            "shared": row["shared_bytes"],
            "occupancy": row["occupancy"],
        }
        for row in rows
    ]


def rows_on_device() -> list[Row]:
    """Rows of `measure_on_device`, or none after a line that says why there are none."""
    try:
        rows = measure_on_device()
    except RuntimeError as error:
        print(f"not measured on a GPU: {error}")
        return []
    print(f"on this device:\n{summary(rows)}")
    return rows


def faults(rows: list[Row]) -> list[str]:
    """A line for every kernel that spills."""
    return [
        f"sm_{r['arch']} {r['kernel']} ({r['file']}, {r['variant']}): {r['spills']} bytes spilled"
        for r in rows
        if r["spills"]
    ]


def summary(rows: list[Row]) -> str:
    """A table of kernels and architectures: the number of variants, the most of each resource, the least occupancy."""
    lines = [f"{'kernel':26}{'arch':>6}{'variants':>10}{'registers':>11}{'spills':>8}{'shared':>9}{'occupancy':>11}"]
    for kernel, arch in sorted({(r["kernel"], r["arch"]) for r in rows}):
        same = [r for r in rows if (r["kernel"], r["arch"]) == (kernel, arch)]
        most = [max(r[key] for r in same) for key in ("registers", "spills", "shared")]
        least = min(r["occupancy"] for r in same)
        lines.append(f"{kernel:26}{arch:>6}{len(same):>10}{most[0]:>11}{most[1]:>8}{most[2]:>9}{least:>11.0%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--json", type=Path, help="write every row here")
    options = parser.parse_args()
    rows = measure(options.arch)
    print(summary(rows))
    rows += rows_on_device()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if found := faults(rows):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
