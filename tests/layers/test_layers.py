# SPDX-License-Identifier: Apache-2.0
import copy

import maps
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_fast import LabelMap, reference
from spade_fast.labels.map_scope import map_scope
from spade_fast.layers import FusedSPADE, SPADEResnetBlock
from spade_fast.layers import spade as layers
from spade_fast.models import MultiscaleDiscriminator, SPADEGenerator

CLASSES = 5


def label_map(n=2, h=16, w=16, classes=CLASSES, kind="cells", seed=0, ignore=True):
    """With edges, and some ignored pixels."""
    ids = {
        "cells": lambda: maps.cells(n, h, w, classes, seed),
        "noise": lambda: maps.noise(n, h, w, classes, seed),
        "one label": lambda: torch.full((n, h, w), 1),
    }[kind]()
    if ignore:
        ids[:, : h // 3, : w // 3] = -1
    edges = maps.noise(n, h, w, 2, seed).bool() if kind == "noise" else maps.boundaries(ids)
    return LabelMap(ids, classes, edges, ignore_index=-1)


def pair(norm_nc=6, label_nc=CLASSES + 1, norm="syncbatch", kernel_size=3, hidden_nc=10, dtype=torch.float64):
    """A reference layer and a fused one with the same weights."""
    torch.manual_seed(0)
    plain = reference.SPADE(norm_nc, label_nc, norm, kernel_size, hidden_nc).to(dtype)
    for p in plain.parameters():  # weights of a size that makes every term matter
        torch.nn.init.normal_(p, std=0.3)
    fused = FusedSPADE(norm_nc, label_nc, norm, kernel_size, hidden_nc).to(dtype)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def activation(n=2, c=6, h=8, w=8, dtype=torch.float64, channels_last=True, mean=1.0, seed=0):
    x = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + mean
    x = x.to(dtype)
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()


def plain_forward(plain, x, segmap, slope, upsample):
    x = x.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    out = plain(x, segmap)
    return out if slope is None else torch.where(out > 0, out, slope * out)


def compare(plain, fused, x, labels, slope=None, upsample=1, tolerance=1e-10):
    """Output, every gradient and the state afterwards; twice, for the running statistics."""
    segmap = labels.one_hot(x.dtype) if isinstance(labels, LabelMap) else labels
    for _ in range(2):
        expected = plain_forward(plain, x, segmap, slope, upsample)
        actual = fused(x, labels, slope, upsample)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = [
            torch.autograd.grad((out * upstream.to(x.dtype)).sum(), [x, *layer.parameters()])
            for out, layer in ((actual, fused), (expected, plain))
        ]
        for a, e in zip([actual, *grads[0]], [expected, *grads[1]], strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=tolerance * max(1.0, float(e.detach().abs().max())))
    for (name, a), e in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6 if x.dtype == torch.float32 else 1e-12, atol=0, msg=name)


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("kernel_size", reference.KERNEL_SIZES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("upsample", [1, 2])
def test_is_the_reference_layer(norm, kernel_size, training, upsample):
    plain, fused = pair(norm=norm, kernel_size=kernel_size)
    plain.train(training), fused.train(training)
    compare(plain, fused, activation(h=8 // upsample), label_map(), slope=0.2, upsample=upsample)


@pytest.mark.parametrize("kind", ["cells", "noise", "one label"])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (1, 13), (7, 3), (31, 20), (5, 5)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_kinds_of_map_and_sizes(kind, size, channels_last):
    """Down- and upsampled, thin, not multiples of the map's 16×16."""
    plain, fused = pair()
    compare(plain, fused, activation(2, 6, *size, channels_last=channels_last), label_map(kind=kind))


def test_without_edges_and_with_300_classes():
    plain, fused = pair(label_nc=300)
    labels = LabelMap(maps.noise(2, 16, 16, 300), 300)
    compare(plain, fused, activation(), labels, slope=0.2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dense_above", "few_pixels"), [(2.0, 256), (-1.0, 0), (-1.0, 256)])
def test_every_path_agrees(monkeypatch, training, dense_above, few_pixels):
    """The same map through each path; the layer chooses by the numbers of patterns and pixels."""
    monkeypatch.setattr(layers, "DENSE_ABOVE", dense_above)
    monkeypatch.setattr(layers, "FEW_PIXELS", few_pixels)
    calls, modulation = [], layers.modulation
    monkeypatch.setattr(layers, "modulation", lambda *args: calls.append(args) or modulation(*args))
    plain, fused = pair()
    plain.train(training), fused.train(training)
    compare(plain, fused, activation(), label_map(), slope=0.2)
    assert bool(calls) == (dense_above == 2.0 or few_pixels == 0)


@given(
    n=st.integers(1, 3),
    c=st.integers(1, 7),
    h=st.integers(1, 7),
    w=st.integers(1, 7),
    upsample=st.sampled_from([1, 2]),
    norm=st.sampled_from(["batch", "instance", "none"]),
    kernel_size=st.sampled_from([1, 3, 5]),
    hidden=st.integers(1, 9),
    map_size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(n, c, h, w, upsample, norm, kernel_size, hidden, map_size):
    if n * h * w == 1 or (norm == "instance" and h * w == 1):
        h = 2  # a single value has no variance: an error in both, tested below
    plain, fused = pair(c, CLASSES + 1, norm, kernel_size, hidden)
    x = activation(n, c, h, w, seed=n + c + h + w)
    compare(plain, fused, x, label_map(n, *map_size), slope=0.2, upsample=upsample, tolerance=1e-9)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("conditioning", ["random", "one-hot but one pixel", "one-hot"])
def test_tensor_conditioning(conditioning, channels_last):
    """Dense maps, and tensors that are exactly one-hot, give what the reference gives."""
    plain, fused = pair()
    segmap = label_map().one_hot(torch.float64)
    if conditioning == "random":
        segmap = torch.randn_like(segmap)
    elif conditioning == "one-hot but one pixel":
        segmap[1, 2, 3, 4] = 0.5
    compare(plain, fused, activation(channels_last=channels_last), segmap, slope=0.2)


def test_a_one_hot_tensor_is_recognized_by_its_content(monkeypatch):
    _, fused = pair()
    x, segmap, calls = activation(), label_map().one_hot(torch.float64), []
    original = LabelMap.from_segmap
    monkeypatch.setattr(LabelMap, "from_segmap", lambda t: calls.append(t) or original(t))
    with torch.no_grad():
        first = fused(x, segmap)
        segmap.numpy()[...] = segmap.flip(3).numpy()  # no version counts this write
        second = fused(x, segmap)
        torch.testing.assert_close(second, fused(x, label_map().one_hot(torch.float64).flip(3)))
        assert not torch.equal(first, second)
        calls.clear()
        with map_scope():
            fused(x, segmap)
            fused(x, segmap)
        assert len(calls) == 1
    with torch.inference_mode(), map_scope():
        calls.clear()
        inference = segmap.clone()
        fused(x, inference)
        torch.testing.assert_close(fused(x, inference), second)
        assert len(calls) == 1


def test_gradient_reaches_dense_conditioning():
    """Even when its values happen to be one-hot."""
    plain, fused = pair()
    segmap = label_map().one_hot(torch.float64).requires_grad_()
    expected, actual = (
        torch.autograd.grad(layer(activation(), segmap).square().sum(), segmap)[0] for layer in (plain, fused)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("training", [True, False])
def test_float32_error_is_at_most_twice_the_plain_layers(norm, training):
    """Against float64, on a real map: output and every gradient, in the norm over all elements."""
    torch.manual_seed(0)
    labels = LabelMap(maps.real(64), 183, maps.noise(1, 64, 64, 2))
    exact = reference.SPADE(32, 184, norm).double().train(training)
    plain = copy.deepcopy(exact).float()
    fused = FusedSPADE(32, 184, norm).train(training)
    fused.load_state_dict(plain.state_dict())
    exact.load_state_dict(plain.state_dict())
    upstream = torch.randn(1, 32, 64, 64)
    results = []
    for layer in (exact, plain, fused):
        dtype = layer.mlp_gamma.weight.dtype
        x = torch.randn(1, 32, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out = layer(x, labels if layer is fused else labels.one_hot(dtype))
        grads = torch.autograd.grad((out * upstream.to(dtype)).sum(), [x, *layer.parameters()])
        results.append([t.double() for t in (out, *grads)])
    for e, p, f in zip(*results, strict=True):
        assert (f - e).norm() <= 2 * (p - e).norm(), f"{tuple(e.shape)}: {(f - e).norm():.3g} {(p - e).norm():.3g}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dense", [False, True])
def test_half_precision_layer(dtype, dense):
    """Everything in half precision: parameters round once, the output once."""
    plain, fused = pair(dtype=dtype)
    labels = label_map()
    labels = torch.randn_like(labels.one_hot(dtype)) if dense else labels
    segmap = labels if dense else labels.one_hot(dtype)
    x = activation(dtype=dtype)
    expected = plain.double()(x.double(), segmap.double())
    actual = fused(x, labels)
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(expected.detach().abs().max())
    )
    actual.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in fused.parameters())


def test_autocast():
    plain, fused = pair(dtype=torch.float32)
    labels, x = label_map(), activation(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = fused(x.bfloat16(), labels)
    assert actual.dtype == torch.bfloat16
    expected = plain(x.bfloat16().float(), labels.one_hot())
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.03 * float(expected.detach().abs().max()))
    actual.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    plain, fused = pair()
    plain.train(training), fused.train(training)
    x, labels = activation(n=0), label_map()[:0]
    out = fused(x, labels)
    assert out.shape == plain(x, labels.one_hot(torch.float64)).shape
    for a, e in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, e)
    out.sum().backward()
    assert x.grad.shape == x.shape and all(torch.equal(p.grad, torch.zeros_like(p)) for p in fused.parameters())


@pytest.mark.parametrize(("norm", "n"), [("batch", 1), ("instance", 2)])
def test_a_single_value_has_no_variance(norm, n):
    plain, fused = pair(norm=norm)
    x, labels = activation(n, 6, 1, 1), label_map(n)
    for layer in (plain, fused):
        with pytest.raises(ValueError, match="more than 1"):
            layer(x, labels.one_hot(torch.float64))
    if norm == "batch":  # but one pixel is fine in evaluation, and when enlarged
        fused.load_state_dict(plain.state_dict())  # the plain layer counted the failed batch
        compare(plain.eval(), fused.eval(), x, labels)
        compare(plain.train(), fused.train(), x, labels, upsample=2)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_momentum_of_the_norm_counts(momentum):
    plain, fused = pair()
    plain.param_free_norm.momentum = fused.param_free_norm.momentum = momentum
    compare(plain, fused, activation(), label_map(), upsample=2)


def test_state_dict_and_initial_weights_are_the_references():
    torch.manual_seed(3)
    plain = reference.SPADE(8, 4)
    torch.manual_seed(3)
    fused = FusedSPADE(8, 4)
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), fused.state_dict().values(), strict=True))


