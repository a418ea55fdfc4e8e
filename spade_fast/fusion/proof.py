# SPDX-License-Identifier: Apache-2.0
"""Proof that a fused layer computes what the module computes: outputs, all gradients and buffers, on random input."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast.fusion.forward import Adapter, FusedForward
from spade_fast.fusion.structure import NotUnderstood, Structure
from spade_fast.labels.map_scope import map_scope

# (limit of outputs, limit of gradients), each relative to the largest value. The proof is in float64. In the module's
# own dtype, sums in another order differ by up to ROUNDING.
PROOF = (1e-10, 1e-8)
ROUNDING = {torch.float32: (2e-5, 1e-4), torch.float16: (5e-3, 2e-2), torch.bfloat16: (4e-2, 1e-1)}
SIZES = ((7, 10), (6, 5))  # (H, W) of x, and of maps of x's size
LARGER = ((17, 13), (8, 9))  # (h, w) of maps that are larger by a factor which is not whole
TIMED = (64, 64)


Build = Callable[[Tensor | None, Tensor], tuple]  # the arguments of a call with another x and map


@dataclasses.dataclass
class Differences:
    """The largest relative differences, and milliseconds without gradients."""

    evaluation: float = 0.0
    training: float = 0.0
    gradients: float = 0.0
    old_ms: float = float("nan")
    new_ms: float = float("nan")


@dataclasses.dataclass
class Example:
    """A call of the layer within the model's: its arguments, and which of them are x and the map."""

    build: Build
    x: Tensor | None
    labels: Tensor


@contextlib.contextmanager
def kept(
    module: nn.Module, dtype: torch.dtype | None = None, generator: torch.Generator | None = None
) -> Iterator[None]:
    """Inside, a module may run. Afterwards everything is as before, random states too.

    The module's own tensors are never written: its buffers are copies inside.

    Args:
        module: the module.
        dtype: if given, the parameters are copies of this dtype.
        generator: if given, the values of the copied parameters and running statistics are random.
    """
    parts = list(module.modules())
    flags = [(m, m.training) for m in parts]
    parameters, buffers = ([(m, k, v) for m in parts for k, v in getattr(m, n).items()] for n in _TABLES)
    plain = [(m, k, v) for m in parts for k, v in m.__dict__.items() if isinstance(v, Tensor)]
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    copies: dict[int, Tensor] = {}
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
            for m, name, value in [*(parameters if dtype else []), *buffers]:
                if value is not None:
                    table: dict[str, Any] = m._buffers if name in m._buffers else m._parameters
                    table[name] = copies.setdefault(id(value), _copy(name, value, dtype, generator))
            yield
    finally:
        for m, name, value in parameters:
            m._parameters[name] = value
        for m, name, value in buffers:
            m._buffers[name] = value
        for m, name, value in plain:
            m.__dict__[name] = value
        for m, training in flags:
            m.training = training


_TABLES = ("_parameters", "_buffers")


def _copy(name: str, value: Tensor, dtype: torch.dtype | None, generator: torch.Generator | None) -> Tensor:
    """A copy. Random values are of a size at which every term matters, while many weights of a new network are zero."""
    copy = value.detach().clone()
    if dtype is not None and copy.is_floating_point():
        copy = copy.to(dtype)
    parameter = isinstance(value, nn.Parameter)
    if generator is not None and (parameter or name.startswith("running_")):
        drawn = torch.randn(copy.shape, generator=generator, dtype=torch.float64)
        if copy.dim() > 1:
            drawn *= 1.5 / copy[0].numel() ** 0.5
        elif name == "running_var":
            drawn = 0.5 + drawn.square()
        elif not name.startswith("weight"):
            drawn *= 0.2
        copy.copy_(drawn)
    return nn.Parameter(copy, requires_grad=copy.is_floating_point()) if parameter else copy


