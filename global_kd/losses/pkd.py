"""PKD: Pearson correlation of the maps (Cao et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _check
from ..ops.correlation import standardised_error
from ..ranks import Ranks
from ..step import Step
from .base import Common, DistillLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Half the squared error of maps standardised per channel over the batch.

    .. math:: L = \tfrac12 \operatorname{mean}_{b,c,y,x} (\hat s - \hat t)^2
              = \tfrac{n-1}{n} \operatorname{mean}_c (1 - r_c),\quad
              \hat z = \frac{z - \operatorname{mean}_c}{\operatorname{std}_c + 10^{-6}}

    with ``r_c`` the Pearson correlation of a channel over its ``n = B H W`` values. The student's
    standardisation is differentiated through. A constant channel counts as zeros.

    Args:
        student: Map ``(B, C, H, W)``, adapted.
        teacher: Map of the same shape, detached inside.

    Returns:
        Scalar in at least float32.

    Example:
        >>> import torch
        >>> from global_kd.functional import pkd_loss
        >>> x = torch.arange(8.0).view(2, 1, 2, 2)
        >>> round(float(pkd_loss(3 * x + 1, x)), 6)  # any positive affine map
        0.0
    """
    _check.same_maps(student, teacher)
    return _half_squares(student, teacher)


def _half_squares(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    error = standardised_error(student, teacher, weights, total)
    return error / (2 * max(student.numel(), 1))


class PKD(DistillLoss):
    """Imitate the correlation of features instead of their values.

    "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
    NeurIPS 2022. It needs maps only, and serves any two detectors. Sum over levels of
    :func:`global_kd.functional.pkd_loss`.

    The paper has no adapter, since its pairs have equal channels; here a 1x1 convolution stands in
    where they do not (``adapter="match"``). The released code resizes where heights differ; here
    levels are cut to the shared cells. Robust weights weigh the squares of the cells.

    Args:
        weight: Default 6 for two-stage detectors, 10 for others.
        share_statistics: Under ``torch.distributed``, standardise over the batches of all ranks
            instead of a rank's own (released): then a job of many small batches trains as one of
            their union. In training mode only; every rank must call it.
        **common: See :class:`global_kd.losses.DistillLoss`. The paper distils four levels:
            ``levels=(4, 8, 16, 32)`` for Faster R-CNN, ``(8, 16, 32, 64)`` for RetinaNet.
    """

    name = "pkd"

    def __init__(
        self,
        *,
        weight: float | None = None,
        share_statistics: bool = False,
        **common: Unpack[Common],
    ) -> None:
        self.share_statistics = share_statistics
        usual = {"two-stage": {"": 6.0}, "one-stage": {"": 10.0}}
        super().__init__({"": weight}, usual, **common)

    def terms(self, step: Step) -> dict[str, Tensor]:
        shared = self.share_statistics and self.training
        total = Ranks(self.distributed).total if shared else None
        found = []
        for level, (s, t) in enumerate(zip(self.adapted(step), step.teacher, strict=True)):
            found.append(_half_squares(s, t, self.cell_weights(step, level), total))
        return {"": torch.stack(found).sum()}
