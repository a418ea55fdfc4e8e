# SPDX-License-Identifier: Apache-2.0
import copy
import io
import pickle
import sys

import maps
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_fast import LabelMap
from spade_fast.labels import pattern_tables
from spade_fast.labels.pattern_tables import _TENSORS, nearest_index
from spade_fast.ops.segments import segments

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]


ZEROS = torch.zeros(1, 2, 2, dtype=torch.int64)


def make(n, h=9, w=11, classes=3, seed=0, edges=True):
    return LabelMap(maps.cells(n, h, w, classes, seed), classes, maps.noise(n, h, w, 2, seed) if edges else None)


def dense(ids, num_classes, edges=None, ignore=None):
    """The one-hot map, pixel by pixel."""
    n, h, w = ids.shape
    out = torch.zeros(n, num_classes + (edges is not None), h, w)
    for i in range(n):
        for y in range(h):
            for x in range(w):
                if int(ids[i, y, x]) != ignore:
                    out[i, int(ids[i, y, x]), y, x] = 1
                if edges is not None and edges[i, y, x]:
                    out[i, num_classes, y, x] = 1
    return out


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_dtype(dtype):
    ids = maps.noise(2, 4, 5, 100)
    assert torch.equal(LabelMap(ids.to(dtype), 100).one_hot(), dense(ids, 100))


