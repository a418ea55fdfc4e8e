# SPDX-License-Identifier: Apache-2.0
"""What only the C++ backend promises. The tests of each op check its numbers."""

from __future__ import annotations

import threading
import time

import maps
import pytest
import torch

from spade_fast.ops import _backend as backend
from spade_fast.ops.label_conv import label_conv_backward_torch, label_conv_torch
from spade_fast.ops.modulation import modulation_torch
from spade_fast.ops.modulation_backward import modulation_backward_torch
from spade_fast.ops.pattern_params import tap_segments
from spade_fast.ops.patterns import patterns_torch
from spade_fast.ops.segments import segments, segments_torch

pytestmark = pytest.mark.skipif(backend.why_not("cpp") is not None, reason=f"backend cpp: {backend.why_not('cpp')}")
native = torch.ops.spade_fast_native


def random(*shape, seed=0, dtype=torch.float32, layout=torch.channels_last):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=layout) if len(shape) == 4 else values


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def every_result(layout, dtype):
    """Every output of every op without a GEMM, on inputs large enough that three threads all get work."""
    codes = maps.cells(3, 64, 96, 5).to(torch.int32)
    hidden, rows, counts = native.patterns(codes, 3)
    ids, taps, _ = native.patterns(hidden, 3)
    order, offsets = native.segments(ids, taps.shape[0])
    large = maps.noise(1, 400, 400, 1000).to(torch.int32)  # several parts of one sort
    table, bias = random(9, 5, 40, dtype=dtype), random(40, seed=1, dtype=dtype)
    many = rows.repeat(40, 1)
    a = native.embedding_sum(table, bias, many, False, True)
    results = [hidden, rows, counts, ids, taps, order, offsets, *native.segments(large, 1000), a]
    results += native.embedding_sum_backward(random(*a.shape, seed=2, dtype=dtype), a, many, 5, False, True)
    for options in ((4, 2, 2, False), (4, 2, 2, True)):
        table = random(16, 5, 40, dtype=dtype)
        out = native.label_conv(codes, table, bias, True, *options)
        dout = random(*out.shape, seed=2, dtype=dtype, layout=layout)
        results += [out, *native.label_conv_backward(dout, codes, 5, True, *options)]
    x = random(3, 24, 64, 96, seed=3, dtype=dtype, layout=layout)
    params = [random(taps.shape[0], 48, seed=4, dtype=dtype), random(taps.shape[0], 48, seed=5, dtype=dtype)]
    dense = [random(3, 48, 64, 96, seed=6, dtype=dtype, layout=layout)]
    upstream = [random(3, 24, 64, 96, seed=s, dtype=dtype, layout=layout) for s in (7, 8)]
    for per_sample in (False, True):
        mean, m2 = native.statistics(x, per_sample)
        rstd = torch.rsqrt(m2 * mean.numel() / x.numel() + 1e-5)
        by_pattern = (x, mean, rstd, params, ids, order, offsets, [0.2, 1.0], 1, True)
        by_pixel = (x, mean, rstd, dense, None, None, None, [0.2], 1, True)
        results += [mean, m2, *native.modulation(*by_pattern), *native.modulation(*by_pixel)]
        results += native.modulation_backward(upstream, *by_pattern)
        results += native.modulation_backward(upstream[:1], *by_pixel)
    return results


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(threads, layout, dtype):
    threads(1)
    expected = every_result(layout, dtype)
    for count in (2, 3):
        threads(count)
        for i, (actual, want) in enumerate(zip(every_result(layout, dtype), expected, strict=True)):
            assert torch.equal(actual, want), f"result {i} differs with {count} threads"


