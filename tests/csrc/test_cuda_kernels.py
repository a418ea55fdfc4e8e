# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' numbers, on a CPU (see cuda_on_cpu.h), against definitions written out in float64.

The cases have partial blocks, tails, odd widths and unaligned pointers. Threads and blocks run forwards and in reverse,
and must give the same bits.
"""

import os
import subprocess
import sys
from pathlib import Path

import cuda_harness
import maps
import pattern_cases
import pytest
import torch
from cuda_harness import ROUNDING, BothOrders, Kernels, close, generator, lay_out, misalign, random

from spade_fast.ops.patterns import patterns_torch

if reason := cuda_harness.why_not():
    pytest.skip(reason, allow_module_level=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels():
    return BothOrders(Kernels(cuda_harness.compile_library()))


@pytest.fixture(scope="module")
def weak_hash():
    """patterns.cu with a hash of one bit, so that nearly all patches collide."""
    return BothOrders(Kernels(cuda_harness.compile_library(("-DSPADE_FAST_WEAK_HASH",), only="patterns")))


# ---- patterns and segments ----


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("name", pattern_cases.MAPS)
@pytest.mark.parametrize("build", ["kernels", "weak_hash"])
def test_patterns_are_the_definition(request, build, name, k):
    codes = pattern_cases.MAPS[name].int().contiguous()
    ids, taps, counts, overflow = request.getfixturevalue(build).patterns(codes, k)
    expected = pattern_cases.written_out(codes, k)
    assert all(torch.equal(a, e) for a, e in zip((ids, taps, counts), expected, strict=True))
    assert overflow.item() == 0


def test_patterns_of_many_pixels(kernels):
    """More than 1024 parts of 1024 pixels, so that parts grow."""
    codes = maps.cells(3, 600, 603, 7).int()
    actual = kernels.kernels.patterns(codes, 3)
    assert all(torch.equal(a, e) for a, e in zip(actual[:3], patterns_torch(codes, 3), strict=True))


@pytest.mark.parametrize("spare", [-5, -1, 0, 3])
def test_patterns_of_fixed_capacity(kernels, spare):
    codes = maps.cells(2, 19, 23, 5).int()
    expected_ids, expected_taps, expected_counts = patterns_torch(codes, 3)
    capacity = len(expected_taps) + spare
    ids, taps, counts, overflow = kernels.patterns(codes, 3, capacity)  # it checks that no further row is written
    assert overflow.item() == (spare < 0)
    assert torch.equal(taps[: len(expected_taps)], expected_taps[:capacity])
    assert (taps[len(expected_taps) :] == -1).all()
    assert torch.equal(ids, expected_ids.where(expected_ids < capacity, -1))
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3), (2, 3, 0)])
def test_patterns_of_nothing(kernels, shape):
    ids, taps, counts, overflow = kernels.patterns(torch.zeros(shape, dtype=torch.int32), 3, 2)
    assert ids.shape == shape and (taps == -1).all() and overflow.item() == 0
    assert torch.equal(counts, torch.zeros(shape[0], dtype=torch.int64))


@pytest.mark.parametrize("numel", [0, 1, 255, 700])
@pytest.mark.parametrize("num", [1, 11, 4000])
def test_segments(kernels, numel, num):
    ids = torch.randint(-1, min(num, 9), (numel,), generator=generator(1), dtype=torch.int32)
    order, offsets = kernels.segments(ids, num)
    values, expected = torch.sort(ids, stable=True)
    assert torch.equal(order.long(), expected)
    assert torch.equal(offsets.long(), torch.searchsorted(values, torch.arange(num + 1, dtype=torch.int32)))


# ---- statistics ----

# one pixel; odd channels; tails of vectors; many channels; several parts of an image; many images
SHAPES = [(1, 1, 1, 1), (2, 5, 1, 9), (3, 33, 4, 4), (2, 24, 5, 7), (1, 1032, 3, 5), (2, 8, 64, 80), (40, 16, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", [0, 1])
def test_statistics(kernels, shape, channels_last, dtype, skip):
    x = misalign(lay_out(random(*shape, dtype=dtype, mean=3.0), channels_last), skip)
    for per_sample in (False, True):
        mean, m2 = kernels.statistics(x, channels_last, per_sample)
        exact, dims = x.double(), (2, 3) if per_sample else (0, 2, 3)
        expected = exact.mean(dims).view(mean.shape)
        squares = (exact - exact.mean(dims, keepdim=True)).square().sum(dims).view(mean.shape)
        close(mean, expected, size=4.0)
        # a rounding of a value of size 4 against the deviation, besides those of the sum
        close(m2, squares, size=squares.max() + 4.0, terms=x.numel() / mean.numel())


@pytest.mark.parametrize("channels_last", [True, False])
def test_statistics_of_a_large_mean(kernels, channels_last):
    """E[x²] - E[x]² would have no correct digit."""
    x = lay_out(random(2, 16, 24, 24, mean=1e4), channels_last)
    mean, m2 = kernels.statistics(x, channels_last, False)
    exact = x.double().permute(1, 0, 2, 3).reshape(16, -1)
    torch.testing.assert_close(mean[0].double(), exact.mean(1), rtol=2 * ROUNDING, atol=0)
    # each running mean is within a rounding (of 1e4) of the true one, which the deviations are taken from
    torch.testing.assert_close(m2[0].double(), exact.var(1, correction=0) * exact.shape[1], rtol=1e4 * ROUNDING, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 2), (2, 0, 3, 3)])
def test_statistics_of_nothing(kernels, shape):
    for per_sample in (False, True):
        mean, m2 = kernels.statistics(torch.zeros(shape), False, per_sample)
        assert (mean == 0).all() and (m2 == 0).all()


# ---- embedding_sum ----


# vectors; odd width; the smallest; nothing; many rows of a table with few, so that segments are long
@pytest.mark.parametrize("size", [(300, 9, 20, 128), (7, 1, 5, 33), (1, 9, 3, 1), (0, 9, 3, 8), (1500, 25, 4, 12)])
@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_sum(kernels, size, edges, relu, dtype):
    q, taps, rows, width = size
    table, bias = random(taps, rows, width, dtype=dtype), random(width, seed=1)
    codes = torch.randint(-1, 2 * rows + 2, (q, taps), generator=generator(), dtype=torch.int32)
    label = torch.where(codes < 0, -1, codes >> 1 if edges else codes)
    counted = (label >= 0) & (label < rows - edges)
    hot = torch.zeros(q, taps, rows, dtype=torch.float64)
    hot.scatter_(2, label.clamp(0, rows - 1).long()[..., None], counted.double()[..., None])
    if edges:
        hot[..., -1] += ((codes >= 0) & (codes % 2 == 1)).double()
    expected = torch.einsum("qtl,tlw->qw", hot, table.double()) + bias.double()
    expected = expected.relu() if relu else expected
    for skip in (0, 1):
        out = kernels.embedding_sum(misalign(table, skip), misalign(bias, skip), codes, edges, relu, skip)
        close(out, expected, size=10.0, terms=2 * taps)
    assert kernels.embedding_sum(table, None, codes, edges, False).shape == (q, width)

    dout = random(q, width, dtype=dtype, seed=2)
    gradient = dout.double() * (out > 0) if relu else dout.double()
    dtable, dbias = kernels.embedding_sum_backward(dout, out, codes, rows, edges, relu)
    close(dtable, torch.einsum("qtl,qw->tlw", hot, gradient), size=20.0, terms=q)
    close(dbias, gradient.sum(0), size=20.0, terms=q)


# ---- the whole, once more, with every access checked ----


SANITIZE = ("-O1", "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-fno-omit-frame-pointer")


@pytest.mark.timeout(300)
def test_address_sanitizer():
    """A part of these tests on a build that stops at the first access that is out of bounds or not aligned."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    runtime = runtime.stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("no address sanitizer")
    library = cuda_harness.compile_library(flags=SANITIZE)
    environment = dict(os.environ, LD_PRELOAD=runtime, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, __file__, str(library)],
        capture_output=True, text=True, env=environment, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stderr[-4000:]


