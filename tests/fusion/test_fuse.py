# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import standins
import torch
import torch.nn.functional as F
from fuse_cases import FUSED, LEFT, WITH_FIXTURE, Network, by_width, named, plain, ran_fused
from standins import STANDINS
from torch import nn
from torch.nn.utils import prune

from spade_fast import fuse, unfuse
from spade_fast.fusion.forward import FusedForward


def options(standin, fixture, dtype):
    if not standin.name.startswith("StableSR"):
        return {}
    call = standins.arguments(standin, fixture, "onehot", dtype)
    return {"adapters": {"StableSRSPADE": by_width}, "example": call}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"])
@named(WITH_FIXTURE)
def test_a_fused_layer_gives_the_numbers_of_the_public_one(standin, dtype, limit):
    fixture = standins.load(standin.fixture)
    model = standins.filled(standin, fixture, dtype)
    state = copy.deepcopy(model.state_dict())
    report = fuse(model, **options(standin, fixture, dtype))
    assert [layer.fused for layer in report] == [True] * standin.fused, str(report)
    assert list(model.state_dict()) == list(state)
    for output in standins.modes(fixture):
        model.load_state_dict(state)
        call = standins.arguments(standin, fixture, output[1], dtype)
        model.train(output[0] == "train")
        if standin.name not in ("CoCosNet similarity", "SEAN ACE"):
            layers = [m.forward for m in model.modules() if isinstance(m.__dict__.get("forward"), FusedForward)]
            fast = output[1] == "onehot" or all(layer.structure.gains_when_dense for layer in layers)
            assert ran_fused(copy.deepcopy(model), *call) == fast
        with torch.no_grad():
            got = standins.run(model, standin, fixture, output, dtype)
        assert standins.difference(got, fixture, output) < limit


@named(FUSED)
def test_gradients_and_buffers_are_those_of_the_module(standin):
    torch.manual_seed(0)
    model = standin.build().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    channels = {"StableSR": 32, "StableSR 64": 64, "MONAI group": 8}.get(standin.name, 6)
    ids = torch.randint(5, (2, 3, 4)).repeat_interleave(3, 1).repeat_interleave(3, 2)
    onehot = F.one_hot(ids, 5).movedim(-1, 1).double()
    x = torch.randn(2, channels, 9, 12, dtype=torch.float64)

    def run(model, labels):
        torch.manual_seed(3)  # SEAN's noise
        x_, labels = x.clone().requires_grad_(), labels.clone().requires_grad_(labels is not onehot)
        if standin.name == "SEAN":
            out = torch.cat(model(labels), 1)
        else:
            out = model(x_, {"12": labels} if "StableSR" in standin.name else labels)
        model.zero_grad()
        out.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return out, x_.grad, labels.grad, grads, dict(model.named_buffers())

    original, kwargs = copy.deepcopy(model), {}
    if standin.name.startswith("StableSR"):
        kwargs = {"adapters": {"StableSRSPADE": by_width}, "example": (x, {"12": onehot})}
    assert len(fuse(model, **kwargs).fused) == standin.fused
    for labels in (onehot, torch.randn_like(onehot)):
        for training in (True, False):
            fused, original = model.train(training), original.train(training)
            torch.testing.assert_close(run(fused, labels), run(original, labels), rtol=1e-9, atol=1e-9)


@named(LEFT)
def test_what_is_not_understood_is_left_and_named(standin):
    model = standin.build()
    reasons = {
        "SIGE": "takes the hidden map, not the labels",
        "MONAI 3-D": "Conv3d: only 2-D maps",
        "MONAI 1-D": "Conv1d: only 2-D maps",
    }
    report = fuse(model)
    assert [layer.fused for layer in report] == [False] and reasons[standin.name] in report.layers[0].how
    assert "forward" not in model.__dict__ and reasons[standin.name] in str(report)


