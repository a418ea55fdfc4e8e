# SPDX-License-Identifier: Apache-2.0
import itertools

import maps
import pytest
import torch

from spade_fast import LabelMap
from spade_fast.ops import _backend
from spade_fast.ops.recognize import recognize

pytestmark = pytest.mark.usefixtures("strict_memory")

REAL = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGER = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]


def written_out(segmap):
    """(kind, codes) as the docstring says them, a pixel at a time; codes None for kind 0."""
    n, channels, h, w = segmap.shape
    values = segmap.permute(0, 2, 3, 1).reshape(-1, channels).to(torch.float64).tolist()
    if any(v not in (0, 1) for pixel in values for v in pixel):
        return 0, None
    found = [[c for c, v in enumerate(pixel) if v == 1] for pixel in values]
    if all(len(f) <= 1 for f in found):
        return 1, torch.tensor([f[0] if f else channels for f in found]).view(n, h, w)
    labels = [[c for c in f if c < channels - 1] for f in found]
    if any(len(f) > 1 for f in labels):
        return 0, None
    edges = [channels - 1 in f for f in found]
    codes = [2 * (f[0] if f else channels - 1) + e for f, e in zip(labels, edges, strict=True)]
    return 2, torch.tensor(codes).view(n, h, w)


def assert_right(segmap, kind=None):
    codes, found = recognize(segmap)
    expected_kind, expected = written_out(segmap)
    assert kind is None or expected_kind == kind
    assert int(found) == expected_kind and found.dtype == codes.dtype == torch.int32
    if expected_kind:
        assert torch.equal(codes, expected.to(torch.int32))
    labels = LabelMap.from_segmap(segmap)
    assert (labels is None) == (expected_kind == 0)
    if labels is not None:
        assert torch.equal(labels.one_hot(torch.float64), segmap.to(torch.float64))


def make(n=2, h=7, w=5, classes=6, edges=False, ignore=1):
    labels = LabelMap(
        maps.noise(n, h, w, classes), classes, maps.noise(n, h, w, 2, seed=1) if edges else None, ignore_index=ignore
    )
    return labels.one_hot()


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("dtype", REAL + INTEGER + UNSIGNED, ids=str)
def test_every_dtype(backend, dtype, edges):
    segmap = make(edges=edges).to(dtype)
    assert_right(segmap, 2 if edges else 1)
    assert_right(segmap.contiguous(memory_format=torch.channels_last), 2 if edges else 1)


def layouts(segmap):
    n, channels, h, w = segmap.shape
    wide = torch.full((n, 2 * channels, 2 * h, 2 * w), 7.0)
    wide[:, ::2, ::2, ::2] = segmap
    last = torch.full((n, h, w, channels + 3), 7.0)
    last[..., 2 : channels + 2] = segmap.permute(0, 2, 3, 1)
    return {
        "contiguous": segmap.contiguous(),
        "channels-last": segmap.contiguous(memory_format=torch.channels_last),
        "every second": wide[:, ::2, ::2, ::2],
        "slice of channels-last": last[..., 2 : channels + 2].permute(0, 3, 1, 2),
        "transposed": segmap.transpose(2, 3).contiguous().transpose(2, 3),
        "batch innermost": segmap.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "rows apart": torch.zeros(n, channels, h, w + 3)[..., :w].copy_(segmap),
    }


@pytest.mark.parametrize("edges", [False, True])
def test_every_layout(backend, edges):
    for segmap in layouts(make(edges=edges)).values():
        assert_right(segmap, 2 if edges else 1)


