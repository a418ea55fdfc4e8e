# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and shared memory of every Triton kernel and config, compiled ahead of time: no GPU needed.

    python -m benchmarks.tools.resources [--arch 80 90 100 120] [--thorough] [--json FILE]

The launchers themselves are called on small CPU tensors, and Triton's launch is replaced by a compilation for the
architecture. So what is compiled is what a GPU would run. The command fails when a kernel spills, or needs more shared
memory than the architecture has. Where nvcc is found, the CUDA kernels follow (benchmarks.tools.cuda_resources).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tools import cuda_resources
from spade_fast.native.toolchain import find_nvcc

if TYPE_CHECKING:  # the process that starts the others does without torch
    import torch
    from torch import Tensor

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may use


def _driver(arch: int) -> Any:
    """A stand-in for Triton's CUDA driver. It names the architecture and can do everything but launch."""
    import torch
    from triton.backends.compiler import GPUTarget

    class Driver:
        launcher_cls = None

        class utils:
            @staticmethod
            def get_device_properties(device: int) -> dict:
                return {"max_shared_mem": SHARED_LIMIT[arch], "multiprocessor_count": 132}

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return arch  # Triton caches compiled kernels by device

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def set_current_device(self, device: int) -> None:
            pass

        def is_active(self) -> bool:
            return True

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

    return Driver()


@contextlib.contextmanager
def _compile_instead_of_launching(arch: int, found: list[tuple[str, dict[str, Any], Any]]) -> Iterator[None]:
    """Inside, kernel[grid](...) compiles every config and appends (name, constants, compiled kernel) to `found`."""
    import torch
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launch, tune, empty = JITFunction.run, Autotuner.run, torch.empty

    def compile_(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, kwargs, compiled))
        return compiled

    def every_config(self: Any, *args: Any, **kwargs: Any) -> None:
        for config in self.configs:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    def zeros(*args: Any, **kwargs: Any) -> Tensor:  # no launcher may use uninitialized memory as an index
        return empty(*args, **kwargs).zero_()

    JITFunction.run, Autotuner.run, torch.empty = compile_, every_config, zeros
    driver.set_active(_driver(arch))
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run, torch.empty = launch, tune, empty


