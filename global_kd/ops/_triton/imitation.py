"""Imitation: one pass reads both maps, sums their squared error and leaves the gradient behind.

The gradient is made for upstream gradients of 1, which they are where all factors of the loss are
part of the scales. Only the device knows, so the backward asks there: a kernel that scales the kept
gradient in place, and returns at once where there is nothing to scale. Under ``retain_graph`` it
scales a copy, because a second backward needs the first gradient again.

float16 keeps the gradient without any scale: a loss averaged over a map would underflow before the
loss scaler's factor arrives. The backward applies both in one go.
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
    require_first_derivative,
)

_TILE = 2048  # elements: with 4 warps, four 16-byte loads of float32 a thread from each map
_PROGRAMS = 2048  # about 16 for each multiprocessor of a large GPU


@triton.jit
def _paint_kernel(
    weights,  # (R,)
    boxes,  # (R, 4) int64 cell ranges x1, y1, x2, y2
    image_index,  # (R,) int64
    canvas,  # (B, H * W) float32, written
    count,  # R
    width,
    cells,  # H * W
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    # canvas[b, n] = max over the boxes of image b that cover cell n of their weight, or 0
    i_b = tl.program_id(1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    y = o_n // width
    x = o_n - y * width
    top, bottom = tl.program_id(0) * BN // width, (tl.program_id(0) * BN + BN - 1) // width
    value = tl.zeros([BN], tl.float32)
    for r in range(0, count, BR):
        o_r = r + tl.arange(0, BR)
        image, x1, y1, w, h = load_boxes(boxes, image_index, o_r, o_r < count)
        near = (image == i_b) & (y1 <= bottom) & (y1 + h > top)
        if tl.max(near.to(tl.int32), axis=0) > 0:
            weight = tl.load(weights + o_r, mask=near, other=0).to(tl.float32)
            inside = covers(x, y, x1[:, None], y1[:, None], w[:, None], h[:, None])
            value = tl.maximum(value, tl.max(tl.where(inside, weight[:, None], 0.0), axis=0))
    tl.store(canvas + i_b.to(tl.int64) * cells + o_n, value, mask=o_n < cells)


@torch.library.custom_op("global_kd::paint_boxes", mutates_args=())
def _paint(
    weights: Tensor, cells: Tensor, image_index: Tensor, batch: int, height: int, width: int
) -> Tensor:
    canvas = weights.new_empty((batch, height, width), dtype=torch.float32)
    if canvas.numel():
        require_dtype(weights=weights)
        block = power_of_two(height * width, 16, 256)
        with device_of(weights):
            _paint_kernel[(ceil_div(height * width, block), batch)](
                weights.contiguous(),
                cells.contiguous(),
                image_index.contiguous(),
                canvas,
                weights.shape[0],
                width,
                height * width,
                BR=power_of_two(weights.shape[0], 1, 16),
                BN=block,
            )
    return canvas


@_paint.register_fake
def _(
    weights: Tensor, cells: Tensor, image_index: Tensor, batch: int, height: int, width: int
) -> Tensor:
    return weights.new_empty((batch, height, width), dtype=torch.float32)


def paint_boxes(
    weights: Tensor, cells: Tensor, image_index: Tensor, size: tuple[int, int, int]
) -> Tensor:
    """See :func:`global_kd.ops.imitation.paint_boxes`; float32, without gradient."""
    return _paint(weights.detach(), cells, image_index, *size)  # type: ignore[no-any-return]


@triton.jit
def _terms_kernel(
    student,  # (B, C, H, W), any strides
    teacher,  # (B, C, H, W), any strides
    weight,  # (B, H * W) float32
    member,  # (B, H * W) float32
    scale_foreground,  # 0-d
    scale_background,  # 0-d
    grad,  # (B, C, H, W) or empty, written
    partial,  # (2, programs) float32, written
    channels,
    span,  # channels of one program, a multiple of BC
    width,
    cells,  # H * W
    s_b,
    s_c,
    s_y,
    s_x,
    t_b,
    t_c,
    t_y,
    t_x,
    g_b,
    g_c,
    g_y,
    g_x,
    GRAD: tl.constexpr,
    SCALED: tl.constexpr,  # whether the scales are part of the gradient
    FLAT: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    # partial[0] = scale_f sum w d^2, partial[1] = scale_b sum (1 - m) d^2 of a tile, d = s - t
    # grad = 2 d (scale_f w + scale_b (1 - m)), or d (w + (1 - m)) unscaled
    i_n, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < cells
    w = tl.load(weight + i_b * cells + o_n, mask=m_n, other=0)
    outside = 1 - tl.load(member + i_b * cells + o_n, mask=m_n, other=1)
    scale_f = tl.load(scale_foreground).to(tl.float32)
    scale_b = tl.load(scale_background).to(tl.float32)
    factor = 2 * (scale_f * w + scale_b * outside) if SCALED else w + outside
    p_s = student + i_b * s_b + cell_offset(o_n, width, s_y, s_x, FLAT)[None, :]
    p_t = teacher + i_b * t_b + cell_offset(o_n, width, t_y, t_x, FLAT)[None, :]
    p_g = grad + i_b * g_b + cell_offset(o_n, width, g_y, g_x, FLAT)[None, :]
    squares = tl.zeros([BC, BN], tl.float32)
    for c in range(i_c * span, tl.minimum(i_c * span + span, channels), BC):
        o_c = (c + tl.arange(0, BC)).to(tl.int64)[:, None]
        m = (o_c < channels) & m_n[None, :]
        s = tl.load(p_s + o_c * s_c, mask=m, other=0).to(tl.float32)
        d = s - tl.load(p_t + o_c * t_c, mask=m, other=0).to(tl.float32)
        squares += d * d
        if GRAD:
            tl.store(p_g + o_c * g_c, (d * factor[None, :]).to(grad.dtype.element_ty), mask=m)
    error = tl.sum(squares, axis=0)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    place = partial + (i_b * tl.num_programs(1) + i_c) * tl.num_programs(0) + i_n
    tl.store(place, scale_f * tl.sum(w * error, axis=0))
    tl.store(place + programs, scale_b * tl.sum(outside * error, axis=0))


@triton.jit
def _scale_kernel(
    grad,  # (B, C, H, W), any strides, scaled in place
    member,  # (B, H * W) float32
    factors,  # (2,) foreground, background
    channels,
    width,
    cells,  # H * W
    g_b,
    g_c,
    g_y,
    g_x,
    FLAT: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    # grad *= factor of the cell
    f_foreground = tl.load(factors).to(tl.float32)
    f_background = tl.load(factors + 1).to(tl.float32)
    if (f_foreground != 1) | (f_background != 1):
        i_n, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        o_n = i_n * BN + tl.arange(0, BN)
        o_c = (i_c * BC + tl.arange(0, BC)).to(tl.int64)[:, None]
        m_n = o_n < cells
        m = (o_c < channels) & m_n[None, :]
        inside = tl.load(member + i_b * cells + o_n, mask=m_n, other=0) > 0
        factor = tl.where(inside, f_foreground, f_background)[None, :]
        p_g = grad + i_b * g_b + o_c * g_c + cell_offset(o_n, width, g_y, g_x, FLAT)[None, :]
        g = tl.load(p_g, mask=m, other=0).to(tl.float32)
        tl.store(p_g, (g * factor).to(grad.dtype.element_ty), mask=m)


def _tile(x: Tensor, *others: Tensor) -> tuple[int, int]:
    """Channels and cells of a tile, long along what lies side by side in memory."""
    channels, cells = x.shape[1], x.shape[2] * x.shape[3]
    side_by_side = {channels_first(y) for y in (x, *others)}
    if len(side_by_side) == 2:
        along = 64
    elif side_by_side == {True}:
        along = min(1024, power_of_two(cells, 1, _TILE))
    else:
        along = _TILE // power_of_two(channels, 1, min(512, _TILE))
    return power_of_two(channels, 1, _TILE // along), power_of_two(cells, 1, along)


@torch.library.custom_op("global_kd::imitation_terms", mutates_args=())
def _terms(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    member: Tensor,
    scale_foreground: Tensor,
    scale_background: Tensor,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    require_dtype(student=student, teacher=teacher)
    batch, channels, height, width = student.shape
    grad = torch.empty_like(student) if with_grad else student.new_empty(0)
    if not student.numel():
        return student.new_zeros(2, dtype=torch.float32), grad
    block_c, block_n = _tile(student, teacher)
    tiles, blocks = ceil_div(height * width, block_n), ceil_div(channels, block_c)
    span = ceil_div(blocks, min(blocks, ceil_div(_PROGRAMS, tiles * batch))) * block_c
    grid = tiles, ceil_div(channels, span), batch
    partial = student.new_empty((2, grid[0] * grid[1] * grid[2]), dtype=torch.float32)
    written = grad if with_grad else student
    with device_of(student):
        _terms_kernel[grid](
            student,
            teacher,
            weight.float().contiguous(),
            member.float().contiguous(),
            scale_foreground,
            scale_background,
            grad,
            partial,
            channels,
            span,
            width,
            height * width,
            *student.stride(),
            *teacher.stride(),
            *written.stride(),
            GRAD=with_grad,
            SCALED=student.dtype != torch.float16,
            FLAT=flat(student, teacher, written),
            BC=block_c,
            BN=block_n,
        )
    return partial.sum(dim=1), grad


@_terms.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    member: Tensor,
    scale_foreground: Tensor,
    scale_background: Tensor,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(student) if with_grad else student.new_empty(0)
    return student.new_empty(2, dtype=torch.float32), grad


@torch.library.custom_op("global_kd::imitation_scale_", mutates_args=("grad",))
def _scale_(grad: Tensor, member: Tensor, factors: Tensor) -> None:
    if grad.numel():
        batch, channels, height, width = grad.shape
        block_c, block_n = _tile(grad)
        grid = ceil_div(height * width, block_n), ceil_div(channels, block_c), batch
        with device_of(grad):
            _scale_kernel[grid](
                grad,
                member.float().contiguous(),
                factors.contiguous(),
                channels,
                width,
                height * width,
                *grad.stride(),
                FLAT=flat(grad),
                BC=block_c,
                BN=block_n,
            )


@_scale_.register_fake
def _(grad: Tensor, member: Tensor, factors: Tensor) -> None:
    return None


def _may_overwrite(grad: Tensor) -> bool:
    """Whether nobody needs this gradient again.

    Not so where a second backward may follow, or torch (before 2.5) does not tell; and a compiler
    that traces decides itself what to overwrite.
    """
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return type(grad) is Tensor and not kept()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, _, member, scale_foreground, scale_background, _ = inputs
    ctx.save_for_backward(output[1], member, scale_foreground, scale_background)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, above: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if above is None:
        return (None,) * 7
    require_first_derivative("imitation_terms")
    grad, member, scale_foreground, scale_background = ctx.saved_tensors
    if grad.dtype == torch.float16:
        above = 2 * above * torch.stack([scale_foreground, scale_background])
    grad = grad.detach() if _may_overwrite(grad) else grad.clone()
    _scale_(grad, member, above)
    return grad, *(None,) * 6


_terms.register_autograd(_backward, setup_context=_setup_context)


def imitation_terms(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    member: Tensor,
    scale_foreground: Tensor,
    scale_background: Tensor,
) -> tuple[Tensor, Tensor]:
    """See :func:`global_kd.ops.imitation.imitation_terms`; one derivative, none of the second."""
    small = (x.detach() for x in (teacher, weight, member, scale_foreground, scale_background))
    with_grad = torch.is_grad_enabled() and student.requires_grad
    foreground, background = _terms(student, *small, with_grad)[0].unbind()
    return foreground, background
