# SPDX-License-Identifier: Apache-2.0
"""The reference layer and block against formulas written out in numpy float64."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from spade_fast.layers import FusedSPADE, SPADEResnetBlock
from spade_fast.models import SPADEGenerator
from spade_fast.reference import SPADE, InstanceNorm2d


def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, stride: int = 1, padding: int = 0) -> np.ndarray:
    """Convolution as its definition: out[n,o,y,x] = b[o] + sum_{c,i,j} w[o,c,i,j] * in[n,c,y*s+i-p,x*s+j-p]."""
    n, _, h, w = x.shape
    o, _, kh, kw = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    oh, ow = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1
    out = (
        np.zeros((n, o, oh, ow)) if bias is None else np.broadcast_to(bias[None, :, None, None], (n, o, oh, ow)).copy()
    )
    for y in range(oh):
        for x0 in range(ow):
            patch = padded[:, :, y * stride : y * stride + kh, x0 * stride : x0 * stride + kw]
            out[:, :, y, x0] += np.einsum("ncij,ocij->no", patch, weight)
    return out


def nearest(x: np.ndarray, h: int, w: int) -> np.ndarray:
    rows = [int(y * x.shape[2] / h) for y in range(h)]
    columns = [int(i * x.shape[3] / w) for i in range(w)]
    return x[:, :, rows][:, :, :, columns]


def normalize(x: np.ndarray, norm: str) -> np.ndarray:
    if norm == "none":
        return x
    axes = (2, 3) if norm == "instance" else (0, 2, 3)
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5)


def spade(x: np.ndarray, segmap: np.ndarray, p: dict[str, np.ndarray], norm: str) -> np.ndarray:
    """Equation 1 of the paper."""
    padding = p["mlp_gamma.weight"].shape[2] // 2
    segmap = nearest(segmap, *x.shape[2:])
    hidden = np.maximum(conv(segmap, p["mlp_shared.0.weight"], p["mlp_shared.0.bias"], 1, padding), 0)
    gamma = conv(hidden, p["mlp_gamma.weight"], p["mlp_gamma.bias"], 1, padding)
    beta = conv(hidden, p["mlp_beta.weight"], p["mlp_beta.bias"], 1, padding)
    return normalize(x, norm) * (1 + gamma) + beta


def parameters(module: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v.numpy() for k, v in module.state_dict().items() if k.startswith(prefix)}


@pytest.mark.parametrize("norm", ["syncbatch", "batch", "instance", "none"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_layer_equals_the_formula(norm, kernel_size):
    torch.manual_seed(kernel_size)
    layer = SPADE(5, 4, norm=norm, kernel_size=kernel_size, hidden_nc=6).double()
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64) * 3 + 1
    segmap = torch.randn(2, 4, 9, 5, dtype=torch.float64)  # enlarged in one direction, reduced in the other
    expected = spade(x.numpy(), segmap.numpy(), parameters(layer), norm)
    np.testing.assert_allclose(layer(x, segmap).detach().numpy(), expected, rtol=1e-11, atol=1e-11)


def test_running_statistics_and_evaluation():
    torch.manual_seed(0)
    layer = SPADE(3, 2).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 2 + 1
    segmap = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    layer(x, segmap)
    state = parameters(layer)
    np.testing.assert_allclose(state["param_free_norm.running_mean"], 0.1 * x.numpy().mean((0, 2, 3)), rtol=1e-12)
    unbiased = x.numpy().var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(state["param_free_norm.running_var"], 0.9 + 0.1 * unbiased, rtol=1e-12)
    layer.eval()
    mean, var = (state[f"param_free_norm.running_{s}"][None, :, None, None] for s in ("mean", "var"))
    p = parameters(layer)
    hidden = np.maximum(conv(segmap.numpy(), p["mlp_shared.0.weight"], p["mlp_shared.0.bias"], 1, 1), 0)
    gamma = conv(hidden, p["mlp_gamma.weight"], p["mlp_gamma.bias"], 1, 1)
    beta = conv(hidden, p["mlp_beta.weight"], p["mlp_beta.bias"], 1, 1)
    expected = (x.numpy() - mean) / np.sqrt(var + 1e-5) * (1 + gamma) + beta
    np.testing.assert_allclose(layer(x, segmap).detach().numpy(), expected, rtol=1e-11, atol=1e-11)


def test_state_dict_names():
    assert set(SPADE(3, 2).state_dict()) == {
        "param_free_norm.running_mean",
        "param_free_norm.running_var",
        "param_free_norm.num_batches_tracked",
        "mlp_shared.0.weight",
        "mlp_shared.0.bias",
        "mlp_gamma.weight",
        "mlp_gamma.bias",
        "mlp_beta.weight",
        "mlp_beta.bias",
    }


def normalized(weight: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Spectral norm, one power iteration as training makes it."""
    matrix = weight.reshape(weight.shape[0], -1)
    v = matrix.T @ u
    v = v / np.linalg.norm(v)
    u = matrix @ v
    u = u / np.linalg.norm(u)
    return weight / (u @ matrix @ v)


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


