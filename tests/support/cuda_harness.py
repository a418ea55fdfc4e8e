# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on CPU tensors: g++ compiles csrc/cuda/*.cu under cuda_on_cpu.h, and ctypes calls the launchers.

Outputs and workspace are full of NaN before a call. An element that is not written is still NaN afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spade_fast.native.toolchain import csrc, cuda_home, find_nvcc
from spade_fast.ops import _backend as backends

TESTS = Path(__file__).resolve().parent
ROUNDING = 2.0**-24  # of float32
NATIVE_OPS = (
    "patterns", "segments", "embedding_sum", "embedding_sum_backward", "statistics", "modulation", "modulation_backward"
)  # fmt: skip
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def why_not() -> str | None:
    """Why the kernels can not be compiled here, or None if they can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "cuda_on_cpu.h is for x86-64"
    if shutil.which("g++") is None:
        return "no g++"
    if find_nvcc() is None:
        return "no CUDA headers: nvcc was not found"
    return None


def compile_library(defines: tuple[str, ...] = (), flags: tuple[str, ...] = ("-O1",), only: str = "*") -> Path:
    """The shared library of csrc/cuda/<only>.cu, compiled unless one of the same sources and options is cached."""
    options = ["-std=c++17", *defines, *flags, "-x", "c++"]
    return _compile(sorted((csrc() / "cuda").glob(f"{only}.cu")), options, flags, "kernels.so")


def compile_bindings() -> Path:
    """csrc/cuda/bindings.cpp for CPU tensors, linked to the library of all kernels."""
    torch_directory, kernels = Path(torch.__file__).resolve().parent, compile_library()
    options = [
        "-std=c++20", "-O0", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-isystem{torch_directory / 'include'}", f"-DSPADE_FAST_TORCH={torch.__version__}",
    ]  # fmt: skip
    link = [str(kernels), f"-Wl,-rpath,{kernels.parent}", f"-L{torch_directory / 'lib'}", "-lc10", "-ltorch_cpu"]
    return _compile([csrc() / "cuda" / "bindings.cpp"], options, link, "bindings.so")


def _compile(sources: list[Path], options: list[str], link: list[str] | tuple[str, ...], name: str) -> Path:
    if reason := why_not():
        pytest.skip(reason)
    options = [*options, "-fPIC", "-DSPADE_FAST_ON_CPU", "-w", f"-I{TESTS}", f"-I{csrc()}"]
    nvcc = find_nvcc()
    assert nvcc is not None  # why_not has checked it
    options.append(f"-isystem{cuda_home(nvcc) / 'include'}")
    digest = hashlib.sha256(repr((options, link)).encode())
    for file in (*sources, *sorted((csrc() / "cuda").glob("*.*h")), TESTS / "cuda_on_cpu.h"):
        digest.update(file.name.encode() + file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"spade_fast_cuda_on_cpu_{os.getuid()}" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / name
    with open(folder / "lock", "w") as lock:  # one process compiles, the others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        with tempfile.TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:

            def compile_one(source: Path) -> str:
                target = f"{scratch}/{source.stem}.o"
                _run(["g++", "-c", *options, str(source), "-o", target])
                return target

            objects = list(pool.map(compile_one, sources))
            _run(["g++", "-shared", *objects, *link, "-o", f"{scratch}/{name}"])
            os.replace(f"{scratch}/{name}", library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


_library: list[torch.library.Library] = []


@contextlib.contextmanager
def as_backend() -> Iterator[None]:
    """Inside, the backend `cuda` takes CPU tensors: its bindings, which convert and allocate, and its kernels."""
    if not _library:
        _library.append(torch.library.Library("spade_fast_cuda_on_cpu", "DEF"))
        for op in NATIVE_OPS:
            schema = str(getattr(torch.ops.spade_fast, op).default._schema).replace("SymInt", "int")
            _library[0].define(schema.partition("::")[2])
        torch.ops.load_library(str(compile_bindings()))
    why_not, implementation = backends.why_not, backends.implementation

    def choose(op: str, torch_function: Callable, device: torch.device, module: str | None = None) -> Callable:
        if op in NATIVE_OPS and backends.choose(op, device) == "cuda":
            return backends.without_float64(getattr(torch.ops.spade_fast_cuda_on_cpu, op).default, torch_function)
        return implementation(op, torch_function, device, module)

    backends.why_not = lambda name, device="cpu": None if name == "cuda" else why_not(name, device)
    backends.implementation = choose
    try:
        yield
    finally:
        backends.why_not, backends.implementation = why_not, implementation


class ModulationArgs(ctypes.Structure):
    """spade_fast_modulation_args of csrc/cuda/launchers.h."""

    _flags = ("dtype", "params_dtype", "channels_last", "upsample", "outputs", "dense")
    _fields_ = (
        *((name, ctypes.c_int64) for name in "nchw"),
        *((name, ctypes.c_int32) for name in _flags),
        ("groups", ctypes.c_int64),
        ("patterns", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "mean", "rstd", "pattern_ids")),
        ("params", ctypes.c_void_p * 2),
        ("slopes", ctypes.c_float * 2),
    )

    def __init__(self, x, mean, rstd, params, pattern_ids, slopes, upsample, channels_last) -> None:
        flags = (int(channels_last), upsample, len(params), int(pattern_ids is None))
        super().__init__(*x.shape, DTYPES[x.dtype], DTYPES[params[0].dtype], *flags)
        self.groups = 1 if mean is None else mean.shape[0]
        self.patterns = params[0].shape[0]
        for name, t in (("x", x), ("mean", mean), ("rstd", rstd), ("pattern_ids", pattern_ids)):
            setattr(self, name, None if t is None else t.data_ptr())
        self.params = pointers(params)
        self.slopes = (ctypes.c_float * 2)(*slopes)


def pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * 2)(*(t.data_ptr() for t in tensors))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, skip: int = 0, channels_last: bool = False) -> Tensor:
    """A tensor full of NaN, or of -7 for integers. Its memory starts `skip` elements into an allocation."""
    count = torch.Size(shape).numel()
    memory = torch.full((count + skip,), float("nan") if dtype.is_floating_point else -7, dtype=dtype)[skip:]
    if channels_last:
        n, c, h, w = shape
        return memory.view(n, h, w, c).permute(0, 3, 1, 2)
    return memory.view(shape)


def misalign(t: Tensor, skip: int) -> Tensor:
    """A copy of t in the same dense layout whose memory starts `skip` elements into an allocation."""
    memory = torch.empty(t.numel() + skip, dtype=t.dtype)[skip:]
    return torch.as_strided(memory, t.shape, t.stride()).copy_(t)


class Kernels:
    """The launchers of a library on tensors. Each writes to outputs full of NaN."""

    poison = 0xFF  # bytes of a new workspace: NaN, -1

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("patterns", "segments", "statistics", "modulation_backward", "embedding_sum_backward"):
            if hasattr(self.library, f"spade_fast_{name}_workspace"):
                getattr(self.library, f"spade_fast_{name}_workspace").restype = ctypes.c_size_t

    def run_reversed(self, on: bool) -> None:
        """From now on threads and blocks run in reverse order, on a workspace of other values. No result may change."""
        self.library.spade_fast_run_reversed(int(on))
        self.poison = 0x7F if on else 0xFF  # 3e38, 2139062143

    def call(self, name: str, *arguments: object) -> None:
        """Runs one launcher on the null stream. RuntimeError if its status is not success."""
        status = getattr(self.library, f"spade_fast_{name}")(*map(_value, arguments), ctypes.c_void_p(0))
        if status:
            raise RuntimeError(f"spade_fast_{name}: CUDA error {status}")

    def workspace(self, name: str, *arguments: object) -> Tensor:
        """The bytes a launcher asks for, full of `poison`."""
        size = getattr(self.library, f"spade_fast_{name}_workspace")(*map(_value, arguments))
        return torch.full((size,), self.poison, dtype=torch.uint8)

    def patterns(self, codes: Tensor, k: int, capacity: int | None = None) -> tuple[Tensor, ...]:
        """(pattern_ids, taps, counts, overflow). capacity None: as many rows as there are patterns."""
        shape, kernel_size = codes.shape, ctypes.c_int(k)
        total, overflow = poisoned(1, dtype=torch.int32), poisoned(1, dtype=torch.int32)
        memory = self.workspace("patterns", *shape)
        self.call("patterns_find", codes, *shape, kernel_size, total, memory)
        capacity = int(total) if capacity is None else capacity
        pattern_ids, counts = poisoned(*shape, dtype=torch.int32), poisoned(shape[0], dtype=torch.int64)
        taps = poisoned(capacity + 1, k * k, dtype=torch.int32)  # one row more than the kernel may write
        self.call(
            "patterns_write", codes, *shape, kernel_size, capacity, total, pattern_ids, taps, counts, overflow, memory
        )  # fmt: skip
        assert (taps[-1] == -7).all()
        return pattern_ids, taps[:-1], counts, overflow

    def segments(self, segment_ids: Tensor, num: int) -> tuple[Tensor, Tensor]:
        order, offsets = poisoned(segment_ids.numel(), dtype=torch.int32), poisoned(num + 1, dtype=torch.int32)
        memory = self.workspace("segments", segment_ids.numel(), num)
        self.call("segments", segment_ids, segment_ids.numel(), num, order, offsets, memory)
        return order, offsets

    def statistics(self, x: Tensor, channels_last: bool, per_sample: bool) -> tuple[Tensor, Tensor]:
        groups = x.shape[0] if per_sample else 1
        mean, m2 = poisoned(groups, x.shape[1]), poisoned(groups, x.shape[1])
        memory = self.workspace("statistics", *x.shape)
        self.call("statistics", x, x.dtype, channels_last, *x.shape, per_sample, mean, m2, memory)
        return mean, m2

    def modulation(self, args: ModulationArgs, like: Tensor, skip: int = 0) -> list[Tensor]:
        n, c, h, w = like.shape
        shape, up = (n, c, h * args.upsample, w * args.upsample), bool(args.channels_last)
        outs = [poisoned(*shape, dtype=like.dtype, skip=skip, channels_last=up) for _ in range(args.outputs)]
        self.call("modulation", ctypes.byref(args), pointers(outs))
        return outs

    def modulation_backward(
        self, args: ModulationArgs, douts: list[Tensor], order: Tensor | None, offsets: Tensor | None,
        stats_from_x: bool, like: Tensor, params: list[Tensor], skip_dx: int = 0, skip_dparams: int = 0,
    ) -> list[Tensor]:  # fmt: skip
        dx = poisoned(*like.shape, dtype=like.dtype, skip=skip_dx, channels_last=True)
        dparams = [poisoned(*p.shape, dtype=p.dtype, skip=skip_dparams, channels_last=p.dim() == 4) for p in params]
        memory = self.workspace("modulation_backward", ctypes.byref(args))
        self.call(
            "modulation_backward", ctypes.byref(args), pointers(douts), order, offsets, stats_from_x, dx,
            pointers(dparams), memory,
        )  # fmt: skip
        return [dx, *dparams]

    def embedding_sum(self, table, bias, codes, edges: bool, relu: bool, skip: int = 0) -> Tensor:
        out = poisoned(codes.shape[0], table.shape[2], dtype=table.dtype, skip=skip)
        self.call("embedding_sum", table, table.dtype, bias, codes, codes.shape[0], *table.shape, edges, relu, out)
        return out

    def embedding_sum_backward(self, dout, out, codes, rows: int, edges: bool, relu: bool) -> tuple[Tensor, Tensor]:
        (q, taps), width = codes.shape, dout.shape[1]
        numbers = poisoned(q, taps * (1 + edges), dtype=torch.int32)
        self.call("embedding_rows", codes, q, taps, rows, edges, numbers)
        order, offsets = self.segments(numbers, taps * rows)
        dtable, dbias = poisoned(taps, rows, width, dtype=dout.dtype), poisoned(width, dtype=dout.dtype)
        sizes = (q, numbers.shape[1], taps * rows, width)
        memory = self.workspace("embedding_sum_backward", *sizes)
        self.call(
            "embedding_sum_backward", dout, out, dout.dtype, numbers, order, offsets, *sizes, relu, dtable, dbias,
            memory,
        )  # fmt: skip
        return dtable, dbias


class BothOrders:
    """The launchers of Kernels. Each is called twice, forwards and in reverse."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def __getattr__(self, name: str):
        def run(*args, **options):
            first = getattr(self.kernels, name)(*args, **options)
            self.kernels.run_reversed(True)
            second = getattr(self.kernels, name)(*args, **options)
            self.kernels.run_reversed(False)
            pairs = [(first, second)] if isinstance(first, torch.Tensor) else zip(first, second, strict=True)
            for a, b in pairs:
                assert torch.equal(a, b), name  # NaN is equal to nothing: every element was written
            return first

        return run


