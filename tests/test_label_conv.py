# SPDX-License-Identifier: Apache-2.0
import maps
import pytest
import torch
import torch.nn.functional as F

from spade_fast import LabelMap, ops

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
    actual = ops.label_conv(labels.codes, table_of(weight), bias, edges, k, stride, padding, pooled)
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
    actual = ops.label_conv(labels.codes, table_of(weight), None, True, 3, 1, 1)
    expected = written_out(labels, weight, None, 1, 1, False)
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-5)


def test_autocast():
    labels, weight, bias = make(1, 9, 9, 4, True, 16, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.label_conv(labels.codes, table_of(weight), bias, True, 3, 1, 1)
    assert actual.dtype == torch.bfloat16
    expected = written_out(labels, weight.bfloat16(), bias.bfloat16(), 1, 1, False)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5)


def test_real_map_as_the_discriminator_sees_it(backend):
    labels = LabelMap(maps.real(32), 183, maps.noise(1, 32, 32, 2))
    weight = torch.randn(8, 184, 4, 4, generator=torch.Generator().manual_seed(0))
    for pooled in (False, True):
        actual = ops.label_conv(labels.codes, table_of(weight), None, True, 4, 2, 2, pooled)
        expected = written_out(labels, weight, None, 2, 2, pooled)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def test_empty_batch(backend):
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    out = ops.label_conv(torch.empty(0, 5, 5, dtype=torch.int32), table_of(weight), None, False, 3, 1, 1)
    assert out.shape == (0, 6, 5, 5)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("pooled", [False, True])
def test_gradcheck(pooled):
    labels, weight, bias = make(1, 4, 5, 2, True, 2, 3)
    weight.requires_grad_(), bias.requires_grad_()

    def function(w, b):
        return ops.label_conv(labels.codes, table_of(w), b, True, 3, 2, 1, pooled)

    assert torch.autograd.gradcheck(function, (weight, bias))


def test_backward_is_bitwise_reproducible(backend):
    labels, weight, _ = make(2, 12, 12, 2, False, 4, 3, torch.float32)
    weight.requires_grad_()

    def gradient():
        out = ops.label_conv(labels.codes, table_of(weight), None, False, 3, 1, 1)
        return torch.autograd.grad(out.square().sum(), weight)[0]

    first = gradient()
    assert torch.equal(first, gradient()) and torch.equal(first, gradient())


def test_second_backward_says_so():
    labels, weight, _ = make(1, 4, 5, 2, False, 2, 3)
    weight.requires_grad_()
    out = ops.label_conv(labels.codes, table_of(weight), None, False, 3, 1, 1)
    (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="spade_fast::label_conv can be differentiated once only"):
        grad.sum().backward()


def test_wrong_arguments():
    table = torch.zeros(9, 2, 4)
    with pytest.raises(ValueError, match=r"codes \[N, H, W\] and table \[16, L, O\]"):
        ops.label_conv(torch.zeros(1, 5, 5, dtype=torch.int32), table, None, False, 4)
    with pytest.raises(ValueError, match=r"a 3x3 kernel does not fit codes \[1, 2, 5\]"):
        ops.label_conv(torch.zeros(1, 2, 5, dtype=torch.int32), table, None, False, 3)


@pytest.mark.parametrize("pooled", [False, True])
def test_opcheck(backend, pooled):
    labels, weight, bias = make(1, 4, 3, 3, True, 2, 3, torch.float32)
    table = table_of(weight).requires_grad_()
    options = (True, 3, 2, 1, pooled)
    torch.library.opcheck(torch.ops.spade_fast.label_conv.default, (labels.codes, table, bias, *options))
    dout = torch.randn(ops.label_conv(labels.codes, table, bias, *options).shape)
    args = (dout, labels.codes, labels.label_nc, *options)
    torch.library.opcheck(torch.ops.spade_fast.label_conv_backward.default, args)