@pytest.mark.parametrize(
    "make",
    [
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
    ],
    ids=["spectral", "weight", "parametrized spectral", "parametrized weight", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_made_by_hooks_and_parametrizations_are_made_once_a_forward(make):
    model, x, labels = plain()
    for conv in (model.mlp_shared[0], model.mlp_gamma, model.mlp_beta):
        make(conv)
    state = copy.deepcopy(model.state_dict())

    def steps():
        model.load_state_dict(state)
        outs = []
        for training in (True, True, False):
            model.train(training)
            model.zero_grad()
            out = model(x, labels)
            out.square().sum().backward()
            outs.append((out.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
        return outs, copy.deepcopy(model.state_dict())

    want = steps()
    assert fuse(model).fused
    torch.testing.assert_close(steps(), want, rtol=1e-8, atol=1e-8)


def test_second_derivatives_are_those_of_the_module():
    model, x, labels = plain()

    def penalty():
        x_ = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x_, labels).square().sum(), x_, create_graph=True)
        model.zero_grad()
        gradient.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()], x_.grad

    want = penalty()
    assert fuse(model).fused
    torch.testing.assert_close(penalty(), want, rtol=1e-9, atol=1e-9)


def test_an_example_names_sizes_and_must_be_a_tuple():
    model = Network(lambda: plain()[0])
    x, labels = plain()[1:]
    with pytest.raises(TypeError, match="example must be a tuple of the model's arguments, got Tensor"):
        fuse(model, example=x)
    report = fuse(model, example=(x, labels))
    assert len(report.fused) == 2
    table = str(report)
    assert "first" in table and "batch norm" in table and table.endswith("2 of 2 fused")
    assert all(layer.eval_difference < 1e-10 and layer.old_ms > 0 and layer.new_ms > 0 for layer in report)


def test_an_adapter_without_an_example_is_left_by_name():
    report = fuse(next(s for s in STANDINS if s.name == "StableSR").build(), adapters={"StableSRSPADE": by_width})
    assert not report.fused and "no example" in report.left[0].how


class WrongSlope(nn.Module):
    """Made of a SPADE layer's parts, but another function."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.shared = nn.Conv2d(5, 8, 3, padding=1)
        self.gamma, self.beta = (nn.Conv2d(8, 6, 3, padding=1) for _ in range(2))

    def forward(self, x, labels):
        hidden = F.elu(self.shared(F.interpolate(labels, size=x.shape[2:])))
        return self.norm(x) * (1 + self.gamma(hidden)) + self.beta(hidden)


class Detached(WrongSlope):
    """Right values, other gradients."""

    def forward(self, x, labels):
        hidden = F.relu(self.shared(F.interpolate(labels, size=x.shape[2:])))
        return self.norm(x) * (1 + self.gamma(hidden.detach())) + self.beta(hidden)


class BilinearlyResized(WrongSlope):
    """Fused for maps of x's size alone."""

    def forward(self, x, labels):
        hidden = F.relu(self.shared(F.interpolate(labels, size=x.shape[2:], mode="bilinear")))
        return self.norm(x) * (1 + self.gamma(hidden)) + self.beta(hidden)


def test_another_function_of_the_same_parts_is_not_taken():
    report = fuse(WrongSlope())
    assert not report.fused and "another function" in report.left[0].how
    report = fuse(Detached())
    assert not report.fused and "differs in gradients" in report.left[0].how
    model, (x, labels) = BilinearlyResized().double(), plain()[1:]
    original = copy.deepcopy(model)
    assert fuse(model).fused and not ran_fused(model, x, labels) and ran_fused(model, x, labels[:, :, :9, :8])
    for map_ in (labels, labels[:, :, :9, :8]):
        torch.testing.assert_close(model(x, map_), original(x, map_), rtol=1e-10, atol=1e-10)


def test_zero_weights_hide_nothing():
    """gamma and beta that are zero at first are told apart all the same."""
    for first, second in (("mlp_beta", "mlp_gamma"), ("one", "two"), ("two", "one")):

        class Layer(nn.Module):
            def __init__(self, a=first, b=second):
                super().__init__()
                self.shared = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.ReLU())
                for name in (a, b):
                    setattr(self, name, nn.Conv2d(8, 6, 3, padding=1))
                    nn.init.zeros_(getattr(self, name).weight), nn.init.zeros_(getattr(self, name).bias)
                self.gamma, self.b = "mlp_gamma" if a == "mlp_beta" else "one", "mlp_beta" if a == "mlp_beta" else "two"

            def forward(self, x, labels):
                hidden = self.shared(labels)
                return x * (1 + getattr(self, self.gamma)(hidden)) + getattr(self, self.b)(hidden)

        model = Layer().double()
        assert fuse(model).fused
        with torch.no_grad():
            for p in model.parameters():
                nn.init.normal_(p)
        x, labels = plain()[1:]
        labels = labels[:, :, :9, :8]
        got = model(x, labels)
        unfuse(model)
        torch.testing.assert_close(got, model(x, labels), rtol=1e-10, atol=1e-10)


def test_autocast_gives_the_modules_dtype_and_values():
    model, x, labels = plain(dtype=torch.float32)
    original = copy.deepcopy(model)
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = model(x, labels), original(x, labels)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


class Activated(nn.Module):
    """Around a layer: takes x and the map too, and has no parameters."""

    def __init__(self):
        super().__init__()
        self.norm, self.activation = plain()[0], nn.LeakyReLU(0.2)

    def forward(self, x, labels):
        return self.activation(self.norm(x, labels))


def test_a_layer_within_a_module_like_one_is_found():
    model = Network(Activated).double()
    _, x, labels = plain()
    want = copy.deepcopy(model)(x, labels)
    assert [(layer.name, layer.fused) for layer in fuse(model)] == [("first.norm", True), ("second.norm", True)]
    assert ran_fused(copy.deepcopy(model), x, labels)
    torch.testing.assert_close(model(x, labels), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_parametrized_convolutions(kind):
    model, x, labels = plain()
    for convolution in (model.mlp_shared[0], model.mlp_gamma, model.mlp_beta):
        getattr(nn.utils.parametrizations, kind)(convolution)
    original = copy.deepcopy(model)
    assert len(fuse(model).fused) == 1
    for training in (True, False):
        outs = [m.train(training)(x, labels) for m in (original, model)]
        torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
        grads = [
            torch.autograd.grad(o.square().sum(), list(m.parameters()))
            for o, m in zip(outs, (original, model), strict=True)
        ]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(dict(model.named_buffers()), dict(original.named_buffers()), rtol=1e-9, atol=1e-9)


class LowRank(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return self.inner(x) * self.scale


def test_reasons_name_the_parameter_and_the_kernel():
    wrapped, other = plain()[0], plain()[0]
    wrapped.mlp_gamma = LowRank(wrapped.mlp_gamma)
    other.mlp_beta = nn.Conv2d(128, 6, 5, padding=2).double()
    assert [layer.how for layer in fuse(wrapped)] == ["has further parameters: mlp_gamma.scale"]
    assert [layer.how for layer in fuse(other)] == ["kernels of 3 and 5"]


def test_an_adapter_for_no_module_is_named():
    with pytest.raises(ValueError, match="adapters: SPADE has no module of class 'Spade'"):
        fuse(plain()[0], adapters={"Spade": by_width})
