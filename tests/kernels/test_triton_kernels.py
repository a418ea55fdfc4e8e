# SPDX-License-Identifier: Apache-2.0
"""What the operations' own tests, run on the triton backend, do not reach: several tiles, chunks and splits of small
tensors, every config of tuned kernels, offsets beyond 2**31. Against formulas written out in float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
if not importlib.import_module("spade_fast.kernels.common").INTERPRET:
    pytest.skip("the kernels run on CPU tensors in Triton's interpreter only", allow_module_level=True)

embedding_sum, label_conv, modulation, modulation_backward, pattern_params, patterns, segments, statistics = (
    importlib.import_module(f"spade_fast.kernels.{name}")
    for name in (
        "embedding_sum label_conv modulation modulation_backward pattern_params patterns segments statistics"
    ).split()
)
strict = pytest.mark.usefixtures("strict_memory")
TUNED = {
    "modulation": modulation._forward,
    "modulation_backward": modulation_backward._input_gradient,
    "embedding_sum": embedding_sum._gather_sum,
    "label_conv": label_conv._forward,
    "pattern_params": pattern_params._gather_gemm,
}


def use_config(monkeypatch, kernel, config):
    monkeypatch.setattr(kernel, "configs", [config])
    monkeypatch.setattr(kernel, "cache", {})


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 256 elements, chunks of 16 sorted positions: small tensors have many, and partial ones."""
    for name in ("modulation", "modulation_backward", "embedding_sum", "label_conv"):
        use_config(monkeypatch, TUNED[name], triton.Config({"TILE": 256}))
    monkeypatch.setattr(segments, "ELEMENTS", 512)  # 16 rows of 32 columns: no more than a chunk
    monkeypatch.setattr(segments, "chunk_of", lambda total: 16)
    monkeypatch.setattr(statistics, "TILE", 64)


def random(*shape, dtype=torch.float32, seed=0, channels_last=False):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if channels_last else t


def close(actual, expected, terms=1):
    """Within the rounding of the result's dtype and of fp32 sums of `terms` numbers of the result's size."""
    size = float(expected.abs().max()) if expected.numel() else 0.0
    eps = torch.finfo(actual.dtype).eps / 2 + 4 * 2**-24 * (1 + terms**0.5)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4 * eps * size)


@strict
@pytest.mark.parametrize(
    "lengths",
    [
        [100],  # one segment over seven chunks
        [16, 16, 16],  # exactly the chunks
        [15, 2, 14, 1, 17, 0, 33, 1],  # across boundaries, an empty one, whole chunks in the middle
        [1] * 40,  # every position its own
        [40, 0, 0, 1],
    ],
)
@pytest.mark.parametrize("dropped", [0, 21])
@pytest.mark.parametrize("width", [20, 130])
def test_segments_across_chunks(small_tiles, lengths, dropped, width):
    keys = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    keys = torch.cat([torch.full((dropped,), -1), keys])
    keys = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))].int()
    source = random(len(keys), width)
    order, offsets = segments.segments(keys, len(lengths))
    actual = segments.segment_sum(source, keys, order, offsets)
    expected = torch.stack([source[keys == s].double().sum(0) for s in range(len(lengths))])
    close(actual, expected, terms=max(lengths))
    assert torch.equal(actual, segments.segment_sum(source, keys, order, offsets))


