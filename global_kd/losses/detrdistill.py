"""DETRDistill's term of features: imitate where the teacher's queries look (ICCV 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from .. import _check
from ..ops.boxes import iou
from ..ops.cosine import unit_rows
from ..ops.precision import accumulate
from ..step import Queries, Step
from ..targets import Targets
from .base import Common, DistillLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack

FLOOR = 0.01


def query_guided_loss(student: Tensor, teacher: Tensor, queries: Tensor, scores: Tensor) -> Tensor:
    r"""Squared error of two maps where the teacher's good queries are like its cells.

    .. math:: L = \operatorname{mean}_{b,c,y,x} \bigl(m_{byx} (t - s)\bigr)^2,\qquad
              m = \frac{\max(0.01, a)}{\max_{yx} a},\qquad
              a_{byx} = \sum_n \sigma_{bn} \Bigl\langle \frac{q_{bn}}{\lVert q_{bn} \rVert},
              \frac{t_{byx}}{\lVert t_{byx} \rVert} \Bigr\rangle

    (Chang et al. 2023.) In an image where ``a`` stays below 0.01 everywhere, ``m`` is 0.01:
    undivided, where the released code would make it 1 because there is no object.

    Args:
        student: Map ``(B, C, H, W)``, adapted.
        teacher: Map of the same shape; gets no gradient.
        queries: The teacher's ``(B, Q, C)``; get no gradient.
        scores: Of each query, ``(B, Q)`` >= 0; get no gradient.

    Returns:
        Scalar in at least float32.

    Example:
        >>> import torch
        >>> from global_kd.functional import query_guided_loss
        >>> teacher = torch.eye(4).view(1, 4, 2, 2)  # each cell has a direction of its own
        >>> query, score = torch.tensor([[[1.0, 0, 0, 0]]]), torch.tensor([[0.5]])
        >>> loss = query_guided_loss(torch.zeros_like(teacher), teacher, query, score)
        >>> round(loss.item() * 16, 4)  # the first cell wholly, three at 0.01 / 0.5
        1.0012
    """
    _check.same_maps(student, teacher)
    _check.tensor("queries", queries, 3, "(B, Q, C)")
    if queries.shape[::2] != teacher.shape[:2]:
        raise ValueError(
            f"queries: expected (B, Q, C) with the maps' B and C, {tuple(teacher.shape[:2])}, but "
            f"got {tuple(queries.shape)}; distil the maps that the teacher's decoder reads"
        )
    _check.shape("scores", scores, tuple(queries.shape[:2]))
    _check.same_device(student=student, queries=queries, scores=scores)
    student, teacher = accumulate(student), accumulate(teacher.detach())
    mask = _mask(teacher, queries.detach(), scores.detach())
    squares = (teacher - student).square().sum(dim=1) * mask.square()
    return squares.sum() / max(student.numel(), 1)


@torch.no_grad()
def _mask(teacher: Tensor, queries: Tensor, scores: Tensor) -> Tensor:
    """``(B, H, W)`` in (0, 1]."""
    # Cosines are linear in the unit queries: their weighted sum is one direction of each image.
    wanted = (unit_rows(queries) * accumulate(scores)[:, :, None]).sum(dim=1)
    length = teacher.square().sum(dim=1).sqrt()
    likeness = (teacher * wanted[:, :, None, None]).sum(dim=1)
    likeness = likeness / length.clamp(min=torch.finfo(length.dtype).tiny)
    mask = likeness.clamp(min=FLOOR)
    largest = mask.amax(dim=(1, 2), keepdim=True)
    return torch.where(largest > FLOOR, mask / largest, mask)


def query_scores(queries: Queries, targets: Targets, weights: Tensor | None = None) -> Tensor:
    """Class score times IoU with the nearest ground truth, ``(B, Q)``; 0 in an image without.

    Args:
        queries: The teacher's.
        targets: Ground truth.
        weights: Of each box, ``(R,)``: factors of its IoU.
    """
    logits = accumulate(queries.logits)
    if queries.activation == "sigmoid":
        scores = logits.sigmoid().amax(dim=2)
    else:  # the last class is no object
        scores = logits.softmax(dim=2)[..., :-1].amax(dim=2)
    overlap = iou(accumulate(queries.boxes)[:, :, None], targets.boxes.to(scores.dtype))
    if weights is not None:
        overlap = overlap * weights.to(scores.dtype)
    images = torch.arange(len(scores), device=scores.device)
    here = (targets.image_index == images[:, None])[:, None]
    # A column of zeros stands for images without a box.
    return scores * functional.pad(overlap * here, (0, 1)).amax(dim=2)


class DETRDistill(DistillLoss):
    """Imitate the maps where the teacher's queries that found an object look.

    The term of features of "DETRDistill: A Universal Knowledge Distillation Framework for
    DETR-families", ICCV 2023. A query counts by its class score times its IoU with the nearest
    ground truth, a cell by its likeness to such queries. It needs the decoder queries of a DETR
    teacher and ground-truth boxes; the student may be any detector whose levels pair with the
    teacher's. Sum over levels of :func:`global_kd.functional.query_guided_loss`.

    Masks are divided by their largest value in each image and level; the squared error is that of
    the maps as they are, only the likeness is one of unit vectors. Changed: an image without
    objects has almost no weight (there the whole). Robust weights are factors of the boxes' IoUs.
    The paper's weight could not be read, nor its terms of logits and assignments, which need
    matched queries.

    Args:
        weight: Default 1. It means little across detectors: give it as a share of the gradient.
        **common: See :class:`global_kd.losses.DistillLoss`.
    """

    name = "detrdistill"
    needs = frozenset({"queries", "targets"})

    def __init__(self, *, weight: float | None = None, **common: Unpack[Common]) -> None:
        super().__init__({"": weight}, **common)

    def check_pair(self, dry: Callable[[frozenset[str]], Step]) -> None:
        step = dry(frozenset({"queries"}))
        assert step.queries is not None
        width, wanted = step.queries.embeddings.shape[2], self._strides_wanted
        levels = zip(step.teacher, step.strides, strict=True)
        maps = [t.shape[1] for t, stride in levels if wanted is None or stride in wanted]
        if any(channels != width for channels in maps):
            raise ValueError(
                "losses: DETRDistill expected the teacher's maps as wide as its decoder's queries, "
                f"{width} channels, but got {maps}; take a teacher whose decoder reads its maps "
                "as they are, or a loss that needs no queries, such as PKD"
            )

    def terms(self, step: Step) -> dict[str, Tensor]:
        queries, targets, weights = step.queries, step.targets, self.box_weights(step)
        assert queries is not None and targets is not None
        scores = None if weights is not None else query_scores(queries, targets)
        found = []
        for level, (s, t) in enumerate(zip(self.adapted(step), step.teacher, strict=True)):
            if weights is not None:
                scores = query_scores(queries, targets, weights[level])
            assert scores is not None
            found.append(query_guided_loss(s, t, queries.embeddings, scores))
        return {"": torch.stack(found).sum()}
