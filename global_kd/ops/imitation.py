"""Foreground and background squared error of two maps under per-box weights.

The weights of the cells are painted once, ``(B, H, W)``; the maps are read once. The definition is
:func:`imitation_terms` in plain torch; on the processor it runs some planes at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cells import box_cells, cell_members
from .dispatch import backend
from .memory import empty
from .precision import accumulate

aten = torch.ops.aten

# Elements of a map that are worked on at a time. Fewer would fit a smaller cache; but each
# operation ends in a barrier of all threads, and where other jobs hold a core a thousand of those
# take seconds.
_CHUNK = 1 << 20


def paint_boxes(
    weights: Tensor, cells: Tensor, image_index: Tensor, size: tuple[int, int, int]
) -> Tensor:
    """``(B, H, W)`` map of the largest weight (>= 0) among the boxes on each cell, 0 elsewhere.

    Args:
        weights: Floating-point ``(R,)``.
        cells: Half-open ranges, int64 ``(R, 4)``, from :func:`box_cells`.
        image_index: int64 ``(R,)``.
        size: ``(B, H, W)``.
    """
    form = backend(weights)
    if form == "triton":
        from ._triton.imitation import paint_boxes as twin

        return twin(weights, cells, image_index, size)
    if form == "cpu":
        return _paint_in_turn(weights, cells, image_index, size)
    batch, height, width = size
    rows, columns = cell_members(cells, height, width)
    painted = weights[:, None, None] * (rows[:, :, None] & columns[:, None, :])
    canvas = painted.new_zeros(batch, height * width)
    index = image_index[:, None].expand(-1, height * width)
    return canvas.scatter_reduce(0, index, painted.flatten(1), "amax").view(size)


def paint_values(values: Tensor, image_index: Tensor, batch: int) -> Tensor:
    """``(B, H, W)`` map of the largest value (>= 0) among the boxes' own maps, 0 without any.

    Args:
        values: Floating-point ``(R, H, W)``.
        image_index: int64 ``(R,)``.
        batch: ``B``.
    """
    rows = values.flatten(1)
    canvas = rows.new_zeros(batch, rows.shape[1])
    index = image_index[:, None].expand_as(rows)
    return canvas.scatter_reduce(0, index, rows, "amax").view(batch, *values.shape[1:])


def _paint_in_turn(
    weights: Tensor, cells: Tensor, image_index: Tensor, size: tuple[int, int, int]
) -> Tensor:
    """From the smallest weight to the largest, so that the largest stays.

    A loop over boxes, on the processor alone: a slice each is far less than a mask each.
    """
    canvas = weights.new_zeros(size)
    order = weights.argsort()
    where = torch.cat([image_index[:, None], cells], dim=1)[order].tolist()
    for value, (i, x1, y1, x2, y2) in zip(weights[order].tolist(), where, strict=True):
        canvas[i, y1:y2, x1:x2] = value
    return canvas


def imitation_terms(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    member: Tensor,
    scale_foreground: Tensor,
    scale_background: Tensor,
) -> tuple[Tensor, Tensor]:
    """``scale_f * sum(weight * d^2)`` and ``scale_b * sum((1 - member) * d^2)``, d the difference.

    Args:
        student: ``(B, C, H, W)``; the only one that gets a gradient.
        teacher: ``(B, C, H, W)``.
        weight: ``(B, H, W)``, zero where ``member`` is.
        member: ``(B, H, W)``, 0 or 1.
        scale_foreground: 0-d.
        scale_background: 0-d.
    """
    form = backend(student)
    arguments = student, teacher, weight, member, scale_foreground, scale_background
    if form == "triton":
        from ._triton.imitation import imitation_terms as twin

        return twin(*arguments)
    if form == "cpu":
        return _InPlanes.apply(*arguments)  # type: ignore[no-any-return]
    error = (accumulate(student) - accumulate(teacher)).square().sum(dim=1)
    return scale_foreground * (weight * error).sum(), scale_background * (
        (1 - member) * error
    ).sum()


def masked_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """``sum(mask * d^2)``, d the difference of maps ``(B, C, H, W)``, the mask ``(B, H, W)``.

    The mask, in the dtype of :func:`accumulate`, has its normaliser in it; it gets no gradient.
    """
    one = mask.new_ones(())
    return imitation_terms(student, teacher, mask, torch.ones_like(mask), one, one)[0]


class _InPlanes(torch.autograd.Function):
    """Nothing of the maps' size is made but the gradient itself.

    The backward reads the maps again instead of keeping the difference, or a gradient to be scaled,
    from the forward: on a processor fresh memory costs more than a second read.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, *small: Tensor) -> tuple[Tensor, ...]:
        weight, member, scale_foreground, scale_background = small
        ctx.save_for_backward(student, teacher, *small)
        error = torch.zeros_like(weight)
        same = student.dtype == teacher.dtype == weight.dtype
        for b, planes, d in _planes(student, weight.dtype):
            s, t = student[b, planes], teacher[b, planes]
            if same:
                aten.mse_loss.out(s, t, 0, out=d)
            else:  # halves are subtracted, and their squares summed, in float32
                d.copy_(s).sub_(t).square_()
            error[b] += d.sum(dim=0)
        foreground = scale_foreground * (weight * error).sum()
        return foreground, scale_background * ((1 - member) * error).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, weight, member, scale_foreground, scale_background = ctx.saved_tensors
        above_foreground, above_background = above
        factor = above_foreground * scale_foreground * weight
        factor += above_background * scale_background * (1 - member)
        gradient = empty(student.shape, student.dtype)
        if student.dtype == teacher.dtype == weight.dtype:
            # 2 (s - t) factor in one pass
            shares = factor[:, None].expand_as(student)
            aten.mse_loss_backward.grad_input(shares, student, teacher, 0, grad_input=gradient)
        else:
            factor *= 2
            for b, planes, d in _planes(student, weight.dtype):
                d.copy_(student[b, planes]).sub_(teacher[b, planes])
                gradient[b, planes] = d.mul_(factor[b])
        return gradient, None, None, None, None, None