@strict
def test_segments_share_rows_and_large_chunks():
    """Two entries a row, 512-long segments: chunks of 64 with the tile sizes a GPU uses."""
    keys = (torch.arange(1200, dtype=torch.int32) // 512).view(600, 2)
    source = random(600, 16).bfloat16()
    actual = segments.segment_sum(source, keys.view(-1), *segments.segments(keys, 3), per_row=2, dtype=torch.bfloat16)
    close(actual, torch.stack([(source.double() * (keys == s).sum(1, keepdim=True)).sum(0) for s in range(3)]), 512)


def modulated(x, mean, rstd, params, ids, slopes, up):
    """Outputs in float64, every step written out."""
    big = F.interpolate(x, scale_factor=up, mode="nearest")
    if mean is not None:
        big = (big - mean[:, :, None, None]) * rstd[:, :, None, None]
    outs = []
    for p, slope in zip(params, slopes, strict=True):
        gamma, beta = (p if ids is None else p[ids.long()].permute(0, 3, 1, 2)).chunk(2, 1)
        outs.append(F.leaky_relu(big * (1 + gamma) + beta, slope))
    return outs


@strict
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("channels_last", torch.float32),
        ("channels_last", torch.bfloat16),
        ("nchw", torch.float32),
        ("strided", torch.float16),
    ],
)
@pytest.mark.parametrize(
    ("outputs", "up", "dense", "groups"),
    [(1, 1, False, 1), (2, 2, False, 2), (2, 1, False, 0), (2, 2, True, 1), (1, 2, True, 2)],
)
def test_modulation_in_many_tiles(small_tiles, outputs, up, dense, groups, layout, dtype):
    n, c, h, w = 2, 19, 5, 7
    if layout == "strided":
        x = random(n, c + 2, 2 * h, w + 1, dtype=dtype, channels_last=True)[:, 1:-1, ::2, 1:]
    else:
        x = random(n, c, h, w, dtype=dtype, channels_last=layout == "channels_last")
    g = torch.Generator().manual_seed(3)
    rows = 14  # the first seven of image 0, one of them unused
    ids = torch.randint(6, (n, h * up, w * up), generator=g, dtype=torch.int32)
    ids += 7 * torch.arange(n, dtype=torch.int32)[:, None, None]
    ids[0, 2:] = 3  # and one long
    shape = (n, 2 * c, h * up, w * up) if dense else (rows, 2 * c)
    params = [random(*shape, dtype=dtype, seed=5 + m) for m in range(outputs)]
    if dense:
        ids = None
    slopes = [0.2, 1.0][:outputs]
    x64 = x.double().requires_grad_()
    params64 = [p.double().requires_grad_() for p in params]
    mean = rstd = mean64 = rstd64 = None
    if groups:
        dims = (0, 2, 3) if groups == 1 else (2, 3)
        mean64 = x64.mean(dims).reshape(groups, c)
        rstd64 = (x64.var(dims, correction=0).reshape(groups, c) + 1e-5).rsqrt()
        mean, rstd = mean64.detach().float(), rstd64.detach().float()
    expected = modulated(x64, mean64, rstd64, params64, ids, slopes, up)
    order, offsets = (None, None) if dense else segments.segments(ids, rows)
    arguments = (x, mean, rstd, params, ids, order, offsets, slopes, up, True)
    actual = modulation.modulation(*arguments)
    for a, e in zip(actual, expected, strict=True):
        close(a, e.detach())
    douts = [random(*a.shape, dtype=dtype, seed=8 + m) for m, a in enumerate(actual)]
    wanted = torch.autograd.grad(
        sum((e * d.double()).sum() for e, d in zip(expected, douts, strict=True)), [x64, *params64]
    )
    for a, e in zip(modulation_backward.modulation_backward(douts, *arguments), wanted, strict=True):
        assert a.dtype == dtype
        close(a, e, terms=h * w * up * up * n)


