# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of modulation, on a CPU (see cuda_on_cpu.h), against the formula in float64 and autograd.

The cases have partial blocks, tails, odd channels, unaligned pointers and every dtype. Threads and blocks run forwards
and in reverse, and must give the same bits.
"""

import ctypes

import cuda_harness
import pytest
import torch
from cuda_harness import BothOrders, Kernels, ModulationArgs, close, generator, lay_out, misalign, random

if reason := cuda_harness.why_not():
    pytest.skip(reason, allow_module_level=True)

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(d, d) for d in DTYPES] + [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


@pytest.fixture(scope="module")
def kernels():
    return BothOrders(Kernels(cuda_harness.compile_library()))


class Modulation:
    """One call's inputs as the kernels take them, and the formula in float64."""

    def __init__(
        self, shape, norm="batch", upsample=1, outputs=1, dense=False, dtypes=(torch.float32, torch.float32),
        channels_last=True, skip=0, slopes=(0.2, 1.0), ids=None,
    ):  # fmt: skip
        n, c, h, w = shape
        dtype, params_dtype = dtypes
        size = (h * upsample, w * upsample)
        self.upsample, self.slopes, self.channels_last, self.skip = upsample, slopes[:outputs], channels_last, skip
        self.norm, self.x = norm, misalign(lay_out(random(*shape, dtype=dtype, mean=0.5), channels_last), skip)
        self.mean = self.rstd = self.ids = self.order = self.offsets = None
        if norm != "none":
            dims = (2, 3) if norm == "instance" else (0, 2, 3)
            exact = self.x.double()
            self.mean = misalign(exact.mean(dims).float().view(-1, c), skip)
            self.rstd = misalign((exact.var(dims, correction=0) + EPS).rsqrt().float().view(-1, c), skip)
        shapes = (n, 2 * c, *size)
        if not dense:
            self.ids = self._ids(n, *size) if ids is None else ids
            count = int(self.ids.max()) + 3  # the last two do not occur
            self.order, self.offsets = _segments(self.ids, count)
            shapes = (count, 2 * c)
        params = [random(*shapes, dtype=params_dtype, seed=m + 1) for m in range(outputs)]
        self.params = [misalign(lay_out(p, channels_last) if dense else p, skip) for p in params]
        self.prepare()

    def prepare(self):
        self.args = ModulationArgs(
            self.x, self.mean, self.rstd, self.params, self.ids, self.slopes, self.upsample, self.channels_last
        )

    @staticmethod
    def _ids(n, h, w):
        """Three patterns an image, and one image without its first."""
        ids = torch.randint(3, (n, h, w), generator=generator(), dtype=torch.int32)
        ids[n // 2] = ids[n // 2].clamp(min=1)
        return ids + 3 * torch.arange(n, dtype=torch.int32)[:, None, None]

    def z(self, x, params, constant=True):
        """What the activation is applied to, in float64."""
        if self.norm != "none" and constant:
            group = (self.mean.shape[0], -1, 1, 1)
            x = (x - self.mean.double().view(group)) * self.rstd.double().view(group)
        elif self.norm != "none":
            dims = (2, 3) if self.norm == "instance" else (0, 2, 3)
            x = x - x.mean(dims, keepdim=True)
            x = x / torch.sqrt(x.square().mean(dims, keepdim=True) + EPS)
        x = x.repeat_interleave(self.upsample, 2).repeat_interleave(self.upsample, 3)
        zs = []
        for p in params:
            gamma, beta = (p if self.ids is None else p[self.ids.long()].permute(0, 3, 1, 2)).chunk(2, 1)
            zs.append(x * (1 + gamma) + beta)
        return zs

    def outs(self, x, params, constant=True):
        return [torch.where(z > 0, z, s * z) for z, s in zip(self.z(x, params, constant), self.slopes, strict=True)]

    def check_forward(self, kernels):
        for actual, expected in zip(
            kernels.modulation(self.args, self.x, self.skip),
            self.outs(self.x.double(), [p.double() for p in self.params]),
            strict=True,
        ):
            close(actual, expected, size=1 + float(expected.abs().max()))

    def check_backward(self, kernels, stats_from_x, skip_douts=None, skip_dparams=None):
        x = self.x.double().requires_grad_()
        params = [p.double().requires_grad_() for p in self.params]
        douts = []
        for i, z in enumerate(self.z(x, params)):
            dout = random(*z.shape, dtype=self.x.dtype, seed=10 + i)
            dout[z.abs() < 1e-3] = 0  # rounding decides on which side of LeakyReLU z is
            skip = self.skip if skip_douts is None else skip_douts
            douts.append(misalign(lay_out(dout, True), skip))
        loss = sum((o * d.double()).sum() for o, d in zip(self.outs(x, params, not stats_from_x), douts, strict=True))
        expected = torch.autograd.grad(loss, [x, *params])
        actual = kernels.modulation_backward(
            self.args,
            douts,
            self.order,
            self.offsets,
            stats_from_x,
            self.x,
            self.params,
            self.skip,
            self.skip if skip_dparams is None else skip_dparams,
        )
        terms = self.x.numel() / self.x.shape[1] * self.upsample**2
        # normalizing multiplies a rounding of x by rstd; the sums are of dout times numbers of the size of xhat
        size = 1.0 if self.rstd is None else 1 + float(self.rstd.max())
        for a, e in zip(actual, expected, strict=True):
            close(a, e, size=size * (4 + float(e.abs().max())), terms=terms)


def _segments(ids, num):
    values, order = torch.sort(ids.reshape(-1), stable=True)
    return order.int(), torch.searchsorted(values, torch.arange(num + 1, dtype=torch.int32), out_int32=True)


# vectors and tails of pixels; odd channels; the smallest; more vectors than a block has threads
MODULATED = [(2, 16, 7, 5), (2, 33, 4, 4), (1, 1, 1, 1), (1, 2056, 2, 3)]


@pytest.mark.parametrize("shape", MODULATED)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
def test_modulation(kernels, shape, channels_last, dense, upsample):
    for norm, outputs in (("batch", 1), ("instance", 2), ("none", 2)):
        Modulation(shape, norm, upsample, outputs, dense, channels_last=channels_last).check_forward(kernels)


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("skip", [0, 1])
def test_modulation_of_every_dtype(kernels, dtypes, channels_last, dense, upsample, skip):
    options = dict(dtypes=dtypes, channels_last=channels_last, skip=skip)
    Modulation((2, 24, 6, 5), "batch", upsample, 2, dense, **options).check_forward(kernels)


@pytest.mark.parametrize("which", ["x", "mean", "rstd", "params", "douts", "outs", "dparams"])
@pytest.mark.parametrize("dense", [False, True])
def test_each_tensor_alone_may_be_unaligned(kernels, which, dense):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        case = Modulation((1, 24, 4, 3), outputs=2, dense=dense, dtypes=dtypes)
        if which == "params":
            case.params = [case.params[0], misalign(case.params[1], 1)]
        elif which in ("x", "mean", "rstd"):
            setattr(case, which, misalign(getattr(case, which), 1))
        case.skip = int(which == "outs")  # and dx
        case.prepare()
        case.check_forward(kernels)
        case.check_backward(kernels, True, skip_douts=int(which == "douts"), skip_dparams=int(which == "dparams"))


def test_modulation_without_pattern(kernels):
    """id -1 stands for gamma = beta = 0."""
    ids = torch.tensor([[[0, -1, 1]]], dtype=torch.int32)
    for channels_last in (True, False):
        case = Modulation((1, 8, 1, 3), "none", ids=ids, channels_last=channels_last, slopes=(1.0,))
        (out,) = kernels.modulation(case.args, case.x)
        assert torch.equal(out[..., 1], case.x[..., 1])


@pytest.mark.parametrize("shape", MODULATED)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
def test_modulation_backward(kernels, shape, dense, upsample):
    if shape == (1, 1, 1, 1) and upsample == 1:
        shape = (1, 1, 1, 2)  # statistics of one element leave no gradient to compare
    for norm, outputs in (("batch", 2), ("instance", 1), ("none", 2)):
        case = Modulation(shape, norm, upsample, outputs, dense)
        for stats_from_x in (False, True):
            case.check_backward(kernels, stats_from_x)


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("skip", [0, 1])
def test_modulation_backward_of_every_dtype(kernels, dtypes, dense, upsample, skip):
    for norm in ("batch", "instance"):
        Modulation((2, 24, 6, 5), norm, upsample, 2, dense, dtypes, skip=skip).check_backward(
            kernels, stats_from_x=True
        )


@pytest.mark.parametrize("channels", [4, 3])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_one_pattern_owns_most_pixels(kernels, channels, share):
    """Segments across many pieces and three levels of them, beside a thousand short ones."""
    h, w = 180, 200
    ids = torch.randint(2000, (1, h, w), generator=generator(), dtype=torch.int32)
    ids[torch.rand(ids.shape, generator=generator(1)) < share] = 17
    Modulation((1, channels, h, w), "batch", 1, 2, ids=ids).check_backward(kernels, stats_from_x=True)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)])