def _value(a: object) -> object:
    if a is None:
        return ctypes.c_void_p(0)
    if isinstance(a, Tensor):
        return ctypes.c_void_p(a.data_ptr())
    if isinstance(a, torch.dtype):
        return ctypes.c_int(DTYPES[a])
    if isinstance(a, bool):
        return ctypes.c_int(int(a))
    return ctypes.c_int64(a) if isinstance(a, int) else a


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, dtype=torch.float32, seed=0, mean=0.0):
    return (torch.randn(shape, generator=generator(seed), dtype=torch.float64) + mean).to(dtype)


def lay_out(t, channels_last):
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def close(actual, expected, size, terms=1):
    """Asserts that `actual` is within the rounding of its type and the roundings of a float32 sum.

    The sum has `terms` numbers, whose absolute values add up to `size`. Its error grows with the root of `terms`.
    """
    bound = torch.finfo(actual.dtype).eps / 2 * expected.abs() if actual.dtype != torch.float32 else 0.0
    # the spacing of float16 does not shrink below its smallest normal number
    bound = bound + torch.finfo(actual.dtype).tiny * torch.finfo(actual.dtype).eps
    bound = bound + 8 * ROUNDING * (1 + terms**0.5) * size
    wrong = (actual.double() - expected).abs() > bound
    assert not wrong.any(), (actual.double() - expected).abs().max()
