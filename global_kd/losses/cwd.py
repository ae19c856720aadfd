"""CWD: each channel of a map as a distribution over its cells (Shu et al., ICCV 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _check
from ..ops.correlation import standardised
from ..ops.shares import share_divergence
from ..step import Step
from .base import Common, DistillLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack


def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Kullback-Leibler divergence of the channels' distributions over the cells.

    .. math:: L = \frac{\tau^2}{B C} \sum_{b,c} \mathrm{KL}(p^t_{bc} \,\|\, p^s_{bc}),\qquad
              p_{bc} = \operatorname{softmax}_{y,x}(z_{bcyx} / \tau)

    Adding a constant to a channel of an image changes nothing (Shu et al. 2021, normalised as in
    mmrazor).

    Args:
        student: Map ``(B, C, H, W)``, adapted.
        teacher: Map of the same shape; gets no gradient.
        temperature: > 0. Higher values look at more cells than the largest ones.

    Returns:
        Scalar in at least float32.

    Example:
        >>> import torch
        >>> from global_kd.functional import cwd_loss
        >>> x = torch.arange(4.0).view(1, 1, 2, 2)
        >>> cwd_loss(x + 5, x).item()
        0.0
    """
    _check.same_maps(student, teacher)
    _check.positive("temperature", temperature)
    return _divergence(student, teacher.detach(), temperature)


def _divergence(
    student: Tensor, teacher: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    total = share_divergence(student, teacher, temperature, weights)
    return temperature**2 * total / max(student.shape[0] * student.shape[1], 1)


class CWD(DistillLoss):
    """Imitate where each channel is active, not how strongly.

    "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021. Every channel of an image
    becomes a distribution over its cells; the divergences of student from teacher are averaged. It
    needs maps only, and serves any two detectors. Sum over levels of
    :func:`global_kd.functional.cwd_loss`.

    The paper's own weights for detection could not be read: the defaults are those of mmrazor for
    Faster R-CNN and RetinaNet, on five levels. Robust weights weigh the cells' shares of the
    divergence, each kept from being negative.

    Args:
        weight: Default 10.
        temperature: > 0.
        standardize: Standardise the channels of both maps over the batch first, as
            :class:`global_kd.losses.PKD` does: maps of unlike scale, from detectors of unlike
            kind, then have equally sharp distributions. Not in the paper.
        **common: See :class:`global_kd.losses.DistillLoss`.
    """

    name = "cwd"

    def __init__(
        self,
        *,
        weight: float | None = None,
        temperature: float = 1.0,
        standardize: bool = False,
        **common: Unpack[Common],
    ) -> None:
        _check.positive("temperature", temperature)
        self.temperature, self.standardize = temperature, standardize
        super().__init__({"": weight}, {"one-stage": {"": 10.0}}, **common)

    def terms(self, step: Step) -> dict[str, Tensor]:
        found = []
        for level, (s, t) in enumerate(zip(self.adapted(step), step.teacher, strict=True)):
            if self.standardize:
                s, t = standardised(s), standardised(t)
            found.append(_divergence(s, t, self.temperature, self.cell_weights(step, level)))
        return {"": torch.stack(found).sum()}