@pytest.mark.parametrize("layout", layouts(make()))
@pytest.mark.parametrize("wrong", [2.0, -1.0, 0.5, float("nan"), float("inf"), 1.0 + 2**-23, 1e-45])
def test_one_wrong_value_anywhere(backend, layout, wrong):
    for where in ((0, 0, 0, 0), (1, 5, 6, 4), (0, 3, 2, 1)):
        segmap = make()
        segmap[where] = wrong
        assert_right(layouts(segmap)[layout], 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_negative_zero_is_zero_and_minus_one_is_not_one(backend, dtype):
    segmap = make().to(dtype).to(torch.float64)
    assert_right(torch.where(segmap == 0, -0.0, segmap).to(dtype), 1)
    assert_right((-segmap).to(dtype), 0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_integers_that_resemble_one(backend, dtype):
    for value in {torch.iinfo(dtype).min, torch.iinfo(dtype).max, 2, 3} - {0}:
        segmap = make().to(dtype)
        segmap[1, 4, 6, 4] = value
        assert_right(segmap, 0)


def test_two_labels_in_a_pixel(backend):
    for channels_last, (a, b) in itertools.product((False, True), [(0, 1), (2, 4), (0, 5), (4, 5)]):
        segmap = make(classes=6)
        segmap[1, :, 3, 2] = 0
        segmap[1, [a, b], 3, 2] = 1
        if channels_last:
            segmap = segmap.contiguous(memory_format=torch.channels_last)
        assert_right(segmap, 2 if b == 5 else 0)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_map_of_one_row(backend, channels):
    """All maps of two pixels with values 0, 1 and 2."""
    for values in itertools.product((0.0, 1.0, 2.0), repeat=2 * channels):
        assert_right(torch.tensor(values).view(1, channels, 1, 2))


def test_expanded(backend):
    segmap = make(n=1, h=1)
    assert_right(segmap.expand(3, -1, 4, -1), 1)
    assert_right(segmap[:, :, :, :1].expand(-1, -1, 4, 6), 1)
    assert_right(torch.ones(1, 1, 1, 1).expand(2, 3, 2, 2), 0)
    assert_right(torch.zeros(1, 1, 1, 1).expand(2, 3, 2, 2), 1)


def test_blocks(backend):
    """More pixels than the native code takes at once; the second label, or the wrong value, in the last of them."""
    ids = maps.noise(2, 61, 83, 3)
    for channels_last in (False, True):
        for change, kind in (((0.0, 1.0, 0.0), 1), ((1.0, 1.0, 0.0), 0), ((0.0, 1.0, 1.0), 2), ((0.0, 3.0, 0.0), 0)):
            segmap = LabelMap(ids, 3).one_hot()
            segmap[1, :, 60, 82] = torch.tensor(change)
            if channels_last:
                segmap = segmap.contiguous(memory_format=torch.channels_last)
            assert_right(segmap, kind)


def test_many_channels_in_half_precision(backend):
    """Channel numbers that half precision does not have."""
    ids = torch.tensor([[[0, 2049, 4999, 5000]]])
    segmap = LabelMap(ids, 5000, ignore_index=5000).one_hot(torch.float16)
    codes, kind = recognize(segmap)
    assert int(kind) == 1 and torch.equal(codes, ids.to(torch.int32))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 2), (2, 3, 2, 0)])
def test_no_pixels(backend, shape):
    codes, kind = recognize(torch.empty(shape))
    assert codes.shape == (shape[0], *shape[2:]) and int(kind) == 1


def test_complex_and_no_channels_are_no_label_map():
    assert LabelMap.from_segmap(make().to(torch.complex64)) is None
    assert LabelMap.from_segmap(torch.empty(1, 0, 2, 2)) is None


def test_negated_view(backend):
    """A view with torch's lazy sign (imaginary part of a conjugate)."""
    negated = torch.complex(torch.zeros(2, 6, 7, 5), -make()).conj().imag
    assert negated.is_neg()
    assert_right(negated, 1)


def test_opcheck():
    torch.library.opcheck(torch.ops.spade_fast.recognize.default, (make(edges=True),))


def test_native_op_names_what_is_wrong():
    if _backend.why_not("cpp") is not None:
        pytest.skip("no native extension")
    native = torch.ops.spade_fast_native.recognize
    with pytest.raises(RuntimeError, match=r"segmap must have shape \[N, L, H, W\] .* got \[3, 4, 4\]"):
        native(torch.zeros(3, 4, 4))
    with pytest.raises(RuntimeError, match=r"segmap must hold integers, booleans or floating point .* ComplexFloat"):
        native(torch.zeros(1, 3, 4, 4, dtype=torch.complex64))
