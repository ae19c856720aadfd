"""FRS: imitation where the teacher finds something (Du et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from .. import _check
from ..ops.entropy import binary_entropies
from ..ops.imitation import masked_error
from ..ops.precision import accumulate
from ..step import Dense, Step
from .base import Common, DistillLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack

NORMALIZERS = ("cells", "channels")


def richness_loss(
    student: Tensor,
    teacher: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    normalizer: str = "cells",
) -> tuple[Tensor, Tensor]:
    r"""Errors of features and of class logits, weighed by the teacher's largest class score.

    .. math:: M = \max_k \sigma(z^t_k), \qquad
              L_f = \frac{\sum M \sum_c (s_c - t_c)^2}{\sum M}, \qquad
              L_c = \frac{\sum M \sum_k \mathrm{BCE}(\sigma(z^s_k), \sigma(z^t_k))}{\sum M}

    Outer sums run over the batch's cells (Du et al. 2021, as released).

    Args:
        student: Map ``(B, C, H, W)``, adapted.
        teacher: Map of the same shape; no gradient.
        student_logits: ``(B, A * K, H, W)`` of a sigmoid head.
        teacher_logits: Of the same shape; no gradient.
        normalizer: ``"cells"`` (released), or ``"channels"``: the first is divided by ``C``, too.

    Returns:
        Two scalars, features and classes, in at least float32.

    Example:
        >>> import torch
        >>> from global_kd.functional import richness_loss
        >>> student, teacher = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
        >>> logits = torch.zeros(1, 1, 2, 2)
        >>> features, classes = richness_loss(student, teacher, logits, logits)
        >>> features.item(), round(classes.item(), 4)  # 4 channels; the entropy of a coin
        (4.0, 0.6931)
    """
    _check.same_maps(student, teacher)
    _check.same_maps(student_logits, teacher_logits)
    _check.one_of("normalizer", normalizer, NORMALIZERS)
    batch, _, height, width = student.shape
    _check.shape("teacher_logits", teacher_logits[:, 0], (batch, height, width))
    mask = accumulate(teacher_logits.detach()).amax(dim=1).sigmoid()
    rows = _cross_entropy(student_logits.movedim(1, 3), teacher_logits.movedim(1, 3), "sigmoid")
    return _features(student, teacher, mask, None, normalizer), _weighted_mean(rows, mask, None)


def _features(
    student: Tensor, teacher: Tensor, mask: Tensor, weights: Tensor | None, normalizer: str
) -> Tensor:
    """Over a mask ``(B, H, W)``; ``weights``, likewise, count in the numerator only."""
    mask = mask.to(torch.promote_types(student.dtype, torch.float32))
    total = mask.sum() * (student.shape[1] if normalizer == "channels" else 1)
    if weights is not None:
        mask = mask * weights
    return masked_error(student, teacher.detach(), mask / _not_zero(total))


def _weighted_mean(rows: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    weight = mask if weights is None else mask * weights
    return (rows * (weight / _not_zero(mask.sum()))).sum()


def _not_zero(total: Tensor) -> Tensor:
    """A mask may be 0 everywhere: its loss is then 0. Scores may be tiny, so not at 1."""
    return total.clamp(min=torch.finfo(total.dtype).tiny)


def _cross_entropy(student: Tensor, teacher: Tensor, activation: str) -> Tensor:
    """Of logits ``(..., K)`` with the teacher's probabilities as targets, summed over classes."""
    if activation == "sigmoid":
        return binary_entropies(student, teacher)
    student, teacher = accumulate(student), accumulate(teacher.detach())
    return -(teacher.softmax(dim=-1) * student.log_softmax(dim=-1)).sum(dim=-1)


def _require_shared(name: str, head: Dense, strides: Sequence[float]) -> None:
    found = [grid.stride for grid in head.grids]
    if not set(found) & set(strides):
        raise ValueError(
            f"{name}: expected a level of stride {list(strides)}, but got {found}; FRS weighs a "
            "map by the scores of the head on it: pass levels=... that the teacher's head has, or "
            "take a method that needs no head"
        )


