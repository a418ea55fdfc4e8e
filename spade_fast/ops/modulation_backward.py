# SPDX-License-Identifier: Apache-2.0
"""The backward of modulation: gradients of x and of the parameters, in two passes over the pixels.

With xhat = (x - mean) * rstd, z = xhat * (1 + gamma) + beta and out = leaky_relu(z):

    pass 1  dz = dout * leaky_relu'(z),  dgamma = Σ dz * xhat,  dbeta = Σ dz
    pass 2  dx = rstd * (dz * (1 + gamma) - (s1 + xhat * s2) / count)

Pass 2 is needed only where the statistics depend on x. There s1 and s2 are the sums over pixels of dz * (1 + gamma)
and of dz * (1 + gamma) * xhat, as in the backward of batch normalization (Ioffe and Szegedy 2015, section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spade_fast.ops import _register
from spade_fast.ops._modulation_rows import Norm, Rows, folded, is_per_sample, norm_of, normalized
from spade_fast.ops._segment_sum import segment_sum
from spade_fast.ops.segments import segments

GROUP_ELEMENTS = 2**24  # Elements of per-pixel gradients kept at once on a CPU, before they are summed by pattern.


class _Output(NamedTuple):
    """One output of the call."""

    dout: Tensor  # [N, C, Ho, Wo]
    params: Tensor  # [P, 2C], or [N, 2C, Ho, Wo]
    slope: float


class _Group(NamedTuple):
    """Some images: their rows of x, their output pixels, and their patterns, which are numbered image by image."""

    rows: slice
    pixels: slice
    patterns: slice


def _image_groups(rows: Rows, offsets: Tensor) -> list[_Group]:
    """Groups of images with at most GROUP_ELEMENTS per-pixel gradients on a CPU; all images together on a GPU."""
    image_pixels = rows.h * rows.pixels
    images = rows.n
    if offsets.device.type == "cpu":
        images = max(1, min(rows.n, GROUP_ELEMENTS // max(1, 2 * rows.c * image_pixels)))
    firsts = range(0, rows.n, images)
    bounds = [0, offsets.numel() - 1]
    if len(firsts) > 1:
        limits = torch.tensor([first * image_pixels for first in firsts[1:]], dtype=offsets.dtype)
        bounds[1:1] = torch.searchsorted(offsets, limits).tolist()
    groups = []
    for number, first in enumerate(firsts):
        stop = min(first + images, rows.n)
        pixels = slice(first * image_pixels, stop * image_pixels)
        groups.append(_Group(slice(first * rows.h, stop * rows.h), pixels, slice(bounds[number], bounds[number + 1])))
    return groups


def _pattern_pass(
    rows: Rows,
    norm: Norm | None,
    outputs: list[_Output],
    pattern_ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    dx: Tensor,
) -> list[Tensor]:
    """Pass 1 with parameters by pattern. Fills dx with the part that does not go through the statistics.

    Args:
        dx: [N·H, 1, W, 1, C] in the dtype of accumulation.

    Returns:
        [dgamma | dbeta] [P, 2C] of each output, in the dtype of accumulation.
    """
    groups = _image_groups(rows, offsets)
    pixels = max(group.pixels.stop - group.pixels.start for group in groups)
    buffer = _register.scratch((pixels, 2 * rows.c), rows.acc, dx.device)
    dparams = []
    for output in outputs:
        table = folded(output.params, norm, pattern_ids, rows.acc)
        dout = rows.of_output(output.dout)
        sums = []
        for group in groups:
            gradients = buffer[: group.pixels.stop - group.pixels.start]
            for block in rows.blocks(group.rows, split_images=is_per_sample(norm)):
                x = rows.x[block.rows].to(rows.acc)
                scale, shift = rows.gather(table, pattern_ids.view(-1), block)
                start = group.pixels.start
                target = gradients[block.pixels.start - start : block.pixels.stop - start]
                dgamma, dbeta = target.view(*scale.shape[:-1], -1).chunk(2, -1)
                if output.slope == 1.0:
                    dbeta.copy_(dout[block.rows])
                else:
                    z = torch.addcmul(shift, x, scale)
                    _activation_gradient(dout[block.rows].to(rows.acc), z, output.slope, out=dbeta)
                torch.mul(dbeta, normalized(x, norm, block.image), out=dgamma)
                _add_gradient(dx[block.rows], dbeta, scale, first=output is outputs[0])
            sums.append(_sum_by_pattern(gradients, group, order, offsets))
        dparams.append(sums[0] if len(sums) == 1 else torch.cat(sums))
    return dparams


def _activation_gradient(dout: Tensor, z: Tensor, slope: float, out: Tensor) -> None:
    """out = dout * (1 where z > 0, slope elsewhere)."""
    torch.ops.aten.leaky_relu_backward.grad_input(dout, z, slope, False, grad_input=out)


def _add_gradient(dx: Tensor, dz: Tensor, scale: Tensor, first: bool) -> None:
    """dx += dz * scale, summed over the output pixels of each x; the first output's share is assigned."""
    if dz.shape == dx.shape:
        if first:
            torch.mul(dz, scale, out=dx)
        else:
            dx.addcmul_(dz, scale)
        return
    product = (dz * scale).sum((1, 3), keepdim=True)
    if first:
        dx.copy_(product)
    else:
        dx.add_(product)


