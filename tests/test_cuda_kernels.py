# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' numbers, on a CPU (see cuda_on_cpu.h), against definitions written out in float64: partial blocks,
tails, odd channels, unaligned pointers, every dtype. Each call runs again with threads and blocks in reverse order and
must give the same bits."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import cuda_harness
import maps
import pytest
import test_patterns
import torch
from cuda_harness import Kernels, ModulationArgs, misalign

from spade_fast.ops.patterns import patterns_torch

if reason := cuda_harness.why_not():
    pytest.skip(reason, allow_module_level=True)

EPS = 1e-5
ROUNDING = 2.0**-24  # of float32
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(d, d) for d in DTYPES] + [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


class BothOrders:
    """The launchers of Kernels, each called twice: forwards and in reverse."""

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


@pytest.fixture(scope="module")
def kernels():
    return BothOrders(Kernels(cuda_harness.compile_library()))


@pytest.fixture(scope="module")
def weak_hash():
    """patterns.cu with a hash of one bit: nearly every patch collides."""
    return BothOrders(Kernels(cuda_harness.compile_library(("-DSPADE_FAST_WEAK_HASH",), only="patterns")))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, dtype=torch.float32, seed=0, mean=0.0):
    return (torch.randn(shape, generator=generator(seed), dtype=torch.float64) + mean).to(dtype)


def lay_out(t, channels_last):
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def close(actual, expected, size, terms=1):
    """Within one rounding to the result's dtype and the roundings of a float32 sum of `terms` numbers, of `size` in
    all: the first is of the result, the others grow with the square root of their number."""
    bound = torch.finfo(actual.dtype).eps / 2 * expected.abs() if actual.dtype != torch.float32 else 0.0
    # below the smallest normal number of float16 its spacing no longer shrinks
    bound = bound + torch.finfo(actual.dtype).tiny * torch.finfo(actual.dtype).eps
    bound = bound + 8 * ROUNDING * (1 + terms**0.5) * size
    wrong = (actual.double() - expected).abs() > bound
    assert not wrong.any(), (actual.double() - expected).abs().max()


# ---- patterns and segments ----


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("name", test_patterns.MAPS)
@pytest.mark.parametrize("build", ["kernels", "weak_hash"])
def test_patterns_are_the_definition(request, build, name, k):
    codes = test_patterns.MAPS[name].int().contiguous()
    ids, taps, counts, overflow = request.getfixturevalue(build).patterns(codes, k)
    expected = test_patterns.written_out(codes, k)
    assert all(torch.equal(a, e) for a, e in zip((ids, taps, counts), expected, strict=True))
    assert overflow.item() == 0


def test_patterns_of_many_pixels(kernels):
    """More than 1024 parts of 1024 pixels: parts grow."""
    codes = maps.cells(3, 600, 603, 7).int()
    actual = kernels.kernels.patterns(codes, 3)
    assert all(torch.equal(a, e) for a, e in zip(actual[:3], patterns_torch(codes, 3), strict=True))


@pytest.mark.parametrize("spare", [-5, -1, 0, 3])
def test_patterns_of_fixed_capacity(kernels, spare):
    codes = maps.cells(2, 19, 23, 5).int()
    expected_ids, expected_taps, expected_counts = patterns_torch(codes, 3)
    capacity = len(expected_taps) + spare
    ids, taps, counts, overflow = kernels.patterns(codes, 3, capacity)  # checks that no row more is written
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


# ---- modulation ----


