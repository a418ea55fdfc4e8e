# SPDX-License-Identifier: Apache-2.0
import itertools

import maps
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_fast.ops import _modulation_rows, modulation_backward
from spade_fast.ops.modulation import modulation
from spade_fast.ops.patterns import patterns
from spade_fast.ops.segments import segments
from spade_fast.ops.statistics import statistics

pytestmark = pytest.mark.usefixtures("strict_memory")
EPS = 1e-5


class Case:
    """Inputs of one call, and the formula of the docstring written out in float64 with autograd through everything."""

    def __init__(
        self, shape, norm="batch", upsample=1, outputs=1, dense=False, dtype=torch.float64, layout="channels_last",
        slopes=(0.2, 1.0), mean=1.0, seed=0,
    ):  # fmt: skip
        n, c, h, w = shape
        g = torch.Generator().manual_seed(seed)
        self.norm, self.upsample, self.dense, self.slopes = norm, upsample, dense, list(slopes[:outputs])
        size = (h * upsample, w * upsample)
        x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + mean
        self.x = lay_out(x.to(dtype), layout).requires_grad_()
        self.ids = self.order = self.offsets = None
        count = 0
        if not dense:
            codes = maps.cells(n, *size, 3, seed).to(torch.int32)
            self.ids, taps, _ = patterns(codes, 3)
            count = taps.shape[0]
            self.order, self.offsets = segments(self.ids, count)
        shapes = (n, 2 * c, *size) if dense else (count, 2 * c)
        params = [torch.randn(shapes, generator=g, dtype=torch.float64).to(dtype) for _ in range(outputs)]
        self.params = [(lay_out(p, "channels_last") if dense else p).requires_grad_() for p in params]
        outs = (n, c, *size)
        self.upstream = [torch.randn(outs, generator=g, dtype=torch.float64).to(dtype) for _ in range(outputs)]

    def statistics(self):
        if self.norm == "none":
            return None, None
        mean, m2 = statistics(self.x, self.norm == "instance")
        return mean, torch.rsqrt(m2 * mean.numel() / max(self.x.numel(), 1) + EPS)

    def actual(self):
        mean, rstd = self.statistics()
        return modulation(
            self.x,
            mean,
            rstd,
            self.params,
            self.ids,
            self.order,
            self.offsets,
            self.slopes,
            self.upsample,
            stats_from_x=self.norm != "none",
        )

    def expected(self):
        x = self.x.double()
        if self.norm != "none":
            dims = (2, 3) if self.norm == "instance" else (0, 2, 3)
            centered = x - x.mean(dims, keepdim=True)
            x = centered / torch.sqrt(centered.square().mean(dims, keepdim=True) + EPS)
        x = x.repeat_interleave(self.upsample, 2).repeat_interleave(self.upsample, 3)
        outs = []
        for p, slope in zip(self.params, self.slopes, strict=True):
            p = p.double() if self.dense else p.double()[self.ids.long()].permute(0, 3, 1, 2)
            gamma, beta = p.chunk(2, 1)
            z = x * (1 + gamma) + beta
            outs.append(torch.where(z > 0, z, slope * z))
        return outs

    def gradients(self, outs):
        loss = sum((o * u.to(o.dtype)).sum() for o, u in zip(outs, self.upstream, strict=True))
        return torch.autograd.grad(loss, [self.x, *self.params])

    def check(self, tolerance):
        """Output and every gradient within tolerance of the formula, relative to the largest value of each."""
        outs, expected = self.actual(), self.expected()
        for o, e in zip(outs, expected, strict=True):
            assert o.dtype == self.x.dtype
            close(o, e, tolerance)
        for g, e in zip(self.gradients(outs), self.gradients(expected), strict=True):
            close(g, e, tolerance)


def close(actual, expected, tolerance):
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * max(scale, 1.0))


def lay_out(t, layout):
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last).detach()
    if layout == "strided":  # every second row of a wider tensor, channels neither first nor last in memory
        wide = torch.zeros(t.shape[0], t.shape[2], t.shape[1], 2 * t.shape[3], dtype=t.dtype)
        wide[..., ::2] = t.permute(0, 2, 1, 3)
        return wide[..., ::2].permute(0, 2, 1, 3).detach()
    return t.contiguous().detach()


