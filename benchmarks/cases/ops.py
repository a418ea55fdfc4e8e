# SPDX-License-Identifier: Apache-2.0
"""One call of each operator, at the shapes of a SPADE layer, with the bytes and the products that it needs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import check
from spade_fast import LabelMap
from spade_fast.ops import _backend as backend
from spade_fast.ops.statistics import statistics

HIDDEN = 128
TAPS = 9
CALL = torch.ops.spade_fast
# The sizes of the COCO-Stuff generator that differ in kind: channels and size of x.
SIZES = ((128, 256), (256, 128), (512, 64), (1024, 32), (1024, 16), (64, 256))


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors together; None has none."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor in channels-last memory."""
    return tensor.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        op: the operator's name.
        call: runs it and returns the tensors to compare.
        floor_bytes: bytes that must move. Each large input is read once, each output is written once, tables once.
        flops: floating-point operations of its matrix products, 0 without any. A multiply-add is two.
    """

    op: str
    call: Callable[[], list[Tensor]]
    floor_bytes: int
    flops: int = 0

    @property
    def bound(self) -> float:
        """Largest relative error of a right result of float32 operands."""
        # A value within rounding of LeakyReLU's kink may fall on either side of it.
        return 1e-3 if self.op == "modulation_backward" else 1e-5


class Operands:
    """What the operators take at one layer size.

    Args:
        labels: N label maps, on the device.
        channels: channels C of x.
        size: height and width of x.
        dtype: of x. The modulation parameters have it on a GPU, and float32 on a CPU, as in the layer.
    """

    def __init__(self, labels: LabelMap, channels: int, size: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        device, n, c = labels.device, len(labels), channels
        self.codes, self.label_nc, self.edges = labels.resized(size, size), labels.label_nc, labels.has_edges
        self.labels = LabelMap.from_codes(self.codes, labels.num_classes, labels.has_edges)
        found = self.labels.patterns(size, size, 3, backward=True)
        self.hidden_ids, self.hidden_codes, self.taps, self.ids = found.hidden_ids, found.codes, found.taps, found.ids
        assert found.order is not None and found.offsets is not None
        assert found.tap_order is not None and found.tap_offsets is not None
        self.order, self.offsets = found.order, found.offsets
        self.tap_order, self.tap_offsets = found.tap_order, found.tap_offsets
        half = dtype if device.type == "cuda" else torch.float32

        def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        self.table, self.bias = random(TAPS, self.label_nc, HIDDEN), random(HIDDEN)
        self.hidden = random(len(self.hidden_codes), HIDDEN, dtype=half)
        self.w_gamma = channels_last(random(c, HIDDEN, 3, 3, dtype=half) / 34)
        self.w_beta = channels_last(random(c, HIDDEN, 3, 3, dtype=half) / 34)
        self.b_gamma, self.b_beta = random(c, dtype=half), random(c, dtype=half)
        self.x = channels_last(random(n, c, size, size, dtype=dtype))
        self.small_x = channels_last(self.x[:, :, ::2, ::2])
        self.params = random(len(self.taps), 2 * c, dtype=half)
        self.other_params = self.params.flip(0)
        self.pixel_params = channels_last(random(n, 2 * c, size, size, dtype=half))
        self.mean, m2 = statistics(self.x, False)
        self.rstd = torch.rsqrt(m2 / (n * size * size) + 1e-5)
        self.upstream = torch.randn_like(self.x)
        self.scale, self.shift = random(c), random(c)
        self.label_table = random(64, self.label_nc, 4, 4).permute(2, 3, 1, 0).reshape(16, self.label_nc, 64)
        self.label_upstream = {
            pooled: channels_last(random(n, 64, out, out))
            for pooled, out in ((False, size // 2 + 1), (True, size // 2 // 2 + 1))
        }

    @functools.cached_property
    def one_hot(self) -> Tensor:
        """[N, label_nc, size, size]: the map as the original layer takes it."""
        return self.labels.one_hot()

    @functools.cached_property
    def double(self) -> Operands:
        """The same values in float64."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(twin, name, value.double())
        twin.label_upstream = {pooled: t.double() for pooled, t in self.label_upstream.items()}
        return twin


