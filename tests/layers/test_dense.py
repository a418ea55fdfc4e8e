# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixtures import rule

from benchmarks.dense import Decoder
from spade_fast import FusedSPADE, reference
from spade_fast.layers import dense

FIXTURE = Path(__file__).parents[1] / "fixtures" / "liveportrait_decoder_up1.json"


@pytest.fixture
def always(monkeypatch):
    """The path at the map's own size wherever it is exact, not only where it is faster."""
    monkeypatch.setattr(dense, "FEWEST_PIXELS", 0)
    monkeypatch.setattr(dense, "MOST_TAPS", 1.0)
    taken = []
    run = dense.hidden_of_blocks
    monkeypatch.setattr(dense, "hidden_of_blocks", lambda *given: taken.append(given[1]) or run(*given))
    return taken


def random(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def make(k=3, hidden=5, label_nc=3, c=4, bias=True, dtype=torch.float64):
    shapes = [(hidden, label_nc, k, k), (c, hidden, k, k), (c, hidden, k, k)]
    given = []
    for i, shape in enumerate(shapes):
        given += [
            random(*shape, seed=i, dtype=dtype) / 4,
            random(shape[0], seed=9 + i, dtype=dtype) if bias is True or i in bias else None,
        ]
    return given


def plain(segmap, size, shared, shared_bias, gamma, gamma_bias, beta, beta_bias, slope=0.0):
    padding = shared.shape[2] // 2
    enlarged = F.interpolate(segmap, size=size, mode="nearest")
    hidden = F.leaky_relu(F.conv2d(enlarged, shared, shared_bias, padding=padding), slope)
    convolve = [F.conv2d(hidden, w, b, padding=padding) for w, b in ((gamma, gamma_bias), (beta, beta_bias))]
    return torch.cat(convolve, dim=1)


def assert_same(segmap, size, given, slope=0.0, atol=1e-12):
    """Outputs, and the gradients of everything that is given."""
    results = []
    for function in (dense.dense_gamma_beta, plain):
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (segmap, *given)]
        out = function(leaves[0], size, *leaves[1:], slope)
        upstream = random(*out.shape, seed=3)
        results.append([out, *torch.autograd.grad(out, [t for t in leaves if t is not None], upstream)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("factors", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (8, 8), (2, 4), (1, 3), (8, 1)], ids=str)
def test_whole_factors(always, factors, k, layout):
    segmap = random(2, 3, 4, 3).contiguous(memory_format=layout)
    assert_same(segmap, (4 * factors[0], 3 * factors[1]), make(k))
    assert always == [factors]


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 5), (2, 1)])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_maps_that_are_all_border(always, factor, k, h, w):
    """Kernels that reach over the whole map, on both sides at once."""
    assert_same(random(1, 3, h, w), (h * factor, w * factor), make(k))
    assert always == [(factor, factor)]


@pytest.mark.parametrize("size", [(6, 8), (9, 8), (4, 3), (2, 2), (8, 9)])
def test_other_sizes_are_enlarged_first(always, size):
    assert_same(random(2, 3, 4, 6), size, make())
    assert not always


def test_whole_factors_whose_nearest_neighbors_are_no_blocks(always):
    """Nearest neighbor takes the floor of a rounded product: torch's own choice is kept where it is not a block."""
    cases = [(h, factor) for h in range(1, 30) for factor in (2, 3, 7, 11)]
    for h, factor in [*cases, (2, 41), (3, 47)]:
        expected = F.interpolate(torch.arange(float(h))[None, None, None], size=(1, h * factor), mode="nearest")
        whole = torch.equal(expected.flatten(), torch.arange(float(h)).repeat_interleave(factor))
        assert (dense._factors((1, h), (1, h * factor)) == (1, factor)) == whole == ((h, factor) in cases)
    assert_same(random(1, 3, 2, 3), (2, 3 * 47), make())
    assert not always


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, -0.5])
def test_slope_of_the_hidden_layer(always, slope):
    assert_same(random(1, 3, 3, 4), (12, 16), make(), slope)
    assert_same(random(1, 3, 3, 4), (3, 4), make(), slope)


