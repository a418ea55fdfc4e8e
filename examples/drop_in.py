# SPDX-License-Identifier: Apache-2.0
"""Puts FusedSPADE into a model that has its own SPADE layers, compares the results, and times both.

    python examples/drop_in.py

The model stands for yours: a layer written as in the paper, and a network that uses it. `swap` replaces each layer by
a FusedSPADE with the same weights. Where you do not want to edit a model, `spade_fast.fuse(model)` does without.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

from spade_fast import FusedSPADE


class TheirSPADE(nn.Module):
    """A SPADE layer as found in many repositories."""

    def __init__(self, norm_nc, label_nc, nhidden=128):
        super().__init__()
        self.param_free_norm = nn.BatchNorm2d(norm_nc, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, nhidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(nhidden, norm_nc, 3, padding=1)
        self.mlp_beta = nn.Conv2d(nhidden, norm_nc, 3, padding=1)

    def forward(self, x, segmap):
        hidden = self.mlp_shared(F.interpolate(segmap, size=x.shape[2:], mode="nearest"))
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class TheirModel(nn.Module):
    """Two SPADE layers with convolutions between them."""

    def __init__(self, channels=64, label_nc=35):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.norm_0 = TheirSPADE(channels, label_nc)
        self.conv_0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_1 = TheirSPADE(channels, label_nc)
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, image, segmap):
        x = self.first(image)
        x = self.conv_0(F.leaky_relu(self.norm_0(x, segmap), 0.2))
        return self.last(F.leaky_relu(self.norm_1(x, segmap), 0.2))


def swap(model):
    """Replaces every TheirSPADE by a FusedSPADE with its weights. Returns how many there were."""
    count = 0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, TheirSPADE):
            fused = FusedSPADE(layer.mlp_gamma.out_channels, layer.mlp_shared[0].in_channels)
            fused.load_state_dict(layer.state_dict())
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], fused.train(layer.training))
            count += 1
    return count


def milliseconds(model, *inputs, rounds):
    """The shortest of a few forwards."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        model(*inputs)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=128, help="height and width of the images (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, help="forwards that are timed (default: 5)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = TheirModel().eval()
    blocks = torch.randint(35, (1, 8, 8)).float()[:, None]
    labels = F.interpolate(blocks, size=(args.size, args.size), mode="nearest")[:, 0].long()
    segmap = F.one_hot(labels, 35).movedim(-1, 1).float()  # what their model takes: [N, 35, H, W]
    image = torch.randn(1, 3, args.size, args.size)

    with torch.inference_mode():
        before = model(image, segmap)
        plain = milliseconds(model, image, segmap, rounds=args.rounds)
        count = swap(model)
        after = model(image, segmap)
        fused = milliseconds(model, image, segmap, rounds=args.rounds)
    difference = (after - before).abs().max().item() / before.abs().max().item()
    print(f"{count} layers swapped; largest difference {difference:.1e} of the largest value")
    print(f"forward {plain:.1f} ms before, {fused:.1f} ms after")
    if difference > 1e-5:
        raise SystemExit("error: the results differ")
    return difference


if __name__ == "__main__":
    main()
