# SPDX-License-Identifier: Apache-2.0
"""Prints what fuse() does with every stand-in: ``python tests/standins/report.py`` (the table of docs/fuse.md)."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from spade_fast import fuse
from standins import STANDINS

SIZE = 64


class All(nn.Module):
    """Calls every stand-in that can be fused, at one size."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({s.name: s.build() for s in STANDINS})

    def forward(self, labels):
        generator = torch.Generator().manual_seed(0)
        for standin in STANDINS:
            layer = self.layers[standin.name]
            channels = {"StableSR": 32, "StableSR 64": 64, "MONAI group": 8}.get(standin.name, 6)
            x = torch.randn(1, channels, SIZE, SIZE, generator=generator)
            if standin.name == "SEAN":
                layer(labels)
            elif standin.name.startswith("StableSR"):
                layer(x, {str(SIZE): labels})
            elif standin.fused:
                layer(x, labels)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids = torch.randint(5, (1, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels = F.one_hot(ids, 5).movedim(-1, 1).float()
    adapters = {"StableSRSPADE": lambda x, maps, size=None: (x, maps[str(x.shape[-1])])}
    print(fuse(All(), adapters, (labels,)))


if __name__ == "__main__":
    main()