@pytest.mark.parametrize("bias", [(), (0,), (1,), (2,), (0, 1)])
@pytest.mark.parametrize("factor", [1, 4])
def test_without_biases(always, factor, bias):
    """On few pixels γ and β are joined after their convolutions, on many before."""
    for size in (1, 6):
        assert_same(random(1, 3, size, size), (size * factor, size * factor), make(bias=bias))


def test_gradcheck(always):
    given = [t.requires_grad_() for t in make(hidden=2, label_nc=2, c=1)]
    segmap = random(1, 2, 2, 1).requires_grad_()

    def run(*inputs):
        return dense.dense_gamma_beta(inputs[0], (8, 4), *inputs[1:], 0.3)

    torch.autograd.gradcheck(run, (segmap, *given))
    torch.autograd.gradgradcheck(run, (segmap, *given))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 3, 2, 2)])
def test_empty_batch(always, shape):
    segmap = torch.empty(shape, dtype=torch.float64)
    assert dense.dense_gamma_beta(segmap, (8, 8), *make()).shape == (shape[0], 8, 8, 8)


def test_autocast(always):
    """Weights are added in float32 and rounded once, as the plain layer's are."""
    given, segmap = make(dtype=torch.float32), random(1, 3, 4, 4, dtype=torch.float32)
    exact = plain(segmap.double(), (16, 16), *(t.double() for t in given))
    with torch.autocast("cpu", torch.bfloat16):
        actual = dense.dense_gamma_beta(segmap, (16, 16), *given)
        expected = plain(segmap, (16, 16), *given)
    assert always and actual.dtype == expected.dtype == torch.bfloat16
    bound = 1.5 * (expected.double() - exact).norm()
    assert (actual.double() - exact).norm() < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(always, dtype):
    given, segmap = make(dtype=dtype), random(1, 3, 4, 4, dtype=dtype)
    exact = plain(segmap.double(), (16, 16), *(t.double() for t in given))
    expected, actual = plain(segmap, (16, 16), *given), dense.dense_gamma_beta(segmap, (16, 16), *given)
    assert always and actual.dtype == dtype
    assert (actual.double() - exact).norm() < 1.5 * (expected.double() - exact).norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layer(always, layout):
    """FusedSPADE with a dense map at a quarter of x's size: output and all gradients."""
    nets = [kind(6, 3, "instance").double() for kind in (reference.SPADE, FusedSPADE)]
    nets[1].load_state_dict(nets[0].state_dict())
    results = []
    for net in nets:
        x, segmap = (t.contiguous(memory_format=layout) for t in (random(2, 6, 16, 12), random(2, 3, 4, 3)))
        leaves = [x.requires_grad_(), segmap.requires_grad_(), *net.parameters()]
        out = net(x, segmap)
        results.append([out, *torch.autograd.grad(out, leaves, random(*out.shape))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    assert always == [(4, 4)]


def test_fewer_taps():
    """25 instead of 144 a block at f = 4, 16 instead of 36 at f = 2."""
    assert dense._taps((4, 4), (3, 3)) == 25 / 144
    assert dense._taps((2, 2), (3, 3)) == 16 / 36
    assert dense._taps((1, 1), (3, 3)) == 1


@pytest.mark.parametrize("layer", [reference.SPADE, FusedSPADE])
def test_liveportrait_decoder(always, layer):
    """LivePortrait's decoder from published facts, with the numbers its own code computes."""
    facts = json.loads(FIXTURE.read_text())
    net = Decoder(layer, 16, 8, upscale=1).double().eval()
    assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == facts["keys"]
    net.load_state_dict(rule.fill(facts["keys"], facts["base"], facts["gain"]))
    with torch.no_grad():
        image = net(rule.make(**facts["inputs"][0]))
    actual, expected = rule.probe(image), facts["outputs"]["eval"]["image"]
    assert actual["shape"] == expected["shape"] and actual["index"] == expected["index"]
    assert actual["value"] == pytest.approx(expected["value"], abs=1e-9)
    assert actual["mean"] == pytest.approx(expected["mean"], abs=1e-9)
    assert bool(always) == (layer is FusedSPADE)