def _sum_by_pattern(gradients: Tensor, group: _Group, order: Tensor, offsets: Tensor) -> Tensor:
    """Sums of a group's per-pixel gradients [pixels, 2C] over each of its patterns."""
    positions = order[group.pixels] - group.pixels.start
    bounds = offsets[group.patterns.start : group.patterns.stop + 1] - group.pixels.start
    return segment_sum(gradients, positions, bounds)


def _channel_sums(
    outputs: list[_Output], dparams: list[Tensor], offsets: Tensor, groups: int, image_pixels: int
) -> tuple[Tensor, Tensor]:
    """s1 and s2 [G, C], as sums over patterns instead of pixels. groups: 1, or N for statistics of each sample."""
    c = dparams[0].shape[1] // 2
    totals = []
    for output, d in zip(outputs, dparams, strict=True):
        scale = output.params[:, :c].to(d.dtype) + 1
        weighted = torch.cat([scale * d[:, c:], scale * d[:, :c]], 1)
        if groups == 1:
            totals.append(weighted.sum(0, keepdim=True))
        else:
            limits = torch.arange(groups + 1, dtype=offsets.dtype, device=offsets.device) * image_pixels
            bounds = torch.searchsorted(offsets, limits, out_int32=True)
            patterns = torch.arange(weighted.shape[0], dtype=torch.int32, device=offsets.device)
            totals.append(segment_sum(weighted, patterns, bounds))
    s1, s2 = torch.stack(totals).sum(0).chunk(2, 1)
    return s1, s2


