# SPDX-License-Identifier: Apache-2.0
import maps
import pytest
import torch

from spade_fast.ops import pattern_params as module
from spade_fast.ops.pattern_params import pattern_params, tap_segments
from spade_fast.ops.patterns import patterns

pytestmark = pytest.mark.usefixtures("strict_memory")


@pytest.fixture(params=["gather", "factored"])
def method(request, monkeypatch):
    """Forces a method of the torch backend; the others have one each."""
    monkeypatch.setattr(module, "choose_method", lambda *sizes: request.param)
    return request.param


def make(q, p, k, width, c, dtype=torch.float64, seed=0):
    """a, taps (some outside, never the center), w_gamma, b_gamma, w_beta, b_beta."""
    g = torch.Generator().manual_seed(seed)
    taps = torch.randint(-1, q, (p, k * k), generator=g, dtype=torch.int32)
    taps[:, k * k // 2].clamp_(min=0)
    shapes = [(q, width), (c, width, k, k), (c,), (c, width, k, k), (c,)]
    a, wg, bg, wb, bb = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return a, taps, wg, bg, wb, bb


def written_out(a, taps, wg, bg, wb, bb):
    """Every pattern as a k×k picture of hidden rows under the two kernels, in float64."""
    rows = torch.cat([a.double(), torch.zeros(1, a.shape[1], dtype=torch.float64)])
    k = wg.shape[2]
    patches = rows[taps.long().where(taps >= 0, torch.tensor(a.shape[0]))].view(-1, k, k, a.shape[1])
    return torch.cat(
        [torch.einsum("pyxh,chyx->pc", patches, w.double()) + b.double() for w, b in ((wg, bg), (wb, bb))], 1
    )


SIZES = [
    (12, 30, 3, 8, 5),
    (1, 1, 1, 1, 1),  # minimal
    (20, 20, 1, 7, 3),  # k = 1: patterns are the hidden rows
    (9, 15, 5, 6, 4),
    (3, 700, 3, 4, 2),  # long segments in backward
    (7, 20, 3, 5, 150),  # several blocks of channels
]


@pytest.mark.parametrize(("q", "p", "k", "width", "c"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cached", [False, True])
def test_output_and_gradients(backend, method, q, p, k, width, c, dtype, cached):
    if backend == "triton" and (dtype == torch.float64 or p > 100):
        pytest.skip("slow in the interpreter")
    arguments = make(q, p, k, width, c, dtype)
    taps = arguments[1]
    leaves = [t.requires_grad_() for t in arguments if t.is_floating_point()]
    upstream = torch.randn(p, 2 * c, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = written_out(*arguments)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), leaves)
    segments = tap_segments(taps, q) if cached else (None, None)
    actual = pattern_params(*arguments, *segments)
    grads = torch.autograd.grad((actual * upstream.to(dtype)).sum(), leaves)
    # Random signs: a sum of m products errs by a few sqrt(m) roundings of a unit-size product.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=20 * eps * (k * k * width) ** 0.5)
    terms = {0: p * k * k * 2 * c / q, 1: p, 2: p, 3: p, 4: p}
    for i, (a, e) in enumerate(zip(grads, expected_grads, strict=True)):
        # One after another, m products of random sign err by √m roundings of a sum of size √m.
        atol = eps * max(30 * terms[i] ** 0.5 + 30, terms[i])
        torch.testing.assert_close(a, e.to(dtype), rtol=0, atol=atol)


def test_weights_in_any_memory_order(backend, method):
    a, taps, wg, bg, wb, bb = make(6, 11, 3, 8, 4, torch.float32)
    expected = written_out(a, taps, wg, bg, wb, bb)
    channels_last = [w.to(memory_format=torch.channels_last) for w in (wg, wb)]
    strided = [w.repeat(1, 2, 1, 1)[:, : w.shape[1]] for w in (wg, wb)]
    for g, b in (channels_last, strided):
        actual = pattern_params(a, taps, g, bg, b, bb)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend, method, dtype):
    arguments = make(6, 11, 3, 16, 4, dtype)
    actual, expected = pattern_params(*arguments), written_out(*arguments)
    assert actual.dtype == dtype
    # operands are given; the factored method may round 9 partial sums of size ~4 where the GEMM rounds once
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


def test_autocast_casts_and_differentiates(method):
    arguments = [t.requires_grad_() if t.is_floating_point() else t for t in make(6, 11, 3, 16, 4, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        actual = pattern_params(*arguments)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), written_out(*arguments), rtol=0.02, atol=0.3)
    actual.sum().backward()
    assert arguments[0].grad.dtype == torch.float32
    torch.testing.assert_close(arguments[3].grad, torch.full((4,), 11.0))


def test_no_patterns(backend, method):
    arguments = [t.requires_grad_() if t.is_floating_point() else t for t in make(1, 0, 3, 4, 2, torch.float32)]
    out = pattern_params(*arguments)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in arguments if t.is_floating_point())