def find_reading(
    module: nn.Module, structure: Structure, adapter: Adapter | None, only: Example | None
) -> tuple[FusedForward, torch.dtype]:
    """The reading of the structure that computes what the module computes with random weights.

    Args:
        module: the layer.
        structure: its parts.
        adapter: see :func:`spade_fast.fuse`.
        only: a call with the only arguments and sizes that are known to run.

    Returns:
        The fused forward, and the dtype of the comparison. It is float64, or the parameters' own where the module does
        not run in float64.

    Raises:
        NotUnderstood: no reading computes the same.
    """
    own = next(module.parameters()).dtype
    if own != torch.float64 and own not in ROUNDING:
        raise NotUnderstood(f"its parameters are {own}")
    closest, error = float("inf"), ""
    for dtype in (torch.float64,) if own == torch.float64 else (torch.float64, own):
        generator = torch.Generator().manual_seed(0)
        for resizes in (False,) if structure.only_map else (True, False):
            with kept(module, dtype, generator), torch.no_grad():
                x, labels, build = _input(structure, module, generator, only, 0, resizes, "one-hot")
                if resizes and x is not None and x.shape[2:] == labels.shape[2:]:
                    continue
                module.eval()
                try:
                    want = type(module).forward(module, *build(x, labels))
                except Exception as e:  # a foreign module may raise anything on a map of another size
                    error = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
                    continue
                if isinstance(want, tuple) != structure.only_map:
                    raise NotUnderstood(f"returns a {type(want).__name__}")
                for reading in structure.readings():
                    fused = FusedForward(module, reading, adapter, resizes)
                    difference = _relative(_joined(fused.compute(x, labels)), _joined(want))
                    if difference < _limits(dtype, own)[0]:
                        return fused, dtype
                    closest = min(closest, difference)
        if closest < float("inf"):
            raise NotUnderstood(f"another function: relative difference {closest:.2g}")
    raise NotUnderstood(f"does not run on random input: {error}")


