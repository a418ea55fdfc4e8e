# SPDX-License-Identifier: Apache-2.0
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spade_fast import FusedSPADE, LabelMap
from spade_fast.functional import (
    ConstantsAndLabels,
    ModulationNetwork,
    conditioning,
    gamma_beta,
    positional_norm,
    spade,
)
from spade_fast.labels.map_scope import map_scope, recognized
from spade_fast.layers import dense

LABELS, HIDDEN, CHANNELS = 5, 8, 6


def network(kernel_size=3, biases=True, label_nc=LABELS, **options):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(0.3).requires_grad_()

    k = (kernel_size, kernel_size)
    tensors = [draw(HIDDEN, label_nc, *k), draw(HIDDEN)]
    for _ in range(2):
        tensors += [draw(CHANNELS, HIDDEN, *k), draw(CHANNELS) if biases else None]
    return ModulationNetwork(*tensors, **options)


def leaves(net):
    names = ("shared_weight", "shared_bias", "gamma_weight", "gamma_bias", "beta_weight", "beta_bias")
    return [t for t in (getattr(net, n) for n in names) if t is not None]


def convolve(x, weight, bias, padding):
    pad = weight.shape[-1] // 2
    if pad:
        x = F.pad(x, (pad,) * 4, mode="reflect" if padding == "reflect" else "constant")
    return F.conv2d(x, weight, bias)


def plain_gamma_beta(labels, net, size):
    labels = F.interpolate(labels, size=size, mode="nearest")
    hidden = F.leaky_relu(convolve(labels, net.shared_weight, net.shared_bias, net.padding), net.hidden_slope)
    pair = [
        convolve(hidden, w, b, net.padding)
        for w, b in ((net.gamma_weight, net.gamma_bias), (net.beta_weight, net.beta_bias))
    ]
    return pair if net.instance_eps is None else [F.instance_norm(t, eps=net.instance_eps) for t in pair]


def maps(kind, n=2, size=(13, 11)):
    generator = torch.Generator().manual_seed(1)
    if kind == "dense":
        return torch.randn(n, LABELS, *size, generator=generator, dtype=torch.float64)
    if kind == "noise":  # every pixel its own pattern
        ids = torch.randint(LABELS, (n, *size), generator=generator)
    else:
        cells = torch.randint(LABELS, (n, 4, 4), generator=generator)
        ids = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : size[0], : size[1]]
    onehot = F.one_hot(ids, LABELS).movedim(-1, 1).double()
    if kind == "ignored":
        onehot[0, :, :5, :6] = 0
    if kind == "constants":
        onehot = F.one_hot(ids.clamp(max=2), 3).movedim(-1, 1).double()
        onehot[1, :, 3:7, 2:] = 0
        constant = torch.randn(n, 2, 1, 1, generator=generator, dtype=torch.float64).expand(-1, -1, *size)
        onehot = torch.cat([constant, onehot], 1)
    return onehot


