# SPDX-License-Identifier: Apache-2.0
"""Traces, exports, torch.func and second derivatives of the fused layer and networks, against the plain ones."""

import io
import warnings

import pytest
import torch
from test_drop_in import CLASSES, maps, networks, pair
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from spade_fast.models import MultiscaleDiscriminator, SPADEGenerator

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


def x_of(shape=(2, 6, 20, 20)) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("what", ["label map", "one-hot"])
def test_torch_func(training, what):
    plain, fused = pair("instance" if training else "batch")
    labels, x, t = maps(), x_of(), x_of().flip(3)
    segmap = labels.one_hot(torch.float64)
    found = []
    for layer, condition in ((plain, segmap), (fused, labels if what == "label map" else segmap)):
        layer.train(training)

        def call(q, layer=layer, condition=condition):
            return layer(q, condition)

        def loss(parameters, layer=layer, condition=condition):
            return functional_call(layer, parameters, (x, condition)).square().sum()

        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        with torch.autograd.forward_ad.dual_level():
            dual = call(torch.autograd.forward_ad.make_dual(x, t))
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        found.append(
            {
                "jvp": jvp(call, (x,), (t,))[1],
                "forward AD": tangent,
                "grad": grad(lambda q: call(q).square().sum())(x),
                "vmap": vmap(call)(torch.stack([x, t])),
                "per-sample": vmap(grad(lambda q: call(q).square().sum()))(torch.stack([x, t])),
                "jacrev": jacrev(lambda q: call(q).sum((2, 3)))(x),
                **grad(loss)(parameters),
            }
        )
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-9)
    assert found[0]["jvp"].abs().max() > 0.1


