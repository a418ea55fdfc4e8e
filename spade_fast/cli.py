# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the error of a wrong option, and the device."""

from __future__ import annotations

import torch


class ConfigError(ValueError):
    """An option that is unknown, of the wrong type, out of range, or at odds with another. Names the option."""


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU when there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:  # torch raises AssertionError for a CUDA it was built without
        raise ConfigError(f"--device {name} can't be used: {str(e).splitlines()[0]}") from None
