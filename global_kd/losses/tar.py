"""TAR: each task takes from the teacher what the teacher does better (Sun et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from .. import _check
from ..instances import assign_levels
from ..ops.boxes import iou
from ..ops.cells import box_cells, cell_members
from ..ops.imitation import masked_error, paint_values
from ..ops.logits import divergences
from ..ops.precision import accumulate
from ..schedules import Schedule
from ..step import RegionOutputs, Regions, Step
from .base import Common, DistillLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack

GATES = ("probability", "correct", "all")
REFERENCES = ("proposal", "student")
_PARTS = ("features", "classes", "boxes")
_SMALLEST = 1e-2  # pixels; a regressed side below it is this long


def gaussian_mask(
    boxes: Tensor, image_index: Tensor, stride: float, size: tuple[int, int, int]
) -> Tensor:
    r"""A bell on each box: 1 at its centre, ``exp(-1/2)`` at the middle of an edge, 0 outside.

    .. math:: M_{yx} = \max_k \exp\Bigl(-\tfrac12 \bigl(\tfrac{x - x_k}{w_k / 2}\bigr)^2
              - \tfrac12 \bigl(\tfrac{y - y_k}{h_k / 2}\bigr)^2\Bigr)

    with ``x, y`` the centre of a cell and the maximum over the boxes that cover it (Sun et al.
    2020; the variances are those of a re-implementation). A side shorter than a cell counts as one
    cell.

    Args:
        boxes: ``(R, 4)`` xyxy in pixels of the padded network input.
        image_index: int64 ``(R,)``, the image of each box, in ``[0, B)``.
        stride: Pixels of the network input per cell.
        size: ``(B, H, W)`` in cells.

    Returns:
        ``(B, H, W)`` in at least float32, without gradient.

    Example:
        >>> import torch
        >>> from global_kd.functional import gaussian_mask
        >>> box, image = torch.tensor([[0.0, 0.0, 24.0, 8.0]]), torch.tensor([0])
        >>> gaussian_mask(box, image, 8, (1, 1, 4))
        tensor([[[0.8007, 1.0000, 0.8007, 0.0000]]])
    """
    _check.boxes(boxes, image_index)
    _check.positive("stride", stride)
    _check.same_device(boxes=boxes, image_index=image_index)
    return paint_values(_bells(boxes, stride, size[1], size[2]), image_index, size[0])


def _bells(boxes: Tensor, stride: float, height: int, width: int) -> Tensor:
    """Of each box a map of its own, ``(R, H, W)``."""
    boxes = accumulate(boxes.detach())
    rows, columns = cell_members(box_cells(boxes, stride, height, width), height, width)
    x1, y1, x2, y2 = (boxes / stride)[:, :, None].unbind(dim=1)

    def bell(low: Tensor, high: Tensor, members: Tensor) -> Tensor:
        centres = torch.arange(members.shape[1], device=boxes.device, dtype=boxes.dtype) + 0.5
        away = (centres - (low + high) / 2) / ((high - low) / 2).clamp(min=0.5)
        return (-away.square() / 2).exp() * members

    return bell(y1, y2, rows)[:, :, None] * bell(x1, x2, columns)[:, None, :]


def _encode(boxes: Tensor, proposals: Tensor, factors: Sequence[float]) -> Tensor:
    """Boxes as deltas ``(N, 4)`` to their proposals: shifts by sides, logarithms of ratios."""
    low, high = boxes[:, :2], boxes[:, 2:]
    side = (proposals[:, 2:] - proposals[:, :2]).clamp(min=_SMALLEST)
    shift = (low + high - proposals[:, :2] - proposals[:, 2:]) / 2 / side
    ratio = ((high - low).clamp(min=_SMALLEST) / side).log()
    return torch.cat(
        [shift[:, :1] * factors[0], shift[:, 1:] * factors[1]]
        + [ratio[:, :1] * factors[2], ratio[:, 1:] * factors[3]],
        dim=1,
    )


class TAR(DistillLoss):
    r"""Imitate near the middle of objects, and take answers only where the teacher's are better.

    "Distilling Object Detectors with Task Adaptive Regularization", 2020 (arXiv 2006.13108). On the
    maps, with ``M`` of :func:`global_kd.functional.gaussian_mask` on the level of each box,

    .. math:: L_{features} = \frac{1}{2 \max(1, \sum M)} \sum M \sum_c d^2

    summed over levels. It needs ground truth. In two-stage detectors both box heads also look at
    the student's proposals (fact ``regions``), where they can be had or a weight is given:
    ``classes`` is ``T^2 KL(t || s)`` of the rows on which the teacher is the better classifier;
    ``boxes`` the smooth L1 of deltas to the proposal, of those positive rows whose box the teacher
    regresses to a higher IoU with the ground truth than the proposal has. Each is the mean over the
    rows that remain. All three decay linearly over training, ``r(t) = 1 - (t - 1) / t_max``; with
    ``schedule=Schedule("linear", steps=epochs)`` in steps of an epoch, as in the paper.

    **The specification is third-hand**: no code was released, and the paper's body could not be
    read. From notes and a re-implementation come the mask, the decay, the student's proposals and
    the test of the teacher's box against the proposal. Not known, hence options or our choice: the
    weights (1 here), the exact test for classes, the level of a box (its own here), the
    normalisers of ``classes`` and ``boxes``, the deltas' factors.

    Robust weights lower the numerators only.

    Args:
        features: Weight. Default 1.
        classes: Weight. Default 1.
        boxes: Weight. Default 1.
        gate: The teacher is the better classifier where its ``"probability"`` of the true class
            (background included) is higher than the student's; where its answer is ``"correct"``;
            or on ``"all"`` rows.
        reference: The teacher's box must beat the ``"proposal"``, or the box of the ``"student"``.
        temperature: Of the class logits.
        delta_factors: Factors of the four deltas; ``(10, 10, 5, 5)`` in most box heads.
        **common: See :class:`global_kd.losses.DistillLoss`. ``adapter`` defaults to ``"conv3x3"``.
    """

    name = "tar"
    needs = frozenset({"targets"})
    default_schedule = dict.fromkeys(_PARTS, Schedule("linear"))

    def __init__(
        self,
        *,
        features: float | None = None,
        classes: float | None = None,
        boxes: float | None = None,
        gate: str = "probability",
        reference: str = "proposal",
        temperature: float = 1.0,
        delta_factors: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        **common: Unpack[Common],
    ) -> None:
        _check.one_of("gate", gate, GATES)
        _check.one_of("reference", reference, REFERENCES)
        _check.positive("temperature", temperature)
        self.gate, self.reference, self.temperature = gate, reference, temperature
        self.delta_factors = delta_factors
        if classes or boxes:
            self.needs = self.needs | {"regions"}
        elif classes is None or boxes is None:
            self.wishes = frozenset({"regions"})
        common.setdefault("adapter", "conv3x3")
        super().__init__({"features": features, "classes": classes, "boxes": boxes}, **common)

    @property
    def adapts(self) -> bool:
        return self.wants("features")

    def terms(self, step: Step) -> dict[str, Tensor]:
        terms, regions = {}, step.regions
        if self.wants("features"):
            terms["features"] = self._feature_term(step)
        if regions is None:
            return terms
        weights = self.row_weights(step, regions.box)
        if self.wants("classes"):
            terms["classes"] = self._class_term(regions, weights)
        told = regions.student.boxes is not None and regions.teacher.boxes is not None
        if self.wants("boxes") and (told or self._given["boxes"]):
            terms["boxes"] = self._box_term(step, regions, weights)
        return terms

    def _feature_term(self, step: Step) -> Tensor:
        assert step.targets is not None
        boxes, index = step.targets.boxes, step.targets.image_index
        weights, own = self.box_weights(step), assign_levels(boxes.detach(), step.strides)
        errors = []
        maps = zip(self.adapted(step), step.teacher, step.strides, strict=True)
        for level, (s, t, stride) in enumerate(maps):
            batch, _, height, width = s.shape
            bells = _bells(boxes, stride, height, width) * (own == level)[:, None, None]
            bells = bells.to(torch.promote_types(s.dtype, torch.float32))
            mask = paint_values(bells, index, batch)
            total = 2 * mask.sum().clamp(min=1)
            if weights is not None:
                bells = bells * weights[level].to(bells.dtype)[:, None, None]
                mask = paint_values(bells, index, batch)
            errors.append(masked_error(s, t, mask / total))
        return torch.stack(errors).sum()

    def _class_term(self, regions: Regions, weights: Tensor | None) -> Tensor:
        student, teacher = regions.student, regions.teacher
        rows = regions.box >= -1
        if self.gate != "all":
            (p_s, _), (p_t, correct) = (_judge(x, regions) for x in (student, teacher))
            rows = rows & (correct if self.gate == "correct" else p_t > p_s)
        each = divergences(student.logits, teacher.logits, self.temperature, student.activation)
        return self.temperature**2 * _mean(each, rows, weights)

    def _box_term(self, step: Step, regions: Regions, weights: Tensor | None) -> Tensor:
        assert step.targets is not None
        proposals = accumulate(regions.proposals.boxes.detach())
        truth = step.targets.boxes.detach().to(proposals.dtype)
        truth = torch.cat([truth, truth.new_zeros(1, 4)])[regions.box.clamp(min=-1)]
        labels = regions.proposals.labels
        student = regions.student.boxes_of(labels).to(proposals.dtype)
        teacher = regions.teacher.boxes_of(labels).detach().to(proposals.dtype)
        reference = proposals if self.reference == "proposal" else student.detach()
        rows = (regions.box >= 0) & (iou(teacher, truth) > iou(reference, truth))
        s, t = (_encode(x, proposals, self.delta_factors) for x in (student, teacher))
        each = functional.smooth_l1_loss(s, t, reduction="none").sum(dim=1)
        return _mean(each, rows, weights)


def _judge(outputs: RegionOutputs, regions: Regions) -> tuple[Tensor, Tensor]:
    """Probability of the true class of each row, and whether it is the answer; both ``(N,)``."""
    logits = accumulate(outputs.logits.detach())
    p = logits.sigmoid() if outputs.activation == "sigmoid" else logits.softmax(dim=1)
    nothing = outputs.background
    if nothing is None:  # no object is what no class claims
        nothing = p.shape[1]
        p = torch.cat([p, 1 - p.amax(dim=1, keepdim=True)], dim=1)
    labels = regions.proposals.labels.clamp(0, p.shape[1] - 1)
    truth = torch.where(regions.box >= 0, labels, nothing % p.shape[1])
    return p.gather(1, truth[:, None])[:, 0], p.argmax(dim=1) == truth


def _mean(each: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """Over those ``rows``; a zero that still back-propagates where there are none."""
    rows = rows.to(each.dtype)
    share = rows / rows.sum().clamp(min=1)
    if weights is not None:
        share = share * weights
    return (share * each).sum()