@pytest.mark.parametrize("edge_dtype", [torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("ignore", [None, 255, -1, 2])
def test_one_hot_with_edges_and_ignored_pixels(edge_dtype, ignore):
    ids, edges = maps.noise(2, 4, 5, 4), maps.noise(2, 4, 5, 2, seed=1)
    if ignore is not None:
        ids[0, :2] = ignore
    labels = LabelMap(ids, 4, edges.to(edge_dtype), ignore_index=ignore)
    assert labels.label_nc == 5 and labels.size == (4, 5) and len(labels) == 2
    assert torch.equal(labels.one_hot(), dense(ids, 4, edges, ignore))
    assert labels.one_hot(torch.float16).dtype == torch.float16
    assert torch.equal(labels.edges, edges.bool())
    assert torch.equal(labels.labels, ids.masked_fill(ids == (-99 if ignore is None else ignore), 4).int())


def test_more_than_255_classes():
    ids = maps.noise(1, 6, 6, 300)
    assert torch.equal(LabelMap(ids, 300).one_hot(), dense(ids, 300))


@pytest.mark.parametrize(
    ("ids", "kwargs", "error", "message"),
    [
        (
            torch.tensor([[[0, 1], [7, 2]]]),
            {},
            ValueError,
            r"labels\[0, 1, 0\] is 7; labels must be in 0\.\.2 .*1 pixels",
        ),
        (torch.tensor([[[0, -1]]]), {}, ValueError, r"labels\[0, 0, 1\] is -1; .*no ignore_index was given"),
        (torch.tensor([[[0, 255]]]), dict(ignore_index=-1), ValueError, r"is 255; .*ignore_index is -1"),
        (torch.tensor([[[0, 2**40]]]), {}, ValueError, rf"is {2**40}"),
        (torch.zeros(1, 2, 2), {}, TypeError, "labels must have an integer dtype, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, ValueError, r"shape \[N, H, W\], got \[2, 2\]"),
        (ZEROS, dict(edges=torch.zeros(1, 2, 3)), ValueError, r"\[1, 2, 2\], got \[1, 2, 3\]"),
        (ZEROS, dict(edges=torch.zeros(1, 2, 2)), TypeError, "edges must be bool or integer"),
        (
            ZEROS,
            dict(edges=torch.tensor([[[0, 1], [255, 0]]])),
            ValueError,
            r"edges\[0, 1, 0\] is 255; edges must be 0 or 1",
        ),
    ],
)
def test_wrong_values_are_named(ids, kwargs, error, message):
    with pytest.raises(error, match=message):
        LabelMap(ids, 3, **kwargs)


def test_num_classes_must_be_positive():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        LabelMap(torch.zeros(1, 1, 1, dtype=torch.int64), 0)


def test_unvalidated_labels_out_of_range_count_as_ignored():
    ids = torch.tensor([[[0, 7, -3, 2**40]]])
    assert torch.equal(LabelMap(ids, 3, validate=False).one_hot()[0, :, 0].sum(0), torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_from_segmap_recognizes_one_hot(edges, dtype):
    labels = make(2, classes=300, edges=edges)
    found = LabelMap.from_segmap(labels.one_hot(dtype))
    assert found.label_nc == labels.label_nc
    assert torch.equal(found.one_hot(), labels.one_hot())


def test_from_segmap_keeps_ignored_pixels():
    labels = LabelMap(torch.tensor([[[0, 1], [-1, 2]]]), 3, torch.ones(1, 2, 2, dtype=torch.bool), ignore_index=-1)
    assert torch.equal(LabelMap.from_segmap(labels.one_hot()).one_hot(), labels.one_hot())


@pytest.mark.parametrize("wrong", [0.5, 2.0, -1.0, 1 + 2**-20, float("nan"), float("inf")])
def test_from_segmap_refuses_other_values(wrong):
    segmap = make(1).one_hot()
    segmap[0, 1, 3, 4] = wrong
    assert LabelMap.from_segmap(segmap) is None


def test_from_segmap_refuses_two_labels_in_a_pixel():
    segmap = make(1, classes=4).one_hot()
    segmap[0, :3, 5, 5] = 1
    assert LabelMap.from_segmap(segmap) is None


def test_from_segmap_needs_four_dimensions():
    with pytest.raises(ValueError, match=r"\[N, L, H, W\], got \[3, 4, 4\]"):
        LabelMap.from_segmap(torch.zeros(3, 4, 4))


def test_nearest_index_is_interpolates():
    for size in [*range(1, 40), 61, 97, 128, 250, 256, 511]:
        positions = torch.arange(size, dtype=torch.float32)[None, None]
        for to in [*range(1, 40), 63, 64, 91, 127, 200, 256, 333, 1000]:
            picked = F.interpolate(positions, size=to, mode="nearest")[0, 0].long()
            assert torch.equal(nearest_index(size, to), picked), (size, to)


@given(st.integers(1, 5000), st.integers(1, 5000))
@settings(max_examples=200, deadline=None)
def test_nearest_index_of_any_sizes(size, to):
    picked = F.interpolate(torch.arange(size, dtype=torch.float32)[None, None], size=to, mode="nearest")[0, 0]
    assert torch.equal(nearest_index(size, to), picked.long())


@pytest.mark.parametrize("size", [(9, 11), (4, 5), (18, 22), (7, 30), (1, 1)])
def test_resized_is_the_resized_one_hot(size):
    labels = make(2)
    resized = LabelMap.from_codes(labels.resized(*size), 3, True)
    assert torch.equal(resized.one_hot(), F.interpolate(labels.one_hot(), size=size, mode="nearest"))


def same(a, b):
    """Codes, sizes found and patterns found, tensor by tensor."""
    assert torch.equal(a.codes, b.codes) and (a.num_classes, a.has_edges) == (b.num_classes, b.has_edges)
    assert a._resized.keys() == b._resized.keys() and a._patterns.keys() == b._patterns.keys()
    assert all(torch.equal(a._resized[k], b._resized[k]) for k in a._resized)
    for key, p in a._patterns.items():
        q = b._patterns[key]
        assert (p.pattern_counts, p.patch_counts, p.outside_counts) == (
            q.pattern_counts,
            q.patch_counts,
            q.outside_counts,
        )
        for name, x, y in zip(_TENSORS, p.tensors(), q.tensors(), strict=True):
            assert (x is None and y is None) or torch.equal(x, y), (key, name)
    return True


SIZES = [(9, 11), (4, 5), (18, 22)]


@pytest.mark.parametrize("backward", [False, True])
def test_cat_and_slices_are_the_patterns_of_the_whole(backward, monkeypatch):
    parts = [make(n, seed=n).build(SIZES, 3, backward) for n in (2, 1, 3)]
    whole = LabelMap.from_codes(torch.cat([p.codes for p in parts]), 3, True).build(SIZES, 3, backward)
    for name in ("patterns", "segments", "tap_segments"):  # nothing is searched again
        monkeypatch.setattr(pattern_tables, name, None)
    assert same(LabelMap.cat(parts), whole)
    assert same(whole[:2], parts[0]) and same(whole[2], parts[1]) and same(whole[-3:], parts[2])
    assert same(whole[::2], LabelMap.cat([whole[0], whole[2], whole[4]]))
    assert same(LabelMap.cat([whole[i] for i in range(6)]), whole)
    assert len(whole[4:2]) == 0 and len(whole[7:]) == 0


def test_cat_keeps_what_all_have():
    first, second = make(1).build([(4, 5), (9, 11)], 3), make(1, seed=1).build([(4, 5)], 3, backward=True)
    whole = LabelMap.cat([first, second])
    assert list(whole._patterns) == [(4, 5, 3)] and whole._patterns[4, 5, 3].outside_counts is None


def test_patterns_are_found_once_and_completed_for_backward():
    labels = make(2)
    found = labels.patterns(4, 5)
    assert (
        found.pixels_by_pattern is None
        and labels.patterns(4, 5, backward=True) is found
        and found.pixels_by_pattern is not None
    )
    assert found.kernel_size == 3 and found.density == sum(found.pattern_counts) / 40
    expected = segments(found.pattern_of_pixel, found.pattern_patches.shape[0])
    assert torch.equal(found.pixels_by_pattern, expected[0]) and torch.equal(found.pattern_offsets, expected[1])


@pytest.mark.parametrize("backward", [False, True])
def test_pickle_copy_and_save(backward):
    labels = make(2).build(SIZES, 3, backward)
    assert same(pickle.loads(pickle.dumps(labels)), labels)
    assert same(copy.deepcopy(labels), labels)
    file = io.BytesIO()
    torch.save(labels, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False), labels)


def test_to_its_own_device_is_itself():
    labels = make(1)
    assert labels.to("cpu") is labels


@pytest.mark.parametrize("index", [3, -4])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match=f"image {index} of a LabelMap of 3"):
        make(3)[index]


def test_index_of_another_type():
    with pytest.raises(TypeError, match="indexed by an int or a slice, got list"):
        make(3)[[0, 1]]


def test_cat_refuses_mixtures():
    with pytest.raises(ValueError, match=r"size of item 1 is \(9, 12\), of item 0 \(9, 11\)"):
        LabelMap.cat([make(1), make(1, w=12)])
    with pytest.raises(ValueError, match="num_classes of item 1 is 4, of item 0 3"):
        LabelMap.cat([make(1), make(1, classes=4)])
    with pytest.raises(ValueError, match="at least one"):
        LabelMap.cat([])


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return make(1, seed=i).build(SIZES[:2], 3, backward=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_workers_build_and_collate(workers):
    loader = torch.utils.data.DataLoader(
        Items(),
        batch_size=2,
        collate_fn=LabelMap.cat,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    for i, batch in enumerate(loader):
        assert same(batch, LabelMap.cat([Items()[2 * i], Items()[2 * i + 1]]))


def test_workers_do_not_import_the_compiler():
    """Marking sizes as dynamic is left out where torch.compile is not loaded: importing it takes seconds."""
    import subprocess

    code = (
        "import sys, torch; from spade_fast import LabelMap; "
        "LabelMap(torch.zeros(1, 4, 4, dtype=torch.int64), 2).build([(4, 4)], 3, True); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_repr():
    assert repr(make(2)) == "LabelMap([2, 9, 11], num_classes=3, edges, device=cpu)"


def test_the_earlier_name_of_labels():
    ids = torch.tensor([[[0, 1], [2, 1]]])
    with pytest.warns(FutureWarning, match="ids= is now labels="):
        labels = LabelMap(ids=ids, num_classes=3)
    assert torch.equal(labels.codes, LabelMap(labels=ids, num_classes=3).codes)
    with pytest.warns(FutureWarning, match=r"LabelMap\.ids is now LabelMap\.labels"):
        assert torch.equal(labels.ids, ids.int())
