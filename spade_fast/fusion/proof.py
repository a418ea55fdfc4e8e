# SPDX-License-Identifier: Apache-2.0
"""Proof that a fused layer computes what the module computes: outputs, all gradients and buffers, on random input."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from spade_fast.fusion.forward import FusedForward
from spade_fast.fusion.structure import NotUnderstood, Structure
from spade_fast.map_scope import map_scope

# Relative to the largest output, and to the largest value of a gradient; sums in another order differ by less.
TOLERANCES = {torch.float32: (2e-5, 1e-4), torch.float64: (1e-10, 1e-9)}
SIZES = ((12, 20), (9, 7))  # of x; the maps are of the same size or, by a factor that is not whole, larger
LARGER = ((31, 29), (16, 25))
TIMED = (64, 64)


@dataclasses.dataclass
class Differences:
    """The worst relative differences, and milliseconds without gradients."""

    evaluation: float = 0.0
    training: float = 0.0
    gradients: float = 0.0
    old_ms: float = float("nan")
    new_ms: float = float("nan")


@dataclasses.dataclass
class Example:
    """A call of the layer within the model's: its arguments, and which of them are x and the map."""

    build: Callable[[Tensor | None, Tensor], tuple]
    x: Tensor | None
    labels: Tensor


@contextlib.contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Restores parameters, buffers, tensors kept as plain attributes, training flags and random states."""
    parts = list(module.modules())
    flags = [(m, m.training) for m in parts]
    needs = [(p, p.requires_grad) for p in module.parameters()]
    values = [(p, p.detach().clone()) for p in module.parameters()]
    buffers = [(m, n, b, b.detach().clone()) for m in parts for n, b in m._buffers.items() if b is not None]
    plain = [(m, k, v) for m in parts for k, v in m.__dict__.items() if isinstance(v, Tensor)]
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
            for p, _ in needs:
                p.requires_grad_(True)
            yield
    finally:
        for p, needed in needs:
            p.requires_grad_(needed)
        for p, value in values:
            p.data.copy_(value)  # .data: a graph that waits for its backward is not disturbed
        for m, name, buffer, value in buffers:
            m._buffers[name] = buffer
            buffer.data.copy_(value)
        for m, key, value in plain:
            m.__dict__[key] = value
        for m, training in flags:
            m.training = training


def find_reading(module: nn.Module, structure: Structure, adapter, example: Example | None) -> FusedForward:
    """The reading of the structure that computes what the module computes with random weights.

    Raises:
        NotUnderstood: none does.
    """
    dtype = next(module.parameters()).dtype
    if dtype not in TOLERANCES:
        raise NotUnderstood(f"its parameters are {dtype}: fuse in float32, then convert")
    closest, error = float("inf"), None
    generator = torch.Generator().manual_seed(0)
    with kept(module):
        _randomize(module, generator)
        module.eval()
        for resizes in (False,) if structure.only_map else (True, False):
            x, labels, build = _input(structure, module, generator, example, 0, resizes, "one-hot")
            if resizes and x.shape[2:] == labels.shape[2:]:
                continue
            try:
                with torch.no_grad():
                    want = _joined(type(module).forward(module, *build(x, labels)))
            except Exception as e:  # a foreign module may raise anything on a map of another size
                error = e
                continue
            for reading in structure.readings():
                fused = FusedForward(module, reading, adapter, resizes)
                with torch.no_grad():
                    got = _joined(fused.compute(x, labels))
                difference = _relative(got, want)
                if difference < TOLERANCES[dtype][0]:
                    return fused
                closest = min(closest, difference)
    if closest == float("inf"):
        raise NotUnderstood(f"it does not run on random input: {type(error).__name__}: {str(error).splitlines()[0]}")
    raise NotUnderstood(f"another function: relative difference {closest:.2g}")


def prove(module: nn.Module, fused: FusedForward, only: Example | None, example: Example | None) -> Differences:
    """Compares in evaluation and training, with random weights and with its own, one-hot and dense maps.

    only: a call whose form and sizes are the only ones known to run. example: a call at real sizes.

    Raises:
        NotUnderstood: a difference above the tolerance.
    """
    found = Differences()
    dtype = next(module.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    structure = fused.structure
    cases = [
        (True, 0, False, "one-hot"),
        (True, 1, True, "dense"),
        (False, 1, True, "one-hot"),
        (False, 0, False, "dense"),
    ]
    if structure.shared.in_channels >= 3:
        cases.append((True, 0, False, "constants"))
    for random_weights, which, larger, kind in cases:
        larger = larger and fused.resizes
        with kept(module):
            if random_weights:
                _randomize(module, generator)
            x, labels, build = _input(structure, module, generator, only, which, larger, kind)
            for training in (False, True):
                module.train(training)
                difference, gradients = _compare(module, fused, x, labels, build, kind == "dense")
                name = "training" if training else "evaluation"
                setattr(found, name, max(getattr(found, name), difference))
                found.gradients = max(found.gradients, gradients)
    if example is not None:
        with kept(module):
            for training in (False, True):
                module.train(training)
                x, labels, build = example.x, example.labels, example.build
                difference, gradients = _compare(module, fused, x, labels, build, False)
                name = "training" if training else "evaluation"
                setattr(found, name, max(getattr(found, name), difference))
                found.gradients = max(found.gradients, gradients)
    output, gradient = TOLERANCES[dtype]
    for name, limit in (("evaluation", output), ("training", output), ("gradients", gradient)):
        if not getattr(found, name) <= limit:
            raise NotUnderstood(f"differs in {name}: relative difference {getattr(found, name):.2g}")
    with kept(module):
        _time(module, fused, example, generator, found)
    if not found.evaluation <= output:
        raise NotUnderstood(f"differs without gradients: relative difference {found.evaluation:.2g}")
    return found


def _input(structure, module, generator, example, which, larger, kind):
    """(x, map, function giving the arguments): random, of the example's sizes if there is one."""
    n, size = 2, SIZES[which]
    if structure.only_map:
        map_size = size
    elif example is not None:
        n, size, map_size = example.x.shape[0], tuple(example.x.shape[2:]), tuple(example.labels.shape[2:])
    else:
        map_size = LARGER[which] if larger else size
    x = None if structure.only_map else torch.randn(n, structure.channels, *size, generator=generator) * 1.5 + 0.3
    labels = _map(n, structure.shared.in_channels, map_size, kind, generator)
    parameter = next(module.parameters())
    build = _plain_arguments if example is None else example.build
    return None if x is None else x.to(parameter), labels.to(parameter), build