class FRS(DistillLoss):
    """Imitate the teacher's features where its classifier fires, and its class logits there.

    "Distilling Object Detectors with Feature Richness", NeurIPS 2021. The mask of a cell is the
    teacher's largest class score; no ground truth is asked for. Sum over levels of
    :func:`global_kd.functional.richness_loss`.

    The term ``features`` needs the teacher's dense head only (for two-stage detectors its RPN): the
    student may be of any family and have other classes. A level that the teacher's head lacks
    contributes nothing. The term ``classes`` needs both heads with the same anchors and classes; it
    is left out where they cannot be had, unless its weight is given. On softmax heads, which the
    paper does not have, it is the cross-entropy with the teacher's distribution.

    Ultralytics ships the first term alone. Its settings are ``FRS(features=6, classes=0,
    normalizer="channels", adapter="projector", warmup_steps=0)``.

    Changed from the released code: cross-entropy in logit form, which autocast allows; the teacher
    takes no gradient; each head runs once; a mask of zeros gives 0, not NaN. Robust weights lower
    the numerator only.

    Args:
        features: Weight. Default 0.002 for two-stage detectors, 0.005 for others (the paper's
            RetinaNet; FCOS 0.01, GFL 0.1). With ``"channels"`` 6.
        classes: Weight. Default 0.1 for two-stage detectors, 0.02 for others (FCOS and GFL 0.05).
        normalizer: ``"cells"`` (released) divides by the sum of the mask, ``"channels"`` by the
            channels, too.
        **common: See :class:`global_kd.losses.DistillLoss`. As released, ``adapter="conv3x3"`` and
            ``warmup_steps=500``.
    """

    name = "frs"
    needs = frozenset({"teacher_dense"})

    def __init__(
        self,
        *,
        features: float | None = None,
        classes: float | None = None,
        normalizer: str = "cells",
        **common: Unpack[Common],
    ) -> None:
        _check.one_of("normalizer", normalizer, NORMALIZERS)
        self.normalizer = normalizer
        if classes is None:
            self.wishes = frozenset({"dense"})
        elif classes > 0:
            self.needs = self.needs | {"dense"}
        usual = {
            "two-stage": {"features": 0.002, "classes": 0.1},
            "one-stage": {"features": 0.005, "classes": 0.02},
        }
        if normalizer == "channels":
            usual = {family: x | {"features": 6.0} for family, x in usual.items()}
        common.setdefault("adapter", "conv3x3")
        common.setdefault("warmup_steps", 500)
        super().__init__({"features": features, "classes": classes}, usual, **common)

    @property
    def adapts(self) -> bool:
        return self.wants("features")

    def terms(self, step: Step) -> dict[str, Tensor]:
        terms = {}
        if self.wants("features"):
            terms["features"] = self._feature_term(step)
        if self.wants("classes") and step.dense is not None:
            terms["classes"] = self._class_term(step, *step.dense)
        return terms

    def _feature_term(self, step: Step) -> Tensor:
        assert step.teacher_dense is not None
        _require_shared("teacher_dense", step.teacher_dense, step.strides)
        found = []
        maps = zip(self.adapted(step), step.teacher, step.strides, strict=True)
        for level, (s, t, stride) in enumerate(maps):
            mask = step.teacher_dense.score_map(stride, (s.shape[2], s.shape[3]))
            if mask is None:
                found.append(accumulate(s[:0]).sum())  # keeps the adapter in the graph
                continue
            weights = self.cell_weights(step, level)
            found.append(_features(s, t, mask.detach(), weights, self.normalizer))
        return torch.stack(found).sum()

    def _class_term(self, step: Step, student: Dense, teacher: Dense) -> Tensor:
        _require_shared("dense", teacher, step.strides)
        rows = _cross_entropy(student.logits, teacher.logits, student.activation)
        if student.valid is not None:
            rows = torch.where(student.valid, rows, 0)
        found = []
        levels = zip(student.grids, student.split(rows), teacher.score_maps(), strict=True)
        for grid, row, mask in levels:
            if grid.stride in step.strides:
                cells = row.unflatten(1, (grid.height, grid.width, grid.anchors)).sum(dim=3)
                weights = self._head_weights(step, grid.stride, cells)
                found.append(_weighted_mean(cells, mask.detach(), weights))
        return torch.stack(found).sum()

    def _head_weights(self, step: Step, stride: float, cells: Tensor) -> Tensor | None:
        """The weights of a level's cells, cut to the head's grid or filled up with 1."""
        weights = self.cell_weights(step, step.strides.index(stride))
        if weights is None:
            return None
        down, right = (n - m for n, m in zip(cells.shape[1:], weights.shape[1:], strict=True))
        return functional.pad(weights, (0, right, 0, down), value=1.0)
