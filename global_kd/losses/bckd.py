"""BCKD: dense class scores as independent two-point distributions (Yang et al., ICCV 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from ..ops.boxes import giou
from ..ops.precision import accumulate
from ..step import Step
from .base import Common, DistillLoss
from .rows import both_heads, count_positives, quiet, rows_that_count

if TYPE_CHECKING:
    from typing_extensions import Unpack


def disagreement_rows(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""Cross-entropy of two-point distributions, weighted by how far the scores lie apart.

    .. math:: \sum_k |\sigma(t_k) - \sigma(s_k)|^\beta \, \mathrm{BCE}(s_k, \sigma(t_k))

    The factor is differentiated through, as in the quality focal loss.

    Args:
        student: Logits ``(..., K)``.
        teacher: Logits of the same shape, detached inside.
        beta: 0 (plain cross-entropy), or at least 1, below which the gradient is infinite where
            the scores agree.

    Returns:
        ``(...)`` in at least float32.
    """
    s, t = accumulate(student), accumulate(teacher.detach()).sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(s, t, reduction="none")
    if beta == 0:
        return entropy.sum(dim=-1)
    apart = (t - s.sigmoid()).abs()
    return ((apart if beta == 1 else apart**beta) * entropy).sum(dim=-1)


def check_beta(beta: float) -> None:
    """0, or at least 1."""
    if beta != 0 and not beta >= 1:
        raise ValueError(f"beta: expected 0 or a number >= 1, but got {beta!r}")


class BCKD(DistillLoss):
    r"""Binary classification distillation, and boxes where the two disagree on the class.

    "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV
    2023. Every location is distilled, without a temperature:

    .. math:: L_{classes} = \frac1{N_{pos}} \sum_i \lambda_i \sum_k
              |\sigma(t_{ik}) - \sigma(s_{ik})|^\beta \, \mathrm{BCE}(s_{ik}, \sigma(t_{ik}))

    .. math:: L_{boxes} = \frac1{N_{pos}} \sum_i \lambda_i \max_k |\sigma(t_{ik}) - \sigma(s_{ik})|
              \, (1 - \mathrm{GIoU}(b^s_i, b^t_i))

    ``lambda_i`` is 0 where the student's assigner ignores a location, else 1, or with
    ``robust=True`` the weight of its cell. ``N_pos`` is the number of positives in the batch, in
    training the mean over ranks, at least 1; without an assigner the sum of the teacher's largest
    scores.

    Needs both dense heads with the same locations and classes, and their boxes unless
    ``boxes=0``. It takes no maps into account and has no adapter.

    The released code lets a level without positives contribute nothing; here it counts like any
    other. The weight of a box is not differentiated through: it would push classes by boxes (the
    equation does not say). Softmax heads count by the probabilities of their object classes.

    Args:
        classes: Weight, default 1.
        boxes: Weight, default 4; 0 for heads without boxes.
        beta: Power of the disagreement; 0 is soft binary cross-entropy, else at least 1.
        **common: See :class:`global_kd.losses.DistillLoss`.
    """

    name = "bckd"
    wishes = frozenset({"assigned"})

    def __init__(
        self,
        *,
        classes: float | None = None,
        boxes: float | None = None,
        beta: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        check_beta(beta)
        self.beta = beta
        self.needs = frozenset({"dense"} if boxes == 0 else {"dense", "boxes"})
        usual = {"one-stage": {"classes": 1.0, "boxes": 4.0}}
        super().__init__({"classes": classes, "boxes": boxes}, usual, **common)

    @property
    def adapts(self) -> bool:
        return False

    def terms(self, step: Step) -> dict[str, Tensor]:
        fields = {"boxes": "boxes=0 leaves the boxes out"} if self.wants("boxes") else {}
        student, teacher = both_heads(self, step, **fields)
        counts = rows_that_count(self, student, teacher, assigned=step.assigned)
        s = quiet(student.binary_logits(), counts)
        t = quiet(teacher.binary_logits(), counts)
        p = t.sigmoid()
        number = count_positives(self, counts, step.assigned, p.amax(dim=2))
        weights = counts.to(s.dtype) / number
        robust = self.location_weights(step, student)
        if robust is not None:
            weights = weights * robust
        terms = {}
        if self.wants("classes"):
            terms["classes"] = (weights * disagreement_rows(s, t, beta=self.beta)).sum()
        if self.wants("boxes"):
            assert student.boxes is not None and teacher.boxes is not None
            apart = (p - s.detach().sigmoid()).abs().amax(dim=2)
            overlap = giou(quiet(student.boxes, counts), quiet(teacher.boxes, counts))
            terms["boxes"] = (weights * apart * (1 - overlap)).sum()
        return terms
