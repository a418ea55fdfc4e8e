# SPDX-License-Identifier: Apache-2.0
import copy
import io
import warnings

import pytest
import torch
from fuse_cases import FUSED, Network, named, plain, ran_fused
from torch import nn

from spade_fast import LabelMap, fuse, unfuse
from spade_fast.fusion.forward import FusedForward, fingerprint


def _mutations():
    def activation(m):
        m.mlp_shared[1] = nn.GELU()

    def stride(m):
        m.mlp_shared[0].dilation, m.mlp_shared[0].padding = (2, 2), (2, 2)

    def kernel(m):
        m.mlp_gamma = nn.Conv2d(128, 6, (3, 1), padding=(1, 0))

    def hook(m):
        m.mlp_beta.register_forward_hook(lambda module, args, out: 2 * out)

    def before(m):
        m.mlp_beta.register_forward_pre_hook(lambda module, args: (2 * args[0],))

    def replaced(m):
        m.mlp_beta.forward = lambda h: nn.Conv2d.forward(m.mlp_beta, h) + 1

    def subclass(m):
        m.mlp_beta.__class__ = Doubled

    def padding(m):
        m.mlp_beta.padding_mode, m.mlp_beta._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]

    def slope(m):
        m.mlp_shared[1] = nn.LeakyReLU(0.3)

    def norm(m):
        m.param_free_norm = nn.GroupNorm(2, 6)

    return [activation, stride, kernel, hook, before, replaced, subclass, padding, slope, norm]


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", _mutations(), ids=lambda c: c.__name__)
def test_a_layer_changed_before_is_left_or_right_and_changed_after_runs_as_it_is(change):
    model, x, labels = plain()
    change(model)
    model.double().eval()
    want = model(x, labels)
    report = fuse(model)
    if change.__name__ in ("slope", "norm"):
        assert report.fused and ran_fused(model, x, labels)
    else:
        assert not report.fused and report.left[0].how
    torch.testing.assert_close(model(x, labels), want, rtol=1e-12, atol=1e-12)

    model, x, labels = plain()
    assert fuse(model.eval()).fused
    change(model)
    model.double().eval()
    with pytest.warns(UserWarning, match="runs unfused: .* changed since fuse"):
        got = model(x, labels)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert torch.equal(model(x, labels), got)
    unfuse(model)
    assert torch.equal(model(x, labels), got)


def test_weights_of_this_moment_are_used_however_they_are_written():
    model, x, labels = plain()
    original = copy.deepcopy(model)
    fuse(model)
    for write in (
        lambda m: m.mlp_gamma.weight.data.mul_(2),
        lambda m: m.mlp_shared[0].bias.detach().numpy().__iadd__(0.5),
        lambda m: (
            setattr(m, "mlp_beta", m.mlp_beta) or setattr(m.mlp_beta, "bias", nn.Parameter(torch.ones(6).double()))
        ),
        lambda m: m.load_state_dict({k: v / 2 for k, v in m.state_dict().items()}),
    ):
        write(model), write(original)
        assert ran_fused(model, x, labels)
        torch.testing.assert_close(model(x, labels), original(x, labels), rtol=1e-10, atol=1e-10)


