"""Pooling as a product of the features with the 0/1 masks of the boxes, built as it goes.

One read of the map pools all boxes of an image, one write spreads their gradient, whatever their
areas. The products are exact even on tensor cores: 0 and 1 are exact in any format, and a float32
is the sum of three numbers of at most 11 bits (a half-precision number is one already). Sums are in
float32, of short stretches, added in a fixed order.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import (
    ceil_div,
    cell_offset,
    channels_first,
    covers,
    device_of,
    flat,
    load_boxes,
    power_of_two,
    require_dtype,
)

_PROGRAMS = 1024  # about 8 for each multiprocessor of a large GPU: boxes leave some with no work
_MANY = 256  # boxes from which larger tiles pay
_CELLS = 32  # of the map that a pooling program works on at a time
# "tf32" is exact for numbers of 11 bits, which are all it is given. AMD's do not all know it.
_PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32")


@triton.jit
def _cut(x):
    # The leading 11 bits of a float32, all that tensor cores take.
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _parts(x):
    # Three numbers of at most 11 bits that add up to a float32 exactly, largest first.
    high = _cut(x)
    middle = _cut(x - high)
    return high, middle, x - high - middle


@triton.jit
def _add_product(total, x, mask):
    # total + x @ mask, x (M, K) of any dtype, mask (K, N) bool. Smallest part first, and `total`
    # last and apart, where its addition rounds to nearest: tensor cores only cut off.
    ones = mask.to(tl.float32)
    if x.dtype == tl.float32:
        high, middle, low = _parts(x)
        part = tl.dot(low, ones, input_precision=_PRECISION)
        part = tl.dot(middle, ones, part, input_precision=_PRECISION)
        part = tl.dot(high, ones, part, input_precision=_PRECISION)
        return total + part
    return tl.dot(x.to(tl.float32), ones, total, input_precision=_PRECISION)


@triton.jit
def _pool_kernel(
    features,  # (B, C, H, W), any strides
    boxes,  # (R, 4) int64 cell ranges x1, y1, x2, y2
    image_index,  # (R,) int64
    partial,  # (splits, R, C) float32, written
    count,  # R
    batch,
    channels,
    width,
    cells,  # H * W
    span,  # cells of one program, a multiple of BK
    s_b,
    s_c,
    s_y,
    s_x,
    FLAT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    # partial[i, r, c] = sum over the cells of stretch i in box r of features[image of r, c], / area
    i_c, i_r, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_c = (i_c * BC + tl.arange(0, BC)).to(tl.int64)
    o_r = i_r * BR + tl.arange(0, BR)
    m_c, m_r = o_c < channels, o_r < count
    image, x1, y1, w, h = load_boxes(boxes, image_index, o_r, m_r)
    total = tl.zeros([BC, BR], tl.float32)
    # Boxes come image by image as a rule, in which case a block of them meets one or two images.
    first = tl.maximum(tl.min(tl.where(m_r, image, batch), axis=0), 0)
    last = tl.minimum(tl.max(image, axis=0), batch - 1)
    for b in range(first, last + 1):
        own_h = tl.where(image == b, h, 0)
        sums = tl.zeros([BC, BR], tl.float32)
        p_f = features + tl.cast(b, tl.int64) * s_b + o_c[:, None] * s_c
        start = tl.min(tl.where(own_h > 0, y1 * width, cells), axis=0)
        stop = tl.max(tl.where(own_h > 0, (y1 + own_h) * width, 0), axis=0)
        start = tl.maximum(start // BK * BK, i_k * span)
        stop = tl.minimum(stop, i_k * span + span)
        for k in range(start, stop, BK):
            o_k = k + tl.arange(0, BK)
            y = o_k // width
            x = o_k - y * width
            # A stretch that no box meets is not read. Along one row the test is exact.
            top, bottom = k // width, (k + BK - 1) // width
            left, right = k - top * width, k + BK - 1 - bottom * width
            meets = (y1 <= bottom) & (y1 + own_h > top)
            meets &= (top < bottom) | ((x1 <= right) & (x1 + w > left))
            m_k = o_k < cells * tl.max((meets & (own_h > 0)).to(tl.int32), axis=0)
            p_k = p_f + cell_offset(o_k, width, s_y, s_x, FLAT)[None, :]
            f = tl.load(p_k, mask=m_c[:, None] & m_k[None, :], other=0)
            sums = _add_product(sums, f, covers(x[:, None], y[:, None], x1, y1, w, own_h))
        # 0 * inf: what overflows in this image must not reach the boxes of another.
        total = tl.where((image == b)[None, :], sums, total)
    area = tl.maximum(w * h, 1).to(tl.float32)
    place = (tl.cast(i_k, tl.int64) * count + o_r[None, :]) * channels + o_c[:, None]
    tl.store(partial + place, total / area[None, :], mask=m_c[:, None] & m_r[None, :])


@triton.jit
def _spread_kernel(
    grad,  # (R, C), any strides
    boxes,  # (R, 4) int64 cell ranges x1, y1, x2, y2
    image_index,  # (R,) int64
    out,  # (B, C, H, W), written
    count,  # R
    channels,
    width,
    cells,  # H * W
    g_r,
    g_c,
    s_b,
    s_c,
    s_x,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    # out[b, c, n] = sum over the boxes r of image b that cover cell n of grad[r, c] / area of r
    i_n, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BN + tl.arange(0, BN)
    o_c = (i_c * BC + tl.arange(0, BC)).to(tl.int64)[:, None]
    m_c = o_c < channels
    y = o_n // width
    x = o_n - y * width
    top, bottom = i_n * BN // width, (i_n * BN + BN - 1) // width
    total = tl.zeros([BC, BN], tl.float32)
    for r in range(0, count, BR):
        o_r = r + tl.arange(0, BR)
        image, x1, y1, w, h = load_boxes(boxes, image_index, o_r, o_r < count)
        near = (image == i_b) & (y1 <= bottom) & (y1 + h > top)
        if tl.max(near.to(tl.int32), axis=0) > 0:
            area = tl.maximum(w * h, 1).to(tl.float32)
            p_g = grad + o_r.to(tl.int64)[None, :] * g_r + o_c * g_c
            g = tl.load(p_g, mask=m_c & near[None, :], other=0).to(tl.float32) / area[None, :]
            inside = covers(x, y, x1[:, None], y1[:, None], w[:, None], h[:, None])
            total = _add_product(total, g, inside)
    place = tl.cast(i_b, tl.int64) * s_b + o_c * s_c + o_n.to(tl.int64)[None, :] * s_x
    tl.store(out + place, total.to(out.dtype.element_ty), mask=m_c & (o_n < cells)[None, :])


@torch.library.custom_op("global_kd::pool_boxes", mutates_args=())
def _pool(features: Tensor, cells: Tensor, image_index: Tensor) -> Tensor:
    require_dtype(features=features)
    count, (batch, channels, height, width) = cells.shape[0], features.shape
    if not (count and features.numel()):
        return features.new_zeros((count, channels), dtype=torch.float32)
    many = count > _MANY
    block_c = power_of_two(channels, 16, 128 if many else 64)
    block_r = power_of_two(count, 16, 64 if many else 32)
    blocks = ceil_div(channels, block_c), ceil_div(count, block_r)
    stretches = ceil_div(height * width, _CELLS)
    splits = min(stretches, ceil_div(_PROGRAMS, blocks[0] * blocks[1]))
    span = ceil_div(stretches, splits) * _CELLS
    splits = ceil_div(height * width, span)
    partial = features.new_empty((splits, count, channels), dtype=torch.float32)
    with device_of(features):
        _pool_kernel[(*blocks, splits)](
            features,
            cells.contiguous(),
            image_index.contiguous(),
            partial,
            count,
            batch,
            channels,
            width,
            height * width,
            span,
            *features.stride(),
            FLAT=flat(features),
            BR=block_r,
            BC=block_c,
            BK=_CELLS,
            num_warps=8 if block_c == 128 else 4,
        )
    return partial.sum(dim=0)


@_pool.register_fake
def _(features: Tensor, cells: Tensor, image_index: Tensor) -> Tensor:
    return features.new_empty((cells.shape[0], features.shape[1]), dtype=torch.float32)


@torch.library.custom_op("global_kd::pool_boxes_backward", mutates_args=())
def _spread(
    grad: Tensor,
    cells: Tensor,
    image_index: Tensor,
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    require_dtype(grad=grad)
    channels = grad.shape[1]
    out = _empty_map(grad, (batch, channels, height, width), dtype, channels_last)
    if not out.numel():
        return out
    block_c, block_n = power_of_two(channels, 16, 128), power_of_two(height * width, 16, 64)
    grid = ceil_div(height * width, block_n), ceil_div(channels, block_c), batch
    s_b, s_c, _, s_x = out.stride()
    with device_of(grad):
        _spread_kernel[grid](
            grad,
            cells.contiguous(),
            image_index.contiguous(),
            out,
            cells.shape[0],
            channels,
            width,
            height * width,
            *grad.stride(),
            s_b,
            s_c,
            s_x,
            BR=16,
            BC=block_c,
            BN=block_n,
            num_warps=8 if block_c == 128 else 4,
        )
    return out


@_spread.register_fake
def _(
    grad: Tensor,
    cells: Tensor,
    image_index: Tensor,
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return _empty_map(grad, (batch, grad.shape[1], height, width), dtype, channels_last)


def _empty_map(
    like: Tensor, size: tuple[int, int, int, int], dtype: torch.dtype, last: bool
) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=layout)


def _pool_setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    features, cells, image_index = inputs
    ctx.save_for_backward(cells, image_index)
    batch, _, height, width = features.shape
    ctx.map = batch, height, width, features.dtype, not channels_first(features)


def _pool_backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
    return _spread(above, *ctx.saved_tensors, *ctx.map), None, None


def _spread_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, cells, image_index = inputs[:3]
    ctx.save_for_backward(cells, image_index)
    ctx.dtype = grad.dtype


def _spread_backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
    return _pool(above, *ctx.saved_tensors).to(ctx.dtype), *(None,) * 7


_pool.register_autograd(_pool_backward, setup_context=_pool_setup_context)
_spread.register_autograd(_spread_backward, setup_context=_spread_setup_context)


def pool_cells(features: Tensor, cells: Tensor, image_index: Tensor) -> Tensor:
    """See :func:`global_kd.ops.pool_boxes.pool_boxes`; any number of derivatives."""
    return _pool(features, cells, image_index)  # type: ignore[no-any-return]
