"""Direction of features: a foundation model as teacher (as in RT-DETRv4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _check
from ..ops.cosine import unit_rows
from ..step import Step
from .base import Common, DistillLoss, Levels

if TYPE_CHECKING:
    from typing_extensions import Unpack


def cosine_loss(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""One minus the cosine of student and teacher in each cell, averaged.

    .. math:: L = \operatorname{mean}_{b,y,x} w_{byx} \Bigl(1 -
              \frac{\langle s, t \rangle}{\lVert s \rVert \lVert t \rVert}\Bigr)

    Positive factors of a cell change nothing. A cell of zeros in the teacher has no direction and
    counts as 0; one in the student as 1, without a gradient.

    Args:
        student: Map ``(B, C, H, W)``, adapted.
        teacher: Map of the same shape; gets no gradient.
        weights: Of the cells, ``(B, H, W)`` >= 0, in the numerator only.

    Returns:
        Scalar in at least float32, in [0, 2] without weights.

    Example:
        >>> import torch
        >>> from global_kd.functional import cosine_loss
        >>> x = torch.ones(1, 4, 2, 2)
        >>> round(cosine_loss(3 * x, x).item(), 6), round(cosine_loss(-x, x).item(), 6)
        (0.0, 2.0)
    """
    _check.same_maps(student, teacher)
    s, t = (unit_rows(x.movedim(1, 3)) for x in (student, teacher.detach()))
    dtype = torch.promote_types(s.dtype, t.dtype)
    # |t|^2 is 1, and 0 where the teacher says nothing.
    cells = (t.to(dtype) * (t - s)).sum(dim=3)
    if weights is not None:
        _check.shape("weights", weights, tuple(cells.shape))
        cells = cells * weights.detach()
    return cells.sum() / max(cells.numel(), 1)


class Cosine(DistillLoss):
    """Imitate the direction of a teacher's features, such as those of a foundation model.

    The student's map goes through one linear layer; one minus its cosine with the teacher's map is
    averaged over cells (the term of RT-DETRv4, 2025, whose teacher is a DINOv3). It needs maps
    only: the teacher need not be a detector. Where grids differ, a
    :class:`global_kd.Distiller` samples the teacher's bilinearly at the student's cells. Sum over
    levels of :func:`global_kd.functional.cosine_loss`.

    One level by default, the coarsest one, since a vision transformer has one. Robust weights weigh
    the cells.

    RT-DETRv4 steers the weight once an epoch to keep a share of the encoder's gradient, from 11 %
    for its smallest to 2 % for its largest model; a weight alone means little. Two careful studies
    by others found no gain beyond their intervals.

    Args:
        weight: Default 1. It means little across detectors: give it as a share of the gradient.
        **common: See :class:`global_kd.losses.DistillLoss`. ``levels``: the coarsest one;
            ``adapter="conv1x1"``, the linear layer.
    """

    name = "cosine"

    def __init__(self, *, weight: float | None = None, **common: Unpack[Common]) -> None:
        common.setdefault("adapter", "conv1x1")
        super().__init__({"": weight}, **common)

    def build(self, levels: Levels) -> None:
        if self._strides_wanted is None:
            self._strides_wanted = (levels.strides[-1],)
        super().build(levels)

    def terms(self, step: Step) -> dict[str, Tensor]:
        pairs = zip(self.adapted(step), step.teacher, strict=True)
        return {
            "": torch.stack(
                [cosine_loss(s, t, self.cell_weights(step, i)) for i, (s, t) in enumerate(pairs)]
            ).sum()
        }
