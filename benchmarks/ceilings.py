# SPDX-License-Identifier: Apache-2.0
"""What the device can do at most: copy bandwidth and matrix products: ``python -m benchmarks.ceilings``."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.common import interleave, stamp, write_json


def measure(device: str) -> dict:
    """The ceilings, on random data.

    Returns:
        copy_gb_s, which counts the bytes read and those written, and matmul_tflop_s_DTYPE.
    """
    cuda = device == "cuda"
    numel, side = (2**30, 8192) if cuda else (2**25, 2048)  # several times any cache
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    time = interleave({"copy": partial(target.copy_, source)}, device, seconds=2)["copy"]["median_ms"]
    result = {"copy_gb_s": 2 * 4 * numel / time / 1e6}
    del source, target
    for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        time = interleave({"mm": partial(torch.mm, a, b)}, device, seconds=2)["mm"]["median_ms"]
        result[f"matmul_tflop_s_{str(dtype).removeprefix('torch.')}"] = 2 * side**3 / time / 1e9
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceilings", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    result = {"stamp": stamp(options.device), **measure(options.device)}
    for name, value in result.items():
        if name != "stamp":
            print(f"{name}: {value:.2f}")
    write_json(options.json, result)


if __name__ == "__main__":
    main()