KINDS = ("cells", "noise", "ignored", "constants", "dense")
OPTIONS = (
    {},
    {"kernel_size": 1},
    {"kernel_size": 5, "biases": False},
    {"biases": False, "gamma_offset": 0.0},
    {"hidden_slope": 0.01, "instance_eps": 1e-5},
    {"hidden_slope": 0.2, "instance_eps": 1e-3, "gamma_offset": 0.5},
    {"padding": "reflect"},
    {"padding": "reflect", "kernel_size": 5, "hidden_slope": 1.0, "gamma_offset": 0.0},
    {"padding": "reflect", "instance_eps": 1e-5},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_formula(kind, options):
    net, labels = network(**options), maps(kind)
    for size in ((13, 11), (9, 14)):
        x = torch.randn(2, CHANNELS, *size, dtype=torch.float64, requires_grad=True)
        gamma, beta = plain_gamma_beta(labels, net, size)
        want = F.instance_norm(x) * (net.gamma_offset + gamma) + beta
        got = spade(x, labels, net, "instance")
        pair = gamma_beta(labels, net, size)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(pair, (gamma, beta), rtol=1e-10, atol=1e-10)
        weights = torch.randn_like(got)
        for ours, theirs in ((got, want), (torch.cat(pair), torch.cat([gamma, beta]))):
            w = weights if ours is got else torch.cat([weights, 2 * weights])
            inputs = [*leaves(net), x] if ours is got else leaves(net)
            grads = [torch.autograd.grad((out * w).sum(), inputs, retain_graph=True) for out in (ours, theirs)]
            torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: None,
        lambda: nn.BatchNorm2d(CHANNELS, affine=False),
        lambda: nn.BatchNorm2d(CHANNELS, affine=False, momentum=None, eps=1e-2),
        lambda: nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False),
        lambda: nn.BatchNorm2d(CHANNELS),
        lambda: nn.InstanceNorm2d(CHANNELS, eps=1e-2),
        lambda: nn.InstanceNorm2d(CHANNELS, track_running_stats=True),
        lambda: nn.GroupNorm(2, CHANNELS),
        lambda: positional_norm,
    ],
)
def test_norms_are_those_of_the_modules(norm, training):
    net, labels = network(), maps("cells")
    ours, theirs = norm(), norm()
    for module in (ours, theirs):
        if isinstance(module, nn.Module):
            module.double().train(training)
    for step in range(2):
        x = torch.randn(2, CHANNELS, 13, 11, dtype=torch.float64).mul_(2).add_(step).requires_grad_()
        gamma, beta = plain_gamma_beta(labels, net, (13, 11))
        want = (x if theirs is None else theirs(x)) * (1 + gamma) + beta
        got = spade(x, labels, net, ours)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad(out.square().sum(), [x, *leaves(net)], retain_graph=True) for out in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    if isinstance(ours, nn.Module):
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-12, atol=1e-12)


def test_a_label_map_is_its_one_hot_tensor_and_the_layer_its_functional_form():
    layer = FusedSPADE(CHANNELS, LABELS + 1, "batch", hidden_nc=HIDDEN).double()
    ids = torch.randint(LABELS, (2, 4, 4)).repeat_interleave(3, 1).repeat_interleave(3, 2)
    labels = LabelMap(ids, LABELS, ids % 2 == 0)
    net = ModulationNetwork(
        layer.mlp_shared[0].weight,
        layer.mlp_shared[0].bias,
        layer.mlp_gamma.weight,
        layer.mlp_gamma.bias,
        layer.mlp_beta.weight,
        layer.mlp_beta.bias,
    )
    x = torch.randn(2, CHANNELS, 10, 12, dtype=torch.float64)
    want = layer(x, labels)
    for given in (labels, labels.one_hot(torch.float64)):
        torch.testing.assert_close(spade(x, given, net, "batch"), want, rtol=1e-12, atol=1e-12)