@strict
def test_more_channels_than_a_block():
    """130 channels: a second block of two."""
    x, ids = random(1, 130, 2, 3, channels_last=True), torch.tensor([[[0, 1, 1], [2, 0, 0]]], dtype=torch.int32)
    params, slopes = [random(3, 260, seed=1), random(3, 260, seed=2)], [0.2, 1.0]
    leaves = [t.double().requires_grad_() for t in (x, *params)]
    expected = modulated(leaves[0], None, None, leaves[1:], ids, slopes, 1)
    arguments = (x, None, None, params, ids, None, None, slopes, 1, False)
    for a, e in zip(modulation.modulation(*arguments), expected, strict=True):
        close(a, e.detach())
    douts = [random(1, 130, 2, 3, seed=3), random(1, 130, 2, 3, seed=4, channels_last=True)]
    loss = sum((e * d.double()).sum() for e, d in zip(expected, douts, strict=True))
    wanted = torch.autograd.grad(loss, leaves)
    for a, e in zip(modulation_backward.modulation_backward(douts, *arguments), wanted, strict=True):
        close(a, e, terms=6)

    table = random(1, 3, 130).double().requires_grad_()
    codes = ids.view(6, 1)
    expected = table[0, codes[:, 0].long()]
    close(embedding_sum.embedding_sum(table.detach().float(), None, codes, False, False), expected.detach())
    by_pixel = label_conv.label_conv(ids, table.detach().float(), None, False, 1, 1, 0)
    close(by_pixel.permute(0, 2, 3, 1).reshape(6, 130), expected.detach())
    dout = random(6, 130, seed=5)
    wanted = torch.autograd.grad((expected * dout.double()).sum(), table)[0]
    close(embedding_sum.embedding_sum_backward(dout, dout, codes, 3, False, False)[0], wanted, terms=6)
    dout = dout.view(1, 2, 3, 130).permute(0, 3, 1, 2)
    close(label_conv.label_conv_backward(dout, ids, 3, False, 1, 1, 0)[0], wanted, terms=6)


@strict
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_in_many_splits(small_tiles, per_sample, channels_last):
    x = random(3, 5, 11, 23, channels_last=channels_last) + 50
    mean, m2 = statistics.statistics(x, per_sample)
    dims = (2, 3) if per_sample else (0, 2, 3)
    expected = x.double().mean(dims, keepdim=True)
    close(mean, expected.reshape(mean.shape))
    expected = (x.double() - expected).square().sum(dims).reshape(m2.shape)
    # each value is off by the rounding of the mean about which it was taken: 50·2^-24 deviations, to first order
    torch.testing.assert_close(m2.double(), expected, rtol=50 * 2**-24 * 8, atol=0)