SHAPES = [(2, 6, 5, 7), (1, 1, 1, 1), (3, 33, 4, 4), (2, 5, 1, 9), (1, 2, 17, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("outputs", [1, 2])
def test_float64_is_the_formula(shape, norm, upsample, dense, outputs):
    Case(shape, norm, upsample, outputs, dense).check(1e-11)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided"])
@pytest.mark.parametrize(("norm", "upsample", "outputs"), [("batch", 1, 2), ("instance", 2, 1), ("none", 1, 1)])
@pytest.mark.parametrize("dense", [False, True])
def test_float32_in_every_layout(backend, layout, norm, upsample, outputs, dense):
    case = Case((2, 19, 6, 5), norm, upsample, outputs, dense, torch.float32, layout)
    case.check(5e-6)  # 40 roundings of the largest value
    channels_last = layout == "channels_last"
    assert all(o.is_contiguous(memory_format=torch.channels_last) == channels_last for o in case.actual())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dense", [False, True])
def test_half_precision_rounds_once(backend, dtype, dense):
    """Arithmetic is float32: outputs differ from the formula on the same half inputs by the last rounding."""
    case = Case((2, 16, 6, 5), "batch", 2, 2, dense, dtype)
    for o, e in zip(case.actual(), case.expected(), strict=True):
        torch.testing.assert_close(o.double(), e, rtol=torch.finfo(dtype).eps / 2 * 1.05, atol=1e-5)
    case.check(2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mean", [30.0, 300.0])
def test_large_mean_is_no_worse_than_batch_norm(backend, mean):
    """Folding the statistics into scale and shift must not lose more than F.batch_norm does (its own rounding)."""
    case = Case((2, 8, 16, 16), mean=mean, dtype=torch.float32, outputs=1, slopes=(1.0,))
    (expected,) = case.expected()
    gamma, beta = case.params[0][case.ids.long()].permute(0, 3, 1, 2).chunk(2, 1)
    plain = F.batch_norm(case.x, None, None, training=True) * (1 + gamma) + beta
    error = (case.actual()[0].double() - expected).norm()
    assert error <= 2 * (plain.double() - expected).norm()


@given(
    n=st.integers(1, 3),
    c=st.integers(1, 9),
    h=st.integers(1, 7),
    w=st.integers(1, 7),
    upsample=st.sampled_from([1, 2]),
    norm=st.sampled_from(["batch", "instance", "none"]),
    dense=st.booleans(),
    outputs=st.integers(1, 2),
    layout=st.sampled_from(["channels_last", "contiguous", "strided"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(n, c, h, w, upsample, norm, dense, outputs, layout):
    Case((n, c, h, w), norm, upsample, outputs, dense, layout=layout, seed=n + c + h + w).check(1e-10)


def test_constant_statistics_take_no_part_in_the_gradient(backend):
    case = Case((2, 6, 5, 7), dtype=torch.float32)
    mean, rstd = case.statistics()
    outs = modulation(case.x, mean, rstd, case.params, case.ids, None, None, [0.2], 1, stats_from_x=False)
    gamma, beta = case.params[0][case.ids.long()].permute(0, 3, 1, 2).chunk(2, 1)
    z = (case.x - mean[0, :, None, None]) * rstd[0, :, None, None] * (1 + gamma) + beta
    expected = case.gradients([torch.where(z > 0, z, 0.2 * z)])
    for a, e in zip(case.gradients(outs), expected, strict=True):
        close(a, e, 5e-6)


def test_one_unused_output(backend):
    """Only the second output takes part in the loss: the first one's parameters get zero gradients."""
    case = Case((1, 4, 5, 6), outputs=2, dtype=torch.float32)
    grads = torch.autograd.grad((case.actual()[1] * case.upstream[1]).sum(), [case.x, *case.params])
    expected = torch.autograd.grad(
        (case.expected()[1] * case.upstream[1]).sum(), [case.x, *case.params], allow_unused=True
    )
    assert torch.equal(grads[1], torch.zeros_like(grads[1]))
    close(grads[0], expected[0], 5e-6), close(grads[2], expected[2], 5e-6)


def test_blocks_and_image_groups_join(monkeypatch):
    """Tiny blocks and groups, so that one call has many of each."""
    monkeypatch.setattr(_modulation_rows, "BLOCK_ELEMENTS", 40)
    monkeypatch.setattr(modulation_backward, "GROUP_ELEMENTS", 2500)
    for norm, upsample, dense in itertools.product(("batch", "instance"), (1, 2), (False, True)):
        Case((5, 6, 7, 5), norm, upsample, 2, dense).check(1e-11)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)])
def test_empty(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    ids = torch.zeros(shape[0], shape[2] * 2, shape[3] * 2, dtype=torch.int32)
    params = torch.randn(3, 2 * shape[1], requires_grad=True)
    (out,) = modulation(x, None, None, [params], ids, None, None, [0.2], 2)
    assert out.shape == (shape[0], shape[1], shape[2] * 2, shape[3] * 2)
    dx, dparams = torch.autograd.grad(out.sum(), (x, params))
    assert dx.shape == x.shape and torch.equal(dparams, torch.zeros_like(params))


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck(norm, dense):
    case = Case((2, 2, 3, 2), norm, 2, 2, dense, slopes=(0.2, 1.0))

    def function(x, *params):
        case.x, case.params = x, list(params)
        return tuple(case.actual())

    assert torch.autograd.gradcheck(function, (case.x, *case.params))


@pytest.mark.parametrize("dense", [False, True])
def test_backward_is_bitwise_reproducible(backend, dense):
    case = Case((2, 8, 9, 10), outputs=2, dense=dense, dtype=torch.float32)
    first, *others = [case.gradients(case.actual()) for _ in range(3)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_second_derivatives():
    """Of both outputs in x and params, through the statistics too, by pattern and by pixel."""
    for case in (Case((2, 2, 3, 3), "batch", 2, 2), Case((2, 2, 3, 3), "instance"), Case((1, 2, 3, 3))):

        def outputs(x, *params, case=case):
            mean, rstd = case.statistics()
            if mean is not None:
                axes = (0, 2, 3) if mean.shape[0] == 1 else (2, 3)
                variance, mean = torch.var_mean(x.detach(), axes, correction=0)
                mean, rstd = mean.view(-1, x.shape[1]), torch.rsqrt(variance.view(-1, x.shape[1]) + 1e-5)
            options = (case.ids, case.order, case.offsets, [0.2, 1.0][: len(params)], case.upsample)
            return tuple(modulation(x, mean, rstd, list(params), *options, stats_from_x=mean is not None))

        assert torch.autograd.gradgradcheck(outputs, (case.x, *case.params))


def test_saves_only_its_inputs():
    case = Case((1, 8, 16, 16), "batch", 2, 2, dtype=torch.float32)
    mean, rstd = case.statistics()
    inputs = [case.x, mean, rstd, *case.params, case.ids, case.order, case.offsets]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        modulation(
            case.x, mean, rstd, case.params, case.ids, case.order, case.offsets, [0.2, 1.0], 2, stats_from_x=True
        )
    assert len(saved) == 8 and set(saved) <= {t.data_ptr() for t in inputs}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(upsample=3), "upsample must be 1 or 2, got 3"),
        (dict(slopes=[0.2, 1.0]), "1 or 2 sets of params, a slope each; got 1 and 2"),
        (
            dict(pattern_ids=torch.zeros(1, 3, 3, dtype=torch.int32)),
            r"pattern_ids must have shape \[1, 4, 4\], got \[1, 3, 3\]",
        ),
        (dict(params=[torch.zeros(5, 5)]), r"params\[0\] must have shape \[P, 4\], got \[5, 5\]"),
        (dict(pattern_ids=None), r"params\[0\] must have shape \[1, 4, 4, 4\], got \[5, 4\]"),
        (dict(x=torch.zeros(2, 4, 4)), r"x must have shape \[N, C, H, W\], got \[2, 4, 4\]"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = dict(
        x=torch.zeros(1, 2, 4, 4),
        mean=None,
        rstd=None,
        params=[torch.zeros(5, 4)],
        pattern_ids=torch.zeros(1, 4, 4, dtype=torch.int32),
        order=None,
        offsets=None,
        slopes=[1.0],
        upsample=1,
    )
    with pytest.raises(ValueError, match=message):
        modulation(**{**arguments, **change})


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_opcheck(backend, dense, layout):
    case = Case((2, 3, 4, 5), "batch", 2, 2, dense, torch.float32, layout)
    mean, rstd = case.statistics()
    rest = (mean, rstd, case.params, case.ids, case.order, case.offsets, case.slopes, 2, True)
    torch.library.opcheck(torch.ops.spade_fast.modulation.default, (case.x, *rest))
    rest = (mean, rstd, [p.detach() for p in case.params], *rest[3:])
    args = (case.upstream, case.x.detach(), *rest)
    torch.library.opcheck(torch.ops.spade_fast.modulation_backward.default, args)
