# SPDX-License-Identifier: Apache-2.0
"""What a foreign module is made of: the convolutions, norm and activation of a SPADE layer, found by structure."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from spade_fast import reference
from spade_fast.functional import ModulationNetwork, is_native, positional_norm

# Pre-forward hooks that compute a weight from other parameters and do not look at the input.
WEIGHT_HOOKS = (SpectralNorm, WeightNorm, BasePruningMethod)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NEUTRAL = (nn.Identity, nn.ReflectionPad2d, nn.ReLU, nn.LeakyReLU, nn.Upsample)
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


Convolution = TypeVar("Convolution", bound=_ConvNd)
_Weights = tuple[Tensor, Tensor | None]  # weight and bias


class NotUnderstood(Exception):
    """Why a module that looks like a SPADE layer is left as it is."""


@dataclasses.dataclass
class Structure:
    """The parts of a layer, and one reading of what they mean. The proof chooses among `readings`."""

    shared: nn.Conv2d
    heads: list[list[nn.Conv2d]]  # one merged convolution; two; or two pairs (depthwise, pointwise)
    norm: Callable[[Tensor], Tensor] | None
    padding: str
    instance_eps: float | None
    only_map: bool  # forward(map) -> (gamma, beta)
    slope: float = 0.0
    offset: float = 1.0
    gamma_first: bool = True

    @property
    def merged(self) -> bool:
        return len(self.heads) == 1

    @property
    def channels(self) -> int:
        return self.heads[0][-1].out_channels // (2 if self.merged else 1)

    @property
    def gains_when_dense(self) -> bool:
        """Whether the fused layer is fast on dense maps too. Other layers compute those faster themselves."""
        return len(self.heads[0]) == 1 and self.instance_eps is None and self.padding == "zeros"

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        return [self.shared, *(conv for head in self.heads for conv in head)]

    def network(self) -> ModulationNetwork:
        """The weights as they are now. Runs each hook that computes a weight once."""
        outs: list[_Weights | None] = [None, None]
        shared = _weight_and_bias(self.shared)
        if self.merged:
            weight, bias = _weight_and_bias(self.heads[0][0])
            biases = (None, None) if bias is None else bias.chunk(2)
            halves: list[_Weights] = list(zip(weight.chunk(2), biases, strict=True))
        else:
            parts = [_fold(head, self.instance_eps is not None) for head in self.heads]
            halves, outs = [p[0] for p in parts], [p[1] for p in parts]
        if not self.gamma_first:
            halves.reverse()
            outs.reverse()
        weights = (*shared, *halves[0], *halves[1])
        return ModulationNetwork(*weights, self.slope, self.offset, self.padding, self.instance_eps, *outs)

    def readings(self) -> list[Structure]:
        """What the parts may mean, the likeliest first."""
        norms: list[Callable[[Tensor], Tensor] | None]
        slopes = [self.slope] if self.slope >= 0 else [0.0, 0.2, 0.01]
        offsets = (1.0,) if self.only_map else (1.0, 0.0)
        norms = [self.norm] if self.norm is not None or self.only_map else [None, positional_norm]
        return [
            dataclasses.replace(self, slope=slope, offset=offset, gamma_first=first, norm=norm)
            for norm in norms
            for slope in slopes
            for offset in offsets
            for first in (self.gamma_first, not self.gamma_first)
        ]

    def describe(self) -> str:
        """How the layer is evaluated, in a few words."""
        if self.only_map:
            words = ["γ, β returned"]
        elif self.norm is None:
            words = ["no norm"]
        elif is_native(self.norm):
            words = ["batch norm" if isinstance(self.norm, nn.BatchNorm2d) else "instance norm"]
        else:
            name = "positional norm" if self.norm is positional_norm else type(self.norm).__name__
            words = [f"{name} outside"]
        if self.merged:
            words.append("merged γβ")
        elif len(self.heads[0]) == 2:
            words.append("separable folded" if self.instance_eps is None else "separable")
        if self.offset != 1.0:
            words.append("no +1")
        if self.slope:
            words.append(f"slope {self.slope:g}")
        if self.instance_eps is not None:
            words.append("γ, β normalized")
        if self.padding != "zeros":
            words.append("reflection")
        hooks = {type(h).__name__ for conv in self.convolutions for h in conv._forward_pre_hooks.values()}
        return ", ".join([*words, *sorted(hooks)])


def _weight_and_bias(conv: nn.Conv2d) -> _Weights:
    for hook in conv._forward_pre_hooks.values():
        hook(conv, (None,))
    return conv.weight, conv.bias  # a parametrization is computed at every reading: read each once


def _fold(head: list[nn.Conv2d], normalized: bool) -> tuple[_Weights, _Weights | None]:
    """One convolution for a depthwise and then a pointwise one. It is exact: a pointwise one adds no border.

    Args:
        head: one convolution, or a depthwise and a pointwise one.
        normalized: whether a norm lies between the two.

    Returns:
        Weight and bias of the convolution. With a norm between, those of the depthwise one as a full convolution, and
        those of the pointwise one.
    """
    if len(head) == 1:
        return _weight_and_bias(head[0]), None
    (depth, depth_bias), (point, bias) = (_weight_and_bias(conv) for conv in head)
    if normalized:
        eye = torch.eye(depth.shape[0], dtype=depth.dtype, device=depth.device)
        return (depth[:, 0][:, None] * eye[:, :, None, None], depth_bias), (point, bias)
    matrix = point[:, :, 0, 0]
    if depth_bias is not None:
        moved = matrix @ depth_bias
        bias = moved if bias is None else bias + moved
    return (matrix[:, :, None, None] * depth[:, 0][None], bias), None


def understand(module: nn.Module) -> Structure | None:
    """The structure of a SPADE layer; None for a module that is no SPADE layer.

    Raises:
        NotUnderstood: the module looks like a SPADE layer, but a part of it is unknown.
    """
    if isinstance(module, _CONTAINERS) or any(p is not None for p in module._parameters.values()):
        return None
    found = [(name, c) for name, c in module.named_modules() if isinstance(c, _ConvNd) and c is not module]
    if any(isinstance(c, _ConvTransposeNd) for _, c in found):
        return None
    positional, variadic = _positional(module)
    only_map = positional == 1 and not variadic
    if positional < 1 or (only_map and len(found) != 3):
        return None
    if len(found) == 1 and positional >= 2 and _takes_hidden_map(module, found[0][1]):
        raise NotUnderstood("takes the hidden map, not the labels")
    if _roles([c for _, c in found]) is None:
        return None
    norm, inner = _norms(module, {name.split(".")[0] for name, _ in found})
    if any(isinstance(part, (nn.Linear, nn.Embedding)) for n in norm for part in n.modules()):
        return None
    known = {id(p) for _, c in found for p in c.parameters()}
    known |= {id(p) for n in norm for p in n.parameters()} | {id(p) for _, n in inner for p in n.parameters()}
    if any(id(p) not in known for p in module.parameters()):
        if len(found) == 2:  # two convolutions in a row may be anything
            return None
        further = next(name for name, p in module.named_parameters() if id(p) not in known)
        raise NotUnderstood(f"has further parameters: {further}")
    convs = [(name, _checked_convolution(name, conv)) for name, conv in found]
    roles = _roles([c for _, c in convs])
    assert roles is not None  # the same convolutions have roles above
    shared, heads = roles
    if len(norm) > 1:
        raise NotUnderstood(f"{len(norm)} modules that may be its norm: {', '.join(type(n).__name__ for n in norm)}")
    _check_hooks(module, norm, [c for _, c in convs])
    size = shared.kernel_size[0]
    for other in (head[0].kernel_size[0] for head in heads):
        if other != size:
            raise NotUnderstood(f"kernels of {size} and {other}")
    names = {id(c): name for name, c in convs}
    return Structure(
        shared,
        heads,
        norm[0] if norm else None,
        _padding([(names[id(c)], c) for c in (shared, *(h[0] for h in heads))]),
        _instance_eps(inner, heads),
        only_map,
        _slope(module),
        gamma_first=len(heads) == 1 or "beta" not in names[id(heads[0][0])].lower(),
    )


def _positional(module: nn.Module) -> tuple[int, bool]:
    """How many arguments forward takes by position, and whether it takes any number more."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return 0, False
    fixed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(fixed), any(p.kind == p.VAR_POSITIONAL for p in parameters)


