# SPDX-License-Identifier: Apache-2.0
"""The contract of the drop-in: every manipulation of the plain layer gives the same on FusedSPADE, outputs and all
gradients; it is held against ``reference.SPADE`` to which the same was done."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from spade_fast import FusedSPADE, LabelMap, reference
from spade_fast.layers import dense as dense_module

CHANNELS, CLASSES = 6, 4


def pair(norm: str = "batch") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = reference.SPADE(CHANNELS, CLASSES, norm, hidden_nc=8).double()
    for name, tensor in plain.named_buffers():
        if tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand_like(tensor) if name.endswith("var") else torch.randn_like(tensor))
    fused = FusedSPADE(CHANNELS, CLASSES, norm, hidden_nc=8).double()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def maps(repeats: int = 5, size: int = 20) -> LabelMap:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, CLASSES, (2, -(-size // repeats), -(-size // repeats)), generator=generator)
    ids = ids.repeat_interleave(repeats, 1).repeat_interleave(repeats, 2)[:, :size, :size]
    return LabelMap(ids, CLASSES)


def dense(labels: LabelMap) -> torch.Tensor:
    return torch.randn(2, CLASSES, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


CONDITIONS = {
    "label map": (lambda: maps(), lambda m: m.one_hot(torch.float64)),
    "noisy map": (lambda: maps(1), lambda m: m.one_hot(torch.float64)),
    "one-hot": (lambda: maps().one_hot(torch.float64), lambda m: m),
    "dense": (lambda: dense(maps()), lambda m: m),
}


def run(layer: nn.Module, segmap) -> dict[str, torch.Tensor]:
    """Output, gradients of x and of every parameter, and buffers after it."""
    x = torch.randn(2, CHANNELS, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    layer.zero_grad()
    out = layer(x, segmap)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = {"out": out.detach(), "x": x.grad}
    found.update({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
    found.update({name: b.double() for name, b in layer.named_buffers()})
    return found


def assert_same(plain: nn.Module, fused: nn.Module, condition: str = "label map") -> None:
    make, as_dense = CONDITIONS[condition]
    labels = make()
    expected = run(plain, as_dense(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = run(fused, labels)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


class Adapter(nn.Module):
    """LoRA: a frozen convolution and a low-rank one beside it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 3, padding=1, bias=False).double()
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False).double()

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    out_channels = property(lambda self: self.base.out_channels)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def set_norm(norm: nn.Module):
    return lambda layer: setattr(layer, "param_free_norm", copy.deepcopy(norm).double())