@strict
@pytest.mark.parametrize("pooled", [False, True])
def test_label_conv_in_many_tiles(small_tiles, pooled):
    codes = torch.randint(0, 8, (2, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    table = random(9, 4, 17)  # 3 classes and the edge; label 3 is ignored
    maps = [(codes >> 1) == label for label in range(3)] + [(codes & 1) == 1]
    one_hot = torch.stack(maps, 1).double()
    if pooled:
        one_hot = F.avg_pool2d(one_hot, 3, 2, 1, count_include_pad=False)
    weight = table.double().requires_grad_()
    expected = F.conv2d(one_hot, weight.view(3, 3, 4, 17).permute(3, 2, 0, 1), None, 2, 1)
    close(label_conv.label_conv(codes, table, None, True, 3, 2, 1, pooled), expected.detach(), terms=162)
    dout = random(*expected.shape, seed=1)
    dtable, dbias = label_conv.label_conv_backward(dout, codes, 4, True, 3, 2, 1, pooled)
    close(dtable, torch.autograd.grad((expected * dout.double()).sum(), weight)[0], terms=codes.numel())
    close(dbias, dout.double().sum((0, 2, 3)), terms=codes.numel())


@strict
@pytest.mark.parametrize("config", pattern_params._gather_gemm.configs, ids=lambda c: str(list(c.kwargs.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "channels"), [(64, 70), (20, 5)])  # K steps whole and partial, two column blocks
def test_gather_gemm(monkeypatch, config, dtype, width, channels):
    use_config(monkeypatch, pattern_params._gather_gemm, config)
    monkeypatch.setattr(pattern_params, "choose_method", lambda *sizes: "gather")
    a = random(30, width, dtype=dtype)
    taps = torch.randint(-1, 30, (150, 9), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    weights = [random(channels, width, 3, 3, dtype=dtype, seed=s, channels_last=True) for s in (2, 3)]
    biases = [random(channels, dtype=dtype, seed=s) for s in (4, 5)]
    actual = pattern_params.pattern_params(a, taps, weights[0], biases[0], weights[1], biases[1])
    rows = torch.cat([a, a.new_zeros(1, width)]).double()[taps.long()]  # [P, T, Hd]
    halves = [
        torch.einsum("pth,cht->pc", rows, w.double().flatten(2)) + b.double()
        for w, b in zip(weights, biases, strict=True)
    ]
    close(actual, torch.cat(halves, 1), terms=9 * width)


@strict
@pytest.mark.parametrize("name", [name for name in TUNED if name != "pattern_params"])
def test_configs_give_equal_bits(monkeypatch, name):
    """Tuning may choose any config, so none may change a result."""
    codes = torch.randint(0, 9, (2, 24, 20), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x, params = random(2, 40, 24, 20, channels_last=True), [random(9, 80, seed=1), random(9, 80, seed=2)]
    arguments = (x, None, None, params, codes, None, None, [0.2, 1.0], 1, True)
    run = {
        "modulation": lambda: modulation.modulation(*arguments)[1],
        "modulation_backward": lambda: modulation_backward.input_gradient(
            modulation_backward.outputs_of([x, x], params, [0.2, 1.0]), x, None, None, codes, None, 1
        ),
        "embedding_sum": lambda: embedding_sum.embedding_sum(
            random(9, 8, 40), None, codes.view(-1)[:900].view(-1, 9), False, True
        ),
        "label_conv": lambda: label_conv.label_conv(codes, random(9, 8, 40), None, False, 3, 1, 1),
    }[name]
    results = []
    for config in list(TUNED[name].configs):
        with monkeypatch.context() as patch:
            use_config(patch, TUNED[name], config)
            results.append(run())
    assert len(results) > 1
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_collisions_are_refined(monkeypatch):
    """With two bits of hash nearly every patch collides; with 63 none does here. Both must find the same patterns."""
    codes = torch.randint(0, 3, (2, 9, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    exact = []
    monkeypatch.setattr(
        patterns, "_first_equal_exact", lambda *a, f=patterns._first_equal_exact: exact.append(1) or f(*a)
    )
    whole = patterns.patterns(codes, 3)
    assert not exact
    monkeypatch.setattr(patterns, "HASH_BITS", 2)
    weak = patterns.patterns(codes, 3)
    assert exact
    padded = F.pad(codes, (1,) * 4, value=-1)
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).reshape(2, 9, 8, 9)
    for ids, taps, counts in (whole, weak):
        assert torch.equal(taps[ids.long()], windows)
        assert counts.tolist() == [len(w.reshape(-1, 9).unique(dim=0)) for w in windows]
        assert counts.sum() == len(taps)


def test_methods_by_cost():
    """Half precision multiplies so fast that moving a factored table costs more; exact fp32 does not."""
    sizes = (30_000, 98_000, 9, 128, 128)
    choose = pattern_params.choose_method
    assert choose(*sizes, torch.bfloat16) == "gather"
    assert choose(*sizes, torch.float32) == "factored"


def test_offsets_beyond_31_bits():
    """Two images 2**31 elements apart, in memory that is reserved but never touched in between."""
    far = 2**31 + 8
    try:
        memory = torch.empty(far + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("4 GB of address space are not to be had")
    x = memory.as_strided((2, 3, 2, 2), (far, 4, 2, 1))
    x.copy_(random(2, 3, 2, 2))
    mean, _ = statistics.statistics(x, True)
    close(mean, x.double().mean((2, 3)))
    params = random(1, 6, dtype=torch.float16)
    ids = torch.zeros(2, 2, 2, dtype=torch.int32)
    arguments = (x, None, None, [params], ids, *segments.segments(ids, 1), [0.2], 1, False)
    close(modulation.modulation(*arguments)[0], modulated(x.double(), None, None, [params.double()], ids, [0.2], 1)[0])
    dx, dparams = modulation_backward.modulation_backward([x], *arguments)
    z = x.double() * (1 + params[:, :3].double().view(1, 3, 1, 1)) + params[:, 3:].double().view(1, 3, 1, 1)
    dz = x.double() * torch.where(z > 0, 1.0, 0.2)
    close(dx, dz * (1 + params[:, :3].double().view(1, 3, 1, 1)))
    close(dparams, torch.cat([(dz * x.double()).sum((0, 2, 3)), dz.sum((0, 2, 3))])[None], terms=8)