def _takes_hidden_map(module: nn.Module, conv: nn.Module) -> bool:
    norms = [m for m in module.modules() if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm))]
    return len(norms) == 1 and bool(conv.out_channels == 2 * getattr(norms[0], "num_features", -1))


def _roles(convs: list[Convolution]) -> tuple[Convolution, list[list[Convolution]]] | None:
    """(first convolution, heads). Every head takes the first one's output, and all give the same number of channels."""
    for shared in convs:
        rest = [c for c in convs if c is not shared]
        if len(rest) == 4:
            heads = [rest[:2], rest[2:]]
            pairs = [d.groups == d.in_channels == d.out_channels and p.kernel_size == (1, 1) for d, p in heads]
            if not all(pairs) or any(d.out_channels != p.in_channels for d, p in heads):
                continue
        elif len(rest) in (1, 2):
            heads = [[c] for c in rest]
        else:
            return None
        if shared.groups != 1 or any(h[0].in_channels != shared.out_channels for h in heads):
            continue
        if len({h[-1].out_channels for h in heads}) == 1 and (len(heads) == 2 or heads[0][0].out_channels % 2 == 0):
            return shared, heads
    return None


def _norms(module: nn.Module, holders: set[str]) -> tuple[list[nn.Module], list[tuple[str, nn.Module]]]:
    """The children that may be the norm of x, and the other modules beside the convolutions with their names.

    holders: the children that hold convolutions.
    """
    norms: list[nn.Module] = []
    inner: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if name not in holders:
            if not isinstance(child, _NEUTRAL) and any(True for _ in child.modules()):
                norms.append(child)
            continue
        for path, part in child.named_modules(prefix=name):
            if ".parametrizations." in path:  # reading a convolution's weight runs it
                continue
            leaf = not any(True for _ in part.children())
            if leaf and not isinstance(part, (_ConvNd, *_NEUTRAL, *_CONTAINERS)):
                inner.append((path, part))
    return norms, inner


