# SPDX-License-Identifier: Apache-2.0
"""The interpreter the kernels are tested in computes bf16 as torch does; unrepaired, these fail."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def _arithmetic(a, b, total, product, larger, negative, scaled, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(total + at, x + y)
    tl.store(product + at, x * y)
    tl.store(larger + at, (x > y).to(tl.int32))
    tl.store(negative + at, -x)
    tl.store(scaled + at, x.to(tl.float32) * 1.7)  # rounded to bf16 by the store


@triton.jit
def _dot(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _latest_or_sum(a_head, a_value, b_head, b_value):
    return a_head | b_head, tl.where(b_head != 0, b_value, a_value + b_value)


@triton.jit
def _scan(head, value, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    flags = tl.load(head + tl.arange(0, R))[:, None] + tl.zeros([R, C], tl.int32)
    tl.store(out + at, tl.associative_scan((flags, tl.load(value + at)), 0, _latest_or_sum)[1])


def test_bf16_arithmetic_is_torchs():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, generator=g) * 10 ** torch.randint(-6, 6, (256,), generator=g) for _ in range(2))
    a, b = a.bfloat16(), b.bfloat16()
    a[0], b[1] = float("nan"), float("inf")
    total, product, negative, scaled = (torch.empty_like(a) for _ in range(4))
    larger = torch.empty(256, dtype=torch.int32)
    _arithmetic[(1,)](a, b, total, product, larger, negative, scaled, N=256)
    for actual, expected in ((total, a + b), (product, a * b), (negative, -a), (scaled, (a.float() * 1.7).bfloat16())):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(larger.bool(), a > b)


def test_bf16_dot_accumulates_in_fp32():
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(32, 32, generator=g).bfloat16() for _ in range(2))
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, N=32)
    expected = a.double() @ b.double()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=32 * 2**-24 * float(expected.abs().max()) * 4)


def test_scan_of_pairs():
    g = torch.Generator().manual_seed(2)
    head = (torch.rand(16, generator=g) < 0.3).int()
    value = torch.randint(-9, 9, (16, 4), generator=g).float()
    expected, running = [], torch.zeros(4)
    for h, v in zip(head.tolist(), value, strict=True):
        running = v if h else running + v
        expected.append(running)
    out = torch.empty(16, 4)
    _scan[(1,)](head, value, out, R=16, C=4)
    assert torch.equal(out, torch.stack(expected))  # small integers: exact