def test_hessian():
    plain, fused = (layer.eval() for layer in pair())
    x, labels = x_of((2, 6, 2, 2)), maps(2, 4)
    expected = hessian(lambda q: plain(q, labels.one_hot(torch.float64)).pow(3).sum())(x)
    actual = hessian(lambda q: fused(q, labels).pow(3).sum())(x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_trace_of_a_layer():
    """The map is an input of the trace, also after the layer has seen it."""
    plain, fused = pair()
    plain.eval(), fused.eval()
    x, a = x_of(), maps().one_hot(torch.float64)
    with torch.no_grad():
        fused(x, a)
        traced = torch.jit.trace(fused, (x, a), check_trace=False)
        for other in (a, a.flip(3), torch.rand_like(a)):
            torch.testing.assert_close(traced(x, other), plain(x, other), rtol=1e-9, atol=1e-9)


class Last(nn.Module):
    """The prediction of a discriminator's second scale."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, segmap, image):
        return self.net(segmap, image)[1][-1]


@pytest.mark.parametrize("with_gradients", [False, True])
def test_trace_of_networks(with_gradients):
    nets = networks()
    segmap = maps(4, 64).one_hot(torch.float64)
    nets["fused"].eval(), nets["reference"].eval()
    with torch.set_grad_enabled(with_gradients):
        expected = nets["reference"](segmap.flip(3))
        saved = io.BytesIO()
        torch.jit.save(torch.jit.trace(nets["fused"], segmap, check_trace=False), saved)
        saved.seek(0)
        torch.testing.assert_close(torch.jit.load(saved)(segmap.flip(3)), expected, rtol=1e-8, atol=1e-8)
        net = MultiscaleDiscriminator(CLASSES, ndf=4).double().eval()
        image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        last = Last(net)
        traced = torch.jit.trace(last, (segmap, image), check_trace=False)
        torch.testing.assert_close(traced(segmap.flip(3), image), last(segmap.flip(3), image), rtol=1e-8, atol=1e-8)


def test_export_with_any_batch_and_size():
    plain, fused = pair()
    plain.eval(), fused.eval()
    batch, height, width = (torch.export.Dim(name, min=1, max=64) for name in ("n", "h", "w"))
    shapes = {"x": {0: batch, 2: height, 3: width}, "labels": {0: batch}}
    args = (x_of(), maps().one_hot(torch.float64))
    exported = torch.export.export(fused, args, dynamic_shapes=shapes).module()
    for n, h, w in ((1, 20, 20), (7, 9, 31)):
        x, segmap = x_of((n, 6, h, w)), torch.rand(n, CLASSES, 20, 20, dtype=torch.float64)
        torch.testing.assert_close(exported(x, segmap), plain(x, segmap), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", [torch.export.Dim.DYNAMIC, torch.export.Dim("n", min=1, max=16)])
def test_export_of_a_generator(dim):
    nets = networks()
    nets["fused"].eval(), nets["reference"].eval()
    segmap = maps(4, 64).one_hot(torch.float64)
    exported = torch.export.export(nets["fused"], (segmap,), dynamic_shapes={"segmap": {0: dim}}).module()
    many = torch.cat([segmap, segmap.flip(3), segmap.flip(2), segmap.flip(1)])
    torch.testing.assert_close(exported(many), nets["reference"](many), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_export(dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    plain, fused = pair()
    plain, fused = plain.eval().float(), fused.eval().float()
    x, segmap = x_of().float(), maps().one_hot()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(fused, (x, segmap), str(tmp_path / "layer.onnx"), dynamo=dynamo, verbose=False)
        expected = plain(x, segmap.flip(3))
    model = ReferenceEvaluator(onnx.load(tmp_path / "layer.onnx"))
    (actual,) = model.run(None, dict(zip(model.input_names, (x.numpy(), segmap.flip(3).numpy()), strict=True)))
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_export_of_a_generator(dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    net = SPADEGenerator(CLASSES, ngf=1, crop_size=32).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (maps(4, 32).one_hot(),), str(tmp_path / "g.onnx"), dynamo=dynamo, verbose=False)
    kinds = {(node.domain, node.op_type) for node in onnx.load(tmp_path / "g.onnx").graph.node}
    assert ("", "Conv") in kinds and all(domain in ("", "ai.onnx") for domain, _ in kinds)


def penalty(out: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(out, of, create_graph=True)
    return gradient.square().sum()


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize("repeats", [1, 5])
def test_gradient_penalty_of_a_layer(norm, repeats):
    found = []
    for layer in pair(norm):
        x, labels = x_of().requires_grad_(), maps(repeats)
        segmap = labels if type(layer).__name__ == "FusedSPADE" else labels.one_hot(torch.float64)
        penalty(layer(x, segmap).pow(3).sum(), x).backward()
        found.append({"x": x.grad, **{name: p.grad for name, p in layer.named_parameters() if p.grad is not None}})
    # A derivative that is exactly zero may be there or not.
    for name in found[0].keys() | found[1].keys():
        a, b = (f.get(name, torch.zeros(())) for f in found)
        torch.testing.assert_close(b.expand_as(a), a.expand_as(b), rtol=1e-8, atol=1e-8 * (1 + a.abs().max().item()))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_path_length_penalty_of_a_generator(checkpointed):
    found = []
    for kind in ("reference", "fused"):
        torch.manual_seed(0)
        net = SPADEGenerator(CLASSES, ngf=2, crop_size=64, z_dim=5, spade=kind).double()
        for name, p in net.named_parameters():
            nn.init.normal_(p, std=0.3) if "bias" in name else nn.init.orthogonal_(p)
        net.checkpoint_blocks = checkpointed
        labels = maps(8, 64)
        z = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = net(labels if kind == "fused" else labels.one_hot(torch.float64), z)
        penalty((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum(), z).backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    for name in found[0].keys() | found[1].keys():
        a, b = (f.get(name, torch.zeros(())) for f in found)
        torch.testing.assert_close(b.expand_as(a), a.expand_as(b), rtol=1e-6, atol=1e-6 * (1e-3 + a.abs().max().item()))


@pytest.mark.parametrize("kind", ["label map", "dense"])
def test_r1_penalty_of_a_discriminator(kind):
    """Against the same network run module by module on concatenated tensors with torch's spectral norm."""
    torch.manual_seed(0)
    net = MultiscaleDiscriminator(CLASSES, ndf=4).double().eval()
    labels = maps(4, 32)
    segmap = labels.one_hot(torch.float64)
    found = []
    for plain in (True, False):
        image = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        image.requires_grad_()
        net.zero_grad()
        if plain:
            for module in net.modules():
                module.__dict__.pop("_conv_forward", None)
                if hasattr(module, "weight_orig"):
                    module._conv_forward = type(module)._conv_forward.__get__(module)  # takes torch's own way
            net.discriminator_0.model0[0].register_forward_hook(lambda m, i, o: o)
            net.discriminator_1.model0[0].register_forward_hook(lambda m, i, o: o)
        else:
            for module in net.modules():
                module.__dict__.pop("_conv_forward", None)
            net.discriminator_0.model0[0]._forward_hooks.clear()
            net.discriminator_1.model0[0]._forward_hooks.clear()
        out = net(segmap if plain or kind == "dense" else labels, image)
        penalty(sum(scale[-1].square().sum() for scale in out), image).backward()
        found.append({"image": image.grad, **{n: p.grad for n, p in net.named_parameters() if p.grad is not None}})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-10 + 1e-8 * value.abs().max().item())
    assert found[0]["discriminator_0.model1.0.0.weight_orig"].abs().max() > 0


def test_compiled_without_fullgraph_with_a_fresh_map():
    nets = networks()
    compiled = torch.compile(nets["fused"], backend="aot_eager")
    for repeats in (4, 8):
        labels = maps(repeats, 64)
        out = compiled(labels)
        expected = nets["reference"](labels.one_hot(torch.float64))
        torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
        for net, image in ((nets["fused"], out), (nets["reference"], expected)):
            net.zero_grad()
            image.square().sum().backward()
        for (name, p), q in zip(nets["fused"].named_parameters(), nets["reference"].parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8, msg=name)