def test_true_hash_collisions():
    """Of 360 000 distinct patches, about 15 pairs share a 32-bit hash (n²/2³³), whatever the hash."""
    codes = maps.noise(1, 600, 600, 1000).to(torch.int32)
    for actual, expected in zip(native.patterns(codes, 3), patterns_torch(codes, 3), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_segments_sorts_every_number(dtype):
    """The numbers include some below 0 and beyond num, and the map is large enough for several parts."""
    ids = torch.randint(-4, 15, (3, 300, 301), generator=torch.Generator().manual_seed(0)).to(dtype)
    for actual, expected in zip(native.segments(ids, 11), segments_torch(ids, 11), strict=True):
        assert torch.equal(actual, expected)


def test_one_pattern_owns_most_pixels():
    """A segment of many thousand pixels is summed in pieces, so fp32 stays near float64."""
    codes = torch.zeros(1, 300, 300, dtype=torch.int32)
    codes[:, 250:, 250:] = maps.noise(1, 50, 50, 9).to(torch.int32)
    ids, taps, _ = native.patterns(codes, 3)
    x, params, upstream = random(1, 5, 300, 300), random(taps.shape[0], 10, seed=1), random(1, 5, 300, 300, seed=2)
    wide = [t.double() for t in (x, params, upstream)]
    for upsample in (1, 2):
        small = x[:, :, ::upsample, ::upsample].contiguous(memory_format=torch.channels_last)
        args = ([0.2], upsample, False)
        _, dparams = native.modulation_backward([upstream], small, None, None, [params], ids, None, None, *args)
        _, expected = modulation_backward_torch(
            [wide[2]], small.double(), None, None, [wide[1]], ids, None, None, *args
        )
        # 87 000 terms: a sum in pieces of 256, then of 340 pieces, errs by √n roundings of a partial sum of size √n.
        assert float((dparams.double() - expected).abs().max()) < 2**-24 * 87000 * 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "permuted",
    [
        lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),  # a convolution weight [Hd, L, k, k]
        lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),  # the same, channels-last
        lambda t: t.repeat_interleave(2, 1)[:, ::2],  # labels not adjacent
        lambda t: t.repeat_interleave(2, 2)[:, :, 1::2],  # nor hidden values
        lambda t: t[:1].expand(9, -1, -1),
    ],
)
def test_strides_of_the_table_do_not_matter(permuted, dtype):
    table = permuted(random(9, 21, 37, dtype=dtype))  # sizes that are no multiple of a block
    codes = torch.randint(-1, 44, (50, 9), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    actual = native.embedding_sum(table, None, codes, True, False)
    assert torch.equal(actual, native.embedding_sum(table.contiguous(), None, codes, True, False))


def test_dtypes_may_differ():
    """Half precision activations with float32 parameters, by pattern and by pixel."""
    ids = torch.zeros(1, 4, 6, dtype=torch.int32)
    x = random(1, 7, 4, 6, dtype=torch.bfloat16)
    for params, numbers in ((random(1, 14), ids), (random(1, 14, 4, 6), None)):
        args = (x, None, None, [params], numbers, None, None, [0.2], 1, False)
        (actual,) = native.modulation(*args)
        (expected,) = modulation_torch(x.float(), *args[1:])
        assert torch.equal(actual, expected.bfloat16())
        dx, dparams = native.modulation_backward([x], *args)
        wanted_dx, wanted = modulation_backward_torch([x.float()], x.float(), *args[1:])
        assert dparams.dtype == torch.float32 and dx.dtype == torch.bfloat16
        torch.testing.assert_close(dparams, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dx.float(), wanted_dx, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ids=torch.full((1, 4, 6), 3, dtype=torch.int32)), r"ids must be in 0\.\.2, got 3\.\.3"),
        (dict(ids=torch.full((1, 4, 6), -1, dtype=torch.int32)), r"ids must be in 0\.\.2, got -1\.\.-1"),
        (dict(mean=torch.zeros(2, 7), rstd=torch.zeros(2, 7)), r"must have shape \[1 or 1, 7\], got \[2, 7\]"),
        (dict(mean=torch.zeros(1, 7)), "must both be given, or neither"),
        (dict(order=torch.full((24,), 24, dtype=torch.int32)), r"are not segments\(ids, 3\)"),
        (dict(offsets=torch.tensor([0, 25, 3, 24])), r"are not segments\(ids, 3\)"),
        (dict(order=torch.zeros(5, dtype=torch.int32)), r"must be segments\(ids, 3\), got \[5\] and \[4\]"),
        (dict(params=[torch.zeros(3, 14), torch.zeros(2, 14)], slopes=[1.0, 1.0]), "equally many rows, got 3 and 2"),
    ],
)
def test_nothing_is_read_out_of_bounds(change, message):
    ids = torch.zeros(1, 4, 6, dtype=torch.int32)
    order, offsets = segments(ids, 3)
    arguments = dict(
        x=random(1, 7, 4, 6),
        mean=None,
        rstd=None,
        params=[torch.zeros(3, 14)],
        ids=ids,
        order=order,
        offsets=offsets,
        slopes=[1.0],
        upsample=1,
        stats=False,
    )
    arguments.update(change)
    with pytest.raises((RuntimeError, IndexError), match=message):
        native.modulation_backward([random(1, 7, 4, 6)] * len(arguments["params"]), *arguments.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(taps=torch.full((5, 9), 4, dtype=torch.int32)), "taps must be below 4, got 4"),
        (dict(taps=torch.zeros(5, 9)), "taps must be int32, got Float"),
        (dict(taps=torch.zeros(5, 8, dtype=torch.int32)), r"two weights \[C, Hd, k, k\], got \[4, 6\], \[5, 8\]"),
        (dict(dparams=torch.zeros(5, 5)), r"dparams must have shape \[5, 6\], got \[5, 5\]"),
        (dict(tap_order=torch.full((45,), 45, dtype=torch.int32)), r"tap_offsets are not segments\(taps, 36\)"),
        (dict(tap_offsets=torch.full((37,), 46)), r"tap_offsets are not segments\(taps, 36\)"),
        (dict(tap_offsets=torch.zeros(36)), r"must be segments\(taps, 36\), got \[45\] and \[36\]"),
    ],
)
def test_no_parameters_are_read_out_of_bounds(change, message):
    taps = torch.zeros(5, 9, dtype=torch.int32)
    order, offsets = tap_segments(taps, 4)
    arguments = dict(dparams=random(5, 6), a=random(4, 6), taps=taps, w_gamma=random(3, 6, 3, 3))
    arguments.update(dict(w_beta=random(3, 6, 3, 3), tap_order=order, tap_offsets=offsets), **change)
    with pytest.raises((RuntimeError, IndexError), match=message):
        native.pattern_params_backward(*arguments.values())


