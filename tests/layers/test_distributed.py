# SPDX-License-Identifier: Apache-2.0
"""Synchronized batch statistics: several processes with parts of a batch against one process with all of it."""

import copy
import warnings

import maps
import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn

from spade_fast import FusedSPADE, LabelMap, set_process_group
from spade_fast.layers import SPADEResnetBlock, sync
from spade_fast.models import SPADEGenerator
from spade_fast.ops.normalization_gradient import normalization_gradient
from spade_fast.ops.statistics import statistics
from spade_fast.ops.sync_modulation import merge_statistics

CLASSES = 5
SPLITS = {2: (3, 1), 4: (2, 0, 3, 1)}  # images a process; one may have none
KINDS = ("patterns", "dense")


def batch(n: int, kind: str, dtype=torch.float64):
    """x [n, 6, 5, 6] with a mean that differs from image to image, and the labels of the output at 10×12."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, 5, 6, generator=generator, dtype=torch.float64) + torch.arange(n).view(-1, 1, 1, 1)
    if kind == "dense":
        return x.to(dtype), torch.randn(n, CLASSES, 10, 12, generator=generator, dtype=torch.float64).to(dtype)
    return x.to(dtype), LabelMap(maps.cells(n, 10, 12, CLASSES, 0), CLASSES)


def block(dtype=torch.float64) -> SPADEResnetBlock:
    torch.manual_seed(0)
    net = SPADEResnetBlock(6, 4, CLASSES)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.to(dtype)


def forward_backward(net, x, labels, part=slice(None)):
    """Output, gradients of x and of the weights of a sum over the images of a part, and the buffers afterwards."""
    x = x[part].contiguous(memory_format=torch.channels_last).requires_grad_()
    out = net(x, labels[part], 2)
    weight = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = (weight.view(1, -1, 1, 1) * torch.linspace(-1, 2, out[0, 0].numel() if len(out) else 0).view(1, 1, 10, -1)
              if len(out) else out.new_zeros(out.shape))  # fmt: skip
    loss = (out * weight.to(out.dtype)).sum()
    grads = torch.autograd.grad(loss, [x, *net.parameters()])
    buffers = {
        name.removeprefix("_orig_mod."): b.clone()
        for name, b in net.named_buffers()
        if "running" in name or "tracked" in name
    }
    return {"out": out.detach(), "dx": grads[0], "weights": list(grads[1:]), "buffers": buffers}


def part_of(rank: int, split) -> slice:
    start = sum(split[:rank])
    return slice(start, start + split[rank])


def generator_net() -> SPADEGenerator:
    torch.manual_seed(0)
    net = SPADEGenerator(CLASSES, ngf=2, crop_size=64).double()
    return net


def three_steps(net, part, reduce) -> dict:
    """Weights after three steps of a generator; reduce(gradient) adds over the processes."""
    labels = LabelMap(maps.cells(4, 64, 64, CLASSES, 3), CLASSES)[part]
    target = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)[part]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (net(labels) - target).square().sum().backward()
        for p in net.parameters():
            reduce(p.grad)
        optimizer.step()
    return {name: value.clone() for name, value in net.state_dict().items()}


def checks(rank: int, world: int) -> dict:
    split = SPLITS[world]
    part = part_of(rank, split)
    result = {}
    for kind in KINDS:
        for dtype in (torch.float64, torch.float32):
            result[kind, dtype] = forward_backward(block(dtype), *batch(sum(split), kind, dtype), part)
    net = generator_net()
    labels = LabelMap(maps.cells(world, 64, 64, CLASSES, 3), CLASSES)
    with processes.Collectives() as forward:
        out = net(labels[rank])
    with processes.Collectives() as backward:
        out.sum().backward()
    with torch.no_grad(), processes.Collectives() as evaluation:
        net.eval()(labels[rank])
    result["collectives"] = [c.counts for c in (forward, backward, evaluation)]
    equal = [slice(rank, rank + 1)] if world == 4 else [slice(3 * rank, 3 * rank + 3 - 2 * rank)]
    result["steps"] = three_steps(generator_net(), equal[0], dist.all_reduce)
    if world == 4:  # two groups of two
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        net = block()
        sync.set_process_group(net, groups[rank // 2])
        result["groups"] = forward_backward(net, *batch(4, "patterns"), slice(rank, rank + 1))
        sync.set_process_group(net, None)
        assert net.norm_0.process_group is None
    else:
        result["compiled"] = compiled(part)
    return result


def compiled(part):
    """The compiled block, of other maps than it was compiled with, against the eager one; both with their backward."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    eager = block()
    net = copy.deepcopy(eager)
    function = torch.compile(net, fullgraph=True, backend=counter)
    x, _ = batch(4, "patterns")
    x = x[part]
    pairs = []
    for seed in range(3):
        labels = LabelMap(maps.cells(4, 16, 16, CLASSES, seed), CLASSES)[part].build([(10, 12)], backward=True)
        pairs += [forward_backward(f, x, labels) for f in (function, eager)]
    return {"frames": counter.frame_count, "pairs": pairs}


@pytest.fixture(scope="module", params=[2, 4])
def several(request):
    return request.param, processes.run(checks, request.param)


def joined(results: list[dict]) -> dict:
    """What one process would have: outputs and dx in order, gradients of weights added."""
    return {
        "out": torch.cat([r["out"] for r in results]),
        "dx": torch.cat([r["dx"] for r in results]),
        "weights": [sum(grads) for grads in zip(*(r["weights"] for r in results), strict=True)],
    }


