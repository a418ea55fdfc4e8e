# SPDX-License-Identifier: Apache-2.0
"""Prints what fuse() does with every stand-in: ``python tests/support/standins/report.py``.

``--wide`` takes a few of them at real sizes. ``--json FILE`` writes both, the wide ones three times, as a results file.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from benchmarks.common import stamp, write_json
from spade_fast import fuse
from spade_fast.fusion.report import FusedLayer, FuseReport
from standins import STANDINS
from standins.others import MONAISPADE, CoCosNetSPADE, ImaginaireNorm, MobileSPADE
from standins.plain import OASISSPADE, SPADE

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


def wide() -> dict[str, FuseReport]:
    """The layers at 128 channels and 128×128 pixels, or the size they are used at."""
    reports = {}
    ids = torch.randint(35, (1, 8, 8)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels, x = F.one_hot(ids, 35).movedim(-1, 1).float(), torch.randn(1, 128, 128, 128)
    noise, feature = torch.randn(1, 64, 1, 1).expand(-1, -1, 128, 128), torch.randn(1, 256, 64, 64)
    for name, layer, example in (
        ("NVlabs", SPADE(128, 35), (x, labels)),
        ("OASIS with noise", OASISSPADE(64, 99), (x[:, :64], torch.cat([noise, labels], 1))),
        ("MONAI", MONAISPADE(35, 128), (x, labels)),
        ("CoCosNet", CoCosNetSPADE(128, 35), (x, labels)),
        ("MobileSPADE", MobileSPADE(128, 35, 128), (x, labels)),
        ("imaginaire", ImaginaireNorm(128, 35, 5, 128), (x, labels)),
        ("LivePortrait, dense", SPADE(256, 256, "instance"), (feature, torch.randn_like(feature))),
    ):
        reports[name] = fuse(layer, example=example)
    return reports


def small() -> FuseReport:
    """Every stand-in, with x at 64×64."""
    ids = torch.randint(5, (1, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels = F.one_hot(ids, 5).movedim(-1, 1).float()
    adapters = {"StableSRSPADE": lambda x, maps, size=None: (x, maps[str(x.shape[-1])])}
    return fuse(All(), adapters, (labels,))


def results(runs: int = 3) -> dict:
    """Both reports for a results file. A layer's ratio is the median over the runs."""
    times: dict[str, list[FusedLayer]] = {}
    for _ in range(runs):
        for name, report in wide().items():
            times.setdefault(name, []).append(report.layers[0])
    return {
        "stamp": stamp(),
        "config": {"threads": 1, "runs": runs, "size": SIZE},
        "wide": {
            name: {
                "how": layers[0].how,
                "ms": [{"before": layer.old_ms, "fused": layer.new_ms} for layer in layers],
                "ratio": statistics.median(layer.old_ms / layer.new_ms for layer in layers),
            }
            for name, layers in times.items()
        },
        "layers": [
            {k: v for k, v in dataclasses.asdict(layer).items() if v == v and not k.endswith("_ms")}
            for layer in small()
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wide", action="store_true", help="a few layers at real sizes")
    parser.add_argument("--json", metavar="FILE", help="write both as a results file")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.json:
        write_json(options.json, results())
    elif options.wide:
        for name, report in wide().items():
            print(name, report, sep="\n", end="\n\n")
    else:
        print(small())


if __name__ == "__main__":
    main()