def test_many_terms_of_one_label_stay_near_float64():
    """Most pixels of several images add to one row of the table. In noise, no run of equal labels is long."""
    codes = maps.noise(3, 300, 200, 2).to(torch.int32)
    for pooled in (False, True):
        options = (codes, 2, False, 3, 1, 1, pooled)
        dout = random(3, 5, *((150, 100) if pooled else (300, 200))) + 1
        dtable, dbias = native.label_conv_backward(dout, *options)
        wide, wide_bias = label_conv_backward_torch(dout.double(), *options)
        # fp32 holds sums of at most 256 terms of about 1: a step errs by at most half a unit of 256, at random. Their
        # sum is float64, rounded once.
        bound = 2**-24 * (wide.abs().max() + 256 * dout[:, 0].numel() ** 0.5)
        assert float((dtable.double() - wide).abs().max()) < bound
        assert float((dbias.double() - wide_bias).abs().max()) < bound


@pytest.mark.parametrize("shape", [(40, 20, 30), (3, 400, 300)])
def test_label_conv_goes_through_images_a_few_at_a_time(shape):
    codes = maps.cells(*shape, 4).to(torch.int32)
    table, bias = random(9, 4, 18, dtype=torch.float64), random(18, dtype=torch.float64)
    for pooled in (False, True):
        options = (False, 3, 2, 1, pooled)
        expected = label_conv_torch(codes, table, bias, *options)
        assert torch.allclose(native.label_conv(codes, table, bias, *options), expected, rtol=0, atol=1e-13)
        dout = random(*expected.shape, seed=1, dtype=torch.float64, layout=torch.contiguous_format)
        for actual, wanted in zip(
            native.label_conv_backward(dout, codes, 4, *options),
            label_conv_backward_torch(dout, codes, 4, *options),
            strict=True,
        ):
            assert torch.allclose(actual, wanted, rtol=0, atol=1e-11)


