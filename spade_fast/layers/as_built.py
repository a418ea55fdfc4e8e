# SPDX-License-Identifier: Apache-2.0
"""Whether a submodule is exactly as FusedSPADE and the networks built it.

Only then may its weights be used directly. Any other submodule runs through its own forward: one with hooks, wrappers
or adapters, or of another class, padding, activation or norm.
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
    """Whether torch's own operations must do all the work, because something that does not know our kernels follows.

    That is a trace (torch.jit), an export (torch.export, ONNX), a transform of torch.func, or a forward-mode
    derivative.
    """
    if torch.compiler.is_compiling():
        return _is_exporting()
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined]  # public, but not in torch.jit's __all__
        or torch.onnx.is_in_onnx_export()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def changed(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why calling `module` is more than calling `kind`'s own forward on its parameters. None: it is not."""
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
    """Why `module` is not a zero-padded convolution fin -> fout with a bias. None: it is.

    Args:
        module: the module in question.
        fin, fout: channels in and out.
        kernel_size, stride: of the convolution, the same along both axes.
        padding: pixels at each border; kernel_size // 2 by default.
    """
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


def changed_network(
    mlp_shared: nn.Module, mlp_gamma: nn.Module, mlp_beta: nn.Module, label_nc: int, norm_nc: int, kernel_size: int
) -> str | None:
    """Which part of a SPADE layer's network from labels to gamma and beta is not as built, and how. None: all are."""
    why = changed(mlp_shared, nn.Sequential)
    if why is not None:
        return f"mlp_shared {why}"
    parts = list(mlp_shared.children())
    if len(parts) != 2:
        return f"mlp_shared has {len(parts)} parts, not 2"
    convolution, activation = parts
    hidden_nc = convolution.out_channels if isinstance(convolution, nn.Conv2d) else 0
    checks = (
        ("mlp_shared.0", changed_convolution(convolution, label_nc, hidden_nc, kernel_size)),
        ("mlp_shared.1", changed(activation, nn.ReLU)),
        ("mlp_gamma", changed_convolution(mlp_gamma, hidden_nc, norm_nc, kernel_size)),
        ("mlp_beta", changed_convolution(mlp_beta, hidden_nc, norm_nc, kernel_size)),
    )
    return next((f"{name} {why}" for name, why in checks if why is not None), None)


def changed_norm(module: nn.Module, channels: int) -> str | None:
    """Why the statistics kernels cannot compute `module`, a norm without affine parameters. None: they can."""
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