def test_constant_channels_before_labels_are_found_and_only_those():
    found = conditioning(maps("constants"))
    assert isinstance(found, ConstantsAndLabels) and found.constants.shape == (2, 2) and found.labels.num_classes == 3
    assert isinstance(conditioning(maps("cells")), LabelMap)
    for kind in ("dense", "constants"):
        labels = maps(kind)
        labels[1, 1, 4, 4] += 0.5
        assert conditioning(labels) is labels
    assert isinstance(conditioning(maps("dense").requires_grad_()), torch.Tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(padding="circular"), "padding must be zeros or reflect, got 'circular'"),
        (
            dict(gamma_weight=torch.zeros(6, 7, 3, 3)),
            r"gamma_weight must have shape \[6, 8, 3, 3\], got \[6, 7, 3, 3\]",
        ),
        (dict(beta_bias=torch.zeros(5)), r"beta_bias must have shape \[6\], got \[5\]"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_by_name(change, message):
    net = network()
    with pytest.raises(ValueError, match=message):
        ModulationNetwork(**{**vars(net), **change})


def test_labels_and_x_that_do_not_fit_are_refused_by_name():
    net, labels = network(), maps("cells")
    x = torch.zeros(2, CHANNELS, 13, 11, dtype=torch.float64)
    for args, message in (
        ((x[:, :2], labels, net), r"x must have shape \[N, 6, H, W\], got \[2, 2, 13, 11\]"),
        ((x, labels[:1], net), "labels must be for N=2 images as x is, got 1"),
        ((x, labels[:, :4], net), r"labels must have 5 channels as the network has, got \[2, 4, 13, 11\]"),
        ((x, labels, net, "layer"), "norm must be None, batch, instance or a function, got 'layer'"),
        ((x[:, :, :1], labels, network(padding="reflect")), "reflection padding by 1"),
    ):
        with pytest.raises(ValueError, match=message):
            spade(*args)


def test_a_scope_remembers_by_tensor_question_and_version():
    asked = []

    def find(t):
        asked.append(t)
        return len(asked)

    def other(t):
        return -1

    a = torch.zeros(3)
    assert [recognized(a, find), recognized(a, find)] == [1, 2]  # no memory outside
    with map_scope():
        first = recognized(a, find)
        with map_scope():
            assert recognized(a, find) == first and recognized(a, other) == -1
        assert recognized(a, find) == first
        assert recognized(a.clone(), find) != first
        a.add_(1)
        assert recognized(a, find) != first
        for size in range(1, 50):  # a dead tensor's id may soon be another's
            short = torch.zeros(size)
            assert recognized(short, torch.Tensor.numel) == size
            alive = weakref.ref(short)
            del short
            assert alive() is None  # the scope does not keep maps
    with map_scope():
        assert recognized(a, find) == len(asked)


def test_a_convolution_after_the_instance_norm():
    torch.manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64) * 0.3

    gamma, beta, outs = (
        (tensor(8, 8, 3, 3), tensor(8)),
        (tensor(8, 8, 3, 3), tensor(8)),
        [(tensor(6, 8, 1, 1), tensor(6))],
    )
    outs.append((tensor(6, 8, 1, 1), None))
    shared = tensor(8, 5, 3, 3), tensor(8)
    network = ModulationNetwork(*shared, *gamma, *beta, gamma_offset=0.0, instance_eps=1e-5, gamma_out=outs[0])
    network.beta_out = outs[1]
    x = tensor(2, 6, 10, 12)
    ids = torch.randint(5, (2, 5, 6))
    for cells in (2, 1):  # by pattern, by pixel
        onehot = F.one_hot(ids.repeat_interleave(cells, 1).repeat_interleave(cells, 2), 5).movedim(-1, 1).double()
        hidden = F.relu(F.conv2d(onehot, *shared, padding=1))
        want = [
            F.conv2d(F.instance_norm(F.conv2d(hidden, *conv, padding=1)), *out)
            for conv, out in zip((gamma, beta), outs, strict=True)
        ]
        torch.testing.assert_close(list(gamma_beta(onehot, network)), want, rtol=1e-9, atol=1e-9)
        if cells == 2:
            out = spade(x, onehot, network)
            torch.testing.assert_close(out, x * want[0] + want[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_a_dense_map_smaller_than_x_takes_the_layers_own_path(monkeypatch, slope):
    """The map's own size, with the formula's values; biases may be missing."""
    monkeypatch.setattr(dense, "FEWEST_PIXELS", 0)
    calls, original = [], dense.hidden_of_blocks
    monkeypatch.setattr(dense, "hidden_of_blocks", lambda *args: calls.append(args) or original(*args))
    net, labels = network(hidden_slope=slope, biases=slope == 0.0), maps("dense", size=(4, 5))
    pair, want = gamma_beta(labels, net, (16, 20)), plain_gamma_beta(labels, net, (16, 20))
    assert len(calls) == 1
    torch.testing.assert_close(pair, tuple(want), rtol=1e-10, atol=1e-10)
