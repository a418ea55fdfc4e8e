# SPDX-License-Identifier: Apache-2.0
"""Every operator once, forward and backward, on small odd shapes: the program that compute-sanitizer watches."""

from __future__ import annotations

import argparse

import torch

from benchmarks.common import check, full_precision
from spade_fast import FusedSPADE, LabelMap
from spade_fast.models import MultiscaleDiscriminator
from spade_fast.reference import SPADE


def compare(device: str) -> None:
    """Raises RuntimeError where a result differs from the plain layers'."""
    torch.manual_seed(0)
    classes = torch.randint(5, (2, 7, 9)).repeat_interleave(3, 1).repeat_interleave(2, 2)
    labels = LabelMap(classes, 5, torch.rand(classes.shape) < 0.1).to(device)
    for channels, upsample, norm in ((33, 1, "syncbatch"), (8, 2, "instance")):
        fused = FusedSPADE(channels, 6, norm=norm).to(device)
        plain = SPADE(channels, 6, norm=norm).to(device)
        plain.load_state_dict(fused.state_dict())
        x = torch.randn(2, channels, 11, 6, device=device)
        gradient = torch.randn(2, channels, 11 * upsample, 6 * upsample, device=device)
        results = []
        for layer in (fused, plain):
            leaf = x.clone().requires_grad_()
            if layer is fused:
                out = layer(leaf, labels, None, upsample)
            else:
                large = torch.nn.functional.interpolate(leaf, scale_factor=float(upsample))
                out = layer(large, labels.one_hot())
            out.backward(gradient)
            results.append([out, leaf.grad, *(p.grad for p in layer.parameters())])
        for i, (actual, expected) in enumerate(zip(*results, strict=True)):
            check(f"FusedSPADE({channels}, norm={norm}) result {i}", actual, expected, 1e-4)
    net = MultiscaleDiscriminator(6, ndf=8).to(device).eval()
    image = torch.randn(4, 3, *labels.size, device=device)
    for scale, (actual, expected) in enumerate(zip(net(labels, image), net(labels.one_hot(), image), strict=True)):
        check(f"discriminator scale {scale}", actual[0], expected[0], 1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.smoke", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    with full_precision():
        compare(device)
    print(f"every operator agrees with the plain layers on {device}")


if __name__ == "__main__":
    main()