def prove(
    module: nn.Module, fused: FusedForward, dtype: torch.dtype, only: Example | None, example: Example | None
) -> Differences:
    """Compares a layer and its fused forward in evaluation and training.

    The comparison takes random weights and the layer's own, and one-hot and dense maps. It is made in dtype, and then
    in the parameters' own dtype.

    Args:
        module: the layer.
        fused: its fused forward.
        dtype: of the first comparison.
        only: a call with the only arguments and sizes that are known to run.
        example: a call at real sizes.

    Returns:
        The differences in the parameters' own dtype.

    Raises:
        NotUnderstood: a difference is above its limit.
    """
    own = next(module.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    cases = [(generator, 0, "one-hot"), (generator, 1, "dense"), (None, 1, "one-hot")]
    if fused.structure.shared.in_channels >= 3:
        cases.append((generator, 0, "constants"))
    proven = Differences()
    for weights, which, kind in cases:
        with kept(module, dtype, weights):
            x, labels, build = _input(fused.structure, module, generator, only, which, fused.resizes, kind)
            _compare_modes(proven, module, fused, x, labels, build, dense=kind == "dense")
    _check(proven, _limits(dtype, own))
    found = Differences()
    with kept(module, own):
        for kind in ("one-hot", "dense"):
            x, labels, build = _input(fused.structure, module, generator, only, 1, False, kind)
            _compare_modes(found, module, fused, x, labels, build, dense=kind == "dense")
        if example is not None:
            _compare_modes(found, module, fused, example.x, example.labels, example.build, dense=False)
        _time(module, fused, example, generator, found)
    _check(found, _limits(own, own))
    return found


def _limits(dtype: torch.dtype, own: torch.dtype) -> tuple[float, float]:
    return PROOF if dtype == torch.float64 else ROUNDING[own]


def _check(found: Differences, limits: tuple[float, float]) -> None:
    output, gradient = limits
    for name, limit in (("evaluation", output), ("training", output), ("gradients", gradient)):
        if not getattr(found, name) <= limit:
            raise NotUnderstood(f"differs in {name}: relative difference {getattr(found, name):.2g}")


def _compare_modes(
    found: Differences,
    module: nn.Module,
    fused: FusedForward,
    x: Tensor | None,
    labels: Tensor,
    build: Build,
    dense: bool,
) -> None:
    for training in (False, True):
        module.train(training)
        difference, gradients = _compare(module, fused, x, labels, build, dense)
        name = "training" if training else "evaluation"
        setattr(found, name, max(getattr(found, name), difference))
        found.gradients = max(found.gradients, gradients)


def _input(
    structure: Structure,
    module: nn.Module,
    generator: torch.Generator,
    example: Example | None,
    which: int,
    larger: bool,
    kind: str,
) -> tuple[Tensor | None, Tensor, Build]:
    """(x, map, function giving the arguments). They are random, and of the example's sizes if there is one."""
    n, size = 2, list(SIZES[which])
    if structure.only_map:
        map_size = size
    elif example is not None:
        assert example.x is not None
        (n, _, *size), (_, _, *map_size) = example.x.shape, example.labels.shape
    else:
        map_size = list(LARGER[which]) if larger else size
    x = None if structure.only_map else torch.randn(n, structure.channels, *size, generator=generator) * 1.5 + 0.3
    labels = _map(n, structure.shared.in_channels, map_size, kind, generator)
    parameter = next(module.parameters())
    build = _plain_arguments if example is None else example.build
    return None if x is None else x.to(parameter), labels.to(parameter), build


def _plain_arguments(x: Tensor | None, labels: Tensor) -> tuple:
    return (labels,) if x is None else (x, labels)


def _map(n: int, channels: int, size: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
    if kind == "dense":
        return torch.randn(n, channels, *size, generator=generator)
    constant = channels // 2 if kind == "constants" else 0
    cells = torch.randint(channels - constant, (n, -(-size[0] // 3), -(-size[1] // 3)), generator=generator)
    ids = cells.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, : size[0], : size[1]]
    labels = nn.functional.one_hot(ids, channels - constant).permute(0, 3, 1, 2).to(torch.float32)
    noise = torch.randn(n, constant, 1, 1, generator=generator).expand(-1, -1, *size)
    return torch.cat([noise, labels], dim=1)


def _compare(
    module: nn.Module, fused: FusedForward, x: Tensor | None, labels: Tensor, build: Build, dense: bool
) -> tuple[float, float]:
    """(largest difference of outputs and buffers, largest difference of gradients)."""
    results = []
    for new in (False, True):
        with kept(module):
            torch.manual_seed(0)
            inputs: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
            x_, labels_ = None if x is None else x.detach().clone(), labels.detach().clone()
            if x_ is not None:
                inputs.append(x_.requires_grad_())
            if dense:
                inputs.append(labels_.requires_grad_())
            with map_scope():
                out = fused.compute(x_, labels_) if new else type(module).forward(module, *build(x_, labels_))
            out = _joined(out)
            # The weights have both signs: with one sign, the rounding of a sum would grow with the number of pixels.
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
            gradients = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
            results.append((out.detach(), gradients, [b.clone() for b in module.buffers()]))
    (want, want_grads, want_buffers), (got, got_grads, got_buffers) = results
    if want.shape != got.shape or want.dtype != got.dtype:
        raise NotUnderstood(f"returns {want.dtype} {list(want.shape)}, fused {got.dtype} {list(got.shape)}")
    difference = max([_relative(got, want), *map(_relative, got_buffers, want_buffers)])
    # The gradient of a bias before a norm vanishes in theory: the floor comes from the other gradients.
    largest = max((float(g.abs().max()) for g in want_grads if g is not None), default=0.0)
    floor = largest * (1e-3 if want.dtype == torch.float64 else 1.0)
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


def _joined(out: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    if isinstance(out, (tuple, list)):
        return torch.cat(list(out), dim=1)
    return out


def _time(
    module: nn.Module,
    fused: FusedForward,
    example: Example | None,
    generator: torch.Generator,
    found: Differences,
) -> None:
    """Times evaluation without gradients on the example's x and map, or on a one-hot map of 6×6 cells.

    The map's patterns are found before, as they are after a model's first layer of a size.
    """
    build: Build
    structure = fused.structure
    if example is None:
        x = None if structure.only_map else torch.randn(1, structure.channels, *TIMED, generator=generator)
        labels = _map(1, structure.shared.in_channels, (TIMED[0] // 2, TIMED[1] // 2), "one-hot", generator)
        labels = nn.functional.interpolate(labels, scale_factor=2.0)  # cells of 6×6
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