def _address_sanitizer(library: str) -> None:
    import test_cuda_modulation

    kernels = BothOrders(Kernels(Path(library)))
    for k in (3, 7):
        kernels.patterns(maps.noise(2, 13, 9, 300).int(), k)
        kernels.patterns(maps.noise(2, 13, 9, 300).int(), k, 20)
    for shape in ((2, 24, 5, 7), (3, 33, 4, 4)):
        for channels_last in (True, False):
            for dtype in (torch.float32, torch.bfloat16):
                test_statistics(kernels, shape, channels_last, dtype, 0)
            for upsample in (1, 2):
                for dense in (False, True):
                    options = dict(dense=dense, channels_last=channels_last)
                    case = test_cuda_modulation.Modulation(shape, "instance", upsample, 2, **options)
                    case.check_forward(kernels)
                    if channels_last:
                        case.check_backward(kernels, True)
    test_cuda_modulation.test_one_pattern_owns_most_pixels(kernels, 4, 0.7)
    for which in ("x", "mean", "rstd", "params", "douts", "outs", "dparams"):
        test_cuda_modulation.test_each_tensor_alone_may_be_unaligned(kernels, which, False)
        test_cuda_modulation.test_each_tensor_alone_may_be_unaligned(kernels, which, True)
    test_embedding_sum(kernels, (300, 9, 20, 128), True, True, torch.float32)
    test_embedding_sum(kernels, (7, 1, 5, 33), False, True, torch.float16)
    print("clean")


if __name__ == "__main__":
    _address_sanitizer(sys.argv[1])
