"""Foreground and background squared error of two maps under per-box weights: definition."""

import torch
from torch import Tensor

from .cells import box_cells, cell_members
from .precision import accumulate


def paint_boxes(
    weights: Tensor, boxes: Tensor, image_index: Tensor, stride: float, size: tuple[int, int, int]
) -> Tensor:
    """``(B, H, W)`` map of the largest weight (>= 0) among the boxes on each cell, 0 elsewhere."""
    batch, height, width = size
    rows, columns = cell_members(box_cells(boxes, stride, height, width), height, width)
    painted = weights[:, None, None] * (rows[:, :, None] & columns[:, None, :])
    canvas = painted.new_zeros(batch, height * width)
    index = image_index[:, None].expand(-1, height * width)
    return canvas.scatter_reduce(0, index, painted.flatten(1), "amax").view(size)


def imitation_sums(
    student: Tensor, teacher: Tensor, weight: Tensor, member: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum(weight * d^2)`` and ``sum((1 - member) * d^2)`` over cells and channels."""
    error = (accumulate(student) - accumulate(teacher)).square().sum(dim=1)
    return (weight * error).sum(), ((1 - member) * error).sum()


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
    if present is None:
        present = torch.ones(boxes.shape[0], device=boxes.device, dtype=torch.bool)
    # Membership and weight are two maps: an instance whose weight is 0 is not background.
    member = paint_boxes(present.to(dtype), boxes, image_index, stride, size)
    weight = member
    if weights is not None:
        weight = torch.where(present, weights.to(dtype), 0)
        weight = paint_boxes(weight, boxes, image_index, stride, size)
    foreground, background = imitation_sums(student, teacher, weight, member)
    counted = weight if normalizer == "weights" else member
    foreground = foreground / (2 * channels * counted.sum()).clamp(min=1)
    background = background / (2 * channels * (1 - member).sum()).clamp(min=1)
    return foreground, background
