# SPDX-License-Identifier: Apache-2.0
"""The cases of the benchmarks: nothing wrong is timed, and bytes and operations are counted right."""

import functools

import pytest
import torch
from maps import cells
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import ops
from benchmarks.cases.layer import CLASS_TABLE, NEW_MAP, PLAIN, LayerCase
from benchmarks.common import TORCH, check, full_precision, relative_error
from spade_fast import LabelMap

CHANNELS, SIZE, CLASSES = 6, 24, 4


def labels(n=2):
    return LabelMap(cells(n, SIZE, SIZE, CLASSES), CLASSES, cells(n, SIZE, SIZE, 2, seed=1))


@functools.cache
def operands():
    return ops.Operands(labels(), CHANNELS, SIZE, torch.float32)


def right(name):
    """The case, and its results in float64."""
    return ops.CASES[name](operands()), ops.expected_of(ops.CASES[name], operands())


@pytest.mark.parametrize("name", ops.CASES)
def test_a_wrong_result_of_any_operator_stops_the_benchmark(name):
    case, expected = right(name)
    ops.check_case(name, case, expected, case.bound)
    for i, want in enumerate(expected):
        wrong = want.clone()
        last = tuple(n - 1 for n in want.shape)
        wrong[last] += want.norm() * 2 * case.bound if want.is_floating_point() else 1
        with pytest.raises(RuntimeError, match=f"result {i}: .*nothing is timed"):
            ops.check_case(name, case, [*expected[:i], wrong, *expected[i + 1 :]], case.bound)


def test_expected_results_are_float64():
    for name in ops.CASES:
        _, expected = right(name)
        assert {t.dtype for t in expected if t.is_floating_point()} <= {torch.float64}


def test_every_operator_has_a_case():
    from spade_fast.ops import _backend

    assert {right(name)[0].op for name in ops.CASES} == set(_backend.OPS)


def test_floors_by_hand():
    pixels = 2 * SIZE**2
    found = labels().patterns(SIZE, SIZE)
    assert right("statistics")[0].floor_bytes == 4 * CHANNELS * pixels
    tables = 4 * len(found.taps) * 2 * CHANNELS
    assert right("modulation")[0].floor_bytes == 2 * 4 * CHANNELS * pixels + 4 * pixels + tables
    rows = min(len(found.taps), len(found.codes))
    assert right("pattern_params")[0].flops == 2 * rows * 9 * 128 * 2 * CHANNELS


def test_shapes_must_agree():
    """A result that would be broadcast is wrong."""
    with pytest.raises(RuntimeError, match=r"shape \[1\] instead of \[3\]"):
        check("sum", torch.ones(1), torch.ones(3), 1e-4)
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


@functools.cache
def layer():
    return LayerCase(CHANNELS, SIZE, labels(), "cpu")


@pytest.mark.parametrize("variant", [*PLAIN, "fused", NEW_MAP, TORCH])
def test_variants_of_the_layer_agree_with_float64(variant):
    exact = layer().exact()
    for name, got, want in zip(layer().names(), layer().training(variant), exact, strict=True):
        check(name, got, want, 1e-5)
    check("output", layer().forward(variant)[0], exact[0], 1e-5)


def test_class_table_looks_gamma_and_beta_up_by_class():
    case = layer()
    table = case.layers[CLASS_TABLE].table.double()
    gamma, beta = table[case.labels.codes].permute(0, 3, 1, 2).chunk(2, dim=1)
    x = case.x[True].double()
    centered = x - x.mean((0, 2, 3), keepdim=True)
    normalized = centered / (centered.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    check("class table", case.forward(CLASS_TABLE)[0], normalized * (1 + gamma) + beta, 1e-5)


@pytest.mark.parametrize("part", ["forward", "training"])
def test_operations_of_the_plain_layer_are_those_torch_counts(part):
    with FlopCounterMode(display=False) as counter:
        layer().run(part, PLAIN[0])
    assert layer().flops(part, PLAIN[0]) == counter.get_total_flops()


def test_operations_of_the_fused_layer_are_those_of_its_patterns():
    found = labels().patterns(SIZE, SIZE)
    assert found.density < 0.8  # the layer gathers rows instead of convolving pixels
    of_row = 2 * 9 * 128 * 2 * CHANNELS
    counts = {len(found.taps) * of_row, len(found.codes) * of_row}
    assert layer().flops("forward", "fused") in counts
    assert layer().flops("training", "fused") == 3 * layer().flops("forward", "fused")


def test_convolutions_of_a_gpu_are_not_rounded_where_results_are_compared(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(ZeroDivisionError), full_precision():
        assert not torch.backends.cudnn.allow_tf32
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32