def _patterns(o: Operands) -> Case:
    moved = nbytes(o.codes, o.hidden_ids, o.hidden_codes)
    return Case("patterns", lambda: list(CALL.patterns(o.codes, 3)[:2]), moved)


def _all_patterns(o: Operands) -> Case:
    """Both searches at six resolutions, from the map's own down."""
    levels = [o.labels.resized(max(1, o.labels.size[0] >> i), max(1, o.labels.size[1] >> i)) for i in range(6)]

    def find() -> list[Tensor]:
        results = []
        for codes in levels:
            hidden_ids, hidden_codes, _ = CALL.patterns(codes, 3)
            results += [hidden_ids, hidden_codes, *CALL.patterns(hidden_ids, 3)[:2]]
        return results

    return Case("patterns", find, nbytes(*levels, *find()))


def _segments(o: Operands) -> Case:
    moved = nbytes(o.ids, o.order, o.offsets)
    return Case("segments", lambda: list(CALL.segments(o.ids, len(o.taps))), moved)


def _recognize(o: Operands, layout: Callable[[Tensor], Tensor]) -> Case:
    segmap = layout(o.one_hot)
    return Case("recognize", lambda: list(CALL.recognize(segmap)), nbytes(segmap, o.codes))


def _embedding_sum(o: Operands) -> Case:
    moved = nbytes(o.table, o.hidden_codes) + 4 * o.hidden.numel()
    return Case("embedding_sum", lambda: [CALL.embedding_sum(o.table, o.bias, o.hidden_codes, o.edges, True)], moved)


def _embedding_sum_backward(o: Operands) -> Case:
    def call() -> list[Tensor]:
        return list(CALL.embedding_sum_backward(o.hidden, o.hidden, o.hidden_codes, o.label_nc, o.edges, True))

    return Case("embedding_sum_backward", call, nbytes(o.hidden_codes, o.table) + 2 * 4 * o.hidden.numel())


def _pattern_flops(o: Operands) -> int:
    """Of gamma and beta, by the method with the fewer products: per pattern, or per distinct hidden row."""
    return 2 * min(len(o.taps), len(o.hidden)) * o.w_gamma.numel() * 2


def _pattern_params(o: Operands) -> Case:
    def call() -> list[Tensor]:
        parameters = (o.w_gamma, o.b_gamma, o.w_beta, o.b_beta)
        return [CALL.pattern_params(o.hidden, o.taps, *parameters, o.tap_order, o.tap_offsets)]

    return Case("pattern_params", call, nbytes(o.hidden, o.taps, o.w_gamma, o.w_beta, o.params), _pattern_flops(o))


def _pattern_params_backward(o: Operands) -> Case:
    weights = (o.w_gamma, o.w_beta)

    def call() -> list[Tensor]:
        return list(
            CALL.pattern_params_backward(o.params, o.hidden, o.taps, *weights, o.tap_order, o.tap_offsets),
        )

    moved = nbytes(o.params, o.hidden, o.hidden, o.taps, *weights, *weights)
    return Case("pattern_params_backward", call, moved, 2 * _pattern_flops(o))


def _statistics(o: Operands) -> Case:
    return Case("statistics", lambda: list(CALL.statistics(o.x, False)), nbytes(o.x))


def _modulation(o: Operands) -> Case:
    def call() -> list[Tensor]:
        return CALL.modulation(o.x, o.mean, o.rstd, [o.params], o.ids, o.order, o.offsets, [0.2], 1, True)

    return Case("modulation", call, nbytes(o.x, o.x, o.ids, o.params))


def _modulation_twice(o: Operands) -> Case:
    params = [o.params, o.other_params]

    def call() -> list[Tensor]:
        return CALL.modulation(o.small_x, o.mean, o.rstd, params, o.ids, o.order, o.offsets, [0.2, 1.0], 2, True)

    return Case("modulation", call, nbytes(o.small_x, o.x, o.x, o.ids, *params))


