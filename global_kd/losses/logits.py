"""Soft labels: the student's class logits follow the teacher's on the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import _check
from ..instances import assign_levels
from ..ops.logits import divergences
from ..step import Step
from .base import Common, DistillLoss, Levels

if TYPE_CHECKING:
    from typing_extensions import Unpack

ACTIVATIONS = ("softmax", "sigmoid")
CLASS_REDUCTIONS = ("mean", "sum")


def logit_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 2.0,
    activation: str = "softmax",
    class_reduction: str = "mean",
) -> Tensor:
    r"""Weighted Kullback-Leibler divergence of class distributions.

    .. math:: L = \frac{1}{N} \sum_n \omega_n T^2 \frac{1}{K} \sum_k \mathrm{KL}\bigl(
              p^t_{nk} \,\|\, p^s_{nk}\bigr), \qquad p = \mathrm{activation}(z / T)

    The soft-label loss of Tang et al. 2022 with the released normalisers. A softmax head has one
    distribution over ``K`` classes (background included), a sigmoid head ``K`` Bernoulli ones.

    Args:
        student: Logits ``(N, K)``.
        teacher: Logits ``(N, K)`` of the same rows; no gradient.
        weights: ``(N,)``, usually the robust weight of each row's box; no gradient.
        temperature: ``T > 0``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_reduction: ``"mean"`` over classes (released) or ``"sum"``.

    Returns:
        A scalar in at least float32; a zero that still back-propagates where ``N = 0``.

    Example:
        >>> import torch
        >>> from global_kd.functional import logit_loss
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> logit_loss(logits, logits).item()
        0.0
    """
    for name, x in (("student", student), ("teacher", teacher)):
        _check.tensor(name, x, 2, "(N, K)")
        _check.floating(name, x)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student: expected the teacher's rows and classes {tuple(teacher.shape)}, "
            f"but got {tuple(student.shape)}"
        )
    _check.positive("temperature", temperature)
    _check.one_of("activation", activation, ACTIVATIONS)
    _check.one_of("class_reduction", class_reduction, CLASS_REDUCTIONS)
    _check.same_device(student=student, teacher=teacher, weights=weights)
    rows = divergences(student, teacher, temperature, activation)
    if class_reduction == "mean":
        rows = rows / max(1, student.shape[1])
    if weights is not None:
        _check.tensor("weights", weights, 1, "(N,)")
        _check.length("weights", weights, student.shape[0])
        rows = rows * weights.detach().to(rows.dtype)
    return temperature**2 * rows.sum() / max(1, student.shape[0])


class SoftLabels(DistillLoss):
    """Soft labels on the student's positives, as a loss of its own.

    The rows that the student's own loss trains as objects follow the teacher's classes:
    :func:`global_kd.functional.logit_loss`. The number is that of ``kd_logits`` in
    :class:`global_kd.GlobalKnowledgeLoss` with the same weight, which brings the term along; here
    it goes without prototypes and beside any other loss.

    Needs class logits of both detectors on these rows, and so the same classes; no adapter.

    With ``robust=True`` a row weighs what its ground-truth box does on the level of its size; a
    :class:`global_kd.GlobalKnowledgeLoss` of a two-stage student weighs by its proposal's box.

    Args:
        weight: Default 5, as there (docs/evidence.md); released 1.
        temperature: Of both.
        activation: ``"softmax"`` or ``"sigmoid"``, what the student's class head uses. ``None``:
            as the detector says, else ``"softmax"``.
        class_reduction: ``"mean"`` over classes (released) or ``"sum"``.
        **common: See :class:`global_kd.losses.DistillLoss`.
    """

    name = "soft_labels"
    needs = frozenset({"positives"})

    def __init__(
        self,
        *,
        weight: float | None = None,
        temperature: float = 2.0,
        activation: str | None = None,
        class_reduction: str = "mean",
        **common: Unpack[Common],
    ) -> None:
        _check.positive("temperature", temperature)
        _check.one_of("class_reduction", class_reduction, CLASS_REDUCTIONS)
        if activation is not None:
            _check.one_of("activation", activation, ACTIVATIONS)
        self._activation, self._temperature = activation, temperature
        self._class_reduction = class_reduction
        super().__init__({"": weight}, {"one-stage": {"": 5.0}, "two-stage": {"": 5.0}}, **common)

    @property
    def adapts(self) -> bool:
        return False

    def make(self, levels: Levels) -> None:
        if self._activation is None:
            self._activation = levels.activation or "softmax"

    def terms(self, step: Step) -> dict[str, Tensor]:
        positives = step.positives
        assert positives is not None
        if positives.student is None or positives.teacher is None:
            raise ValueError(
                "positives: SoftLabels expected class logits of both detectors, but got None"
            )
        assert self._activation is not None
        omega, weights = self.box_weights(step), None
        if omega is not None:
            assert step.targets is not None
            level = assign_levels(step.targets.boxes.detach(), step.strides)
            weights = omega.gather(0, level[None])[0][positives.logit_box]
        value = logit_loss(
            positives.student,
            positives.teacher,
            weights,
            temperature=self._temperature,
            activation=self._activation,
            class_reduction=self._class_reduction,
        )
        return {"": value}