def test_nothing_of_the_model_changes_but_the_forward():
    model, x, labels = plain("imaginaire", torch.float32)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.norm.weight.requires_grad_(False)
    model.train()
    model.mlps.eval()
    torch.manual_seed(5)
    graph = model(x, labels).sum()  # waits for its backward
    before = {k: (v, v.clone(), v.data_ptr(), v._version) for k, v in model.named_buffers()}
    weights = {k: (p, p.detach().clone(), p._version, p.grad, p.requires_grad) for k, p in model.named_parameters()}
    flags = [m.training for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    random = torch.get_rng_state()
    assert fuse(model, example=(x, labels)).fused
    unfuse(model)
    assert torch.equal(torch.get_rng_state(), random) and [m.training for m in model.modules()] == flags
    assert [set(m.__dict__) for m in model.modules()] == attributes
    for k, b in model.named_buffers():
        old, value, pointer, version = before[k]
        assert b is old and torch.equal(b, value) and b.data_ptr() == pointer and b._version == version
    for k, p in model.named_parameters():
        old, value, version, grad, needed = weights[k]
        assert p is old and torch.equal(p, value) and p._version == version
        assert p.grad is grad and bool((grad == 1).all()) and p.requires_grad == needed
    graph.backward()


def test_unfuse_restores_and_fusing_again_fuses():
    model = Network(lambda: plain()[0])
    x, labels = plain()[1:]
    model.eval()
    want = model(x, labels)
    for _ in range(2):
        assert [layer.name for layer in fuse(model).fused] == ["first", "second"]
        assert ran_fused(model, x, labels)
        torch.testing.assert_close(model(x, labels), want, rtol=1e-12, atol=1e-12)
    unfuse(model)
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert torch.equal(model(x, labels), want)


def test_a_forward_that_others_replaced_on_the_model_comes_back():
    model = Network(lambda: plain()[0])
    x, labels = plain()[1:]
    model.forward = mine = lambda x, labels: model.first(x, labels) + 1
    want = model(x, labels)
    fuse(model)
    torch.testing.assert_close(model(x, labels), want)
    unfuse(model)
    assert model.forward is mine


def test_copies_and_pickles_use_their_own_weights():
    model = Network(lambda: plain()[0])
    x, labels = plain()[1:]
    fuse(model.eval())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        before = model(x, labels)
        with torch.no_grad():
            other.first.mlp_beta.bias.add_(1)
        assert ran_fused(other, x, labels) and torch.equal(model(x, labels), before)
        unfused = copy.deepcopy(other)
        unfuse(unfused)
        torch.testing.assert_close(other(x, labels), unfused(x, labels), rtol=1e-10, atol=1e-10)


def test_a_map_is_recognized_once_a_call(monkeypatch):
    from spade_fast.labels import label_map

    asked = []
    find = label_map.LabelMap.from_segmap.__func__
    monkeypatch.setattr(
        label_map.LabelMap, "from_segmap", classmethod(lambda cls, s: (asked.append(1), find(cls, s))[1])
    )
    model = Network(lambda: plain()[0])
    x, labels = plain()[1:]
    fuse(model.eval())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            map_ = labels.clone()
            asked.clear()
            model(x.clone(), map_)
            assert len(asked) == 1
    with torch.no_grad():  # written to between two calls
        map_ = labels.clone()
        model(x, map_)
        map_.copy_(map_.roll(1, dims=1))
        got = model(x, map_)
        unfuse(model)
        torch.testing.assert_close(got, model(x, map_), rtol=1e-10, atol=1e-10)


def test_arguments_unlike_those_proven_go_to_the_module():
    model, x, labels = plain("CLADE")
    original = copy.deepcopy(model)
    fuse(model)
    distance = torch.ones(1, dtype=torch.float64)
    for args, kwargs, fused in (
        ((x, labels), {"input_dist": None}, True),
        ((x,), {"segmap": labels}, True),
        ((), {"x": x, "segmap": labels}, True),
        ((x, labels, distance), {}, False),
        ((x, labels), {"input_dist": distance}, False),
        ((x, labels[:1]), {}, False),  # one map for all images: the plain formula repeats it
    ):
        torch.testing.assert_close(model(*args, **kwargs), original(*args, **kwargs), rtol=1e-10, atol=1e-10)
        ran = []
        model.forward.compute = lambda *a, ran=ran: (ran.append(1), FusedForward.compute(model.forward, *a))[1]
        model(*args, **kwargs)
        del model.forward.compute
        assert bool(ran) == fused
    for args in ((x,), (x, labels[:, :3]), (x.float(), labels)):
        with pytest.raises((TypeError, RuntimeError)) as own:
            original(*args)
        with pytest.raises(own.type) as ours:
            model(*args)
        assert str(ours.value) == str(own.value)


@named([s for s in FUSED if "StableSR" not in s.name])  # its adapter looks a tensor up
def test_a_label_map_stands_for_its_one_hot_map(standin):
    """In each fused layer, where it runs fused and where its module runs; with edges too."""
    torch.manual_seed(0)
    model = standin.build().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    assert len(fuse(model).fused) == standin.fused
    model.eval()  # training changes u and v of a spectral norm
    ids, edges = torch.randint(5, (2, 9, 12)), torch.randint(2, (2, 9, 12))
    for layer in [m for m in model.modules() if isinstance(m.__dict__.get("forward"), FusedForward)]:
        structure = layer.forward.structure
        x = [] if structure.only_map else [torch.randn(2, structure.channels, 9, 12, dtype=torch.float64)]
        nc = structure.shared.in_channels
        for labels in (LabelMap(ids % nc, nc), LabelMap(ids % (nc - 1), nc - 1, edges)):
            dense = labels.one_hot(torch.float64)
            want = type(layer).forward(layer, *x, dense)
            torch.testing.assert_close(layer(*x, labels), want, rtol=1e-9, atol=1e-9)
            assert ran_fused(layer, *x, labels)
            layer.forward.proven = ()
            with pytest.warns(UserWarning, match="changed since fuse"):
                torch.testing.assert_close(layer(*x, labels), want, rtol=1e-9, atol=1e-9)
            layer.forward.proven, layer.forward.warned = fingerprint(layer), False
        with pytest.raises((RuntimeError, ValueError)):
            layer(*x, LabelMap(ids % nc, nc + 1))


def test_traces_transforms_and_dispatch_modes_run_the_module():
    model, x, labels = plain()
    original = copy.deepcopy(model).eval()
    fuse(model.eval())
    other = labels.roll(1, dims=1)
    traced = torch.jit.trace(model, (x, labels), check_trace=False)
    torch.testing.assert_close(traced(x, other), original(x, other), rtol=1e-10, atol=1e-10)
    exported = torch.export.export(model, (x, labels)).module()
    torch.testing.assert_close(exported(x, other), original(x, other), rtol=1e-10, atol=1e-10)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x, other), original(x, other), rtol=1e-10, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ran_fused(model, x, other)  # outside, as before
    _, tangent = torch.func.jvp(lambda x: model(x, labels), (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda x: original(x, labels), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = torch.autograd.forward_ad.unpack_dual(model(dual, labels))
        torch.testing.assert_close(out.tangent, expected)
    mapped = torch.vmap(lambda x: model(x[None], labels[:1])[0])(x)
    torch.testing.assert_close(mapped, original(x, labels[:1]), rtol=1e-10, atol=1e-10)
    weights = {k: v * 2 for k, v in model.state_dict().items()}
    got, want = (torch.func.functional_call(m, weights, (x, labels)) for m in (model, original))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
