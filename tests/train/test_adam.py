# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from spade_fast.train.adam import Adam

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "taps first": lambda t: t.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
}


def parameters(layout, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((4, 3, 3, 3), (5, 2, 1, 1), (7, 1, 4, 4))
    return [torch.nn.Parameter(LAYOUTS[layout](torch.randn(s, generator=g))) for s in shapes]


def set_gradients(params, seed, factor=1.0):
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g) * factor)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.5, 0.999)])
def test_is_adam(layout, betas):
    ours, theirs = parameters(layout), [torch.nn.Parameter(p.detach().double()) for p in parameters("contiguous")]
    a, b = Adam(ours, 1e-2, betas), torch.optim.Adam(theirs, 1e-2, betas, fused=False, foreach=False)
    for step in range(5):
        set_gradients(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.double()
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        # five updates of at most 1e-2 √10 each, values of size 3: a rounding of the value and of the update each time
        torch.testing.assert_close(p.double(), q, rtol=0, atol=5 * 2**-22)
        assert set(a.state[p]) == {"step", "exp_avg_sq", *(["exp_avg"] if betas[0] else [])}


def test_gradients_stay_what_they_were():
    params = parameters("channels-last")
    set_gradients(params, 3)
    before = [p.grad.clone() for p in params]
    Adam(params, 1e-2, (0.0, 0.9)).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.5, 0.999)])
def test_goes_on_where_torchs_own_stopped(layout, betas):
    """A state saved with parameters in another memory order, with first moments."""
    first = parameters("contiguous")
    other = torch.optim.Adam(first, 1e-2, betas)
    set_gradients(first, 0)
    other.step()
    params = [torch.nn.Parameter(LAYOUTS[layout](p.detach().clone())) for p in first]
    optimizer = Adam(params, 1.0, betas)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for group in (first, params):
        set_gradients(group, 1)
    other.step(), optimizer.step()
    for p, q in zip(params, first, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2**-21)


def test_scaled_gradients_and_overflow():
    plain, scaled = parameters("channels-last"), parameters("channels-last")
    a, b = Adam(plain, 1e-2, (0.0, 0.9)), Adam(scaled, 1e-2, (0.0, 0.9))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for step in range(3):
        set_gradients(plain, step)
        set_gradients(scaled, step, 1024.0)
        a.step()
        scaler.step(b)
        scaler.update()
    before = [p.detach().clone() for p in scaled]
    assert all(torch.equal(p, q) for p, q in zip(plain, before, strict=True))
    set_gradients(scaled, 4)
    scaled[1].grad[0] = torch.inf
    scaler.step(b)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(scaled, before, strict=True))
    assert scaler.get_scale() == 512.0 and b.state[scaled[0]]["step"] == 3


def test_gradients_in_another_memory_order():
    params = parameters("channels-last")
    set_gradients(params, 0)
    params[0].grad = params[0].grad.contiguous()
    with pytest.raises(ValueError, match=r"expected strides \(27, 1, 9, 3\) of the parameter, got \(27, 9, 3, 1\)"):
        Adam(params, 1e-2, (0.0, 0.9)).step()