def _modulation_dense(o: Operands) -> Case:
    def call() -> list[Tensor]:
        return CALL.modulation(o.x, o.mean, o.rstd, [o.pixel_params], None, None, None, [0.2], 1, True)

    return Case("modulation", call, nbytes(o.x, o.x, o.pixel_params))


def _modulation_backward(o: Operands, dense: bool) -> Case:
    params = o.pixel_params if dense else o.params
    index: Sequence[Tensor | None] = (None, None, None) if dense else (o.ids, o.order, o.offsets)

    def call() -> list[Tensor]:
        return CALL.modulation_backward([o.upstream], o.x, o.mean, o.rstd, [params], *index, [0.2], 1, True)

    # x and its gradient are read twice: sums over the image come before the gradient of x.
    moved = nbytes(o.x, o.x, o.upstream, o.upstream, o.x, params, params, *index[:2])
    return Case("modulation_backward", call, moved)


def _normalization_gradient(o: Operands) -> Case:
    def call() -> list[Tensor]:
        dx = o.upstream.clone()  # the operator writes to it
        CALL.normalization_gradient(dx, o.x, o.scale, o.shift)
        return [dx]

    return Case("normalization_gradient", call, nbytes(o.upstream, o.x, o.x, o.x, o.x))


def _label_conv(o: Operands, pooled: bool) -> Case:
    def call() -> list[Tensor]:
        return [CALL.label_conv(o.codes, o.label_table, None, o.edges, 4, 2, 2, pooled)]

    return Case("label_conv", call, nbytes(o.codes, o.label_table, o.label_upstream[pooled]))


def _label_conv_backward(o: Operands, pooled: bool) -> Case:
    upstream = o.label_upstream[pooled]

    def call() -> list[Tensor]:
        return list(CALL.label_conv_backward(upstream, o.codes, o.label_nc, o.edges, 4, 2, 2, pooled))

    return Case("label_conv_backward", call, nbytes(o.codes, o.label_table, upstream))


# The first convolution of the discriminator is label_conv; its second scale sees the pooled map.
CASES: dict[str, Callable[[Operands], Case]] = {
    "patterns": _patterns,
    "embedding_sum": _embedding_sum,
    "embedding_sum_backward": _embedding_sum_backward,
    "pattern_params": _pattern_params,
    "pattern_params_backward": _pattern_params_backward,
    "segments": _segments,
    "statistics": _statistics,
    "modulation": _modulation,
    "modulation x2 outputs, upsampled": _modulation_twice,
    "modulation dense": _modulation_dense,
    "modulation_backward": functools.partial(_modulation_backward, dense=False),
    "modulation_backward dense": functools.partial(_modulation_backward, dense=True),
    "normalization_gradient": _normalization_gradient,
    "label_conv": functools.partial(_label_conv, pooled=False),
    "label_conv_backward": functools.partial(_label_conv_backward, pooled=False),
    "label_conv pooled": functools.partial(_label_conv, pooled=True),
    "label_conv_backward pooled": functools.partial(_label_conv_backward, pooled=True),
    "patterns, six resolutions": _all_patterns,
    "recognize": functools.partial(_recognize, layout=torch.Tensor.contiguous),
    "recognize, channels-last": functools.partial(_recognize, layout=channels_last),
}


def expected_of(build: Callable[[Operands], Case], operands: Operands) -> list[Tensor]:
    """The results in float64, by torch's own operations."""
    with backend.use("torch"):
        return build(operands.double).call()


def check_case(name: str, case: Case, expected: list[Tensor], bound: float) -> float:
    """The largest relative error of the case's results on the present backend.

    Raises:
        RuntimeError: a floating-point result is further than bound from the expected one, or another result differs.
    """
    largest = 0.0
    for i, (got, want) in enumerate(zip(case.call(), expected, strict=True)):
        if want.is_floating_point():
            largest = max(largest, check(f"{name}, result {i}", got, want, bound))
        elif not torch.equal(got, want):
            raise RuntimeError(f"{name}, result {i}: integers differ; nothing is timed")
    return largest