def cases(thorough: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, call) of every kernel in the variants that change its code: dtype, layout, outputs, upsampling, tables.

    Without `thorough`, modulation has only its commonest variant, and its largest variants, which could spill.
    """
    import torch
    from spade_fast.kernels.embedding_sum import embedding_sum, embedding_sum_backward
    from spade_fast.kernels.label_conv import label_conv, label_conv_backward
    from spade_fast.kernels.modulation import modulation
    from spade_fast.kernels.modulation_backward import modulation_backward
    from spade_fast.kernels.normalization_gradient import normalization_gradient
    from spade_fast.kernels.pattern_params import _gather_gemm, pattern_params
    from spade_fast.kernels.patterns import finish, patterns
    from spade_fast.kernels.segments import segment_sum, segments
    from spade_fast.kernels.statistics import statistics

    n, c, size, hidden, rows = 2, 128, 16, 128, 184
    image = torch.zeros(n, size, size, dtype=torch.int32)
    codes = torch.zeros(64, 9, dtype=torch.int32)

    def activation(dtype: torch.dtype, channels_last: bool, up: int = 1, channels: int = c) -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.zeros(n, channels, size * up, size * up, dtype=dtype).contiguous(memory_format=layout)

    def modulate(
        dtype: torch.dtype, channels_last: bool, outputs: int, up: int, dense: bool, norm: int, channels: int = c
    ) -> Callable[[], None]:
        def run() -> None:
            x = activation(dtype, channels_last, channels=channels)
            pattern_ids = order = offsets = None
            if dense:
                params = [activation(dtype, channels_last, up, 2 * channels) for _ in range(outputs)]
            else:
                params = [torch.zeros(32, 2 * channels, dtype=dtype) for _ in range(outputs)]
                pattern_ids = torch.arange(n * (size * up) ** 2, dtype=torch.int32).view(n, size * up, size * up) % 32
                order, offsets = segments(pattern_ids, 32)
            mean = torch.zeros(norm, channels) if norm else None
            args = (x, mean, mean, params, pattern_ids, order, offsets, [0.2, 1.0][:outputs], up, True)
            modulation_backward(modulation(*args), *args)

        return run

    half, full = torch.bfloat16, torch.float32
    for dtype in (half, full):
        name = str(dtype).removeprefix("torch.")
        table = torch.zeros(9, rows, hidden, dtype=dtype)
        hidden_rows = torch.zeros(64, hidden, dtype=dtype)
        for edges in (False, True):
            what = f"{name} edges={int(edges)}"
            yield f"embedding_sum {what}", partial(embedding_sum, table, table[0, 0], codes, edges, True)
        backward = partial(embedding_sum_backward, hidden_rows, hidden_rows, codes, rows, True, True)
        yield f"embedding_sum backward {name}", backward
        wide = torch.zeros(16, rows, 64, dtype=dtype)
        for pooled in (False, True):
            what = f"{name} pooled={int(pooled)}"
            yield f"label_conv {what}", partial(label_conv, image, wide, None, True, 4, 2, 2, pooled)
            dout = label_shape(dtype, n, size, pooled)
            yield f"label_conv backward {what}", partial(label_conv_backward, dout, image, rows, True, 4, 2, 2, pooled)
        for channels_last in (True, False):
            layout = "channels-last" if channels_last else "NCHW"
            for per_sample in (False, True):
                yield f"statistics {name} {layout}", partial(statistics, activation(dtype, channels_last), per_sample)
            x, sums = activation(dtype, channels_last), torch.zeros(c)
            yield f"normalization_gradient {name} {layout}", partial(normalization_gradient, x, x, sums, sums)
            variants = [(2, 2, False, n), (2, 2, True, n)]
            if channels_last and dtype == half:
                variants += [(1, 1, False, 1)]
            if thorough:
                variants += [(1, 1, False, 1), (2, 1, False, 1), (1, 2, False, 1), (1, 1, True, 1), (1, 1, False, 0)]
            for outputs, up, dense, norm in variants:
                kind = "dense" if dense else "patterns"
                what = f"modulation {name} {layout} outputs={outputs} ×{up} {kind} norm={norm}"
                yield what, modulate(dtype, channels_last, outputs, up, dense, norm)
        if thorough:
            yield f"modulation {name} C=1000", modulate(dtype, True, 1, 1, False, 1, channels=1000)
            yield f"modulation {name} C=33", modulate(dtype, True, 2, 2, False, 1, channels=33)
        weight = torch.zeros(c, hidden, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
        bias = weight[:, 0, 0, 0]
        yield f"pattern_params {name}", partial(pattern_params, hidden_rows, codes, weight, bias, weight, bias)

        def sum_rows(dtype: torch.dtype = dtype) -> None:
            values = torch.zeros(200, 2 * c, dtype=dtype)
            segment_sum(values, codes.view(-1), *segments(codes, 4), per_row=9, dtype=dtype)

        yield f"segment_sum {name}", sum_rows
    a, out = torch.zeros(64, hidden), torch.zeros(64, 2 * c)
    yield (
        "pattern_params tf32",
        lambda: _gather_gemm[(1, 1)](
            a, codes, out, out, a, a, out, 64, HD=hidden, T=9, C=c, PRECISION="tf32", BLOCK_K=32
        ),
    )
    for k in (1, 3, 5):
        yield f"patterns k={k}", partial(patterns, image, k)
    yield "patterns, from their keys on", lambda: finish(image, torch.arange(image.numel()), 3)


def label_shape(dtype: torch.dtype, n: int, size: int, pooled: bool) -> Tensor:
    """A gradient of label_conv's output for a 4×4 stride-2 pad-2 convolution."""
    import torch

    size = (size - 1) // 2 + 1 if pooled else size
    return torch.zeros(n, 64, size // 2 + 1, size // 2 + 1, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _find(pattern: str, text: str) -> re.Match[str]:
    """The match that the output of a tool must have."""
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"benchmarks.tools.resources: {pattern!r} is not in {text[-500:]!r}")
    return match


