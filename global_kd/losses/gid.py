"""GID: features, relations and answers where the two detectors disagree (Dai et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from .. import _check
from ..instances import assign_levels
from ..ops.boxes import iou
from ..ops.precision import accumulate
from ..ops.roi_align import roi_align
from ..step import Dense, Step
from .base import Common, DistillLoss
from .bckd import disagreement_rows
from .rows import both_heads, quiet, rows_that_count

if TYPE_CHECKING:
    from typing_extensions import Unpack

DISTANCES = ("norm", "square")
_LEAST = 1e-3  # unit of distances, in mean lengths of a row


def select_instances(
    student_probs: Tensor,
    teacher_probs: Tensor,
    student_boxes: Tensor,
    teacher_boxes: Tensor,
    k: int = 10,
    *,
    threshold: float = 0.3,
) -> Tensor:
    r"""The predictions of one image on which two detectors disagree most, none over another.

    .. math:: P_r = \max_c |p^t_{rc} - p^s_{rc}|

    The box of a prediction is that of the detector that is surer there, the teacher's where both
    are equally sure. Of boxes that overlap by more than the threshold the one with the largest
    ``P`` stays.

    Args:
        student_probs: ``(N, K)`` in [0, 1], of each class of objects at each location.
        teacher_probs: Of the same locations and classes.
        student_boxes: ``(N, 4)`` xyxy.
        teacher_boxes: ``(N, 4)``.
        k: How many, at most.
        threshold: IoU in [0, 1]; 1 lets all boxes stay.

    Returns:
        int64, ``k`` indices or fewer, the largest disagreement first. Their number makes an
        accelerator wait.

    Example:
        >>> import torch
        >>> from global_kd.functional import select_instances
        >>> student, teacher = (
        ...     torch.tensor([[0.1], [0.2], [0.5]]),
        ...     torch.tensor([[0.9], [0.9], [0.4]]),
        ... )
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 0, 60, 10]])
        >>> select_instances(student, teacher, boxes, boxes)  # the second lies over the first
        tensor([0, 2])
    """
    for name, x in (("student_probs", student_probs), ("teacher_probs", teacher_probs)):
        _check.tensor(name, x, 2, "(N, K)")
        _check.floating(name, x)
        _check.shape(name, x, (len(teacher_boxes), teacher_probs.shape[1]))
    for name, x in (("student_boxes", student_boxes), ("teacher_boxes", teacher_boxes)):
        _check.tensor(name, x, 2, "(N, 4)")
        _check.shape(name, x, (len(teacher_probs), 4))
    _check.count("k", k)
    _check_share("threshold", threshold)
    _check.same_device(
        student_probs=student_probs,
        teacher_probs=teacher_probs,
        student_boxes=student_boxes,
        teacher_boxes=teacher_boxes,
    )
    probs, boxes = (student_probs[None], teacher_probs[None]), (student_boxes, teacher_boxes)
    scores, merged = _disagreements(*probs, *(x[None] for x in boxes))
    index, there = _pick(scores, merged, k, threshold)
    return index[0][there[0]]


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], but got {value!r}")


@torch.no_grad()
def _disagreements(
    p_s: Tensor, p_t: Tensor, student_boxes: Tensor, teacher_boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """How far they lie apart ``(B, N)``, and the surer one's boxes ``(B, N, 4)``."""
    p_s, p_t = accumulate(p_s), accumulate(p_t)
    student_boxes, teacher_boxes = accumulate(student_boxes), accumulate(teacher_boxes)
    if p_s.shape[2] == 0:
        return p_s.new_zeros(p_s.shape[:2]), teacher_boxes
    surer = p_t.amax(dim=2) >= p_s.amax(dim=2)
    return (p_t - p_s).abs().amax(dim=2), torch.where(
        surer[..., None], teacher_boxes, student_boxes
    )


