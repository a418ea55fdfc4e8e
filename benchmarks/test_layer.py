# SPDX-License-Identifier: Apache-2.0
"""The SPADE layer, plain and fused, forward and with backward, each against the plain layer in float64."""

from __future__ import annotations

import functools
from functools import partial

import pytest
from torch import Tensor

from benchmarks.cases.layer import NEW_MAP, PARTS, PLAIN, SIZES, LayerCase
from benchmarks.common import TORCH, check, full_precision
from benchmarks.conftest import Measure, batch_of, chosen_sizes, readable

KINDS = ("maps", "noise")


class CheckedLayer(LayerCase):
    """A layer case that keeps its results in float64, and the kind of its label maps."""

    kind: str

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        return self.exact()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = chosen_sizes(metafunc.config, SIZES)
    cases = [(kind, size) for size in sizes for kind in KINDS]
    metafunc.parametrize("layer", cases, indirect=True, ids=[f"{readable(size)}-{kind}" for kind, size in cases])
    metafunc.parametrize("part", PARTS)
    metafunc.parametrize("variant", (*PLAIN, "fused", NEW_MAP, TORCH), ids=readable)


@pytest.fixture(scope="module")
def layer(request: pytest.FixtureRequest, device: str) -> CheckedLayer:
    kind, (channels, size) = request.param
    case = CheckedLayer(channels, size, batch_of(request.config, kind), device)
    case.kind = {"maps": "label maps", "noise": "noise"}[kind]
    return case


def test_layer(layer: CheckedLayer, part: str, variant: str, measure: Measure) -> None:
    run = partial(layer.run, part, variant)
    # The forward alone gives the output alone. A hidden value may round across ReLU's kink, which changes gradients.
    with full_precision():
        results = list(zip(layer.names(), run(), layer.expected, strict=part == "training"))
    errors = [
        check(f"{variant}, {name}", got, want, 1e-5 if i == 0 else 1e-3) for i, (name, got, want) in enumerate(results)
    ]
    group = f"layer {part} on {layer.kind}, C={layer.channels} @{layer.size}²"
    floor = {"floor_bytes": layer.floor_bytes(part), "flops": layer.flops(part, variant)}
    measure(run, group, **floor, relative_error=max(errors))