def assert_same(actual: dict, expected: dict, rounding: float) -> None:
    for name in ("out", "dx"):
        bound = rounding * float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=bound, msg=name)
    # A gradient is a sum with cancellation (of a bias before a norm: to 0): what it rounds is what is added up.
    scale = max(float(g.abs().max()) for g in expected["weights"])
    for a, e in zip(actual["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=rounding * scale)


@pytest.mark.parametrize("kind", KINDS)
# float32: 480 values a channel and four layers of sums of up to 54 terms, forward and backward: about 1e3 roundings.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-11), (torch.float32, 1e3 * 2**-24)])
def test_unequal_parts_are_the_whole_batch(several, kind, dtype, rounding):
    world, results = several
    parts = [r[kind, dtype] for r in results]
    whole = forward_backward(block(dtype), *batch(sum(SPLITS[world]), kind, dtype))
    assert_same(joined(parts), whole, rounding)
    for r in parts:
        for name, value in whole["buffers"].items():
            torch.testing.assert_close(r["buffers"][name], value, rtol=rounding, atol=rounding)
            assert torch.equal(r["buffers"][name], parts[0]["buffers"][name]), "ranks differ"


def test_without_sharing_the_parts_differ(several):
    """What the comparison above would show if each process kept its statistics to itself."""
    world, _ = several
    split = SPLITS[world]
    x, labels = batch(sum(split), "patterns")
    alone = [forward_backward(block(), x, labels, part_of(rank, split)) for rank in range(world) if split[rank]]
    whole = forward_backward(block(), x, labels)
    assert (joined(alone)["out"] - whole["out"]).abs().max() > 0.1 * whole["out"].abs().max()


def test_weights_after_three_steps(several):
    _, results = several
    expected = three_steps(generator_net(), slice(None), lambda gradient: None)
    for r in results:
        for name, value in expected.items():
            bound = 1e-10 * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(r["steps"][name], value, rtol=0, atol=bound, msg=name)
    moved = expected["up_0.conv_0.weight_orig"] - generator_net().state_dict()["up_0.conv_0.weight_orig"]
    assert moved.abs().max() > 1e-4


def test_one_collective_for_each_distinct_input(several):
    """7 blocks, in each an input that norm_0 and norm_s share and one of norm_1: 14 each way; none in evaluation."""
    _, results = several
    for r in results:
        assert r["collectives"] == [{"all_gather_into_tensor": 14}, {"all_reduce": 14}, {}]


def test_process_groups_can_be_chosen(several):
    world, results = several
    if world != 4:
        pytest.skip("needs two groups of two")
    for first in (0, 2):
        whole = forward_backward(block(), *batch(4, "patterns"), slice(first, first + 2))
        assert_same(joined([r["groups"] for r in results[first : first + 2]]), whole, 1e-11)


def test_compiles_in_one_graph(several):
    world, results = several
    if world != 2:
        pytest.skip("compiled with two processes")
    for r in results:
        assert r["compiled"]["frames"] == 1
        pairs = r["compiled"]["pairs"]
        for actual, expected in zip(pairs[::2], pairs[1::2], strict=True):
            assert_same(actual, expected, 1e-11)
            for name, value in expected["buffers"].items():
                torch.testing.assert_close(actual["buffers"][name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [1, 2, 7])
def test_large_means_cost_no_digits(world):
    """Mean 1000, deviation 1, in float32: what E[x²] - E[x]² would lose."""
    x = torch.randn(world, 8, 32, 32, generator=torch.Generator().manual_seed(0)) + 1000
    mean, m2 = combine_in_one_process(x)
    torch.testing.assert_close(mean[0], x.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        m2[0], (x.double().var((0, 2, 3), correction=0) * 1024 * world).float(), rtol=1e-4, atol=0
    )


def combine_in_one_process(x):
    """combine_statistics with the gathering replaced by this process's knowledge of every part."""
    parts = [statistics(part, False) for part in x.split(1)]
    packed = torch.stack([torch.cat([m[0], s[0], m.new_full((1,), 1024.0)]) for m, s in parts])
    return merge_statistics(packed)[:2]


def test_warns_once_when_nothing_is_initialized(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sync, "_warned", False)
    x, labels = batch(2, "patterns")
    with pytest.warns(UserWarning, match="WORLD_SIZE is 2, but torch.distributed is not initialized"):
        block()(x, labels, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block()(x, labels, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_normalization_gradient(backend, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    dx, x = (torch.randn(3, 5, 7, 9, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = torch.randn(2, 5, generator=generator, dtype=torch.float64).to(acc)
    dx, x = dx.contiguous(memory_format=layout), x.contiguous(memory_format=layout)[:, :, :, :]
    expected = dx.double() + x.double() * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    normalization_gradient(dx, x, scale, shift)
    # One rounding to dtype, and two in the accumulation of terms of up to 4 · 4.
    bound = torch.finfo(dtype).eps * expected.abs() + 4 * torch.finfo(acc).eps * 16
    assert ((dx.double() - expected).abs() <= bound).all()


def test_choosing_processes_leaves_other_modules_alone():
    """SyncBatchNorm and wrappers of other packages have a process_group of their own."""
    other = torch.nn.SyncBatchNorm(3)
    other.process_group = "theirs"
    net = torch.nn.Sequential(FusedSPADE(3, 2), other)

    class Group:
        group_name = "ours"

        @staticmethod
        def size():
            return 2

    set_process_group(net, Group())
    assert net[0].process_group == ("ours", 2) and other.process_group == "theirs"
    set_process_group(net, None)
    assert net[0].process_group is None and other.process_group == "theirs"
