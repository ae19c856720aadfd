"""CrossKD: the teacher's head judges the student's maps (Wang et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _check
from ..ops.boxes import giou
from ..step import Dense, Hidden, Step, pair_dense
from .base import Common, DistillLoss
from .bckd import check_beta, disagreement_rows
from .rows import count_positives, quiet, rows_that_count

if TYPE_CHECKING:
    from typing_extensions import Unpack


def aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """Features ``(B, C, H, W)`` with the teacher's mean and deviation of each channel.

    Over images and cells; gradients go through the student's mean and deviation, too.

    Raises:
        ValueError: Unlike numbers of channels.
    """
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"after: expected heads of equal width, but the student's has {student.shape[1]} "
            f"channels, the teacher's {teacher.shape[1]}; after=0 adapts the maps instead"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    means, deviations = [], []
    for x in (student.to(dtype), teacher.detach().to(dtype)):
        var, mean = torch.var_mean(
            x, dim=(0, 2, 3), correction=int(x[:, 0].numel() > 1), keepdim=True
        )
        means.append(mean)
        deviations.append((var + 1e-12).sqrt())  # a constant channel keeps a finite gradient
    centred = (student.to(dtype) - means[0]) / (deviations[0] + 1e-6)
    return (centred * deviations[1] + means[1]).to(student.dtype)


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

    By default the student's *maps* are adapted and the teacher's whole head runs on them, which
    serves any pair. With ``after=n`` it is the paper's: the student's hidden features after ``n``
    of its head's convolutions get the teacher's mean and deviation of each channel, and the rest of
    the teacher's branches runs on them. That wants two heads of one shape (torchvision's Faster
    R-CNN, RetinaNet and FCOS, Ultralytics' YOLO heads). The student's convolutions then run once
    more. The divergence of box distributions that the paper takes for GFL, and
    the centreness of its ATSS, are left out: the boxes stand for both.

    Args:
        classes: Weight, default 1; the paper's FCOS 0.4.
        boxes: Weight, default 1; the paper's FCOS 0.75; 0 for heads without boxes.
        after: Convolutions of the head after which the student's features are taken; 0: its maps.
            The paper: 3 of 4 for RetinaNet, 2 for FCOS.
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
        after: int = 0,
        beta: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        check_beta(beta)
        _check.count("after", after or None)
        self.after = after
        if after:
            self.needs = frozenset({"split_heads", "teacher_dense"})
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

    @property
    def adapts(self) -> bool:
        return not self.after

    def check_pair(self, dry: Callable[[frozenset[str]], Step]) -> None:
        if not self.after:
            return
        with torch.no_grad():
            try:
                self._cross(dry(frozenset({"split_heads"})))
            except ValueError as error:
                raise ValueError(
                    f"losses: CrossKD(after={self.after}) does not fit this pair: {error}"
                ) from None

    def _cross(self, step: Step) -> Dense:
        """What the teacher's head, or its rest, says of the student's features."""
        if not self.after:
            assert step.teacher_head is not None
            return step.teacher_head(self.adapted(step))
        assert step.split_heads is not None
        student, teacher, tail = step.split_heads(self.after)
        return tail(
            Hidden(
                [aligned(s, t) for s, t in zip(student.classes, teacher.classes, strict=True)],
                [aligned(s, t) for s, t in zip(student.boxes, teacher.boxes, strict=True)],
            )
        )

    def terms(self, step: Step) -> dict[str, Tensor]:
        assert step.teacher_dense is not None
        cross, teacher, _ = pair_dense(self._cross(step), step.teacher_dense)
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