def _run(tool: str, *arguments: object) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _spills(ptx: str, folder: Path) -> int:
    """Bytes of spill stores and loads, by ptxas."""
    target = _find(r"\.target (sm_\d+a?)", ptx)[1]
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    tool = "ptxas-blackwell" if int(_find(r"\d+", target)[0]) >= 100 else "ptxas"
    log = _run(tool, "-v", f"--gpu-name={target}", source, "-o", folder / "kernel.cubin")
    return sum(int(number) for number in _find(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups())


def _resources(compiled: Any) -> dict[str, Any]:
    """Registers by cuobjdump, spilled bytes by ptxas, shared bytes and warps by Triton."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        log = _run("cuobjdump", "--dump-resource-usage", folder / "kernel.cubin")
        registers, stack = map(int, _find(r"REG:(\d+) STACK:(\d+)", log).groups())
        # A kernel without a stack has no spills, so only the others need ptxas, which is slow.
        spills = _spills(compiled.asm["ptx"], folder) if stack else 0
    return {
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "wgmma": "wgmma" in compiled.asm["ptx"],
    }


def compile_all(arch: int, thorough: bool) -> list[dict[str, Any]]:
    """Every kernel and config for sm_`arch`: dicts of case, kernel, tile, registers, spills (bytes), shared (bytes)."""
    rows, seen = [], set()
    for what, call in cases(thorough):
        found: list = []
        with _compile_instead_of_launching(arch, found):
            call()
        if not found:
            raise RuntimeError(f"benchmarks.tools.resources: case {what!r} launches no kernel")
        for name, options, compiled in found:
            if compiled.hash in seen:
                continue
            seen.add(compiled.hash)
            tile = {k: v for k, v in options.items() if k in ("TILE", "R", "BLOCK", "BLOCK_C", "BLOCK_M", "BLOCK_N")}
            rows.append({"arch": arch, "case": what, "kernel": name, "tile": tile, **_resources(compiled)})
    return rows


def _in_own_process(arch: int, thorough: bool) -> list[dict[str, Any]]:
    """compile_all in a process where the interpreter is off, whatever this one runs under."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    flags = ["--thorough"] if thorough else []
    command = [sys.executable, "-m", "benchmarks.tools.resources", "--only", str(arch), *flags]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if done.returncode:
        raise RuntimeError(f"compiling for sm_{arch} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(archs: list[int], thorough: bool, jobs: int | None = None) -> list[dict[str, Any]]:
    """Rows of compile_all for several architectures, compiled in parallel processes."""
    with ThreadPoolExecutor(jobs or min(len(archs), os.cpu_count() or 1)) as pool:
        return [row for rows in pool.map(lambda arch: _in_own_process(arch, thorough), archs) for row in rows]


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """A line for every kernel that spills or wants more shared memory than its architecture has."""
    return [
        f"sm_{r['arch']} {r['kernel']} {r['tile']} ({r['case']}): {r['spills']} bytes spilled, {r['shared']} shared"
        for r in rows
        if r["spills"] or r["shared"] > SHARED_LIMIT[r["arch"]]
    ]


def summary(rows: list[dict[str, Any]]) -> str:
    """A table: per kernel and architecture, compiled variants and the largest of each resource."""
    lines = [f"{'kernel':26}{'arch':>6}{'variants':>10}{'registers':>11}{'spills':>8}{'shared':>9}"]
    for kernel, arch in sorted({(r["kernel"], r["arch"]) for r in rows}):
        same = [r for r in rows if (r["kernel"], r["arch"]) == (kernel, arch)]
        most = [max(r[key] for r in same) for key in ("registers", "spills", "shared")]
        lines.append(f"{kernel:26}{arch:>6}{len(same):>10}{most[0]:>11}{most[1]:>8}{most[2]:>9}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    parser.add_argument("--thorough", action="store_true", help="all variants of modulation, too")
    parser.add_argument("--json", type=Path, help="write every row here")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(compile_all(options.only, options.thorough)))
        return
    rows = measure(options.arch, options.thorough)
    print(summary(rows))
    found, cuda = faults(rows), []
    if find_nvcc() is not None:
        cuda = cuda_resources.measure(options.arch)
        print(cuda_resources.summary(cuda))
        cuda += cuda_resources.rows_on_device()
        found += cuda_resources.faults(cuda)
    if options.json:
        options.json.write_text(json.dumps(rows + cuda, indent=1))
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
