"""CrossKD: the teacher's head judges the student's maps (Wang et al., CVPR 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..ops.boxes import giou
from ..step import Dense, Step, pair_dense
from .base import Common, DistillLoss
from .bckd import check_beta, disagreement_rows
from .rows import count_positives, quiet, rows_that_count

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CrossKD(DistillLoss):
    r"""What the teacher's head says of the student's maps follows what it says of its own.

    "CrossKD: Cross-Head Knowledge Distillation for Dense Object Detection", CVPR 2024. The
    student's own head learns from the ground truth alone, so the two do not pull it apart. With
    ``c`` the head's cross prediction and ``t`` the teacher's own:

    .. math:: L_{classes} = \frac1{N_{pos}} \sum_i \lambda_i \sum_k
              |\sigma(c_{ik}) - \sigma(t_{ik})|^\beta \, \mathrm{BCE}(c_{ik}, \sigma(t_{ik}))

    .. math:: L_{boxes} = \frac1{N_{pos}} \sum_i \lambda_i \max_k \sigma(t_{ik})
              \, (1 - \mathrm{GIoU}(b^c_i, b^t_i))

    ``lambda_i`` is 0 where the student's assigner ignores a location, else 1, or with
    ``robust=True`` the weight of its cell. ``N_pos`` is the number of positives in the batch, in
    training the mean over ranks, at least 1. Where the assigner says nothing of the teacher's
    locations, since the student's differ, it is the sum of the teacher's largest scores.

    Needs a teacher with a dense head that can be called on maps. The student may have any head,
    and other classes. One forward and one backward of the teacher's head is the cost.

    The released code takes the student's hidden features after three of the head's convolutions,
    gives them the teacher's mean and deviation of each channel, and runs the rest of the teacher's
    branch, so it wants two heads of one shape. Here the student's *maps* are adapted and the whole
    head runs on them, which serves any pair; there is no alignment of statistics, since the head's
    inputs have an adapter. The divergence of box distributions that the paper takes for GFL, and
    the centreness of its ATSS, are left out: the boxes stand for both.

    Args:
        classes: Weight, default 1; the paper's FCOS 0.4.
        boxes: Weight, default 1; the paper's FCOS 0.75; 0 for heads without boxes.
        beta: Power of the disagreement; 0 is soft binary cross-entropy, else at least 1.
        **common: See :class:`global_kd.losses.DistillLoss`. ``levels`` is refused: the head takes
            all of its levels.
    """

    name = "crosskd"
    needs = frozenset({"teacher_head", "teacher_dense"})
    wishes = frozenset({"assigned", "teacher_boxes"})

    def __init__(
        self,
        *,
        classes: float | None = None,
        boxes: float | None = None,
        beta: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        check_beta(beta)
        if common.get("levels") is not None:
            raise ValueError(
                "levels: CrossKD expected None, since the teacher's head takes all of its levels, "
                f"but got {common['levels']}"
            )
        self.beta = beta
        if boxes is not None:  # asked for by name, they must come
            self.needs = self.needs | (frozenset({"teacher_boxes"}) if boxes else frozenset())
            self.wishes = frozenset({"assigned"})
        usual = {"one-stage": {"classes": 1.0, "boxes": 1.0}}
        super().__init__({"classes": classes, "boxes": boxes}, usual, **common)

    def terms(self, step: Step) -> dict[str, Tensor]:
        assert step.teacher_head is not None and step.teacher_dense is not None
        cross, teacher, _ = pair_dense(step.teacher_head(self.adapted(step)), step.teacher_dense)
        teacher = teacher.detach()
        assigned = self._assigned(step, cross)
        counts = rows_that_count(self, cross, teacher, assigned=assigned)
        c = quiet(cross.binary_logits(), counts)
        t = quiet(teacher.binary_logits(), counts)
        scores = t.sigmoid().amax(dim=2)
        weights = counts.to(c.dtype) / count_positives(self, counts, assigned, scores)
        robust = self.location_weights(step, cross)
        if robust is not None:
            weights = weights * robust
        terms = {}
        if self.wants("classes"):
            terms["classes"] = (weights * disagreement_rows(c, t, beta=self.beta)).sum()
        known = cross.boxes is not None and teacher.boxes is not None
        if self.wants("boxes") and (known or self._given["boxes"] is not None):
            if cross.boxes is None or teacher.boxes is None:
                raise ValueError(
                    "teacher_head, teacher_dense: CrossKD expected Dense.boxes of both, but got "
                    "None; boxes=0 leaves the boxes out"
                )
            overlap = giou(quiet(cross.boxes, counts), quiet(teacher.boxes, counts))
            terms["boxes"] = (weights * scores * (1 - overlap)).sum()
        return terms

    @staticmethod
    def _assigned(step: Step, cross: Dense) -> Tensor | None:
        """What the student's assigner says of these locations, if it speaks of them."""
        same = step.dense is None or step.dense[0].grids == cross.grids
        fits = step.assigned is not None and step.assigned.shape[1] == cross.logits.shape[1]
        return step.assigned if same and fits else None
