# SPDX-License-Identifier: Apache-2.0
import maps
import pytest
import torch
import torch.nn.functional as F

from spade_fast import LabelMap
from spade_fast.ops.label_conv import label_conv

pytestmark = pytest.mark.usefixtures("strict_memory")


def make(n, h, w, classes, edges, out, k, dtype=torch.float64, ignore=None):
    ids = maps.cells(n, h, w, classes, seed=h)
    labels = LabelMap(ids, classes, maps.noise(n, h, w, 2) if edges else None, ignore_index=ignore)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(out, labels.label_nc, k, k, generator=g, dtype=torch.float64).to(dtype)
    return labels, weight, torch.randn(out, generator=g, dtype=torch.float64).to(dtype)


def table_of(weight):
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[1], weight.shape[0])


def written_out(labels, weight, bias, stride, padding, pooled):
    dense = labels.one_hot(torch.float64)
    if pooled:
        dense = F.avg_pool2d(dense, 3, stride=2, padding=1, count_include_pad=False)
    return F.conv2d(dense, weight.double(), None if bias is None else bias.double(), stride, padding)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize(("k", "stride", "padding"), [(4, 2, 2), (3, 1, 1), (1, 1, 0), (5, 1, 2)])
@pytest.mark.parametrize(("n", "h", "w"), [(2, 13, 10), (1, 8, 8), (1, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients(backend, n, h, w, k, stride, padding, edges, pooled, dtype):
    if backend == "triton" and (dtype == torch.float64 or (pooled and h * w > 64)):
        pytest.skip("slow in the interpreter; float32 on small maps covers it")
    labels, weight, bias = make(n, h, w, 4, edges, 6, k, dtype, ignore=1)
    weight.requires_grad_(), bias.requires_grad_()
    expected = written_out(labels, weight, bias, stride, padding, pooled)
    actual = label_conv(labels.codes, table_of(weight), bias, edges, k, stride, padding, pooled)
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=50 * eps)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (weight, bias))
    grads = torch.autograd.grad((actual * upstream.to(dtype)).sum(), (weight, bias))
    for a, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=20 * eps * upstream[:, 0].numel() ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(backend, dtype):
    labels, weight, _ = make(1, 9, 9, 300, True, 16, 3, dtype)
    actual = label_conv(labels.codes, table_of(weight), None, True, 3, 1, 1)
    expected = written_out(labels, weight, None, 1, 1, False)
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-5)


def test_autocast():
    labels, weight, bias = make(1, 9, 9, 4, True, 16, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = label_conv(labels.codes, table_of(weight), bias, True, 3, 1, 1)
    assert actual.dtype == torch.bfloat16
    expected = written_out(labels, weight.bfloat16(), bias.bfloat16(), 1, 1, False)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5)


def test_real_map_as_the_discriminator_sees_it(backend):
    labels = LabelMap(maps.real(32), 183, maps.noise(1, 32, 32, 2))
    weight = torch.randn(8, 184, 4, 4, generator=torch.Generator().manual_seed(0))
    for pooled in (False, True):
        actual = label_conv(labels.codes, table_of(weight), None, True, 4, 2, 2, pooled)
        expected = written_out(labels, weight, None, 2, 2, pooled)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize(("k", "stride", "padding"), [(1, 1, 0), (1, 2, 1), (3, 1, 1), (3, 2, 4), (4, 1, 2), (4, 3, 3)])