@pytest.mark.parametrize(("fin", "fout", "upsample"), [(4, 4, 1), (6, 3, 2)])
def test_block_equals_the_formula(fin, fout, upsample):
    torch.manual_seed(1)
    block = SPADEResnetBlock(fin, fout, 3, norm="instance").double()
    x = torch.randn(2, fin, 4, 5, dtype=torch.float64)
    segmap = torch.randn(2, 3, 8, 10, dtype=torch.float64)
    p = parameters(block)

    def sn_conv(name, value, padding):
        weight = normalized(*(p[f"{name}.weight_{s}"] for s in ("orig", "u", "v")))
        return conv(value, weight, p.get(f"{name}.bias"), 1, padding)

    def norm(name, value):
        prefix = name + "."
        return spade(
            value, segmap.numpy(), {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}, "instance"
        )

    p = {k: v.copy() for k, v in p.items()}  # the forward below moves u and v
    big = x.numpy().repeat(upsample, axis=2).repeat(upsample, axis=3)
    out = sn_conv("conv_0", leaky(norm("norm_0", big)), 1)
    out = sn_conv("conv_1", leaky(norm("norm_1", out)), 1)
    shortcut = sn_conv("conv_s", norm("norm_s", big), 0) if fin != fout else big
    actual = block(x, segmap, upsample).detach().numpy()
    np.testing.assert_allclose(actual, shortcut + out, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"norm": "layer"}, "norm must be one of syncbatch, batch, instance, none, got 'layer'"),
        ({"kernel_size": 2}, r"kernel_size must be one of \(1, 3, 5\), got 2"),
        ({"hidden_nc": 0}, "hidden_nc must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        SPADE(4, 3, **option)


@pytest.mark.parametrize("affine", [False, True])
def test_the_gradient_of_one_image_in_channels_last_memory(affine):
    """Against numbers written out: torch's own instance norm on a CPU gives others."""
    torch.manual_seed(0)
    x, given = torch.randn(2, 1, 6, 4, 5, dtype=torch.float64)
    norm = InstanceNorm2d(6, affine=affine).double()
    scale = torch.ones(6, dtype=torch.float64)
    if affine:
        scale = nn.init.normal_(norm.weight).detach()
    centered = (x - x.mean((2, 3), keepdim=True)).numpy()
    rstd = 1 / np.sqrt((centered**2).mean((2, 3), keepdims=True) + 1e-5)
    g = (given * scale[:, None, None]).numpy()
    xhat, mean = centered * rstd, (2, 3)
    want = rstd * (g - g.mean(mean, keepdims=True) - xhat * (g * xhat).mean(mean, keepdims=True))
    for order_x, order_g in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        leaf = x.clone(memory_format=order_x).requires_grad_()
        out = norm(leaf)
        np.testing.assert_allclose(out.detach(), xhat * scale[:, None, None].numpy(), rtol=1e-12, atol=1e-12)
        out.backward(given.clone(memory_format=order_g))
        np.testing.assert_allclose(leaf.grad, want, rtol=1e-12, atol=1e-12)


def test_instance_norm_of_one_value_is_refused_and_others_are_torchs():
    norm, plain = InstanceNorm2d(3), nn.InstanceNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        norm(torch.ones(1, 3, 1, 1))
    for x in (torch.randn(2, 3, 4, 5), torch.randn(3, 4, 5)):
        assert torch.equal(norm(x), plain(x))
    assert not norm.state_dict()


def test_a_plain_generator_of_one_image_in_channels_last_memory():
    """Its gradients are those of the same generator in torch's usual order."""
    segmap = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.manual_seed(0)
    net = SPADEGenerator(3, ngf=2, crop_size=64, norm="instance", spade="reference").double().eval()
    grads = []
    for order in (torch.contiguous_format, torch.channels_last):
        net.to(memory_format=order)
        net(segmap.clone(memory_format=order)).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in net.named_parameters()})
        net.zero_grad()
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("layer", [SPADE, FusedSPADE])
@pytest.mark.parametrize(
    ("text", "norm", "kernel_size"),
    [("spadesyncbatch3x3", "syncbatch", 3), ("spadebatch5x5", "batch", 5), ("spadeinstance1x1", "instance", 1)],
)
def test_the_authors_signature(layer, text, norm, kernel_size):
    """(config_text, norm_nc, label_nc), by position and by name."""
    torch.manual_seed(0)
    want = layer(6, 4, norm, kernel_size)
    x, segmap = torch.randn(2, 6, 5, 7), torch.randn(2, 4, 5, 7)
    ways = (
        lambda: layer(text, 6, 4),
        lambda: layer(text, norm_nc=6, label_nc=4),
        lambda: layer(config_text=text, norm_nc=6, label_nc=4),
    )
    for build in ways:
        torch.manual_seed(0)
        built = build()
        assert type(built.param_free_norm) is type(want.param_free_norm)
        assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in want.state_dict().items()}
        torch.testing.assert_close(built(x, segmap), want(x, segmap), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [SPADE, FusedSPADE])
@pytest.mark.parametrize("text", ["spectralspadebatch3x3", "spadegroup3x3", "spadebatch7x7", "spadebatch", "batch3x3"])
def test_a_config_text_that_is_not_understood_is_refused_by_name(layer, text):
    message = rf"spade, then a norm \(syncbatch, batch, .*\), then a kernel \(1x1, 3x3, 5x5\).* got '{text}'"
    with pytest.raises(ValueError, match=message):
        layer(text, 6, 4)


@pytest.mark.parametrize("layer", [SPADE, FusedSPADE])
def test_a_config_text_leaves_no_other_option(layer):
    with pytest.raises(TypeError, match="kernel_size"):
        layer("spadebatch3x3", 6, 4, kernel_size=5)
    with pytest.raises(TypeError, match="label_nc"):
        layer("spadebatch3x3", 6)
