# SPDX-License-Identifier: Apache-2.0
"""What the first weights do to training: ``python -m benchmarks.init --dataroot coco_stuff_sample``.

Both starts of `spade_fast.models.init` train for equally many steps with the same seed, samples and order. Shown are
the mean absolute difference of synthesized and true images and the feature-matching loss, means over the last ten
steps. Shown too is by how much one Adam step changes a weight, |ΔW| / |W|, at the width of the released networks: the
median over layers.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from benchmarks.common import SAMPLES, stamp, write_json
from spade_fast.data.options import open_dataset
from spade_fast.labels.batch import batch_labels
from spade_fast.layers.spectral import SpectralConv2d
from spade_fast.models import INITS, init_weights
from spade_fast.train import config as cfg
from spade_fast.train.ranks import Ranks
from spade_fast.train.setup import build_networks
from spade_fast.train.step import TrainingStep

LAST = 10  # steps whose mean is the loss at the end
SHOWN = ("seeds", "steps", "crop", "ngf", "batch")  # options in the results file


class Training:
    """Networks and samples of one dataset, with one start and one seed."""

    def __init__(self, init: str, seed: int, **options: Any) -> None:
        # VGG's weights may not be at hand: both datasets train with the weights of the losses of preset `synthetic`.
        given = {"lambda_vgg": 0.0, "lambda_l1": 10.0, "ema": 0.0, "amp": "fp32", "flip": False, "seed": seed}
        self.config = cfg.resolve_config(cfg.merge({}, {**given, "init": init, **options}))
        self.dataset = open_dataset(self.config, "train")
        torch.manual_seed(seed)
        self.nets = build_networks(self.config, self.dataset.label_nc)
        for net in self.nets.values():
            init_weights(net, init)
            net.train()
        self.training = TrainingStep(self.nets, self.config, None, Ranks("cpu"))
        self.order = torch.Generator().manual_seed(seed)
        self.samples = [self.dataset[i] for i in range(len(self.dataset))]
        self.done = 0

    def step(self) -> dict[str, float]:
        """One iteration on a random batch; the weighted losses."""
        chosen = torch.randperm(len(self.samples), generator=self.order)[: self.config.batch_size].tolist()
        batch = default_collate([self.samples[i] for i in chosen])
        labels = batch_labels(batch, self.dataset.num_classes, torch.device("cpu"))
        terms = self.training(labels, batch["image"], self.done)
        self.done += 1
        return {name: value.item() for name, value in terms.items()}


def losses_after(steps: int, init: str, seed: int, **options: Any) -> dict[str, float]:
    """Unweighted losses, means over the last steps."""
    run = Training(init, seed, **options)
    terms = [run.step() for _ in range(steps)][-LAST:]
    weights = {"l1": run.config.lambda_l1, "feat": run.config.lambda_feat}
    return {name: statistics.mean(term[name] for term in terms) / weight for name, weight in weights.items()}


def kernels(net: nn.Module) -> dict[str, list[Tensor]]:
    """The weights of a network's convolutions and linear layers, with spectral norm and without."""
    groups: dict[str, list[Tensor]] = {"spectral norm": [], "others": []}
    for module in net.modules():
        if isinstance(module, SpectralConv2d):
            groups["spectral norm"].append(module.weight_orig)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            groups["others"].append(module.weight)
    return groups


def first_change(init: str, **options: Any) -> dict[str, dict[str, float]]:
    """Median |ΔW| / |W| of each network's layers after one step, with spectral norm and without."""
    run = Training(init, 0, **options)
    groups = {name: kernels(net) for name, net in run.nets.items()}
    before = {name: {k: [w.detach().clone() for w in ws] for k, ws in g.items()} for name, g in groups.items()}
    run.step()
    return {
        name: {
            kind: statistics.median(
                float((new.detach() - old).norm() / old.norm())
                for new, old in zip(weights, before[name][kind], strict=True)
            )
            for kind, weights in group.items()
        }
        for name, group in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.init", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataroot", default=str(SAMPLES), help="COCO-Stuff images (default: the sample's)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--ngf", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.steps < LAST:
        parser.error(f"--steps must be at least {LAST}, got {args.steps}")
    if not Path(args.dataroot).is_dir():
        parser.error(f"--dataroot must be a folder in the layout of COCO-Stuff, got {args.dataroot}")
    torch.set_num_threads(1)
    size = {"crop_size": args.crop, "load_size": args.crop}
    coco = {"dataset": "coco", "dataroot": args.dataroot}
    result: dict[str, Any] = {"stamp": stamp(), "config": {k: v for k, v in vars(args).items() if k in SHOWN}}
    result["first step"] = {init: first_change(init, **coco, **size, ngf=64, ndf=64, batch_size=1) for init in INITS}
    print(f"median |ΔW| / |W| of the first step: {result['first step']}", flush=True)
    small = {**size, "ngf": args.ngf, "ndf": args.ngf, "batch_size": args.batch}
    result["losses"] = {}
    for name, options in {"coco": coco, "synthetic": {"dataset": "synthetic", "synthetic_size": 64}}.items():
        rows = result["losses"][name] = {}
        for init in INITS:
            seeds = [losses_after(args.steps, init, seed, **options, **small) for seed in range(args.seeds)]
            mean = {loss: statistics.mean(s[loss] for s in seeds) for loss in seeds[0]}
            rows[init] = {"seeds": seeds, "mean": mean}
            each = ", ".join(f"{s['l1']:.3f}" for s in seeds)
            print(f"{name}, {init}: L1 {each}, mean {mean['l1']:.3f}; features {mean['feat']:.3f}", flush=True)
    write_json(args.json, result)


if __name__ == "__main__":
    main()