def test_parameters_are_contiguous():
    for network in (FusedSPADE(6, 5), SPADEGenerator(5, ngf=4, crop_size=64), MultiscaleDiscriminator(5, ndf=4)):
        for name, parameter in network.named_parameters():
            assert parameter.is_contiguous(), name


def test_activation_names():
    _, fused = pair()
    fused.eval()
    x, labels = activation(), label_map()
    out = fused(x, labels)
    torch.testing.assert_close(fused(x, labels, "leaky_relu"), F.leaky_relu(out, 0.2))
    torch.testing.assert_close(fused(x, labels, 0), F.relu(out))
    with pytest.raises(ValueError, match="activation must be None, a negative slope"):
        fused(x, labels, "gelu")


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (torch.zeros(2, 5, 4, 4), label_map(), r"x must have shape \[N, 6, H, W\], got \[2, 5, 4, 4\]"),
        (torch.zeros(2, 6, 4, 4), label_map(3), r"\[N=2, label_nc=6\] as x and the layer are, got \[3, 6, 16, 16\]"),
        (torch.zeros(2, 6, 4, 4), label_map(classes=9), r"label_nc=6\] as x and the layer are, got \[2, 10, 16, 16\]"),
        (torch.zeros(2, 6, 4, 4), torch.zeros(2, 3, 4, 4), r"got \[2, 3, 4, 4\]"),
    ],
)
def test_wrong_arguments(x, labels, message):
    _, fused = pair(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        fused(x, labels)


def test_wrong_options():
    with pytest.raises(ValueError, match="kernel_size"):
        FusedSPADE(4, 4, kernel_size=2)
    with pytest.raises(ValueError, match="spade must be one of fused, reference, got 'fast'"):
        SPADEResnetBlock(4, 4, 4, spade="fast")


# The residual block


def blocks(fin, fout, norm="syncbatch", kernel_size=3):
    torch.manual_seed(0)
    plain = SPADEResnetBlock(fin, fout, CLASSES + 1, norm, kernel_size, spade="reference").double()
    fused = SPADEResnetBlock(fin, fout, CLASSES + 1, norm, kernel_size).double()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize(("fin", "fout"), [(6, 6), (6, 4), (4, 6)])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("norm", ["syncbatch", "instance", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_block_is_the_plain_block(fin, fout, upsample, norm, training):
    plain, fused = blocks(fin, fout, norm)
    plain.train(training), fused.train(training)
    compare_blocks(plain, fused, fin, upsample)


def compare_blocks(plain, fused, fin, upsample):
    labels = label_map()
    for x in (activation(c=fin, h=5, w=6), activation(c=fin, h=5, w=6, channels_last=False)):
        expected, actual = plain(x, labels.one_hot(torch.float64), upsample), fused(x, labels, upsample)
        weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
        expected_grads, grads = (
            torch.autograd.grad((out * weight).sum(), [x, *net.parameters()])
            for out, net in ((expected, plain), (actual, fused))
        )
        for a, e in zip([actual, *grads], [expected, *expected_grads], strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-9 * max(1.0, float(e.detach().abs().max())))
    for (name, a), e in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12, msg=name)


def test_running_statistics_of_the_two_norms_may_differ():
    """norm_0 and norm_s see the same x, but a checkpoint need not say so."""
    plain, fused = blocks(6, 4)
    state = plain.state_dict()
    state["norm_0.param_free_norm.running_mean"] += 1
    state["norm_s.param_free_norm.running_var"] *= 3
    plain.load_state_dict(state), fused.load_state_dict(state)
    compare_blocks(plain.eval(), fused.eval(), 6, 2)


def test_block_is_bitwise_reproducible():
    _, fused = blocks(6, 4)
    x, labels = activation(h=5, w=6), label_map()
    first, second = (
        torch.autograd.grad(fused.eval()(x, labels, 2).square().sum(), [x, *fused.parameters()]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_block_never_builds_the_enlarged_input():
    """Of the size [N, fin, 2h, 2w], at most the inputs of the two convolutions and of norm_1 are kept for backward."""
    _, fused = blocks(6, 6)
    x, saved = activation(h=5, w=6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        fused(x, label_map(kind="one label"), 2)
    assert saved.count((2, 6, 10, 12)) <= 3
    assert (2, 6, 5, 6) in saved


# torch.compile and torch.export


@pytest.fixture
def compiled_frames():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("network", ["layer", "block"])
def test_compiled_once_for_every_label_map(compiled_frames, network):
    if network == "layer":
        _, net = pair()
        arguments = (0.2, 2)
    else:
        _, net = blocks(6, 4)
        arguments = (2,)
    net.eval()  # the same running statistics for both calls
    compiled = torch.compile(net, fullgraph=True, backend=compiled_frames)
    counts = set()
    for seed in range(4):
        labels = label_map(h=32, w=32, seed=seed).build([(16, 16)], backward=True)
        counts.add(sum(labels.patterns(16, 16).counts))
        x = activation(seed=seed)
        expected, actual = net(x, labels, *arguments), compiled(x, labels, *arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-11)
        grads = [torch.autograd.grad(out.square().sum(), [x, *net.parameters()]) for out in (actual, expected)]
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-11 * max(1.0, float(e.abs().max())))
    assert len(counts) == 4, "the maps were meant to have different numbers of patterns"
    assert compiled_frames.frame_count == 1


def test_compiled_training_updates_running_statistics(compiled_frames):
    _, eager = pair()
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, fullgraph=True, backend=compiled_frames)
    for seed in range(3):
        x, labels = activation(seed=seed), label_map(seed=seed).build([(8, 8)], backward=True)
        torch.testing.assert_close(compiled(x, labels), eager(x, labels), rtol=0, atol=1e-12)
    for a, e in zip(net.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=0)


class FromIds(torch.nn.Module):
    """What one would deploy: integer labels in, patterns found inside."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, ids, edges):
        return self.net(x, LabelMap(ids, CLASSES, edges, validate=False))


@pytest.mark.parametrize("network", ["layer", "block"])
def test_export_from_integer_labels(network):
    net = FromIds((pair() if network == "layer" else blocks(6, 4))[1]).eval()

    def inputs(seed):
        labels = label_map(seed=seed, ignore=False)
        return activation(seed=seed).detach(), labels.ids, labels.edges

    exported = torch.export.export(net, inputs(0), strict=False)
    with torch.no_grad():
        for seed in (1, 2):  # other maps than the one exported with
            torch.testing.assert_close(exported.module()(*inputs(seed)), net(*inputs(seed)), rtol=1e-12, atol=1e-11)


def test_export_from_a_dense_map():
    plain, fused = pair()
    x, segmap = activation().detach(), torch.randn(2, CLASSES + 1, 16, 16, dtype=torch.float64)
    exported = torch.export.export(fused.eval(), (x, segmap), strict=False)
    torch.testing.assert_close(exported.module()(x, segmap), plain.eval()(x, segmap), rtol=0, atol=1e-10)