def test_every_small_map(backend, k, stride, padding, edges, pooled):
    """Sizes 1 to 5 in both directions; steps and margins larger than the kernel too."""
    if backend == "triton":
        pytest.skip("slow in the interpreter; test_output_and_gradients covers it")
    for h in range(1, 6):
        for w in range(1, 6):
            sizes = [((s - 1) // 2 + 1 if pooled else s) + 2 * padding for s in (h, w)]
            if min(sizes) < k:
                continue
            ids = maps.noise(2, h, w, 3, seed=h * 6 + w)
            labels = LabelMap(ids, 3, maps.noise(2, h, w, 2) if edges else None, ignore_index=1)
            weight, bias = make(1, 1, 1, 3, edges, 3, k)[1:]
            weight.requires_grad_(), bias.requires_grad_()
            expected = written_out(labels, weight, bias, stride, padding, pooled)
            actual = label_conv(labels.codes, table_of(weight), bias, edges, k, stride, padding, pooled)
            upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            grads = [torch.autograd.grad((out * upstream).sum(), (weight, bias)) for out in (actual, expected)]
            for a, e in zip((actual, *grads[0]), (expected, *grads[1]), strict=True):
                torch.testing.assert_close(a, e, rtol=0, atol=1e-13)  # float64, tens of terms of about 1


@pytest.mark.parametrize("pooled", [False, True])
def test_nothing_but_ignored_pixels(backend, pooled):
    """The bias is all there is, and no label gets a gradient; an ignored pixel's edge still counts."""
    for edges in (None, torch.ones(1, 5, 4, dtype=torch.bool)):
        labels = LabelMap(torch.full((1, 5, 4), 255), 3, edges, ignore_index=255)
        weight = torch.randn(6, labels.label_nc, 3, 3, generator=torch.Generator().manual_seed(0))
        weight.requires_grad_()
        bias = torch.randn(6, generator=torch.Generator().manual_seed(1))
        actual = label_conv(labels.codes, table_of(weight), bias, labels.has_edges, 3, 1, 1, pooled)
        expected = written_out(labels, weight, bias, 1, 1, pooled)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
        (grad,) = torch.autograd.grad(actual.sum(), weight)
        assert torch.equal(grad[:, :3], torch.zeros_like(grad[:, :3]))
        if edges is None:
            assert torch.equal(actual, bias.view(1, 6, 1, 1).expand_as(actual))
        else:
            assert bool((grad[:, 3] > 0).all())


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layouts_do_not_matter(backend, dtype, pooled):
    """Gradients, codes and tables of any strides, against contiguous ones."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("torch runs it")
    labels, weight, bias = make(2, 9, 6, 4, True, 5, 3, dtype)
    options = (True, 3, 2, 1, pooled)
    eps, eps_of_sums = torch.finfo(dtype).eps, min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    table = table_of(weight)
    codes = labels.codes.transpose(1, 2).contiguous().transpose(1, 2)
    expected = label_conv(labels.codes, table.contiguous(), bias, *options)
    wide = torch.cat([weight, weight], 1)[:, : weight.shape[1]]  # part of a larger weight
    for other in (table, table_of(wide), table.repeat_interleave(2, 2)[:, :, ::2]):
        actual = label_conv(codes, other, bias, *options)
        torch.testing.assert_close(actual, expected, rtol=eps, atol=50 * eps_of_sums)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    backward = torch.ops.spade_fast.label_conv_backward
    wanted = backward(dout, labels.codes, labels.label_nc, *options)
    layouts = (
        dout.contiguous(memory_format=torch.channels_last),
        dout.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([dout, dout], 1).contiguous(memory_format=torch.channels_last)[:, :5],
        dout.repeat_interleave(2, 3)[..., ::2],
    )
    for other in layouts:
        for a, e in zip(backward(other, codes, labels.label_nc, *options), wanted, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, e, rtol=eps, atol=20 * eps_of_sums * dout[:, 0].numel() ** 0.5)
    ones = torch.ones((), dtype=dtype).expand(expected.shape)  # as sum() gives it: strides of zero
    for a, e in zip(
        backward(ones, codes, labels.label_nc, *options),
        backward(ones.contiguous(), labels.codes, labels.label_nc, *options),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=eps, atol=50 * eps_of_sums)


@pytest.mark.parametrize("pooled", [False, True])
def test_codes_outside_the_image(backend, pooled):
    """A negative code adds nothing and, unlike an ignored pixel, does not count in the mean of a pool."""
    if backend == "triton":
        pytest.skip("takes the pool's size from its position: a LabelMap has no negative code")
    codes = torch.tensor([[[0, -1, 2], [-1, -1, 1], [5, 3, -1]]], dtype=torch.int32)  # 3 rows: 3 and 5 are ignored
    table = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = (codes >= 0).double()
    dense = torch.stack([(codes == c).double() for c in range(3)], 1)
    if pooled:
        sums = F.avg_pool2d(dense, 3, stride=2, padding=1, divisor_override=1)
        counts = F.avg_pool2d(known[:, None], 3, stride=2, padding=1, divisor_override=1)
        dense = sums / counts.clamp(min=1)
    expected = F.conv2d(dense, table[0].T[:, :, None, None])
    actual = label_conv(codes, table, None, False, 1, 1, 0, pooled)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dtable, dbias = torch.ops.spade_fast.label_conv_backward(dout, codes, 3, False, 1, 1, 0, pooled)
    torch.testing.assert_close(dtable[0], torch.einsum("nohw,nlhw->lo", dout, dense), rtol=0, atol=1e-14)
    torch.testing.assert_close(dbias, dout.sum((0, 2, 3)), rtol=0, atol=1e-14)


def test_empty_batch(backend):
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    out = label_conv(torch.empty(0, 5, 5, dtype=torch.int32), table_of(weight), None, False, 3, 1, 1)
    assert out.shape == (0, 6, 5, 5)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("pooled", [False, True])
def test_gradcheck(pooled):
    labels, weight, bias = make(1, 4, 5, 2, True, 2, 3)
    weight.requires_grad_(), bias.requires_grad_()

    def function(w, b):
        return label_conv(labels.codes, table_of(w), b, True, 3, 2, 1, pooled)

    assert torch.autograd.gradcheck(function, (weight, bias))


def test_backward_is_bitwise_reproducible(backend):
    labels, weight, _ = make(2, 12, 12, 2, False, 4, 3, torch.float32)
    weight.requires_grad_()

    def gradient():
        out = label_conv(labels.codes, table_of(weight), None, False, 3, 1, 1)
        return torch.autograd.grad(out.square().sum(), weight)[0]

    first = gradient()
    assert torch.equal(first, gradient()) and torch.equal(first, gradient())


@pytest.mark.parametrize("pooled", [False, True])
def test_second_derivatives(pooled):
    labels, weight, bias = make(1, 4, 5, 2, False, 2, 3)
    tensors = [table_of(weight).requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradgradcheck(
        lambda table, bias: label_conv(labels.codes, table, bias, False, 3, 2, 1, pooled), tensors
    )


def test_wrong_arguments():
    table = torch.zeros(9, 2, 4)
    with pytest.raises(ValueError, match=r"codes \[N, H, W\] and table \[16, L, O\]"):
        label_conv(torch.zeros(1, 5, 5, dtype=torch.int32), table, None, False, 4)
    with pytest.raises(ValueError, match=r"a 3x3 kernel does not fit codes \[1, 2, 5\]"):
        label_conv(torch.zeros(1, 2, 5, dtype=torch.int32), table, None, False, 3)


@pytest.mark.parametrize("pooled", [False, True])
def test_opcheck(backend, pooled):
    labels, weight, bias = make(1, 4, 3, 3, True, 2, 3, torch.float32)
    table = table_of(weight).requires_grad_()
    options = (True, 3, 2, 1, pooled)
    torch.library.opcheck(torch.ops.spade_fast.label_conv.default, (labels.codes, table, bias, *options))
    dout = torch.randn(label_conv(labels.codes, table, bias, *options).shape)
    args = (dout, labels.codes, labels.label_nc, *options)
    torch.library.opcheck(torch.ops.spade_fast.label_conv_backward.default, args)
