"""Local knowledge: the student imitates the teacher's map, inside and outside the boxes."""

import torch
from torch import Tensor

from .. import _check
from ..ops.imitation import imitation

NORMALIZERS = ("weights", "cells")
LARGEST = 10.0  # a standardised term, per level
_CONSTANT = 1e-5  # a map whose variance is below this many squared means is one constant, rounded


def scale_of(teacher: Tensor) -> Tensor:
    """Variance of a map ``(B, C, H, W)`` over all its values; 1 where the map is constant.

    From the moments of its rows, which are short enough for their squares to be summed safely: on a
    processor far faster than ``teacher.var()``. In at least float32, without a copy of the map.
    """
    teacher = teacher.detach()
    wide = torch.promote_types(teacher.dtype, torch.float32)
    mean = teacher.mean(dim=3, dtype=wide)
    square = torch.linalg.vector_norm(teacher, dim=3, dtype=wide).square() / teacher.shape[3]
    between, whole = torch.var_mean(mean, correction=0)
    variance = (square - mean.square()).mean() + between
    return torch.where(variance > _CONSTANT * whole.square(), variance, 1)


def standardized(terms: Tensor, teacher: Tensor) -> Tensor:
    """Foreground and background of a level in units of the variance of the teacher's map.

    The variance is floored against the student's error: at a tenth of the larger of the two terms.
    So neither exceeds 10, whatever the teacher (one of random weights may put out maps of a
    variance of 1e-17), and their gradient is then that of ``10 log(term)``. Pairs of trained
    detectors stay far below: on the digit scenes the terms of the example's teacher and a fresh
    student are below 1 per level from the first step on.

    Args:
        terms: ``(2,)``, at unit weights.
        teacher: ``(B, C, H, W)``.
    """
    largest = terms.detach().amax()
    return terms / torch.maximum(scale_of(teacher), largest / LARGEST)


def imitation_loss(
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    stride: float,
    weights: Tensor | None = None,
    *,
    foreground: float = 1.0,
    background: float = 4.0,
    normalizer: str = "weights",
) -> tuple[Tensor, Tensor]:
    r"""Foreground and background squared error between two maps of one level.

    .. math:: L_{fg} = \lambda_{fg} \frac{\sum W d^2}{\max(1, 2 C \sum W)}, \qquad
              L_{bg} = \lambda_{bg} \frac{\sum (1 - m) d^2}{\max(1, 2 C \sum (1 - m))}

    with ``d = student - teacher``, ``m`` = 1 on the cells of any box and ``W`` the largest weight
    of the boxes on a cell (Tang et al. 2022, Eq. 7 and 8, normalised as released). Without weights
    ``W = m``. A box covers every cell it touches and at least one
    (:func:`global_kd.functional.pool_boxes` pools the same cells).

    Args:
        student: ``(B, C, H, W)``, adapted to the teacher's channels.
        teacher: ``(B, C, H, W)``; gets no gradient.
        boxes: ``(R, 4)`` xyxy in pixels of the padded network input.
        image_index: int64 ``(R,)``, the image of each box, in ``[0, B)``.
        stride: Pixels of the network input per cell of this level.
        weights: ``(R,)`` >= 0, usually robust weights; get no gradient.
        foreground: Factor of the first term.
        background: Factor of the second term.
        normalizer: ``"weights"`` (released) divides the foreground by the sum of weights: only
            *relative* weights act. ``"cells"`` divides by the number of foreground cells: a batch
            of noisy instances counts less as a whole.

    Returns:
        Two scalars, foreground and background, in at least float32. Without boxes the first is a
        zero that still back-propagates.

    Raises:
        ValueError: Shapes, channels or devices that do not fit, an unknown normalizer.
        TypeError: Boxes or maps that are no floating-point tensors, an index that is not int64.

    Example:
        >>> import torch
        >>> from global_kd.functional import imitation_loss
        >>> student, teacher = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
        >>> box, image = torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.tensor([0])
        >>> fg, bg = imitation_loss(student, teacher, box, image, stride=8)
        >>> fg.item(), bg.item()  # d = 1 everywhere: 1/2 of each factor
        (0.5, 2.0)
    """
    for name, x in (("student", student), ("teacher", teacher)):
        _check.tensor(name, x, 4, "(B, C, H, W)")
        _check.floating(name, x)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student: expected the teacher's shape {tuple(teacher.shape)}, but got "
            f"{tuple(student.shape)}; an adapter maps channels, pairing by stride maps sizes"
        )
    _check.boxes(boxes, image_index)
    _check.positive("stride", stride)
    _check.not_negative("foreground", foreground)
    _check.not_negative("background", background)
    _check.one_of("normalizer", normalizer, NORMALIZERS)
    _check.same_device(
        student=student, teacher=teacher, boxes=boxes, image_index=image_index, weights=weights
    )
    if weights is not None:
        _check.tensor("weights", weights, 1, "(R,)")
        _check.length("weights", weights, boxes.shape[0])
        weights = weights.detach()
    fg, bg = imitation(
        student, teacher.detach(), boxes.detach(), image_index, stride, weights, normalizer
    )
    return foreground * fg, background * bg