@pytest.mark.parametrize("dense", [False, True])
def test_modulation_of_nothing(kernels, shape, dense):
    n, c, h, w = shape
    x = lay_out(torch.zeros(shape), True)
    ids = None if dense else torch.zeros(n, h, w, dtype=torch.int32)
    params = [torch.zeros(n, 2 * c, h, w) if dense else torch.zeros(3, 2 * c)]
    args = ModulationArgs(x, None, None, params, ids, [0.2], 1, True)
    assert kernels.modulation(args, x)[0].shape == shape
    order, offsets = (None, None) if dense else _segments(ids, 3)
    dx, dparams = kernels.modulation_backward(args, [x], order, offsets, True, x, params)
    assert dx.shape == shape and (dparams == 0).all()


@pytest.mark.parametrize(
    "change",
    [dict(upsample=3), dict(outputs=3), dict(dtype=7), dict(dtype=1, params_dtype=2), dict(h=2**31), dict(c=-1)],
)
def test_wrong_arguments_are_an_error(kernels, change):
    case = Modulation((1, 4, 2, 2))
    for name, value in change.items():
        setattr(case.args, name, value)
    for launch in (
        lambda: kernels.kernels.call("modulation", ctypes.byref(case.args), cuda_harness.pointers([case.x])),
        lambda: kernels.kernels.call(
            "modulation_backward", ctypes.byref(case.args), cuda_harness.pointers([case.x]), case.order, case.offsets,
            True, None, cuda_harness.pointers([case.x]), None,
        ),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="CUDA error 1"):
            launch()
