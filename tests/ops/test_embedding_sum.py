# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from spade_fast.ops.embedding_sum import embedding_sum

pytestmark = pytest.mark.usefixtures("strict_memory")


def make(q, t, labels, width, edges, dtype=torch.float64, seed=0):
    """table, bias, codes; codes include outside (-1) and ignored ones."""
    g = torch.Generator().manual_seed(seed)
    rows = labels + int(edges)
    codes = torch.randint(-1, (labels + 1) * (2 if edges else 1), (q, t), generator=g, dtype=torch.int32)
    table = torch.randn(t, rows, width, generator=g, dtype=torch.float64).to(dtype)
    return table, torch.randn(width, generator=g, dtype=torch.float64).to(dtype), codes


def written_out(table, bias, codes, edges, relu):
    out = torch.zeros(codes.shape[0], table.shape[2], dtype=torch.float64) + 0 * table.sum()
    out = out if bias is None else out + bias.double()
    rows = table.shape[1]
    out = list(out)
    for q, patch in enumerate(codes.tolist()):
        for t, code in enumerate(patch):
            if code < 0:
                continue
            label, edge = (code >> 1, code & 1) if edges else (code, 0)
            if label < rows - int(edges):
                out[q] = out[q] + table[t, label].double()
            if edge:
                out[q] = out[q] + table[t, rows - 1].double()
    out = torch.stack(out) if out else torch.zeros(0, table.shape[2], dtype=torch.float64)
    return out.relu() if relu else out


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("q", "t", "labels", "width"),
    [
        (40, 9, 5, 16),
        (1, 1, 1, 1),  # minimal
        (7, 25, 3, 37),  # k = 5, odd width
        (600, 9, 2, 8),  # long runs of one label in backward
        (30, 9, 300, 24),  # more than 256 classes
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients(backend, q, t, labels, width, relu, edges, dtype):
    if backend == "triton" and q == 600 and (dtype == torch.float64 or relu):
        pytest.skip("slow in the interpreter; float32 covers it")
    table, bias, codes = make(q, t, labels, width, edges, dtype)
    table.requires_grad_(), bias.requires_grad_()
    upstream = torch.randn(q, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = written_out(table, bias, codes, edges, relu)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (table, bias))
    actual = embedding_sum(table, bias, codes, edges, relu)
    grads = torch.autograd.grad((actual * upstream.to(dtype)).sum(), (table, bias))
    assert actual.dtype == dtype
    # A sum of m unit-size terms errs by about sqrt(m) roundings: at most 50 terms forward, q backward.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=50 * eps)
    for a, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, e.to(dtype), rtol=0, atol=20 * eps * max(q, 4) ** 0.5)


def test_no_bias_and_permuted_table(backend):
    table, _, codes = make(20, 9, 4, 12, True, torch.float32)
    weight = table.permute(2, 1, 0).contiguous()  # as a plain convolution weight [Hd, L, k*k] lies in memory
    actual = embedding_sum(weight.permute(2, 1, 0), None, codes, True, False)
    torch.testing.assert_close(actual.double(), written_out(table, None, codes, True, False), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(backend, dtype):
    table, bias, codes = make(50, 9, 4, 16, True, dtype)
    actual = embedding_sum(table, bias, codes, True, False)
    expected = written_out(table, bias, codes, True, False)
    assert actual.dtype == dtype
    # one rounding of the result, from a float32 sum
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-5)


def test_empty(backend):
    table, bias, codes = make(0, 9, 4, 16, False, torch.float32)
    table.requires_grad_()
    out = embedding_sum(table, bias, codes, False, True)
    assert out.shape == (0, 16)
    (grad,) = torch.autograd.grad(out.sum(), table)
    assert torch.equal(grad, torch.zeros_like(table))


def test_gradcheck():
    table, bias, codes = make(6, 4, 3, 3, True)
    table.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: embedding_sum(a, b, codes, True, True), (table, bias))


def test_backward_is_bitwise_reproducible(backend):
    table, bias, codes = make(300, 4, 3, 16, True, torch.float32)
    table.requires_grad_()
    grads = [
        torch.autograd.grad(embedding_sum(table, bias, codes, True, True).square().sum(), table)[0] for _ in range(3)
    ]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("relu", [False, True])
def test_second_derivatives(relu):
    table, bias, codes = make(5, 4, 3, 3, True)
    table.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t, b: embedding_sum(t, b, codes, True, relu), (table, bias))


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"table \[T, L, Hd\] and codes \[Q, T\], got \[9, 2, 4\], \[5, 8\]"):
        embedding_sum(torch.zeros(9, 2, 4), None, torch.zeros(5, 8, dtype=torch.int32), False, False)


@pytest.mark.parametrize("edges", [False, True])
def test_opcheck(backend, edges):
    table, bias, codes = make(6, 4, 3, 5, edges, torch.float32)
    table.requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(torch.ops.spade_fast.embedding_sum.default, (table, bias, codes, edges, True))
    out = embedding_sum(table, bias, codes, edges, True).detach()
    args = (torch.randn_like(out), out, codes, table.shape[1], edges, True)
    torch.library.opcheck(torch.ops.spade_fast.embedding_sum_backward.default, args)
