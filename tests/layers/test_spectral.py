# SPDX-License-Identifier: Apache-2.0
"""Spectral norm against torch's own hook version, and the folding in evaluation mode."""

import copy

import pytest
import torch
from torch import nn

from spade_fast.layers.spectral import SpectralConv2d
from spade_fast.layers.spectral_gradient import _weight_gradient


def pair(channels_last: bool) -> tuple[SpectralConv2d, nn.Module]:
    torch.manual_seed(0)
    ours = SpectralConv2d(5, 7, 3, padding=1).double()
    theirs = nn.utils.spectral_norm(nn.Conv2d(5, 7, 3, padding=1).double())
    theirs.load_state_dict(ours.state_dict())  # strict: the names are the same
    return ours.to(memory_format=torch.channels_last) if channels_last else ours, theirs


@pytest.mark.parametrize("size", [1, 2, 6])  # an output far smaller, smaller, and larger than the weight
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_and_evaluation_equal_torch(channels_last, size):
    ours, theirs = pair(channels_last)
    root = torch.randn(2, 5, size, size, dtype=torch.float64, requires_grad=True)
    for recompute in (False, True, False):
        outputs, gradients = [], []
        for net in (ours, theirs):
            net.zero_grad()
            root.grad = None
            x = root.sin()
            again = (torch.sin, [root]) if recompute else None
            out = net(x) if net is theirs else net(x, again)
            out.pow(3).sum().backward()
            outputs.append(out.detach())
            gradients.append((root.grad, net.weight_orig.grad, net.bias.grad))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)
        for name in ("weight_u", "weight_v"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=1e-12)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "padding"), [((1, 1), (0, 0)), ((3, 3), (1, 1)), ((4, 2), (2, 0)), ((2, 3), (0, 3))]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weight_gradient_as_one_product(kernel, padding, layout):
    """Whatever the kernel and the memory order of x and dy, in channels-last memory."""
    x, weight = torch.randn(3, 5, 4, 7, dtype=torch.float64), torch.randn(6, 5, *kernel, dtype=torch.float64)
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = torch.nn.functional.conv2d(x, weight, None, 1, padding)
    dy = torch.randn_like(out).contiguous(memory_format=layout)
    (expected,) = torch.autograd.grad(out, weight, dy)
    actual = _weight_gradient(dy, x.contiguous(memory_format=layout), weight, padding)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_frozen_weights():
    """Between freeze and unfreeze the weight of that moment is used; each way out of it shows the weight as it is."""
    ours, theirs = pair(False)
    ours.eval(), theirs.eval()
    x = torch.randn(1, 5, 4, 4, dtype=torch.float64)

    def same():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)

    ways_out = (
        lambda: ours.unfreeze(),
        lambda: ours.train().eval(),
        lambda: ours.load_state_dict(ours.state_dict()),
        lambda: ours.double(),
    )
    with torch.no_grad():
        for way_out in ways_out:
            ours.freeze()
            same()
            before = ours(x)
            for net in (ours, theirs):
                net.weight_orig.data.mul_(2).add_(0.1)
            assert torch.equal(ours(x), before)
            way_out()
            same()
        ours.freeze()
        clone = copy.deepcopy(ours)
        clone.weight_orig.add_(1)
        assert not torch.allclose(clone(x), ours(x))
    ours.freeze()
    for net in (ours, theirs):
        net.weight_orig.data.add_(0.1)
    same()  # with gradients a frozen weight does not serve


def assert_within_rounding(conv: SpectralConv2d, x: torch.Tensor):
    """Against float64, within the bound of a float32 sum of n products: n ulps of the sum of magnitudes."""
    exact = copy.deepcopy(conv).double()
    weight, x64 = exact.normalized_weight(), x.double()
    expected = nn.functional.conv2d(x64, weight, exact.bias, padding=1)
    magnitude = nn.functional.conv2d(x64.abs(), weight.abs(), exact.bias.abs(), padding=1)
    terms = weight[0].numel() + 1
    assert ((conv(x).double() - expected).abs() <= (terms + 4) * 2.0**-24 * magnitude).all()


def test_packed_weight_on_small_maps():
    torch.manual_seed(0)
    conv = SpectralConv2d(48, 32, 3, padding=1).eval()
    with torch.no_grad():
        conv.freeze()
        for shape in [(1, 48, 5, 4), (1, 48, 5, 4), (2, 48, 3, 7)]:
            x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
            assert_within_rounding(conv, x)
        packed = conv._frozen.packed[x.shape]
        conv(x)
        assert conv._frozen.packed[x.shape] is packed  # packed once for a shape
        conv.weight_orig.mul_(-1)
        conv.bias.add_(1)
        conv.freeze()
        assert_within_rounding(conv, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
    x.requires_grad_()
    conv(x).sum().backward()
    assert x.grad is not None and conv.weight_orig.grad is not None


@pytest.mark.parametrize("size", [2, 40])
def test_what_is_kept_for_backward(size):
    conv = SpectralConv2d(5, 7, 3, padding=1)
    root = torch.randn(1, 5, size, size)
    own = {p.untyped_storage().data_ptr() for p in conv.parameters()}

    def kept(recompute: bool) -> int:
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t)
        x = root.sin()
        with hooks:
            conv(x, (torch.sin, [root]) if recompute else None)
        outside = [t for t in sizes if t.untyped_storage().data_ptr() not in own | {root.untyped_storage().data_ptr()}]
        return sum(t.numel() for t in outside)

    vectors = 7 + 45 + 1  # u, v, sigma
    assert kept(False) == vectors + root.numel()
    assert kept(True) == vectors


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("recompute", [False, True])
def test_second_derivatives(layout, size, recompute):
    torch.manual_seed(0)
    conv = SpectralConv2d(2, 3, 3, padding=1).double().eval().to(memory_format=layout)
    root = torch.randn(1, 2, size, size, dtype=torch.float64, requires_grad=True)

    def convolve(root, weight, bias):
        state = {"weight_orig": weight, "bias": bias}
        recipe = (torch.sin, [root]) if recompute else None
        return torch.func.functional_call(conv, state, (root.sin(), recipe))

    tensors = (root, conv.weight_orig.detach().requires_grad_(), conv.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(convolve, tensors) and torch.autograd.gradgradcheck(convolve, tensors)


def test_autocast_gradients():
    """Half precision inside, float32 gradients, within a few bfloat16 roundings of the exact ones."""
    torch.manual_seed(0)
    conv = SpectralConv2d(8, 8, 3, padding=1)
    exact = copy.deepcopy(conv).double()
    x = torch.randn(2, 8, 9, 9)
    for net, value in ((conv, x.clone().requires_grad_()), (exact, x.double().requires_grad_())):
        with torch.autocast("cpu", torch.bfloat16, enabled=net is conv):
            out = net(value)
        assert out.dtype == (torch.bfloat16 if net is conv else torch.float64)
        out.sum().backward()
    error = (conv.weight_orig.grad - exact.weight_orig.grad).norm() / exact.weight_orig.grad.norm()
    assert conv.weight_orig.grad.dtype == torch.float32 and error < 4 * 2**-8


def test_compiles_without_graph_breaks():
    ours, theirs = pair(False)
    x = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.weight_u, theirs.weight_u, rtol=1e-12, atol=1e-12)
