# SPDX-License-Identifier: Apache-2.0
"""The COCO-Stuff generator, plain and fused, forward and with backward, each against the plain one in float64."""

from __future__ import annotations

import copy
import functools
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.cases import generator as cases
from benchmarks.cases.ops import nbytes
from benchmarks.common import TORCH, check, full_precision
from benchmarks.conftest import Measure, batch_of, chosen_network, readable
from benchmarks.macs import measure as count_macs

PARTS = ("forward", "training")


class Generators:
    """The variants at one size, with one initial state, and the plain network's results in float64."""

    def __init__(self, config: pytest.Config, ngf: int, crop: int) -> None:
        device = config.getoption("--device")
        self.size = f"ngf {ngf} at {crop}²"
        self.labels = batch_of(config, "maps", crop)
        self.nets = cases.build(device, ngf, crop)
        self.state = copy.deepcopy(self.nets[cases.PLAIN[0]].state_dict())
        self.calls = cases.forward(self.nets, self.labels)
        self.gradient = torch.randn(len(self.labels), 3, crop, crop, device=device)
        macs = count_macs([self.labels[i] for i in range(len(self.labels))], ngf, crop)  # means of an image
        self.macs = {"plain": macs["plain"]["total"], "fused": macs["total"]["chosen"]}

    @functools.cached_property
    def exact(self) -> dict[str, list[Tensor]]:
        """Results of both parts."""
        net = copy.deepcopy(self.nets[cases.PLAIN[0]]).double()
        net.load_state_dict(self.state)
        segmap = self.labels.one_hot(torch.float64)
        with torch.no_grad():
            forward = [net.eval()(segmap)]
        image = cases.train(net.train(), partial(net, segmap), cases.PLAIN[0], self.gradient.double())
        return {"forward": forward, "training": [image, self.gradients(net)]}

    def gradients(self, net: torch.nn.Module) -> Tensor:
        """Of all weights, in one vector."""
        named = dict(net.named_parameters())
        names = [name for name, _ in self.nets[cases.PLAIN[0]].named_parameters()]  # the order differs
        gradients = [named[name].grad for name in names]
        return torch.cat([g.double().flatten() for g in gradients if g is not None])

    def prepare(self, part: str, variant: str) -> None:
        """The initial state, and the mode of the part."""
        net = self.nets[variant]
        net.train()
        net.load_state_dict(self.state)
        if part == "forward":
            cases.serve({variant: net})

    def forward(self, variant: str) -> Tensor:
        with torch.no_grad():
            return self.calls[variant]()

    def training(self, variant: str) -> Tensor:
        return cases.train(self.nets[variant], self.calls[variant], variant, self.gradient)

    def figures(self, part: str, variant: str) -> dict[str, int]:
        """Bytes that must move, and floating-point operations; a multiply-add is two.

        Weights and labels are read once in each pass, and images and gradients of weights are written once. Backward
        costs twice forward.
        """
        weights = nbytes(*self.nets[variant].parameters())
        moved = weights + nbytes(self.labels.codes, self.gradient)
        macs = self.macs["plain" if "plain" in variant else "fused"] * len(self.labels) * 1e9
        if part == "forward":
            return {"floor_bytes": moved, "flops": round(2 * macs)}
        return {"floor_bytes": 2 * moved + weights, "flops": round(6 * macs)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("generators", [chosen_network(metafunc.config)], indirect=True, ids=readable)
    metafunc.parametrize("part", PARTS)
    metafunc.parametrize("variant", (*cases.PLAIN, "fused", cases.AS_BUILT, TORCH), ids=readable)


@pytest.fixture(scope="module")
def generators(request: pytest.FixtureRequest) -> Generators:
    return Generators(request.config, *request.param)


def test_generator(generators: Generators, part: str, variant: str, measure: Measure) -> None:
    generators.prepare(part, variant)
    run = partial(generators.forward if part == "forward" else generators.training, variant)
    with full_precision():
        image = run()
    results = [image] if part == "forward" else [image, generators.gradients(generators.nets[variant])]
    errors = []
    # A value may round across LeakyReLU's kink, which changes the gradients of all weights before it.
    for name, got, want, bound in zip(
        ("image", "gradients of the weights"), results, generators.exact[part], (1e-4, 5e-3), strict=False
    ):
        errors.append(check(f"{variant}, {name}", got, want, bound))
    figures = generators.figures(part, variant)
    measure(run, f"generator {part}, {generators.size}", **figures, relative_error=max(errors))
