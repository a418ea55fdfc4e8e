# SPDX-License-Identifier: Apache-2.0
"""Dense conditioning at LivePortrait's shapes, each layer and the whole decoder: ``python -m benchmarks.dense``.

The map has 256 channels at 64². The plain layer and ours run in both layouts of x and the map. Outputs and gradients
are compared before anything is timed. `ratio` is the plain layer's time over ours in one layout. `ratio_best` is that
of the plain layer in its faster layout.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import ROOT, check, interleave, stamp, write_json
from spade_fast import FusedSPADE
from spade_fast.reference import SPADE

SHAPES = ((512, 64), (256, 64), (512, 128), (256, 128), (64, 256), (256, 256))  # channels, size of x
MAP = (256, 64)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
RESULTS = ROOT / "benchmarks" / "results" / "dense_cpu.json"


class Block(nn.Module):
    """LivePortrait's residual block: SPADE, LeakyReLU and a spectral convolution, twice; a learned shortcut."""

    def __init__(self, layer: type, fin: int, fout: int, label_nc: int) -> None:
        super().__init__()
        middle = min(fin, fout)
        spectral = nn.utils.spectral_norm
        self.conv_0 = spectral(nn.Conv2d(fin, middle, 3, padding=1))
        self.conv_1 = spectral(nn.Conv2d(middle, fout, 3, padding=1))
        if fin != fout:
            self.conv_s = spectral(nn.Conv2d(fin, fout, 1, bias=False))
        self.norm_0 = layer(fin, label_nc, "instance")
        self.norm_1 = layer(middle, label_nc, "instance")
        if fin != fout:
            self.norm_s = layer(fin, label_nc, "instance")

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        shortcut = self.conv_s(self.norm_s(x, segmap)) if hasattr(self, "conv_s") else x
        out = self.conv_0(F.leaky_relu(self.norm_0(x, segmap), 0.2))
        return shortcut + self.conv_1(F.leaky_relu(self.norm_1(out, segmap), 0.2))


class Decoder(nn.Module):
    """LivePortrait's decoder: the feature map is both its input and the condition of all 18 layers.

    Args:
        layer: class of the SPADE layers.
        feature_nc: channels of the feature map.
        out_nc: channels of the last block.
        upscale: 1, or 2 for three more channels a pixel and a pixel shuffle.
    """

    def __init__(self, layer: type, feature_nc: int = 256, out_nc: int = 64, upscale: int = 2) -> None:
        super().__init__()
        width = 2 * feature_nc
        self.fc = nn.Conv2d(feature_nc, width, 3, padding=1)
        for i in range(6):
            setattr(self, f"G_middle_{i}", Block(layer, width, width, feature_nc))
        self.up_0 = Block(layer, width, feature_nc, feature_nc)
        self.up_1 = Block(layer, feature_nc, out_nc, feature_nc)
        image = nn.Conv2d(out_nc, 3 * upscale**2, 3, padding=1)
        self.conv_img = image if upscale == 1 else nn.Sequential(image, nn.PixelShuffle(upscale))

    def forward(self, feature: Tensor) -> Tensor:
        x = self.fc(feature)
        for i in range(6):
            x = getattr(self, f"G_middle_{i}")(x, feature)
        for block in (self.up_0, self.up_1):
            x = block(F.interpolate(x, scale_factor=2.0, mode="nearest"), feature)
        return torch.sigmoid(self.conv_img(F.leaky_relu(x, 0.2)))


def step(net: nn.Module, upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs and of the parameters."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = net(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *net.parameters()], upstream)]


def infer(net: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return net(*inputs)


def timed(calls: dict[str, Callable[[], object]], seconds: float) -> dict:
    """Milliseconds of each variant, and the two ratios of ours in each layout."""
    times = interleave(calls, "cpu", seconds, rounds=(3, 30))
    best = min(times[f"plain {layout}"]["median_ms"] for layout in LAYOUTS)
    for layout in LAYOUTS:
        ours = times[f"ours {layout}"]
        ours["ratio"] = times[f"plain {layout}"]["median_ms"] / ours["median_ms"]
        ours["ratio_best"] = best / ours["median_ms"]
    return times


def report(name: str, times: dict) -> None:
    text = "  ".join(
        f"{layout} {times[f'ours {layout}']['median_ms']:.0f} ms, {times[f'ours {layout}']['ratio_best']:.2f}x"
        for layout in LAYOUTS
    )
    print(f"{name:32s} {text}", flush=True)


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value; infinity where a value is not finite."""
    worst = ((got.double() - want).abs().max() / want.abs().max()).item()
    return worst if worst == worst else float("inf")


def layer_case(channels: int, size: int, seconds: float) -> dict[str, dict]:
    torch.manual_seed(0)
    plain, ours = SPADE(channels, MAP[0], "instance"), FusedSPADE(channels, MAP[0], "instance")
    ours.load_state_dict(plain.state_dict())
    x, segmap = torch.randn(1, channels, size, size), torch.randn(1, MAP[0], MAP[1], MAP[1])
    upstream = torch.randn_like(x)
    forward: dict[str, Callable[[], object]] = {}
    both: dict[str, Callable[[], object]] = {}
    exact = step(copy.deepcopy(plain).double(), upstream.double(), x.double(), segmap.double())
    rounding = [error(got, want) for got, want in zip(step(plain, upstream, x, segmap), exact, strict=True)]
    for layout, memory_format in LAYOUTS.items():
        given = [t.contiguous(memory_format=memory_format) for t in (upstream, x, segmap)]
        # A hidden value may round across ReLU's kink. Gradients then differ in any float32 layer, the plain one too.
        for i, (got, want) in enumerate(zip(step(ours, *given), exact, strict=True)):
            if not error(got, want) <= max(2 * rounding[i], 1e-4 if i == 0 else 2e-2):
                raise RuntimeError(f"C{channels}@{size} {layout}, result {i}: not the plain layer's; nothing is timed")
        for name, net in (("plain", plain), ("ours", ours)):
            forward[f"{name} {layout}"] = partial(infer, net, *given[1:])
            both[f"{name} {layout}"] = partial(step, net, *given)
    rows = {"forward": timed(forward, seconds), "forward+backward": timed(both, seconds)}
    for name, row in rows.items():
        report(f"C{channels}@{size} {name}", row)
    return rows


def decoder_case(seconds: float) -> dict:
    torch.manual_seed(0)
    plain, ours = Decoder(SPADE).eval(), Decoder(FusedSPADE).eval()
    ours.load_state_dict(plain.state_dict())
    feature = torch.randn(1, MAP[0], MAP[1], MAP[1])
    expected = infer(plain, feature)
    calls: dict[str, Callable[[], object]] = {}
    for layout, memory_format in LAYOUTS.items():
        given = feature.contiguous(memory_format=memory_format)
        for name, net in (("plain", plain), ("ours", ours)):
            check(f"decoder {name} {layout}", infer(net, given), expected, 1e-4)
            calls[f"{name} {layout}"] = partial(infer, net, given)
    row = timed(calls, seconds)
    report("decoder forward", row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dense", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each case and direction")
    parser.add_argument("--json", metavar="FILE", default=RESULTS)
    options = parser.parse_args()
    result: dict = {"stamp": stamp("cpu"), "map": MAP, "layers": {}}
    for channels, size in SHAPES:
        result["layers"][f"C{channels}@{size}"] = layer_case(channels, size, options.seconds)
    result["decoder"] = decoder_case(3 * options.seconds)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
