# SPDX-License-Identifier: Apache-2.0
"""modulation: normalize, scale and shift by pattern or by pixel, activate and enlarge, reading the activation once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.ops import _register
from spade_fast.ops._segment_sum import segment_sum
from spade_fast.ops.segments import segments

_BLOCK = 2**19  # elements of x handled at once on a CPU: the buffers of a block stay in cache
_BLOCK_GPU = 2**27
_GROUP = 2**24  # elements of per-pixel gradients kept at once before they are summed by pattern, on a CPU


class _Geometry:
    """Channels-last row views of one call: B = N·H rows of pixels, [1, W, 1, C] of x and [r, W, r, C] of outputs."""

    def __init__(self, x: Tensor, upsample: int) -> None:
        self.n, self.c, self.h, self.w = x.shape
        self.r = upsample
        self.acc = _register.accumulation_dtype(x.dtype)
        self.rows = self.rows_of(x)
        self.pixels = self.r * self.r * self.w  # output pixels of one row of x
        block = _BLOCK if x.device.type == "cpu" else _BLOCK_GPU
        self.step = max(1, block // max(1, self.pixels * self.c))

    def rows_of(self, t: Tensor) -> Tensor:
        """[B, 1, W, 1, C] view (or copy, when not channels-last) of a tensor of x's size."""
        t = t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return t.reshape(-1, 1, self.w, 1, self.c)

    def out_rows(self, t: Tensor) -> Tensor:
        """[B, r, W, r, channels] view (or copy, when not channels-last) of a tensor of the output's size."""
        t = t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return t.reshape(-1, self.r, self.w, self.r, t.shape[-1])

    def blocks(self, start: int, stop: int, split_images: bool) -> Iterator[tuple[int, int]]:
        """(i, j) with rows i..j-1 of start..stop-1; not across images if split_images."""
        i = start
        while i < stop:
            j = min(i + self.step, stop)
            if split_images:
                j = min(j, (i // self.h + 1) * self.h)
            yield i, j
            i = j


def _empty_output(x: Tensor, upsample: int) -> Tensor:
    n, c, h, w = x.shape
    shape = (n, c, h * upsample, w * upsample)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_register.memory_format(x))


def _image_of_pattern(ids: Tensor, num: int) -> Tensor:
    """[P] the image of each pattern (patterns are found per image)."""
    n = ids.shape[0]
    image = torch.zeros(num, dtype=torch.int64, device=ids.device)
    image[ids.reshape(-1)] = torch.arange(n, device=ids.device).repeat_interleave(ids[0].numel() if n else 0)
    return image


def _scale_shift(params: Tensor, mean: Tensor | None, rstd: Tensor | None, ids: Tensor, acc: torch.dtype) -> Tensor:
    """[P, 2C] with out = x * scale + shift: statistics folded into the pattern parameters."""
    c = params.shape[1] // 2
    params = params.to(acc)  # before the 1 is added
    table = torch.empty_like(params)
    scale, shift = table[:, :c], table[:, c:]
    torch.add(params[:, :c], 1.0, out=scale)
    if mean is None:
        shift.copy_(params[:, c:])
        return table
    mean, rstd = mean.to(acc), rstd.to(acc)
    if mean.shape[0] != 1:
        image = _image_of_pattern(ids, params.shape[0])
        mean, rstd = mean[image], rstd[image]
    scale.mul_(rstd)
    torch.addcmul(params[:, c:], mean, scale, value=-1, out=shift)
    return table


def _normalized(x: Tensor, mean: Tensor | None, rstd: Tensor | None, image: int) -> Tensor:
    """(x - mean) * rstd of a block of rows of one image (any, when the statistics are shared)."""
    if mean is None:
        return x
    g = image if mean.shape[0] != 1 else 0
    return torch.addcmul(-(mean[g] * rstd[g]).to(x.dtype), x, rstd[g].to(x.dtype))


def modulation_torch(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: list[Tensor],
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int,
    stats: bool,
) -> list[Tensor]:
    outs = [_empty_output(x, upsample) for _ in params]
    if x.numel() == 0:
        return outs
    g = _Geometry(x, upsample)
    c, acc = g.c, g.acc
    direct = x.dtype == acc
    targets = [
        out
        if _register.memory_format(x) == torch.channels_last
        else torch.empty_like(out, memory_format=torch.channels_last)
        for out in outs
    ]
    rows = [g.out_rows(t) for t in targets]
    if ids is None:
        dense = [g.out_rows(p) for p in params]
        for i, j in g.blocks(0, g.n * g.h, split_images=mean is not None and mean.shape[0] != 1):
            xhat = _normalized(g.rows[i:j].to(acc), mean, rstd, i // g.h)
            for m, slope in enumerate(slopes):
                p = dense[m][i:j]
                block = rows[m][i:j]
                out = (
                    torch.addcmul(xhat, xhat, p[..., :c], out=block)
                    if direct
                    else torch.addcmul(xhat, xhat, p[..., :c])
                )
                out.add_(p[..., c:])
                _finish_block(out, block, slope)
    else:
        numbers = ids.reshape(-1)
        tables = [_scale_shift(p, mean, rstd, ids, acc) for p in params]
        for i, j in g.blocks(0, g.n * g.h, split_images=False):
            xs = g.rows[i:j].to(acc)
            number = numbers[i * g.pixels : j * g.pixels]
            for m, slope in enumerate(slopes):
                p = tables[m].index_select(0, number).view(j - i, g.r, g.w, g.r, 2 * c)
                block = rows[m][i:j]
                out = block if direct else torch.empty(block.shape, dtype=acc, device=x.device)
                torch.addcmul(p[..., c:], xs, p[..., :c], out=out)
                _finish_block(out, block, slope)
    for out, target in zip(outs, targets, strict=True):
        if target is not out:
            out.copy_(target)
    return outs


def _finish_block(out: Tensor, block: Tensor, slope: float) -> None:
    """LeakyReLU, and the copy to the output's own dtype when computed in another."""
    if slope != 1.0:
        F.leaky_relu_(out, slope)
    if out.data_ptr() != block.data_ptr():
        block.copy_(out)


def _activation_gradient(dout: Tensor, z: Tensor, slope: float, out: Tensor) -> None:
    """out = dout * (1 where z > 0, slope elsewhere)."""
    torch.ops.aten.leaky_relu_backward.grad_input(dout, z, slope, False, grad_input=out)


def _add_gradient(g: _Geometry, dx: Tensor, dz: Tensor, scale: Tensor, first: bool) -> None:
    """dx += dz * scale, summed over the r×r outputs of each x; dx is assigned the first time."""
    if g.r == 1:
        torch.mul(dz, scale, out=dx) if first else dx.addcmul_(dz, scale)
        return
    product = (dz * scale).sum((1, 3), keepdim=True)
    dx.copy_(product) if first else dx.add_(product)


def _pass_1(
    g: _Geometry,
    douts: list[Tensor],
    mean: Tensor | None,
    rstd: Tensor | None,
    params: list[Tensor],
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    slopes: list[float],
    dx: Tensor,
) -> list[Tensor]:
    """With parameters by pattern. Fills dx [B, 1, W, 1, C] with the part that does not go through the statistics;
    returns dparams [P, 2C] = [dgamma | dbeta]."""
    c, acc, device = g.c, g.acc, g.rows.device
    per_sample = mean is not None and mean.shape[0] != 1
    image_pixels = g.h * g.pixels
    # Groups of images whose per-pixel gradients fit the buffer; patterns are in image order, so a group's are a range.
    images = g.n if device.type != "cpu" else max(1, min(g.n, _GROUP // max(1, 2 * c * image_pixels)))
    starts = list(range(0, g.n, images))
    if len(starts) == 1:
        bounds = [0, offsets.numel() - 1]
    else:
        limits = torch.tensor([s * image_pixels for s in starts[1:]], dtype=offsets.dtype, device=device)
        bounds = [0, *torch.searchsorted(offsets, limits).tolist(), offsets.numel() - 1]
    numbers = ids.reshape(-1)
    buffer = _register.scratch((images * image_pixels, 2 * c), acc, device)
    dparams = []
    for m, slope in enumerate(slopes):
        table = _scale_shift(params[m], mean, rstd, ids, acc)
        dout_rows = g.out_rows(douts[m])
        sums = []
        for group, start in enumerate(starts):
            first_row, last_row = start * g.h, min(start + images, g.n) * g.h
            for i, j in g.blocks(first_row, last_row, split_images=per_sample):
                xs = g.rows[i:j].to(acc)
                number = numbers[i * g.pixels : j * g.pixels]
                p = table.index_select(0, number).view(j - i, g.r, g.w, g.r, 2 * c)
                d = buffer[(i - first_row) * g.pixels : (j - first_row) * g.pixels].view(p.shape)
                dz = d[..., c:]
                if slope == 1.0:
                    dz.copy_(dout_rows[i:j])
                else:
                    _activation_gradient(
                        dout_rows[i:j].to(acc), torch.addcmul(p[..., c:], xs, p[..., :c]), slope, out=dz
                    )
                torch.mul(dz, _normalized(xs, mean, rstd, i // g.h), out=d[..., :c])
                _add_gradient(g, dx[i:j], dz, p[..., :c], first=m == 0)
            lo, hi = bounds[group], bounds[group + 1]
            first_pixel, last_pixel = start * image_pixels, last_row * g.pixels
            positions = order[first_pixel:last_pixel] - first_pixel
            local = offsets[lo : hi + 1] - first_pixel
            sums.append(segment_sum(buffer[: last_pixel - first_pixel], positions, local))
        dparams.append(sums[0] if len(sums) == 1 else torch.cat(sums))
    return dparams


def _channel_sums(
    params: list[Tensor], dparams: list[Tensor], offsets: Tensor, images: int, image_pixels: int
) -> tuple[Tensor, Tensor]:
    """s1 = sum over pixels of dz·(1+gamma), s2 = of dz·(1+gamma)·xhat, [G, C]: sums over patterns, not over pixels.

    images: 1 for statistics of the batch, N for statistics of each sample."""
    c = params[0].shape[1] // 2
    total = 0
    for p, d in zip(params, dparams, strict=True):
        scale = p[:, :c].to(d.dtype) + 1
        weighted = torch.cat([scale * d[:, c:], scale * d[:, :c]], 1)
        if images == 1:
            total = total + weighted.sum(0, keepdim=True)
        else:
            limits = torch.arange(images + 1, dtype=offsets.dtype, device=offsets.device) * image_pixels
            bounds = torch.searchsorted(offsets, limits, out_int32=True)
            rows = torch.arange(weighted.shape[0], dtype=torch.int32, device=offsets.device)
            total = total + segment_sum(weighted, rows, bounds)
    return total[:, :c], total[:, c:]


def _dense_pass_1(
    g: _Geometry,
    douts: list[Tensor],
    mean: Tensor | None,
    rstd: Tensor | None,
    params: list[Tensor],
    slopes: list[float],
    dx: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """With parameters by pixel. Fills dx with the part that does not go through the statistics; returns dparams, s1
    and s2."""
    c, acc, device = g.c, g.acc, g.rows.device
    groups = 1 if mean is None else mean.shape[0]
    s1, s2 = torch.zeros(2, groups, c, dtype=acc, device=device)
    dparams = [torch.empty_like(p, memory_format=torch.channels_last) for p in params]
    for m, slope in enumerate(slopes):
        p_rows, d_rows, dout_rows = g.out_rows(params[m]), g.out_rows(dparams[m]), g.out_rows(douts[m])
        for i, j in g.blocks(0, g.n * g.h, split_images=groups != 1):
            image = i // g.h
            group = image if groups != 1 else 0
            xhat = _normalized(g.rows[i:j].to(acc), mean, rstd, image)
            p = p_rows[i:j].to(acc)
            dz = dout_rows[i:j].to(acc)
            if slope != 1.0:
                z = torch.addcmul(p[..., c:], xhat, p[..., :c]).add_(xhat)
                _activation_gradient(dz, z, slope, out=z)
                dz = z
            d_rows[i:j, ..., c:] = dz
            d_rows[i:j, ..., :c] = dz * xhat
            weighted = torch.addcmul(dz, dz, p[..., :c])  # dz * (1 + gamma)
            if g.r != 1:  # from here on only their sum over the pixels of one x matters
                weighted = weighted.sum((1, 3), keepdim=True)
            block = dx[i:j]
            if mean is None:
                block.copy_(weighted) if m == 0 else block.add_(weighted)
                continue
            s1[group] += weighted.sum((0, 1, 2, 3))
            s2[group] += (weighted * xhat).sum((0, 1, 2, 3))
            scale = rstd[group].to(acc)
            torch.mul(weighted, scale, out=block) if m == 0 else block.addcmul_(weighted, scale)
    return dparams, s1, s2


def _pass_2(g: _Geometry, dx: Tensor, mean: Tensor, rstd: Tensor, s1: Tensor, s2: Tensor, count: int) -> None:
    """dx -= rstd * (s1 + xhat * s2) / count: what the statistics' own dependence on x contributes. In place."""
    mean, rstd = mean.to(g.acc), rstd.to(g.acc)
    k1 = -rstd * rstd * s2 / count
    k0 = -rstd * s1 / count - mean * k1
    for i, j in g.blocks(0, g.n * g.h, split_images=mean.shape[0] != 1):
        group = i // g.h if mean.shape[0] != 1 else 0
        dx[i:j].addcmul_(g.rows[i:j].to(g.acc), k1[group]).add_(k0[group])


def modulation_backward_torch(
    douts: list[Tensor],
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: list[Tensor],
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int,
    stats: bool,
) -> list[Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_register.memory_format(x))
    if x.numel() == 0:
        return [dx, *(_empty_gradient(p).zero_() for p in params)]
    g = _Geometry(x, upsample)
    # Accumulated in dx itself when it has the accumulation's dtype and order.
    direct = dx.dtype == g.acc and _register.memory_format(x) == torch.channels_last
    partial = g.rows_of(dx) if direct else torch.empty(g.rows.shape, dtype=g.acc, device=x.device)
    if ids is None:
        dparams, s1, s2 = _dense_pass_1(g, douts, mean, rstd, params, slopes, partial)
    else:
        if order is None or offsets is None:
            order, offsets = segments(ids, params[0].shape[0])
        sums = _pass_1(g, douts, mean, rstd, params, ids, order, offsets, slopes, partial)
        if stats and mean is not None:
            s1, s2 = _channel_sums(params, sums, offsets, mean.shape[0], g.h * g.pixels)
        dparams = [d.to(p.dtype) for d, p in zip(sums, params, strict=True)]
    if stats and mean is not None:
        _pass_2(g, partial, mean, rstd, s1, s2, g.n * g.h * g.w // mean.shape[0])
    if not direct:
        dx.copy_(partial.view(g.n, g.h, g.w, g.c).permute(0, 3, 1, 2))
    return [dx, *dparams]


def _empty_gradient(params: Tensor) -> Tensor:
    return torch.empty_like(params, memory_format=torch.channels_last if params.dim() == 4 else torch.contiguous_format)


def modulation_fake(x, mean, rstd, params, ids, order, offsets, slopes, upsample, stats):
    return [_empty_output(x, upsample) for _ in params]


def _modulation_backward_fake(douts, x, mean, rstd, params, ids, order, offsets, slopes, upsample, stats):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_register.memory_format(x))
    return [dx, *(_empty_gradient(p) for p in params)]


_ARGUMENTS = (
    "Tensor x, Tensor? mean, Tensor? rstd, Tensor[] params, Tensor? ids, Tensor? order, Tensor? offsets,"
    " float[] slopes, int upsample, bool stats"
)
modulation_op = _register.register(f"modulation({_ARGUMENTS}) -> Tensor[]", modulation_torch, modulation_fake)
modulation_backward_op = _register.register(
    f"modulation_backward(Tensor[] douts, {_ARGUMENTS}) -> Tensor[]",
    modulation_backward_torch,
    _modulation_backward_fake,
    module="modulation",
    device_argument=1,
)


def _setup(ctx, inputs, output) -> None:
    x, mean, rstd, params, ids, order, offsets, ctx.slopes, ctx.upsample, ctx.stats = inputs
    ctx.outputs = len(params)
    ctx.save_for_backward(x, mean, rstd, ids, order, offsets, *params)
    ctx.shape = output[0].shape


def _backward(ctx, douts: list[Tensor | None]) -> tuple:
    x, mean, rstd, ids, order, offsets, *params = ctx.saved_tensors
    douts = [x.new_zeros(ctx.shape) if d is None else d for d in douts]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        dx, dparams = _differentiable_backward(ctx, douts, x, mean, rstd, params, ids)
        return dx, None, None, dparams, None, None, None, None, None, None
    dx, *dparams = modulation_backward_op(
        douts, x, mean, rstd, params, ids, order, offsets, ctx.slopes, ctx.upsample, ctx.stats
    )
    return dx, None, None, dparams, None, None, None, None, None, None


def _differentiable_backward(ctx, douts, x, mean, rstd, params, ids) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dx, dparams) as functions of douts, x and params, for second derivatives."""

    def outputs(x: Tensor, *params: Tensor) -> list[Tensor]:
        return modulation_plain(x, mean, rstd, params, ids, ctx.slopes, ctx.upsample, ctx.stats)

    needed = [ctx.needs_input_grad[0], *(p.requires_grad for p in params)]
    dx, *dparams = _register.gradients(outputs, (x, *params), douts, needed)
    return dx, dparams


def modulation_plain(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: Sequence[Tensor],
    ids: Tensor | None,
    slopes: list[float],
    upsample: int,
    stats: bool,
) -> list[Tensor]:
    """`modulation` in operations that can be differentiated any number of times; with stats, mean and rstd too."""
    acc = _register.accumulation_dtype(x.dtype)
    xhat = x.to(acc)
    if mean is not None:
        mean, rstd = (t.to(acc)[:, :, None, None] for t in (mean, rstd))
        if stats:
            axes = (0, 2, 3) if mean.shape[0] == 1 else (2, 3)
            variance, center = torch.var_mean(xhat, axes, correction=0, keepdim=True)
            eps = (rstd**-2 - variance).detach()  # what was added to the variance
            mean, rstd = center, torch.rsqrt(variance + eps)
        xhat = (xhat - mean) * rstd
    if upsample != 1:
        xhat = xhat.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    outs = []
    for p, slope in zip(params, slopes, strict=True):
        p = p.to(acc) if ids is None else p.to(acc)[ids.to(torch.int64)].permute(0, 3, 1, 2)
        gamma, beta = p.chunk(2, 1)
        out = xhat * (1 + gamma) + beta
        outs.append((out if slope == 1.0 else F.leaky_relu(out, slope)).to(x.dtype))
    return outs


_register.register_gradient("modulation", _backward, _setup)
_register.register_first_order_only("modulation_backward", of="modulation")


def modulation(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    params: list[Tensor],
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slopes: list[float],
    upsample: int = 1,
    stats: bool = False,
) -> list[Tensor]:
    """out_m = leaky_relu((x_up - mean) * rstd * (1 + gamma_m) + beta_m, slopes[m]) for one or two sets of parameters.

    x [N, C, H, W]; x_up is x enlarged `upsample` (1 or 2) times by nearest neighbor, never built. mean, rstd [G, C],
    G = 1 or N, or None: no normalization. params[m]: [P, 2C] = [gamma | beta], chosen by ids [N, H·up, W·up] int32; or,
    with ids None, per pixel: [N, 2C, H·up, W·up]. order, offsets: `segments(ids, P)`, used by backward (found there if
    None). slope 1.0: no activation. stats: mean and rstd were computed from this x (rstd from the biased variance), and
    dx takes that into account; otherwise they are constants. Outputs have x's dtype and layout; arithmetic is fp32.

    Gradients go to x and params. Deterministic. Saved for backward: the inputs, nothing of the outputs' size but ids.
    """
    check_arguments(x, params, ids, slopes, upsample)
    return modulation_op(x, mean, rstd, params, ids, order, offsets, slopes, upsample, stats)


def check_arguments(x: Tensor, params: list[Tensor], ids: Tensor | None, slopes: list[float], upsample: int) -> None:
    """Raises ValueError naming the argument."""
    if x.dim() != 4:
        raise ValueError(f"modulation: x must have shape [N, C, H, W], got {list(x.shape)}")
    if upsample not in (1, 2):
        raise ValueError(f"modulation: upsample must be 1 or 2, got {upsample}")
    if len(params) not in (1, 2) or len(slopes) != len(params):
        raise ValueError(f"modulation: 1 or 2 sets of params, a slope each; got {len(params)} and {len(slopes)}")
    n, c, h, w = x.shape
    size = (h * upsample, w * upsample)
    for m, p in enumerate(params):
        if ids is None and p.shape != (n, 2 * c, *size):
            raise ValueError(f"modulation: params[{m}] must have shape {[n, 2 * c, *size]}, got {list(p.shape)}")
        if ids is not None and (p.dim() != 2 or p.shape[1] != 2 * c):
            raise ValueError(f"modulation: params[{m}] must have shape [P, {2 * c}], got {list(p.shape)}")
    if ids is not None and ids.shape != (n, *size):
        raise ValueError(f"modulation: ids must have shape {[n, *size]}, got {list(ids.shape)}")