CODES = torch.zeros(1, 5, 6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(codes=CODES.long()), r"codes must be int32 \[N, H, W\], got Long \[1, 5, 6\]"),
        (dict(codes=CODES[0]), r"codes must be int32 \[N, H, W\], got Int \[5, 6\]"),
        (dict(table=torch.zeros(16, 4, 3)), r"table must be floating point \[9, L, O\], got Float \[16, 4, 3\]"),
        (dict(table=torch.zeros(9, 4, 3).int()), r"table must be floating point \[9, L, O\], got Int \[9, 4, 3\]"),
        (dict(table=torch.zeros(9, 0, 3)), r"expected 1 to 2\*\*31 - 1 table rows, got 0"),
        (dict(bias=torch.zeros(4)), r"bias must have shape \[3\], got \[4\]"),
        (dict(stride=0), "kernel_size and stride must be at least 1, padding at least 0, got 3, 0 and 1"),
        (dict(padding=-1), "padding at least 0, got 3, 1 and -1"),
        (dict(codes=CODES[:, :1, :3], padding=0), r"a 3x3 kernel does not fit codes \[1, 1, 3\]"),
    ],
)
def test_label_conv_names_what_is_wrong(change, message):
    given = dict(codes=CODES, table=torch.zeros(9, 4, 3), bias=None, edges=True, kernel_size=3, stride=1, padding=1)
    with pytest.raises(RuntimeError, match=message):
        native.label_conv(*(given | change).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dout=torch.zeros(1, 3, 5, 5)), r"dout must be floating point \[1, O, 5, 6\], got Float \[1, 3, 5, 5\]"),
        (dict(dout=torch.zeros(2, 3, 5, 6)), r"dout must be floating point \[1, O, 5, 6\], got Float \[2, 3, 5, 6\]"),
        (dict(dout=torch.zeros(1, 3, 5, 6).int()), r"dout must be floating point \[1, O, 5, 6\], got Int"),
        (dict(num_rows=0), r"expected 1 to 2\*\*31 - 1 table rows, got 0"),
        (dict(num_rows=2**31), r"expected 1 to 2\*\*31 - 1 table rows, got 2147483648"),
        (dict(kernel_size=0), "kernel_size and stride must be at least 1"),
    ],
)
def test_label_conv_backward_names_what_is_wrong(change, message):
    given = dict(dout=torch.zeros(1, 3, 5, 6), codes=CODES, num_rows=4, edges=True, kernel_size=3, stride=1, padding=1)
    with pytest.raises(RuntimeError, match=message):
        native.label_conv_backward(*(given | change).values())


def test_other_python_threads_run_meanwhile():
    """An op releases the interpreter's lock, so another thread runs in the middle of a call."""
    codes, seen, stop = maps.noise(1, 1500, 1500, 1000).to(torch.int32), [], threading.Event()

    def watch():
        while not stop.is_set():
            seen.append(time.perf_counter())
            time.sleep(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        start = time.perf_counter()
        native.patterns(codes, 3)
        end = time.perf_counter()
    finally:
        stop.set()
        watcher.join()
    tenth = (end - start) / 10
    assert any(start + tenth < t < end - tenth for t in seen)
