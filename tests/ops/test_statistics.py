# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_fast.ops.statistics import statistics

pytestmark = pytest.mark.usefixtures("strict_memory")


def written_out(x, per_sample):
    rows = x.double().flatten(2) if per_sample else x.double().transpose(0, 1).flatten(1)[None]
    mean = rows.sum(2) / rows.shape[2]
    return mean, (rows - mean[:, :, None]).square().sum(2)


def compare(x, per_sample):
    mean, m2 = statistics(x, per_sample)
    expected_mean, expected_m2 = written_out(x, per_sample)
    assert mean.dtype == m2.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    eps, count = torch.finfo(mean.dtype).eps, x[0, 0].numel() * (1 if per_sample else len(x))
    scale = x.double().abs().max() + 1e-30
    torch.testing.assert_close(mean.double(), expected_mean, rtol=0, atol=float(4 * eps * scale))
    # Deviations carry the rounding of the mean (eps·scale) as well as their own.
    deviation = float((expected_m2 / count).max().sqrt()) + 1e-30
    atol = 8 * eps * count * (deviation**2 + deviation * float(scale) * 1e-1) + count * float(4 * eps * scale) ** 2
    torch.testing.assert_close(m2.double(), expected_m2, rtol=0, atol=atol)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 1, 1, 1), (3, 130, 4, 4), (1, 3, 1, 500), (4, 16, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_is_the_definition(backend, shape, per_sample, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1).to(dtype)
    compare(x, per_sample)
    compare(x.to(memory_format=torch.channels_last), per_sample)


@pytest.mark.parametrize("per_sample", [False, True])
def test_strided(backend, per_sample):
    x = torch.randn(4, 12, 9, 10, generator=torch.Generator().manual_seed(0))
    compare(x[1:, 2::3, ::2, 1:], per_sample)
    compare(x.to(memory_format=torch.channels_last)[:, 1:6], per_sample)
    compare(x.transpose(2, 3), per_sample)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_mean_costs_no_digits(backend, layout):
    """Mean 1000, deviation 1: E[x²] - E[x]² in float32 would have no correct digit; two passes keep four."""
    x = (torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(0)) + 1000).to(memory_format=layout)
    _, m2 = statistics(x, False)
    _, expected = written_out(x, False)
    torch.testing.assert_close(m2.double(), expected, rtol=1e-4, atol=0)


@given(n=st.integers(1, 3), c=st.integers(1, 9), h=st.integers(1, 6), w=st.integers(1, 6), per_sample=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_shape(n, c, h, w, per_sample):
    compare(torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(n * c * h * w)), per_sample)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)])
def test_empty(backend, shape, per_sample):
    mean, m2 = statistics(torch.empty(shape), per_sample)
    expected = torch.zeros(shape[0] if per_sample else 1, shape[1])
    assert torch.equal(mean, expected) and torch.equal(m2, expected)


def test_gradient_stops_here():
    mean, m2 = statistics(torch.randn(1, 2, 3, 3, requires_grad=True), False)
    assert not mean.requires_grad and not m2.requires_grad


@pytest.mark.parametrize("per_sample", [False, True])
def test_opcheck(backend, per_sample):
    torch.library.opcheck(torch.ops.spade_fast.statistics.default, (torch.randn(2, 3, 4, 5), per_sample))