def affine(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return norm


def circular(layer):
    layer.mlp_gamma.padding_mode = "circular"
    layer.mlp_gamma._reversed_padding_repeated_twice = [1, 1, 1, 1]


def wider(layer):
    layer.mlp_gamma.padding = layer.mlp_gamma.dilation = (2, 2)


def own_forward(layer):
    convolution = layer.mlp_beta
    convolution.forward = lambda x: F.conv2d(x, 2 * convolution.weight, convolution.bias, padding=1)


def no_bias(layer):
    layer.mlp_gamma.bias = None


def insert_dropout(layer):
    layer.mlp_shared.append(nn.Dropout(0.0))


CHANGES = {
    "spectral_norm on mlp_gamma": lambda m: spectral_norm(m.mlp_gamma),
    "spectral_norm on mlp_shared.0": lambda m: spectral_norm(m.mlp_shared[0]),
    "parametrized spectral norm": lambda m: parametrizations.spectral_norm(m.mlp_beta),
    "weight_norm": lambda m: weight_norm(m.mlp_beta),
    "pruned": lambda m: prune.l1_unstructured(m.mlp_gamma, "weight", 0.5),
    "forward hook on mlp_gamma": lambda m: m.mlp_gamma.register_forward_hook(lambda *a: a[2] * 0.5),
    "forward hook on mlp_shared": lambda m: m.mlp_shared.register_forward_hook(lambda *a: a[2] + 1),
    "forward hook on the norm": lambda m: m.param_free_norm.register_forward_hook(lambda *a: a[2] * 3),
    "pre-hook on mlp_beta": lambda m: m.mlp_beta.register_forward_pre_hook(lambda _, a: (a[0] + 1,)),
    "backward hook on mlp_beta": lambda m: m.mlp_beta.register_full_backward_hook(lambda _, i, o: (2 * i[0],)),
    "leaky hidden layer": lambda m: m.mlp_shared.__setitem__(1, nn.LeakyReLU(0.2)),
    "tanh hidden layer": lambda m: m.mlp_shared.__setitem__(1, nn.Tanh()),
    "one part more": insert_dropout,
    "adapter on mlp_gamma": lambda m: setattr(m, "mlp_gamma", Adapter(m.mlp_gamma)),
    "adapter on mlp_shared.0": lambda m: m.mlp_shared.__setitem__(0, Adapter(m.mlp_shared[0])),
    "circular padding": circular,
    "dilation": wider,
    "forward replaced": own_forward,
    "no bias": no_bias,
    "affine batch norm": set_norm(affine(nn.BatchNorm2d(CHANNELS))),
    "batch norm without running statistics": set_norm(
        nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False)
    ),
    "cumulative batch norm": set_norm(nn.BatchNorm2d(CHANNELS, affine=False, momentum=None)),
    "instance norm": set_norm(nn.InstanceNorm2d(CHANNELS)),
    "instance norm with running statistics": set_norm(nn.InstanceNorm2d(CHANNELS, track_running_stats=True)),
    "affine instance norm": set_norm(affine(nn.InstanceNorm2d(CHANNELS, affine=True))),
    "group norm": set_norm(nn.GroupNorm(3, CHANNELS)),
    "identity": set_norm(nn.Identity()),
    "norm in evaluation mode": lambda m: m.param_free_norm.eval(),
    "another eps": lambda m: setattr(m.param_free_norm, "eps", 0.3),
    "kernel of another size": lambda m: setattr(m, "mlp_gamma", nn.Conv2d(8, CHANNELS, 5, padding=2).double()),
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_submodules(change, condition):
    plain, fused = pair()
    for layer in (plain, fused):
        torch.manual_seed(1)
        CHANGES[change](layer)
    for training in (True, False):
        if change != "norm in evaluation mode":
            plain.train(training), fused.train(training)
        assert_same(plain, fused, condition)
        for layer in (plain, fused):  # as an optimizer's step
            torch.manual_seed(2)
            with torch.no_grad():
                for p in layer.parameters():
                    p.add_(0.1 * torch.randn_like(p))
    assert_same(plain, fused, condition)


def test_a_changed_submodule_is_named_once():
    _, fused = pair()
    spectral_norm(fused.mlp_gamma)
    x, labels = torch.randn(2, CHANNELS, 20, 20).double(), maps()
    with pytest.warns(UserWarning, match="mlp_gamma has forward pre hooks; it runs through its own forward"):
        fused(x, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(x, labels)
        pair()[1](x, labels)  # one as built says nothing


def test_global_module_hooks_see_every_submodule():
    plain, fused = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        assert_same(plain, fused)
    finally:
        handle.remove()
    half = len(seen) // 2
    assert sorted(seen[:half]) == sorted(n.replace("FusedSPADE", "SPADE") for n in seen[half:])


def write_numpy(tensor, value):
    tensor.detach().numpy()[...] = value.numpy()


def write_pointer(tensor, value):
    import ctypes

    ctypes.memmove(tensor.data_ptr(), value.contiguous().data_ptr(), value.numel() * value.element_size())


def write_swap(tensor, value):
    torch.utils.swap_tensors(tensor, nn.Parameter(value.clone()) if isinstance(tensor, nn.Parameter) else value.clone())


WRITES = {
    "data": lambda t, v: t.data.copy_(v),
    "set data": lambda t, v: setattr(t, "data", v.clone()),
    "no_grad": lambda t, v: t.detach().copy_(v),
    "numpy": write_numpy,
    "pointer": write_pointer,
    "swap": write_swap,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("training", [False, True])
def test_every_write_counts(write, training):
    """To parameters and buffers of the layer and of a generator, between two forwards."""
    from spade_fast.models import SPADEGenerator

    torch.manual_seed(0)
    labels = maps(8, 64)
    generator = SPADEGenerator(CLASSES, ngf=2, crop_size=64).train(training)
    with torch.no_grad():
        generator(labels)
        for tensor in [*generator.parameters(), *generator.buffers()]:
            if tensor.is_floating_point() and tensor.dim():
                value = tensor.detach() * 1.5 + 0.1
                WRITES[write](tensor, value)
        expected = copy.deepcopy(generator)(labels)
        torch.testing.assert_close(generator(labels), expected, rtol=0, atol=0)


def test_parameter_vectors_and_line_search():
    for optimize in (False, True):
        plain, fused = pair()
        for layer in (plain, fused):
            if optimize:
                optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=3, line_search_fn="strong_wolfe")
                x = torch.randn(2, CHANNELS, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
                labels = maps() if layer is fused else maps().one_hot(torch.float64)

                def closure(layer=layer, optimizer=optimizer, x=x, labels=labels):
                    optimizer.zero_grad()
                    loss = layer(x, labels).square().mean()
                    loss.backward()
                    return loss

                optimizer.step(closure)
            else:
                vector = nn.utils.parameters_to_vector(layer.parameters())
                nn.utils.vector_to_parameters(vector * 2 + 0.1, layer.parameters())
                torch.manual_seed(4)
                nn.init.orthogonal_(layer.mlp_gamma.weight)
        assert_same(plain, fused)


def test_a_label_map_keeps_its_own_copy_of_the_labels():
    ids = maps().labels.clone()
    labels = LabelMap(ids, CLASSES)
    before = labels.one_hot()
    labels.patterns(20, 20)
    ids.zero_()
    labels.labels.zero_()
    assert torch.equal(labels.one_hot(), before)


def networks() -> dict[str, nn.Module]:
    """A plain and a fused generator with the same weights, in float64."""
    from spade_fast.models import SPADEGenerator

    torch.manual_seed(0)
    made = {kind: SPADEGenerator(CLASSES, ngf=2, crop_size=64, spade=kind).double() for kind in ("reference", "fused")}
    for name, tensor in made["reference"].named_parameters():
        nn.init.normal_(tensor, std=0.3) if "bias" in name else nn.init.orthogonal_(tensor)
    made["fused"].load_state_dict(made["reference"].state_dict())
    return made


def wrap(parent: str, name: str, module):
    return lambda net: setattr(net.get_submodule(parent), name, module(getattr(net.get_submodule(parent), name)))


class Scaled(nn.Module):
    """Any module, its output doubled; takes what the plain network gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, *segmap):
        return 2 * self.inner(x, *segmap)


def hook(path: str):
    return lambda net: net.get_submodule(path).register_forward_hook(lambda m, i, o: o * 0.5)


def mean_pre_hook(path: str):
    return lambda net: net.get_submodule(path).register_forward_pre_hook(
        lambda m, i: (i[0] + torch.linspace(0, 1, i[0].shape[-1], dtype=i[0].dtype), *i[1:])
    )


def circular_everywhere(net):
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [1, 1, 1, 1]


NETWORK_CHANGES = {
    "hook on fc": hook("fc"),
    "hook on a block": hook("up_1"),
    "hook on norm_0": hook("up_1.norm_0"),
    "hook on norm_s": hook("up_1.norm_s"),
    "hook on conv_0": hook("up_1.conv_0"),
    "hook on conv_1": hook("G_middle_0.conv_1"),
    "hook on conv_s": hook("up_1.conv_s"),
    "hook on conv_img": hook("conv_img"),
    "pre-hook on a block that enlarges": mean_pre_hook("up_1"),
    "pre-hook on conv_1": mean_pre_hook("up_1.conv_1"),
    "wrapped fc": wrap("", "fc", Scaled),
    "spectral norm on fc": lambda net: spectral_norm(net.fc),
    "pruned fc": lambda net: prune.l1_unstructured(net.fc, "weight", 0.5),
    "wrapped conv_img": wrap("", "conv_img", Scaled),
    "wrapped block": wrap("", "up_2", Scaled),
    "wrapped norm_0": wrap("up_1", "norm_0", Scaled),
    "wrapped norm_1": wrap("up_1", "norm_1", Scaled),
    "wrapped conv_0": wrap("up_1", "conv_0", Scaled),
    "group norm in norm_s": lambda net: setattr(net.up_1.norm_s, "param_free_norm", nn.GroupNorm(2, 16).double()),
    "circular padding": circular_everywhere,
    "spectral norm removed": lambda net: nn.utils.remove_spectral_norm(net.up_0.conv_0),
    "pruned weight_orig": lambda net: prune.l1_unstructured(net.up_0.conv_0, "weight_orig", 0.5),
    "one eps differs": lambda net: setattr(net.up_1.norm_s.param_free_norm, "eps", 0.5),
    "one norm in evaluation mode": lambda net: net.up_1.norm_s.eval(),
}


@pytest.mark.parametrize("change", NETWORK_CHANGES)
def test_changed_networks(change):
    found = {}
    for kind, net in networks().items():
        torch.manual_seed(1)
        NETWORK_CHANGES[change](net)
        labels = maps(4, 64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                out = net(labels if kind == "fused" else labels.one_hot(torch.float64))
            out.square().sum().backward()
            net.eval()
            with torch.no_grad():
                still = net(labels if kind == "fused" else labels.one_hot(torch.float64))
        found[kind] = {"out": out, "eval": still, **{n: p.grad for n, p in net.named_parameters()}}
    assert found["fused"].keys() == found["reference"].keys()
    for name, value in found["reference"].items():
        scale = 1e-12 if value is None else value.abs().max().item()
        actual = found["fused"][name]
        torch.testing.assert_close(
            actual, value, rtol=1e-7, atol=1e-7 * scale + 1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_what_hooks_keep_is_not_written_to():
    """Feature extraction: an output that a forward hook keeps stays as it was."""
    from spade_fast.models import SPADEGenerator

    kept = {}
    net = SPADEGenerator(CLASSES, ngf=2, crop_size=64)
    for name, module in net.named_modules():
        if name.count(".") <= 1 and name:
            module.register_forward_hook(lambda m, i, o, n=name: kept.__setitem__(n, (o, o.detach().clone())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net(maps(4, 64))
    assert len(kept) > 30
    for name, (output, copied) in kept.items():
        assert torch.equal(output, copied), name


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.discriminator_0.model0.register_forward_hook(lambda m, i, o: o * 2),
        lambda net: net.discriminator_0.model0[0].register_forward_hook(lambda m, i, o: o * 2),
        lambda net: net.discriminator_1.model0[0].register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
        lambda net: net.discriminator_1.model0.__setitem__(0, Scaled(net.discriminator_1.model0[0])),
        lambda net: spectral_norm(net.discriminator_0.model0[0]),
        lambda net: setattr(net.discriminator_0.model0[0], "padding_mode", "zeros"),
    ],
)
@pytest.mark.parametrize("kind", ["label map", "dense"])
def test_changed_discriminators(change, kind):
    from spade_fast.models import MultiscaleDiscriminator

    torch.manual_seed(0)
    net = MultiscaleDiscriminator(CLASSES, ndf=4).double().eval()
    change(net)
    labels, image = maps(4, 32), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    segmap = labels.one_hot(torch.float64)
    actual = net(labels if kind == "label map" else segmap, image)
    x = torch.cat([segmap.repeat(2, 1, 1, 1), image], 1)
    for i, features in enumerate(actual):
        if i:
            x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        y, part = x, getattr(net, f"discriminator_{i}")
        for j, feature in enumerate(features):
            y = getattr(part, f"model{j}")(y)
            torch.testing.assert_close(feature, y, rtol=1e-9, atol=1e-9)


def authors_start(module):
    if hasattr(module, "weight") and "Conv" in type(module).__name__:
        nn.init.xavier_normal_(module.weight.data, 0.02)


@pytest.mark.parametrize(
    "start",
    [
        authors_start,
        lambda m: m.weight.data.normal_(0, 0.02) if "Conv" in type(m).__name__ and hasattr(m, "weight") else None,
        lambda m: nn.init.orthogonal_(m.weight) if isinstance(m, nn.Conv2d) else None,
        lambda m: nn.init.constant_(m.weight, 0.5) if isinstance(m, nn.Conv2d) else None,
    ],
)
def test_common_initializers_reach_every_convolution(start):
    from spade_fast.models import SPADEGenerator

    net = SPADEGenerator(CLASSES, ngf=2, crop_size=64)
    before = {name: p.detach().clone() for name, p in net.named_parameters() if p.dim() == 4}
    net.apply(start)
    after = dict(net.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_spectral_norm_can_be_removed():
    net = networks()["fused"].eval()
    labels = maps(4, 64)
    with torch.no_grad():
        expected = net(labels)
        for module in list(net.modules()):
            if hasattr(module, "weight_orig"):
                nn.utils.remove_spectral_norm(module)
        assert not any("weight_orig" in name or "weight_u" in name for name in net.state_dict())
        torch.testing.assert_close(net(labels), expected, rtol=1e-10, atol=1e-10)
        copy.deepcopy(net)(labels)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    plain, fused = pair()
    safetensors.save_file(fused.state_dict(), tmp_path / "layer.safetensors")
    state = safetensors.load_file(tmp_path / "layer.safetensors")
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("kind", ["one-hot", "dense"])
def test_another_default_device(kind):
    dense_module._factors.cache_clear()  # what an earlier test found would hide a fault
    plain, fused = pair("instance")
    x = torch.randn(2, CHANNELS, 100, 100, dtype=torch.float64)
    segmap = maps().one_hot(torch.float64) if kind == "one-hot" else dense(maps())
    with torch.device("meta"):
        expected, actual = plain(x, segmap), fused(x, segmap)
    torch.testing.assert_close(actual, expected)