def _planes(student: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, slice, Tensor]]:
    """A few channels of one image at a time: image, channels, and room for them ``(c, H, W)``."""
    batch, channels, height, width = student.shape
    step = max(1, min(-(-channels // 8), _CHUNK // max(1, height * width)))
    buffer = torch.empty(step, height, width, dtype=dtype, device="cpu")
    for b in range(batch):
        for c in range(0, channels, step):
            planes = slice(c, min(c + step, channels))
            yield b, planes, buffer[: planes.stop - c]


def imitation(
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    stride: float,
    weights: Tensor | None,
    normalizer: str,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Foreground and background terms with unit factors; see ``losses/imitation.py``.

    ``present (R,)`` bool leaves boxes out of this level without changing any shape.
    """
    batch, channels, height, width = student.shape
    size = (batch, height, width)
    dtype = torch.promote_types(student.dtype, torch.float32)
    cells = box_cells(boxes, stride, height, width)
    if present is None:
        present = torch.ones(boxes.shape[0], device=boxes.device, dtype=torch.bool)
    # Membership and weight are two maps: an instance whose weight is 0 is not background.
    member = paint_boxes(present.to(dtype), cells, image_index, size)
    weight = member
    if weights is not None:
        weight = torch.where(present, weights.to(dtype), 0)
        weight = paint_boxes(weight, cells, image_index, size)
    counted = weight if normalizer == "weights" else member

    def scale(cells: Tensor) -> Tensor:
        return (2 * channels * cells).clamp(min=1).reciprocal()

    return imitation_terms(
        student, teacher, weight, member, scale(counted.sum()), scale((1 - member).sum())
    )
