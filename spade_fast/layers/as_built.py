# SPDX-License-Identifier: Apache-2.0
"""Whether a submodule is exactly as FusedSPADE and the networks built it, so that its weights may be used directly.

Anything else (hooks, wrappers, adapters, other classes, paddings, activations, norms) runs through its own forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

from spade_fast.reference import InstanceNorm2d

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def torch_only() -> bool:
    """Whether torch's own operations must do all the work, as something follows them that kernels are unknown to: a
    trace (torch.jit), an export (torch.export, ONNX), torch.func's transforms, forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return _is_exporting()
    return (
        torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def changed(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What makes calling `module` more than calling `kind`'s own forward on its parameters, or None."""
    if type(module) is not kind:
        return f"is a {type(module).__name__}, not a {kind.__name__}"
    overridden = [name for name in ("forward", "_conv_forward", "__call__") if name in module.__dict__]
    if overridden:
        return f"has a {overridden[0]} of its own"
    for name in _HOOKS:
        hooks = module.__dict__[name]
        if hooks and not (len(hooks) == 1 and _is_marker(next(iter(hooks.values())))):
            return f"has {name.strip('_').replace('_', ' ')}"
    for name in _GLOBAL_HOOKS:
        if getattr(_module, name):
            return "runs under global module hooks"
    return None


def _is_marker(hook: object) -> bool:
    return getattr(type(hook), "spade_fast_marker", False)


def changed_convolution(
    module: nn.Module, fin: int, fout: int, kernel_size: int, stride: int = 1, padding: int | None = None
) -> str | None:
    """What makes `module` more than a zero-padded convolution fin -> fout with a bias, or None. padding: k // 2."""
    why = changed(module, nn.Conv2d)
    if why is not None:
        return why
    padding = kernel_size // 2 if padding is None else padding
    wanted = {
        "in_channels": fin,
        "out_channels": fout,
        "kernel_size": (kernel_size, kernel_size),
        "stride": (stride, stride),
        "padding": (padding, padding),
        "dilation": (1, 1),
        "groups": 1,
        "padding_mode": "zeros",
    }
    for name, value in wanted.items():
        if getattr(module, name) != value:
            return f"has {name} {getattr(module, name)}, not {value}"
    for name, shape in (("weight", (fout, fin, kernel_size, kernel_size)), ("bias", (fout,))):
        tensor = getattr(module, name)
        if tensor is None:
            return f"has no {name}"
        if not torch.compiler.is_compiling() and type(tensor) not in (nn.Parameter, Tensor):
            return f"has a {name} that is a {type(tensor).__name__}"
        if tuple(tensor.shape) != shape:
            return f"has a {name} of shape {list(tensor.shape)}, not {list(shape)}"
    return None


def changed_norm(module: nn.Module, channels: int) -> str | None:
    """What makes `module` more than a normalization without affine parameters that the statistics kernels compute."""
    for kind in (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, InstanceNorm2d, nn.Identity):
        if type(module) is kind:
            break
    else:
        return f"is a {type(module).__name__}"
    why = changed(module, kind)
    if why is not None or kind is nn.Identity:
        return why
    if module.affine or module.weight is not None or module.bias is not None:
        return "is affine"
    if issubclass(kind, nn.InstanceNorm2d) and module.track_running_stats:
        return "tracks running statistics"
    if module.num_features != channels:
        return f"is for {module.num_features} channels, not {channels}"
    if module.training and module.track_running_stats and module.running_mean is None:
        return "has no running statistics"
    return None
