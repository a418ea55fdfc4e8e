# SPDX-License-Identifier: Apache-2.0
"""Every op against its floor, on every backend the device has: ``python -m benchmarks.ops``.

The floor is the bytes that must move (each large input read once, each output written once, tables counted once) over
the copy bandwidth measured in the same run. Results are checked against the torch backend before anything is timed.
On a GPU the results name every kernel of an op too, with its launches and its time on the device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ceilings import measure as measure_ceilings
from benchmarks.common import check, interleave, label_maps, stamp, write_json
from spade_fast import LabelMap
from spade_fast.ops import _backend as backend
from spade_fast.ops.statistics import statistics

HIDDEN = 128


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def cases(labels: LabelMap, channels: int, size: int, dtype: torch.dtype) -> dict[str, tuple[Callable, int]]:
    """name -> (call giving the tensors to compare, bytes of its floor)."""
    device, n, c = labels.device, len(labels), channels
    found = labels.patterns(size, size, 3, backward=True)
    codes = labels.resized(size, size)
    half = dtype if device.type == "cuda" else torch.float32
    table = torch.randn(9, labels.label_nc, HIDDEN, device=device)
    bias = torch.randn(HIDDEN, device=device)
    a = torch.randn(found.codes.shape[0], HIDDEN, device=device, dtype=half)
    weights = [
        (torch.randn(c, HIDDEN, 3, 3, device=device) / 34).to(half, memory_format=torch.channels_last) for _ in "gb"
    ]
    biases = [torch.randn(c, device=device, dtype=half) for _ in "gb"]
    x = torch.randn(n, c, size, size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    small = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
    params = torch.randn(found.taps.shape[0], 2 * c, device=device, dtype=half)
    second = params.flip(0)
    dense = torch.randn(n, 2 * c, size, size, device=device, dtype=half).contiguous(memory_format=torch.channels_last)
    mean, m2 = statistics(x, False)
    rstd = torch.rsqrt(m2 / (n * size * size) + 1e-5)
    upstream = torch.randn_like(x)
    index = (found.ids, found.order, found.offsets)
    segments = (found.tap_order, found.tap_offsets)
    call = torch.ops.spade_fast

    def modulation(
        source: Tensor, values: list[Tensor], ids: tuple, slopes: list[float], upsample: int
    ) -> list[Tensor]:
        return call.modulation(source, mean, rstd, values, *ids, slopes, upsample, True)

    def parameters() -> list[Tensor]:
        return [call.pattern_params(a, found.taps, weights[0], biases[0], weights[1], biases[1], *segments)]

    none = (None, None, None)
    gradients = call.pattern_params_backward
    return {
        "patterns": (lambda: list(call.patterns(codes, 3)[:2]), nbytes(codes, found.hidden_ids, found.codes)),
        "embedding_sum": (
            lambda: [call.embedding_sum(table, bias, found.codes, labels.has_edges, True)],
            nbytes(table, found.codes) + 4 * a.numel(),
        ),
        "embedding_sum_backward": (
            lambda: list(call.embedding_sum_backward(a, a, found.codes, labels.label_nc, labels.has_edges, True)),
            nbytes(found.codes, table) + 2 * 4 * a.numel(),
        ),
        "pattern_params": (parameters, nbytes(a, found.taps, *weights, params)),
        "pattern_params_backward": (
            lambda: list(gradients(params, a, found.taps, *weights, *segments)),
            nbytes(params, a, a, found.taps, *weights, *weights),
        ),
        "segments": (
            lambda: list(call.segments(found.ids, len(found.taps))),
            nbytes(found.ids, found.order, found.offsets),
        ),
        "statistics": (lambda: list(call.statistics(x, False)), nbytes(x)),
        "modulation": (
            lambda: modulation(x, [params], index, [0.2], 1),
            nbytes(x, x, found.ids, params),
        ),
        "modulation x2 outputs, upsampled": (
            lambda: modulation(small, [params, second], index, [0.2, 1.0], 2),
            nbytes(small, x, x, found.ids, params, params),
        ),
        "modulation dense": (lambda: modulation(x, [dense], none, [0.2], 1), nbytes(x, x, dense)),
        "modulation_backward": (
            lambda: call.modulation_backward([upstream], x, mean, rstd, [params], *index, [0.2], 1, True),
            nbytes(x, x, upstream, upstream, x, found.ids, found.order, params, params),
        ),
        "modulation_backward dense": (
            lambda: call.modulation_backward([upstream], x, mean, rstd, [dense], *none, [0.2], 1, True),
            nbytes(x, x, upstream, upstream, x, dense, dense),
        ),
        **label_conv_cases(codes, labels.label_nc, labels.has_edges),
    }


def label_conv_cases(codes: Tensor, label_nc: int, edges: bool) -> dict[str, tuple[Callable, int]]:
    """As the discriminator's first convolution on both of its scales, forward and backward."""
    n, size = codes.shape[:2]
    weight = torch.randn(64, label_nc, 4, 4, device=codes.device)
    table = weight.permute(2, 3, 1, 0).reshape(16, label_nc, 64)
    work: dict[str, tuple[Callable, int]] = {}
    for pooled in (False, True):
        options = (edges, 4, 2, 2, pooled)
        out_size = (size // 2 if pooled else size) // 2 + 1
        dout = torch.randn(n, 64, out_size, out_size, device=codes.device).contiguous(memory_format=torch.channels_last)
        moved, name = nbytes(codes, table, dout), " pooled" if pooled else ""

        def forward(options: tuple = options) -> list[Tensor]:
            return [torch.ops.spade_fast.label_conv(codes, table, None, *options)]

        def backward(dout: Tensor = dout, options: tuple = options) -> list[Tensor]:
            return list(torch.ops.spade_fast.label_conv_backward(dout, codes, label_nc, *options))

        work |= {f"label_conv{name}": (forward, moved), f"label_conv_backward{name}": (backward, moved)}
    return work


def all_patterns(labels: LabelMap) -> tuple[Callable, int]:
    """The patterns of both searches at six resolutions, from the map's own down, as a case."""
    codes = [labels.resized(labels.size[0] >> i, labels.size[1] >> i) for i in range(6)]

    def find() -> list[Tensor]:
        results = []
        for level in codes:
            hidden_ids, hidden_codes, _ = torch.ops.spade_fast.patterns(level, 3)
            results += [hidden_ids, hidden_codes, *torch.ops.spade_fast.patterns(hidden_ids, 3)[:2]]
        return results

    return find, nbytes(*codes, *find())


def recognize_cases(labels: LabelMap) -> dict[str, tuple[Callable, int]]:
    """The one-hot tensor of the map, in both layouts."""
    one_hot = labels.one_hot()

    def case(segmap: Tensor) -> tuple[Callable, int]:
        return lambda: list(torch.ops.spade_fast.recognize(segmap)), nbytes(segmap, labels.codes)

    last = one_hot.contiguous(memory_format=torch.channels_last)
    return {"recognize": case(one_hot), "recognize, channels-last": case(last)}


def kernels_of(call: Callable) -> dict[str, dict]:
    """Kernel name -> launches and microseconds on the GPU in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    return {e.key: {"launches": e.count, "us": e.self_device_time_total} for e in events}


def measure(options: argparse.Namespace) -> dict:
    device = options.device
    maps, source = label_maps(256)
    labels = LabelMap.cat([maps[i % len(maps)] for i in range(options.batch)]).to(device)
    bandwidth = measure_ceilings(device)["copy_gb_s"]
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    names = backend.available(device)
    result: dict = {"stamp": stamp(device), "copy_gb_s": bandwidth, "labels": source, "batch": options.batch, "ops": {}}
    for channels, size in options.layers:
        work = cases(labels, channels, size, dtype)
        if (channels, size) == options.layers[0]:
            work["patterns, six resolutions"] = all_patterns(labels)
            work |= recognize_cases(labels)
        for op, (call, floor_bytes) in work.items():
            with backend.use("torch"):
                expected = call()
            # Backward: a value within rounding of LeakyReLU's kink may fall on either side of it.
            bound = 2e-2 if dtype == torch.bfloat16 else 1e-3 if "backward" in op else 1e-4
            calls = {}
            for name in names:
                with backend.use(name):
                    for i, (got, want) in enumerate(zip(call(), expected, strict=True)):
                        check(f"{op} on {name}, result {i}", got, want, bound)

                def timed(name=name, call=call) -> None:
                    with backend.use(name):
                        call()

                calls[name] = timed
            times = interleave(calls, device, options.seconds, rounds=(3, 30))
            floor = floor_bytes / bandwidth / 1e6
            row = {n: {**t, "of_copy_bandwidth": floor / t["median_ms"]} for n, t in times.items()}
            if dtype == torch.bfloat16:
                for name, timed in calls.items():
                    row[name]["kernels"] = kernels_of(timed)
            result["ops"][f"{op}, C={channels} @{size}²"] = {"floor_ms": floor, "floor_bytes": floor_bytes, **row}
            text = "  ".join(f"{n} {t['median_ms']:.3f} ms ({floor / t['median_ms']:.0%})" for n, t in times.items())
            print(f"{op:34s} C={channels:4d} @{size:3d}²  floor {floor:8.3f} ms  {text}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=None, help="default: 16 on a GPU, 1 on a CPU")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each op and size")
    parser.add_argument("--quick", action="store_true", help="one layer size, short runs")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    cuda = torch.device(options.device).type == "cuda"
    options.batch = options.batch or (16 if cuda else 1)
    options.layers = [(128, 256), (256, 128), (512, 64), (1024, 32), (1024, 16), (64, 256)]
    if options.quick:
        options.seconds, options.layers = 0.5, [(128, 256), (1024, 32)] if cuda else [(64, 64)]
    write_json(options.json, measure(options))


if __name__ == "__main__":
    main()