def _dense_pass(
    rows: Rows, norm: Norm | None, outputs: list[_Output], dx: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Pass 1 with parameters by pixel. Fills dx with the part that does not go through the statistics.

    Returns:
        The gradient of each output's parameters, and s1 and s2 [G, C], which are zero without statistics.
    """
    groups = norm.mean.shape[0] if norm is not None else 1
    s1, s2 = torch.zeros(2, groups, rows.c, dtype=rows.acc, device=dx.device)
    dparams = [torch.empty_like(output.params, memory_format=torch.channels_last) for output in outputs]
    for number, output in enumerate(outputs):
        params, dout, gradients = (rows.of_output(t) for t in (output.params, output.dout, dparams[number]))
        for block in rows.blocks(split_images=is_per_sample(norm)):
            xhat = normalized(rows.x[block.rows].to(rows.acc), norm, block.image)
            gamma, beta = params[block.rows].to(rows.acc).chunk(2, -1)
            dz = dout[block.rows].to(rows.acc)
            if output.slope != 1.0:
                z = torch.addcmul(beta, xhat, gamma).add_(xhat)
                _activation_gradient(dz, z, output.slope, out=z)
                dz = z
            dgamma, dbeta = gradients[block.rows].chunk(2, -1)
            dbeta.copy_(dz)
            dgamma.copy_(dz * xhat)
            weighted = torch.addcmul(dz, dz, gamma)  # dz * (1 + gamma)
            if rows.upsample != 1:  # From here on only the sum over the output pixels of each x matters.
                weighted = weighted.sum((1, 3), keepdim=True)
            if norm is not None:
                group = norm.group(block.image)
                s1[group] += weighted.sum((0, 1, 2, 3))
                s2[group] += (weighted * xhat).sum((0, 1, 2, 3))
            _add_scaled(dx[block.rows], weighted, norm, block.image, first=number == 0)
    return dparams, s1, s2


def _add_scaled(dx: Tensor, dxhat: Tensor, norm: Norm | None, image: int, first: bool) -> None:
    """dx += dxhat * rstd; the first output's share is assigned."""
    if norm is None:
        if first:
            dx.copy_(dxhat)
        else:
            dx.add_(dxhat)
        return
    rstd = norm.rstd[norm.group(image)]
    if first:
        torch.mul(dxhat, rstd, out=dx)
    else:
        dx.addcmul_(dxhat, rstd)


def _statistics_pass(rows: Rows, norm: Norm, s1: Tensor, s2: Tensor, dx: Tensor) -> None:
    """Pass 2: dx -= rstd * (s1 + xhat * s2) / count, in place. count: elements of x that share a mean."""
    count = rows.n * rows.h * rows.w // norm.mean.shape[0]
    scale = -norm.rstd * norm.rstd * s2 / count
    shift = -norm.rstd * s1 / count - norm.mean * scale
    for block in rows.blocks(split_images=norm.per_sample):
        group = norm.group(block.image)
        dx[block.rows].addcmul_(rows.x[block.rows].to(rows.acc), scale[group]).add_(shift[group])


def modulation_backward_torch(
    douts: list[Tensor],
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: list[Tensor],
    pattern_ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int,
    stats_from_x: bool,
) -> list[Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_register.memory_format(x))
    if x.numel() == 0:
        return [dx, *(_empty_gradient(p).zero_() for p in params)]
    rows = Rows(x, upsample)
    norm = norm_of(mean, rstd, rows.acc)
    outputs = [_Output(*output) for output in zip(douts, params, slopes, strict=True)]
    # The gradient is accumulated in dx itself when dx has the dtype and the memory order of accumulation.
    direct = dx.dtype == rows.acc and _register.memory_format(x) == torch.channels_last
    total = rows.of_input(dx) if direct else torch.empty(rows.x.shape, dtype=rows.acc, device=x.device)

    if pattern_ids is None:
        dparams, s1, s2 = _dense_pass(rows, norm, outputs, total)
        if stats_from_x and norm is not None:
            _statistics_pass(rows, norm, s1, s2, total)
    else:
        if order is None or offsets is None:
            order, offsets = segments(pattern_ids, params[0].shape[0])
        sums = _pattern_pass(rows, norm, outputs, pattern_ids.contiguous(), order, offsets, total)
        if stats_from_x and norm is not None:
            s1, s2 = _channel_sums(outputs, sums, offsets, norm.mean.shape[0], rows.h * rows.pixels)
            _statistics_pass(rows, norm, s1, s2, total)
        dparams = [d.to(p.dtype) for d, p in zip(sums, params, strict=True)]

    if not direct:
        dx.copy_(total.view(rows.n, rows.h, rows.w, rows.c).permute(0, 3, 1, 2))
    return [dx, *dparams]


def _empty_gradient(params: Tensor) -> Tensor:
    return torch.empty_like(params, memory_format=torch.channels_last if params.dim() == 4 else torch.contiguous_format)


def _modulation_backward_fake(
    douts: list[Tensor],
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: list[Tensor],
    pattern_ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int,
    stats_from_x: bool,
) -> list[Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_register.memory_format(x))
    return [dx, *(_empty_gradient(p) for p in params)]


ARGUMENTS = (
    "Tensor x, Tensor? mean, Tensor? rstd, Tensor[] params, Tensor? pattern_ids, Tensor? order, Tensor? offsets,"
    " float[] slopes, int upsample, bool stats_from_x"
)
modulation_backward_op = _register.register(
    f"modulation_backward(Tensor[] douts, {ARGUMENTS}) -> Tensor[]",
    modulation_backward_torch,
    _modulation_backward_fake,
    device_argument=1,
)
_register.register_first_order_only("modulation_backward", of="modulation")