class Modulation:
    """One call's inputs as the kernels take them, and the formula in float64."""

    def __init__(
        self, shape, norm="batch", upsample=1, outputs=1, dense=False, dtypes=(torch.float32, torch.float32),
        channels_last=True, skip=0, slopes=(0.2, 1.0), ids=None,
    ):  # fmt: skip
        n, c, h, w = shape
        dtype, params_dtype = dtypes
        size = (h * upsample, w * upsample)
        self.upsample, self.slopes, self.channels_last, self.skip = upsample, slopes[:outputs], channels_last, skip
        self.norm, self.x = norm, misalign(lay_out(random(*shape, dtype=dtype, mean=0.5), channels_last), skip)
        self.mean = self.rstd = self.ids = self.order = self.offsets = None
        if norm != "none":
            dims = (2, 3) if norm == "instance" else (0, 2, 3)
            exact = self.x.double()
            self.mean = misalign(exact.mean(dims).float().view(-1, c), skip)
            self.rstd = misalign((exact.var(dims, correction=0) + EPS).rsqrt().float().view(-1, c), skip)
        shapes = (n, 2 * c, *size)
        if not dense:
            self.ids = self._ids(n, *size) if ids is None else ids
            count = int(self.ids.max()) + 3  # of which the last two do not occur
            self.order, self.offsets = _segments(self.ids, count)
            shapes = (count, 2 * c)
        params = [random(*shapes, dtype=params_dtype, seed=m + 1) for m in range(outputs)]
        self.params = [misalign(lay_out(p, channels_last) if dense else p, skip) for p in params]
        self.args = ModulationArgs(
            self.x, self.mean, self.rstd, self.params, self.ids, self.slopes, upsample, channels_last
        )

    @staticmethod
    def _ids(n, h, w):
        """Three patterns an image, and one image without its first."""
        ids = torch.randint(3, (n, h, w), generator=generator(), dtype=torch.int32)
        ids[n // 2] = ids[n // 2].clamp(min=1)
        return ids + 3 * torch.arange(n, dtype=torch.int32)[:, None, None]

    def z(self, x, params, constant=True):
        """What the activation is applied to, in float64."""
        if self.norm != "none" and constant:
            group = (self.mean.shape[0], -1, 1, 1)
            x = (x - self.mean.double().view(group)) * self.rstd.double().view(group)
        elif self.norm != "none":
            dims = (2, 3) if self.norm == "instance" else (0, 2, 3)
            x = x - x.mean(dims, keepdim=True)
            x = x / torch.sqrt(x.square().mean(dims, keepdim=True) + EPS)
        x = x.repeat_interleave(self.upsample, 2).repeat_interleave(self.upsample, 3)
        zs = []
        for p in params:
            gamma, beta = (p if self.ids is None else p[self.ids.long()].permute(0, 3, 1, 2)).chunk(2, 1)
            zs.append(x * (1 + gamma) + beta)
        return zs

    def outs(self, x, params, constant=True):
        return [torch.where(z > 0, z, s * z) for z, s in zip(self.z(x, params, constant), self.slopes, strict=True)]

    def check_forward(self, kernels):
        for actual, expected in zip(
            kernels.modulation(self.args, self.x, self.skip),
            self.outs(self.x.double(), [p.double() for p in self.params]),
            strict=True,
        ):
            close(actual, expected, size=1 + float(expected.abs().max()))

    def check_backward(self, kernels, stats):
        x = self.x.double().requires_grad_()
        params = [p.double().requires_grad_() for p in self.params]
        douts = []
        for i, z in enumerate(self.z(x, params)):
            dout = random(*z.shape, dtype=self.x.dtype, seed=10 + i)
            dout[z.abs() < 1e-3] = 0  # where rounding decides on which side of LeakyReLU z is
            douts.append(misalign(lay_out(dout, True), self.skip))
        loss = sum((o * d.double()).sum() for o, d in zip(self.outs(x, params, not stats), douts, strict=True))
        expected = torch.autograd.grad(loss, [x, *params])
        actual = kernels.modulation_backward(
            self.args, douts, self.order, self.offsets, stats, self.x, self.params, self.skip
        )
        terms = self.x.numel() / self.x.shape[1] * self.upsample**2
        # normalising multiplies a rounding of x by rstd; the sums are of dout times numbers of the size of xhat
        size = 1.0 if self.rstd is None else 1 + float(self.rstd.max())
        for a, e in zip(actual, expected, strict=True):
            close(a, e, size=size * (4 + float(e.abs().max())), terms=terms)


def _segments(ids, num):
    values, order = torch.sort(ids.reshape(-1), stable=True)
    return order.int(), torch.searchsorted(values, torch.arange(num + 1, dtype=torch.int32), out_int32=True)


# vectors and tails of pixels; odd channels; the smallest; more vectors than a block has threads
MODULATED = [(2, 16, 7, 5), (2, 33, 4, 4), (1, 1, 1, 1), (1, 2056, 2, 3)]


@pytest.mark.parametrize("shape", MODULATED)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
def test_modulation(kernels, shape, channels_last, dense, upsample):
    for norm, outputs in (("batch", 1), ("instance", 2), ("none", 2)):
        Modulation(shape, norm, upsample, outputs, dense, channels_last=channels_last).check_forward(kernels)


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("skip", [0, 1])
def test_modulation_of_every_dtype(kernels, dtypes, channels_last, dense, upsample, skip):
    options = dict(dtypes=dtypes, channels_last=channels_last, skip=skip)
    Modulation((2, 24, 6, 5), "batch", upsample, 2, dense, **options).check_forward(kernels)


def test_modulation_without_pattern(kernels):
    """id -1 stands for gamma = beta = 0."""
    ids = torch.tensor([[[0, -1, 1]]], dtype=torch.int32)
    for channels_last in (True, False):
        case = Modulation((1, 8, 1, 3), "none", ids=ids, channels_last=channels_last, slopes=(1.0,))
        (out,) = kernels.modulation(case.args, case.x)
        assert torch.equal(out[..., 1], case.x[..., 1])


@pytest.mark.parametrize("shape", MODULATED)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
def test_modulation_backward(kernels, shape, dense, upsample):
    if shape == (1, 1, 1, 1) and upsample == 1:
        shape = (1, 1, 1, 2)  # statistics of one element leave no gradient to compare
    for norm, outputs in (("batch", 2), ("instance", 1), ("none", 2)):
        case = Modulation(shape, norm, upsample, outputs, dense)
        for stats in (False, True):
            case.check_backward(kernels, stats)


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("skip", [0, 1])
def test_modulation_backward_of_every_dtype(kernels, dtypes, dense, upsample, skip):
    for norm in ("batch", "instance"):
        Modulation((2, 24, 6, 5), norm, upsample, 2, dense, dtypes, skip=skip).check_backward(kernels, stats=True)


@pytest.mark.parametrize("channels", [4, 3])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_one_pattern_owns_most_pixels(kernels, channels, share):
    """Segments across many pieces and three levels of them, beside a thousand short ones."""
    h, w = 180, 200
    ids = torch.randint(2000, (1, h, w), generator=generator(), dtype=torch.int32)
    ids[torch.rand(ids.shape, generator=generator(1)) < share] = 17
    Modulation((1, channels, h, w), "batch", 1, 2, ids=ids).check_backward(kernels, stats=True)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)])