def test_gradcheck(method):
    arguments = make(4, 6, 3, 2, 2)
    taps = arguments[1]
    leaves = [t.requires_grad_() for t in arguments if t.is_floating_point()]
    assert torch.autograd.gradcheck(lambda a, *rest: pattern_params(a, taps, *rest), leaves)


def test_backward_is_bitwise_reproducible(backend, method):
    arguments = make(5, 60, 3, 8, 4, torch.float32)
    leaves = [t.requires_grad_() for t in arguments if t.is_floating_point()]
    first, *others = [torch.autograd.grad(pattern_params(*arguments).square().sum(), leaves) for _ in range(3)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_second_derivatives():
    a, taps, *weights = make(4, 6, 3, 2, 2)[:6]
    tensors = [t.requires_grad_() for t in (a, *weights)]
    assert torch.autograd.gradgradcheck(lambda a, *weights: pattern_params(a, taps, *weights), tensors)


def test_segments_of_taps():
    taps = torch.tensor([[0, -1, 2], [2, 0, -1], [0, 0, 1]], dtype=torch.int32)
    order, offsets = tap_segments(taps, 3)
    assert order[: offsets[0]].tolist() == [1, 5]  # outside the image, at the front
    for q in range(3):
        for t in range(3):
            found = order[offsets[q * 3 + t] : offsets[q * 3 + t + 1]].tolist()
            assert found == [p * 3 + t for p in range(3) if taps[p, t] == q]


def test_cheaper_method_is_chosen():
    """Many patterns from few hidden rows: factored. As many hidden rows as patterns: one GEMM."""
    assert module.choose_method(500, 5000, 9, 128, 128) == "factored"
    assert module.choose_method(5000, 5000, 9, 128, 128) == "gather"
    assert module.choose_method(5000, 5000, 1, 128, 128) == "gather"


def test_is_the_dense_convolution_on_a_real_map(backend, method):
    """gamma and beta of every pixel, against the plain convolutions of the paper's layer."""
    codes = maps.real(16).to(torch.int32)
    hidden_ids, hidden_codes, _ = patterns(codes, 3)
    ids, taps, _ = patterns(hidden_ids, 3)
    a, _, wg, bg, wb, bb = make(hidden_codes.shape[0], 1, 3, 8, 6, torch.float32)
    dense = a.double()[hidden_ids.long()].permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(dense, torch.cat([wg, wb]).double(), torch.cat([bg, bb]).double(), padding=1)
    actual = pattern_params(a, taps, wg, bg, wb, bb)[ids.long()].permute(0, 3, 1, 2)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [x[0], x[1][:, :8], *x[2:]], r"do not fit a \[4, 2\] and taps \[6, 8\]"),
        (lambda x: [x[0][0], *x[1:]], r"expected a \[Q, Hd\]"),
    ],
)
def test_wrong_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        pattern_params(*change(list(make(4, 6, 3, 2, 2))))


@pytest.mark.parametrize("cached", [False, True])
def test_opcheck(backend, cached):
    arguments = make(5, 7, 3, 4, 3, torch.float32)
    segments = tap_segments(arguments[1], 5) if cached else (None, None)
    for t in arguments:
        t.requires_grad_(t.is_floating_point())
    torch.library.opcheck(torch.ops.spade_fast.pattern_params.default, (*arguments, *segments))
    a, taps, wg, _, wb, _ = (t.detach() for t in arguments)
    args = (torch.randn(7, 6), a, taps, wg, wb, *segments)
    torch.library.opcheck(torch.ops.spade_fast.pattern_params_backward.default, args)
