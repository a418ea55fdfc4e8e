# SPDX-License-Identifier: Apache-2.0
import sys

import maps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import MAPS, written_out

from spade_fast.ops.patterns import patterns
from spade_fast.ops.segments import segments

pytestmark = pytest.mark.usefixtures("strict_memory")


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("name", MAPS)
def test_is_the_definition(backend, name, k):
    codes = MAPS[name].to(torch.int32)
    for actual, expected in zip(patterns(codes, k), written_out(codes, k), strict=True):
        assert torch.equal(actual, expected)


def test_real_map_is_the_definition(backend):
    codes = maps.real(32).to(torch.int32)
    for actual, expected in zip(patterns(codes, 3), written_out(codes, 3), strict=True):
        assert torch.equal(actual, expected)


@given(
    n=st.integers(1, 3),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    classes=st.integers(1, 4),
    k=st.sampled_from([1, 3, 5]),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(n, h, w, classes, k):
    codes = maps.noise(n, h, w, classes, seed=h * 10 + w).to(torch.int32)
    for actual, expected in zip(patterns(codes, k), written_out(codes, k), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("k", [3, 5])
def test_twice_gives_the_distinct_double_patches(backend, k):
    codes = maps.cells(2, 11, 14, 4).to(torch.int32)
    ids, _, _ = patterns(codes, k)
    twice, taps, counts = patterns(ids, k)
    expected, wide, expected_counts = written_out(codes, 2 * k - 1)
    assert torch.equal(twice, expected)
    assert torch.equal(counts, expected_counts)
    assert taps.shape == (wide.shape[0], k * k)


@pytest.mark.parametrize(
    "weak", [lambda patches, image: torch.zeros_like(image), lambda patches, image: patches[4] % 2]
)
def test_hash_collisions_are_found(monkeypatch, weak):
    monkeypatch.setattr(sys.modules["spade_fast.ops.patterns"], "_hash", weak)
    codes = MAPS["cells"].to(torch.int32)
    for actual, expected in zip(patterns(codes, 3), written_out(codes, 3), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(backend, shape):
    ids, taps, counts = patterns(torch.empty(shape, dtype=torch.int32), 3)
    assert ids.shape == shape and taps.shape == (0, 9) and counts.tolist() == [0] * shape[0]


def test_strided_codes(backend):
    codes = maps.noise(2, 9, 7, 3).to(torch.int32).transpose(1, 2)
    for actual, expected in zip(patterns(codes, 3), written_out(codes, 3), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("codes", "k", "message"),
    [
        (torch.zeros(1, 2, 2), 3, r"codes must be int32 \[N, H, W\], got torch.float32 \[1, 2, 2\]"),
        (torch.zeros(2, 2, dtype=torch.int32), 3, r"got torch.int32 \[2, 2\]"),
        (torch.zeros(1, 2, 2, dtype=torch.int32), 2, "kernel_size must be odd, got 2"),
    ],
)
def test_wrong_arguments(codes, k, message):
    with pytest.raises(ValueError, match=message):
        patterns(codes, k)


@pytest.mark.parametrize("numel", [0, 1, 700])
def test_segments(backend, numel):
    ids = torch.randint(-1, 9, (numel,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    order, offsets = segments(ids, 11)  # 9 and 10 do not occur
    expected = [[i for i, v in enumerate(ids.tolist()) if v == s] for s in range(-1, 11)]
    assert order.tolist() == [i for positions in expected for i in positions]
    assert offsets.tolist() == [sum(map(len, expected[: s + 1])) for s in range(12)]
    assert order.dtype == offsets.dtype == torch.int32


def test_opcheck(backend):
    codes = maps.cells(2, 6, 7, 3).to(torch.int32)
    torch.library.opcheck(torch.ops.spade_fast.patterns.default, (codes, 3))
    torch.library.opcheck(torch.ops.spade_fast.segments.default, (codes, 3))
