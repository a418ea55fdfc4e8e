# SPDX-License-Identifier: Apache-2.0
"""Adam as torch's fused kernels compute it, in less memory and in any memory order."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam(torch.optim.Adam):
    """``torch.optim.Adam(fused=True)``, the same numbers, for parameters that are dense in memory in any order.

    With beta1 = 0, as TTUR has it (paper, section 4), the first moment is the gradient, and is not kept. This saves a
    third of the memory of optimizer and gradients. torch's own Adam copies every channels-last parameter in each step.

    Args:
        params: the parameters.
        lr: the learning rate.
        betas: beta1 and beta2.
        eps: is added to the root of the second moment.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # no closure: training computes the gradients before
        """One update. Raises ValueError unless gradients have the strides of their parameters."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # set by a GradScaler
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p, beta1) for p in params]
            gradients = [_in_memory(p.grad, p) for p in params]
            adam(
                [_in_memory(p, p) for p in params],
                gradients,
                # The first moment may be the gradient: the kernels read all values of an element before they write it.
                [_in_memory(s["exp_avg"], p) for s, p in zip(states, params, strict=True)] if beta1 else gradients,
                [_in_memory(s["exp_avg_sq"], p) for s, p in zip(states, params, strict=True)],
                [],
                [s["step"] for s in states],
                fused=True,
                grad_scale=scale,
                found_inf=found_inf,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )

    def _state(self, p: Tensor, beta1: float) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in ("exp_avg", "exp_avg_sq") if beta1 else ("exp_avg_sq",):
            if name not in state:
                state[name] = torch.zeros_like(p)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes the state of torch's Adam too, saved with parameters in another memory order."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"], group["foreach"] = True, None  # whatever the one that saved it had
            for p in group["params"]:
                state = self.state.get(p, {})
                if not group["betas"][0]:
                    state.pop("exp_avg", None)
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in state and state[name].stride() != p.stride():
                        state[name] = torch.empty_like(p).copy_(state[name])


def _in_memory(t: Tensor, p: Tensor) -> Tensor:
    """The elements of t [numel] in the order of memory. t must have the strides of p, which is dense."""
    if t.stride() != p.stride():
        raise ValueError(f"expected strides {p.stride()} of the parameter, got {t.stride()}")
    return t.as_strided((t.numel(),), (1,))