@pytest.mark.parametrize("dense", [False, True])
def test_modulation_of_nothing(kernels, shape, dense):
    n, c, h, w = shape
    x = lay_out(torch.zeros(shape), True)
    ids = None if dense else torch.zeros(n, h, w, dtype=torch.int32)
    params = [torch.zeros(n, 2 * c, h, w) if dense else torch.zeros(3, 2 * c)]
    args = ModulationArgs(x, None, None, params, ids, [0.2], 1, True)
    assert kernels.modulation(args, x)[0].shape == shape
    order, offsets = (None, None) if dense else _segments(ids, 3)
    dx, dparams = kernels.modulation_backward(args, [x], order, offsets, True, x, params)
    assert dx.shape == shape and (dparams == 0).all()


@pytest.mark.parametrize(
    "change",
    [dict(upsample=3), dict(outputs=3), dict(dtype=7), dict(dtype=1, params_dtype=2), dict(h=2**31), dict(c=-1)],
)
def test_wrong_arguments_are_an_error(kernels, change):
    case = Modulation((1, 4, 2, 2))
    for name, value in change.items():
        setattr(case.args, name, value)
    for launch in (
        lambda: kernels.kernels.call("modulation", ctypes.byref(case.args), cuda_harness.pointers([case.x])),
        lambda: kernels.kernels.call(
            "modulation_backward", ctypes.byref(case.args), cuda_harness.pointers([case.x]), case.order, case.offsets,
            True, None, cuda_harness.pointers([case.x]), None,
        ),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="CUDA error 1"):
            launch()


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


@pytest.mark.timeout(300)
def test_address_sanitizer():
    """A part of these tests on a build that stops at the first access outside a tensor or workspace."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    runtime = runtime.stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("no address sanitizer")
    library = cuda_harness.compile_library(flags=("-O1", "-fsanitize=address", "-fno-omit-frame-pointer"))
    environment = dict(os.environ, LD_PRELOAD=runtime, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, __file__, str(library)],
        capture_output=True, text=True, env=environment, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stderr[-4000:]


def _address_sanitizer(library: str) -> None:
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
                    case = Modulation(shape, "instance", upsample, 2, dense, channels_last=channels_last)
                    case.check_forward(kernels)
                    if channels_last:
                        case.check_backward(kernels, True)
    test_one_pattern_owns_most_pixels(kernels, 4, 0.7)
    test_embedding_sum(kernels, (300, 9, 20, 128), True, True, torch.float32)
    test_embedding_sum(kernels, (7, 1, 5, 33), False, True, torch.float16)
    print("clean")


if __name__ == "__main__":
    _address_sanitizer(sys.argv[1])