@torch.no_grad()
def _pick(scores: Tensor, boxes: Tensor, k: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Suppression that stops after ``k`` boxes: no sorting, no matrix of overlaps.

    Args:
        scores: ``(B, N)``; minus infinity at what is never picked.
        boxes: ``(B, N, 4)``.
        k: How many, of each image.
        threshold: Of the overlap.

    Returns:
        int64 ``(B, min(k, N))``, and bool of the same shape: which of them are picks.
    """
    rest, picks, there = scores, [], []
    for _ in range(min(k, scores.shape[1])):
        best, index = rest.max(dim=1, keepdim=True)
        there.append(best > -torch.inf)
        picks.append(index)
        near = iou(boxes, _at(boxes, index)) > threshold
        rest = torch.where(near, -torch.inf, rest).scatter(1, index, -torch.inf)
    if not picks:
        none = scores.new_zeros((len(scores), 0), dtype=torch.int64)
        return none, none > 0
    return torch.cat(picks, dim=1), torch.cat(there, dim=1)


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """``(B, k, 4)`` of ``(B, N, 4)``."""
    return rows.gather(1, index[..., None].expand(-1, -1, 4))


class GID(DistillLoss):
    r"""General instances: where predictions disagree, whether or not there is an object.

    "General Instance Distillation for Object Detection", CVPR 2021. On each image the ``K``
    predictions of :func:`global_kd.functional.select_instances` become boxes, on each of which
    RoIAlign (10 x 10 cells, on the level of the box's size) makes rows ``s_i`` of the student's
    adapted maps and ``t_i`` of the teacher's. With ``n`` instances in the batch, of any image,

    .. math:: L_{features} = \frac1n \sum_i \|t_i - s_i\|_2, \qquad
              L_{relation} = \operatorname{mean}_{i \ne j} \mathrm{smoothL1}\Bigl(
              \frac{\|s_i - s_j\|_2}{\bar d_s}, \frac{\|t_i - t_j\|_2}{\bar d_t}\Bigr)

    where ``d`` with a bar is the mean distance of two instances, at least a thousandth of their
    mean length; and on the locations ``m`` that belong to an instance

    .. math:: L_{classes} = \frac1{\sum m} \sum m \sum_k \mathrm{BCE}(s_k, \sigma(t_k)), \qquad
              L_{boxes} = \frac1{\sum m} \sum m \sum_{side} |b^s - b^t| / stride

    Needs both dense heads with the same locations and classes, and their boxes; no ground truth.
    Of two-stage detectors that is the first stage.

    **The specification is third-hand**: no code was released, and the paper's body could not be
    read. From notes and outside implementations come the selection, the three losses and their
    weights: 5e-4, 40, and 1 times 0.1 for classes and 1 for boxes. Not known, hence options or our
    choice: the level of a box (that of its size), the unit of the error of boxes (cells of their
    level), and which locations belong to an instance. The paper asks the detector's assigner,
    which is not to be had as a function. Here it is the location where the instance was predicted
    and the anchors that overlap it by ``overlap``, or, where no cell has several anchors, the
    locations whose centre it covers. An outside implementation takes ``distance="square"`` with
    ``features=0.005, boxes=0.1``.

    Left behind from outside implementations: an adapter that is never applied, and suppression
    across the images of a batch. Softmax heads count by the probabilities of their object classes.
    Robust weights are those of an instance's location, of a pair their product, and lower
    numerators only. What is said of the batch is meant of one process.

    Args:
        features: Weight, default 5e-4.
        relation: Weight, default 40.
        classes: Weight, default 0.1.
        boxes: Weight, default 1.
        k: Instances of an image, at most.
        threshold: IoU above which the lesser of two instances is dropped; 1 drops none.
        size: Cells of a row's side.
        distance: ``"norm"`` as above, or ``"square"``: ``||t - s||^2`` over the ``size^2`` cells.
        overlap: See above.
        **common: See :class:`global_kd.losses.DistillLoss`. ``adapter`` defaults to ``"conv3x3"``.
    """

    name = "gid"
    needs = frozenset({"dense", "boxes"})

    def __init__(
        self,
        *,
        features: float | None = None,
        relation: float | None = None,
        classes: float | None = None,
        boxes: float | None = None,
        k: int = 10,
        threshold: float = 0.3,
        size: int = 10,
        distance: str = "norm",
        overlap: float = 0.5,
        **common: Unpack[Common],
    ) -> None:
        for name, value in (("k", k), ("size", size)):
            _check.count(name, value)
        for name, share in (("threshold", threshold), ("overlap", overlap)):
            _check_share(name, share)
        _check.one_of("distance", distance, DISTANCES)
        self.k, self.threshold, self.size = k, threshold, size
        self.distance, self.overlap = distance, overlap
        if classes != 0 or boxes != 0:
            self.wishes = frozenset({"priors"})
        common.setdefault("adapter", "conv3x3")
        given = {"features": features, "relation": relation, "classes": classes, "boxes": boxes}
        usual = {"features": 5e-4, "relation": 40.0, "classes": 0.1, "boxes": 1.0}
        super().__init__(given, {"one-stage": usual}, **common)

    @property
    def adapts(self) -> bool:
        return self.wants("features") or self.wants("relation")

    @property
    def uses_maps(self) -> bool:
        return self.adapts

    def terms(self, step: Step) -> dict[str, Tensor]:
        student, teacher = both_heads(self, step, boxes="GID has no instances without them")
        assert student.boxes is not None and teacher.boxes is not None
        counts = rows_that_count(self, student, teacher)
        mine, theirs = quiet(student.boxes, counts), quiet(teacher.boxes, counts)
        p_s, p_t = (quiet(x.probabilities(), counts) for x in (student, teacher))
        scores, merged = _disagreements(p_s, p_t, mine, theirs)
        scores = torch.where(counts, scores, -torch.inf)
        index, there = _pick(scores, merged, self.k, self.threshold)
        boxes = _at(merged, index)
        robust = self.location_weights(step, student)
        terms = {}
        if self.adapts:
            weights = None if robust is None else robust.gather(1, index).flatten()
            s, t = self._instances(step, boxes)
            if self.wants("features"):
                terms["features"] = self._features(s, t, there.flatten(), weights)
            if self.wants("relation"):
                terms["relation"] = _relation(s, t, there.flatten(), weights)
        if self.wants("classes") or self.wants("boxes"):
            members = self._members(student, counts, index, there, boxes).to(scores.dtype)
            share = members / members.sum().clamp(min=1)
            if robust is not None:
                share = share * robust
            if self.wants("classes"):
                s, t = (quiet(x.binary_logits(), counts) for x in (student, teacher))
                terms["classes"] = (share * disagreement_rows(s, t, beta=0)).sum()
            if self.wants("boxes"):
                apart = (accumulate(mine) - accumulate(theirs)).abs().sum(dim=2)
                levels = zip(student.grids, student.split(share * apart), strict=True)
                terms["boxes"] = torch.stack([x.sum() / g.stride for g, x in levels]).sum()
        return terms

    def _instances(self, step: Step, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``(B k, C size^2)`` of the student's adapted maps and of the teacher's."""
        level = assign_levels(boxes.flatten(0, 1), step.strides).view(boxes.shape[:2])
        return self._aligned(self.adapted(step), step, boxes, level), self._aligned(
            step.teacher, step, boxes, level
        )

    def _aligned(self, maps: Sequence[Tensor], step: Step, boxes: Tensor, level: Tensor) -> Tensor:
        widest = max(x.shape[1] for x in maps)
        rows = []
        for i, (x, stride) in enumerate(zip(maps, step.strides, strict=True)):
            each = roi_align(x, boxes, stride, self.size).flatten(2)
            each = torch.where((level == i)[..., None], each, 0)
            rows.append(functional.pad(each, (0, widest * self.size**2 - each.shape[2])))
        return torch.stack(rows).sum(dim=0).flatten(0, 1)

    def _features(self, s: Tensor, t: Tensor, there: Tensor, weights: Tensor | None) -> Tensor:
        each: Tensor
        if self.distance == "norm":
            each = torch.linalg.vector_norm(s - t, dim=1)
        else:
            each = (s - t).square().sum(dim=1) / self.size**2
        share = there.to(each.dtype)
        share = share / share.sum().clamp(min=1)
        if weights is not None:
            share = share * weights
        return (share * each).sum()

    def _members(
        self, dense: Dense, counts: Tensor, index: Tensor, there: Tensor, boxes: Tensor
    ) -> Tensor:
        """Which locations belong to an instance: bool ``(B, N)``."""
        priors = _cells(dense, boxes) if dense.priors is None else dense.priors.to(boxes.dtype)
        centre = (priors[:, :2] + priors[:, 2:]) / 2
        anchored = dense.priors is not None and any(g.anchors > 1 for g in dense.grids)
        members = torch.zeros_like(counts)
        # One instance of each image at a time: all of them would be as many maps of flags.
        for i in range(boxes.shape[1]):
            box = boxes[:, i, None]
            if anchored:
                hit = iou(priors, box) >= self.overlap
            else:
                inside = (centre >= box[..., :2]) & (centre <= box[..., 2:])
                hit = inside.all(dim=2)
            hit = hit.scatter(1, index[:, i, None], True)
            members = members | (hit & there[:, i, None])
        return members & counts


def _relation(s: Tensor, t: Tensor, there: Tensor, weights: Tensor | None) -> Tensor:
    """Of the distances between instances, each side in units of its mean."""
    same = torch.eye(len(there), dtype=torch.bool, device=there.device)
    pairs = (there[:, None] & there & ~same).to(s.dtype)
    count = pairs.sum().clamp(min=1)
    units = []
    for x in (s, t):
        # Not by a product of matrices, which loses small distances. The gradient of 0 is 0.
        apart = pairs * torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        mean = apart.sum() / count
        # Of maps that are all but constant the distances are rounding, which a unit would blow up.
        length = torch.linalg.vector_norm(x.detach(), dim=1) * there
        mean = mean.clamp(min=_LEAST * length.sum() / there.sum().clamp(min=1))
        units.append(apart / torch.where(mean > 0, mean, 1))
    each = functional.smooth_l1_loss(units[0], units[1], reduction="none")
    if weights is not None:
        each = each * weights[:, None] * weights
    return each.sum() / count


def _cells(dense: Dense, like: Tensor) -> Tensor:
    """The cells ``(N, 4)`` of a head that tells no priors."""
    found = []
    for g in dense.grids:
        y, x = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (g.height, g.width))
        y, x = torch.meshgrid(y, x, indexing="ij")
        corner = torch.stack([x, y], dim=-1)[:, :, None].expand(-1, -1, g.anchors, -1)
        found.append(torch.cat([corner, corner + 1], dim=-1).flatten(0, 2) * g.stride)
    return torch.cat(found)