def _plain_arguments(x: Tensor | None, labels: Tensor) -> tuple:
    return (labels,) if x is None else (x, labels)


def _map(n: int, channels: int, size: tuple[int, int], kind: str, generator: torch.Generator) -> Tensor:
    if kind == "dense":
        return torch.randn(n, channels, *size, generator=generator)
    constant = channels // 2 if kind == "constants" else 0
    cells = torch.randint(channels - constant, (n, -(-size[0] // 4), -(-size[1] // 4)), generator=generator)
    ids = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : size[0], : size[1]]
    labels = nn.functional.one_hot(ids, channels - constant).permute(0, 3, 1, 2).to(torch.float32)
    noise = torch.randn(n, constant, 1, 1, generator=generator).expand(-1, -1, *size)
    return torch.cat([noise, labels], dim=1)


@torch.no_grad()
def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of a size at which every term matters: in a new network many are zero."""
    for p in module.parameters():
        fan_in = p[0].numel() if p.dim() > 1 else 1
        value = torch.randn(p.shape, generator=generator)
        p.data.copy_(value * (1.5 / fan_in**0.5) if p.dim() > 1 else value * 0.2)
    for name, b in module.named_buffers():
        if name.endswith("running_mean"):
            b.data.copy_(torch.randn(b.shape, generator=generator) * 0.2)
        elif name.endswith("running_var"):
            b.data.copy_(torch.rand(b.shape, generator=generator) + 0.5)


def _compare(module, fused, x, labels, build, dense: bool) -> tuple[float, float]:
    """(difference of outputs and buffers, of gradients)."""
    results = []
    for new in (False, True):
        with kept(module):
            torch.manual_seed(0)
            leaves = [p for p in module.parameters() if p.requires_grad]
            x_, labels_ = (None if t is None else t.detach().clone() for t in (x, labels))
            if x_ is not None:
                leaves.append(x_.requires_grad_())
            if dense:
                leaves.append(labels_.requires_grad_())
            with map_scope():
                out = fused.compute(x_, labels_) if new else type(module).forward(module, *build(x_, labels_))
            if new is False and isinstance(out, tuple) != fused.structure.only_map:
                raise NotUnderstood(f"returns a {type(out).__name__}")
            out = _joined(out)
            weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape).to(out)
            gradients = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
            results.append((out.detach(), gradients, [b.clone() for b in module.buffers()]))
    (want, want_grads, want_buffers), (got, got_grads, got_buffers) = results
    if want.shape != got.shape or want.dtype != got.dtype:
        raise NotUnderstood(f"returns {want.dtype} {list(want.shape)}, fused {got.dtype} {list(got.shape)}")
    difference = max([_relative(got, want), *map(_relative, got_buffers, want_buffers)])
    # A gradient that vanishes in theory, of a bias before a norm say, is measured by the others.
    floor = 1e-3 * max((float(g.abs().max()) for g in want_grads if g is not None), default=0.0)
    worst = 0.0
    for a, b in zip(got_grads, want_grads, strict=True):
        if a is None and b is None:
            continue
        a, b = (torch.zeros_like(b if a is None else a) if g is None else g for g in (a, b))
        worst = max(worst, float((a - b).abs().max()) / max(float(b.abs().max()), floor, 1e-30))
    return difference, worst


def _relative(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    difference = float((got.double() - want.double()).abs().max()) / max(float(want.double().abs().max()), 1e-30)
    return difference if difference == difference else float("inf")


def _joined(out) -> Tensor:
    if isinstance(out, (tuple, list)):
        return torch.cat(list(out), dim=1)
    return out


def _time(module, fused, example, generator, found: Differences) -> None:
    """Evaluation, without gradients, on the example's x and map, or on a one-hot map of 8×8 cells; the map's patterns
    are found before, as after a model's first layer of a size."""
    structure = fused.structure
    if example is None:
        x = None if structure.only_map else torch.randn(1, structure.channels, *TIMED, generator=generator)
        labels = _map(1, structure.shared.in_channels, (TIMED[0] // 2, TIMED[1] // 2), "one-hot", generator)
        labels = nn.functional.interpolate(labels, scale_factor=2.0)
        parameter = next(module.parameters())
        x, labels, build = None if x is None else x.to(parameter), labels.to(parameter), _plain_arguments
    else:
        x, labels, build = example.x, example.labels, example.build
    module.eval()
    runs = (lambda: type(module).forward(module, *build(x, labels)), lambda: fused.compute(x, labels))
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), map_scope():
        want, got = (_joined(run()) for run in runs)  # also warms up
        found.evaluation = max(found.evaluation, _relative(got, want))
        for _ in range(3):
            for run, spent in zip(runs, times, strict=True):
                start = time.perf_counter()
                run()
                if labels.is_cuda:
                    torch.cuda.synchronize(labels.device)
                spent.append(1e3 * (time.perf_counter() - start))
    found.old_ms, found.new_ms = (statistics.median(t) for t in times)
