# SPDX-License-Identifier: Apache-2.0
"""The drop-in under torch.distributed: a converted SyncBatchNorm, and FSDP2."""

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.testing._internal.distributed.fake_pg import FakeStore

from spade_fast import FusedSPADE, LabelMap
from spade_fast.models import SPADEGenerator


def layer() -> FusedSPADE:
    torch.manual_seed(0)
    return FusedSPADE(4, 3, norm="batch", hidden_nc=8).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 16, 16, dtype=torch.float64, generator=generator) + torch.arange(3).view(-1, 1, 1, 1)
    ids = torch.randint(0, 3, (3, 4, 4), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return x, ids


def results(net: nn.Module, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = net(x, LabelMap(ids, 3))
    out.pow(3).sum().backward()
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    return {"out": out.detach(), "dx": x.grad, **{n: p.grad for n, p in net.named_parameters()}, **buffers}


def converted(rank: int, world: int, grouped: bool) -> dict[str, torch.Tensor]:
    group = dist.new_group([0, 1]) if grouped else None
    net = nn.SyncBatchNorm.convert_sync_batchnorm(layer(), group)
    assert type(net.param_free_norm) is nn.SyncBatchNorm
    part = slice(0, 2) if rank == 0 else slice(2, 3)
    x, ids = batch()
    return results(net, x[part], ids[part])


def test_a_converted_sync_batch_norm_takes_statistics_of_all_processes():
    expected = results(layer(), *batch())
    for grouped in (False, True):
        parts = processes.run(converted, 2, grouped)
        for name, value in expected.items():
            if name in ("out", "dx"):
                actual = torch.cat([part[name] for part in parts])
            elif "running" in name or "tracked" in name:
                actual = parts[1][name]
            else:
                actual = parts[0][name] + parts[1][name]
            torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-9, msg=name)


def sharded(rank: int, world: int) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = SPADEGenerator(label_nc=3, ngf=2, crop_size=64).double()
    mesh = init_device_mesh("cpu", (world,))
    for block, _ in net.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return plain_step(net)


def plain_step(net: nn.Module) -> dict[str, torch.Tensor]:
    out = net(LabelMap(batch()[1].repeat_interleave(4, 1).repeat_interleave(4, 2), 3))
    out.square().sum().backward()
    grads = {n: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for n, p in net.named_parameters()}
    return {"out": out.detach(), **grads}


def test_fsdp2():
    torch.manual_seed(0)
    expected = plain_step(SPADEGenerator(label_nc=3, ngf=2, crop_size=64).double())
    for found in processes.run(sharded, 2):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)


@pytest.fixture
def two_processes():
    """A process group of two, of which this process is the first; nothing is communicated."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def forward_mode(net, x, segmap):
    with forward_ad.dual_level():
        return net(forward_ad.make_dual(x, torch.ones_like(x)), segmap)


FOLLOWED = {
    "jvp": lambda net, x, m: torch.func.jvp(lambda t: net(t, m), (x,), (x,)),
    "grad": lambda net, x, m: torch.func.grad(lambda t: net(t, m).sum())(x),
    "functional_call": lambda net, x, m: torch.func.grad(lambda p: torch.func.functional_call(net, p, (x, m)).sum())(
        dict(net.named_parameters())
    ),
    "trace": lambda net, x, m: torch.jit.trace(net, (x, m), check_trace=False),
    "export": lambda net, x, m: torch.export.export(net, (x, m)),
    "forward mode": forward_mode,
}


def hooked(net: nn.Module) -> nn.Module:
    net.param_free_norm.register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize("way", FOLLOWED)
def test_statistics_of_all_processes_are_not_replaced_by_those_of_one(two_processes, way):
    """Where torch's own operations must do all the work, BatchNorm2d would take those of this process."""
    torch.manual_seed(0)
    x, ids = batch()
    segmap = LabelMap(ids, 3).one_hot(x.dtype)
    net = FusedSPADE(4, 3, hidden_nc=8).double()
    with pytest.raises(Exception, match=r'norm="syncbatch" on several processes: .*take norm="batch"'):
        FOLLOWED[way](net, x, segmap)
    assert net.param_free_norm.num_batches_tracked == 0
    FOLLOWED[way](net.eval(), x, segmap)
    if way in ("trace", "export", "forward mode"):  # torch.func refuses every norm that updates running statistics
        FOLLOWED[way](layer(), x, segmap)
    FOLLOWED[way](FusedSPADE(4, 3, norm="instance", hidden_nc=8).double(), x, segmap)


def test_a_hooked_norm_does_not_take_statistics_of_one_process(two_processes):
    x, ids = batch()
    net = hooked(FusedSPADE(4, 3, hidden_nc=8).double())
    with pytest.raises(
        RuntimeError,
        match=r"several processes: param_free_norm has forward hooks, so it would",
    ):
        net(x, LabelMap(ids, 3))
    with pytest.warns(UserWarning, match="param_free_norm has forward hooks"):
        net.eval()(x, LabelMap(ids, 3))
    with pytest.warns(UserWarning, match="param_free_norm has forward hooks"):
        hooked(layer())(x, LabelMap(ids, 3))