def _checked_convolution(name: str, conv: _ConvNd) -> nn.Conv2d:
    """conv, if it is of a kind that the fused layer computes."""
    if not isinstance(conv, nn.Conv2d):
        raise NotUnderstood(f"{name} is a {type(conv).__name__}: only 2-D maps")
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        raise NotUnderstood(f"{name} is a {type(conv).__name__} with a forward of its own")
    if conv.stride != (1, 1) or conv.dilation != (1, 1):
        raise NotUnderstood(f"{name} has stride {conv.stride}, dilation {conv.dilation}")
    if conv.groups not in (1, conv.in_channels):
        raise NotUnderstood(f"{name} has {conv.groups} groups")
    if conv.kernel_size[0] != conv.kernel_size[1] or conv.kernel_size[0] not in reference.KERNEL_SIZES:
        raise NotUnderstood(f"{name} has a kernel of {conv.kernel_size}")
    return conv


def _check_hooks(module: nn.Module, norms: list[nn.Module], convs: list[nn.Conv2d]) -> None:
    if "forward" in module.__dict__:
        raise NotUnderstood("its forward was replaced on the instance")
    called = {
        id(m) for norm in norms if not is_native(norm) for m in norm.modules()
    }  # their own forwards run their hooks
    for name, part in module.named_modules():
        if part is module or id(part) in called:
            continue
        if "forward" in part.__dict__:
            raise NotUnderstood(f"forward of {name} was replaced on the instance")
        if any(getattr(part, kind) for kind in _HOOKS):
            raise NotUnderstood(f"{name} has hooks")
        for hook in part._forward_pre_hooks.values():
            if not isinstance(hook, WEIGHT_HOOKS) or part not in convs:
                raise NotUnderstood(f"{name} has a pre-forward hook, {getattr(hook, '__name__', type(hook).__name__)}")


def _padding(convs: list[tuple[str, nn.Conv2d]]) -> str:
    kinds = set()
    for name, conv in convs:
        half = conv.kernel_size[0] // 2
        if half == 0 and conv.padding in ((0, 0), "same", "valid"):
            continue
        if conv.padding == "same" or conv.padding == (half, half):
            if conv.padding_mode not in ("zeros", "reflect"):
                raise NotUnderstood(f"{name} has padding_mode {conv.padding_mode}")
            kinds.add(conv.padding_mode)
        elif conv.padding == (0, 0) or conv.padding == "valid":
            kinds.add("reflect")  # the layer may pad by reflection before it: the proof decides
        else:
            raise NotUnderstood(f"{name} pads a kernel of {conv.kernel_size} by {conv.padding}")
    if len(kinds) > 1:
        raise NotUnderstood("some convolutions pad with zeros, some do not")
    return kinds.pop() if kinds else "zeros"


def _instance_eps(inner: list[tuple[str, nn.Module]], heads: list[list[nn.Conv2d]]) -> float | None:
    for name, part in inner:
        if type(part) not in (nn.InstanceNorm2d, reference.InstanceNorm2d) or part.affine or part.track_running_stats:
            raise NotUnderstood(f"{name} is a {type(part).__name__}")
    if not inner:
        return None
    if len(inner) != len(heads) or len({part.eps for _, part in inner}) > 1:
        raise NotUnderstood(f"{len(inner)} norms beside {len(heads)} convolutions: {', '.join(n for n, _ in inner)}")
    eps = inner[0][1].eps
    assert isinstance(eps, float)
    return eps


def _slope(module: nn.Module) -> float:
    """The activation's negative slope; -1 where no module tells it."""
    found: set[float] = set()
    for part in module.modules():
        if isinstance(part, nn.LeakyReLU):
            found.add(part.negative_slope)
        elif isinstance(part, nn.ReLU):
            found.add(0.0)
        elif type(part).__module__ == "torch.nn.modules.activation":
            raise NotUnderstood(f"activation {type(part).__name__}, not ReLU or LeakyReLU")
    if len(found) > 1:
        raise NotUnderstood(f"activations of slopes {sorted(found)}")
    return found.pop() if found else -1.0
