"""LD: the distributions of a box's sides follow the teacher's (Zheng et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _check
from ..ops.boxes import diou, iou
from ..ops.logits import divergences
from ..ops.precision import accumulate
from ..step import Dense, Grid, Step
from .base import Common, DistillLoss
from .rows import both_heads, quiet, rows_that_count

if TYPE_CHECKING:
    from typing_extensions import Unpack

NORMALIZERS = ("constant", "weights", "balanced")


def localization_loss(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None, *, temperature: float = 10.0
) -> Tensor:
    r"""Weighted mean divergence of the distributions of four sides.

    .. math:: L = \frac{1}{\sum_i \omega_i} \sum_i \omega_i \frac14 \sum_{side} \frac{T^2}{D}
              \sum_d \mathrm{KL}\bigl(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T)\bigr)

    Args:
        student: Logits ``(P, 4, D)`` of the sides' ``D`` bins.
        teacher: Logits of the same rows, detached inside.
        weights: ``(P,)`` >= 0, detached inside; all 1 by default.
        temperature: ``T > 0``.

    Returns:
        Scalar in at least float32; a zero that still back-propagates where the weights sum to 0.

    Example:
        >>> import torch
        >>> from global_kd.functional import localization_loss
        >>> bins = torch.arange(16.0).view(1, 4, 4)
        >>> localization_loss(bins, bins).item()
        0.0
    """
    for name, x in (("student", student), ("teacher", teacher)):
        _check.tensor(name, x, 3, "(P, 4, D)")
        _check.floating(name, x)
    _check.shape("student", student, (teacher.shape[0], 4, teacher.shape[2]))
    _check.positive("temperature", temperature)
    _check.same_device(student=student, teacher=teacher, weights=weights)
    rows = side_rows(student, teacher, temperature) / max(1, student.shape[2])
    if weights is None:
        return rows.sum() / max(1, len(rows))
    _check.shape("weights", weights, (len(rows),))
    weights = weights.detach().to(rows.dtype)
    return _mean(rows, weights, weights)


def side_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the divergence ``(...)`` of ``(..., 4, D)``: mean over sides, sum over bins."""
    s, t = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    sides = divergences(s, t, temperature, "softmax").view(student.shape[:-1])
    return temperature**2 * sides.mean(dim=-1)


def _mean(rows: Tensor, weights: Tensor, by: Tensor) -> Tensor:
    """``sum(weights * rows) / sum(by)``, 0 where that is 0."""
    total = by.sum()
    return (weights * rows).sum() / torch.where(total > 0, total, 1)


def squares(priors: Tensor, grids: Sequence[Grid], side: float) -> Tensor:
    """Boxes ``(N, 4)`` of ``side`` cells around the centres of these priors."""
    centre = (accumulate(priors[:, :2]) + accumulate(priors[:, 2:])) / 2
    half = torch.cat([centre.new_full((g.rows, 1), g.stride * side / 2) for g in grids])
    return torch.cat([centre - half, centre + half], dim=1)


@torch.no_grad()
def valuable_region(
    priors: Tensor,
    grids: Sequence[Grid],
    boxes: Tensor,
    image_index: Tensor,
    counts: Tensor,
    *,
    share: float = 0.25,
    candidates: int = 9,
) -> Tensor:
    r"""Weights of the locations near an object that are not near enough to be trained as one.

    Location ``i`` belongs to box ``g`` where ``share * theta_g <= DIoU(i, g) < theta_g``, with
    ``theta_g`` the mean plus the standard deviation of the DIoU of the ``candidates`` locations
    nearest to its centre on every level (the threshold of ATSS). Its weight is the largest IoU
    with a box that it belongs to.

    Memory grows with boxes times locations.

    Args:
        priors: ``(N, 4)`` anchors.
        grids: Their levels.
        boxes: ``(R, 4)`` of the batch.
        image_index: int64 ``(R,)``.
        counts: bool ``(B, N)``, which locations stand for something.
        share: Lower end of the region.
        candidates: Per level.

    Returns:
        ``(B, N)`` in [0, 1], 0 outside.
    """
    there = counts[image_index]
    priors, boxes = accumulate(priors), accumulate(boxes)[:, None]
    anchors = torch.where(there[..., None], priors, 0)
    near = diou(anchors, boxes)
    centres = anchors[..., :2] + anchors[..., 2:] - boxes[..., :2] - boxes[..., 2:]
    distance = torch.where(there, centres.square().sum(dim=2), torch.inf)
    rows, chosen = [grid.rows for grid in grids], []
    for far, value in zip(distance.split(rows, dim=1), near.split(rows, dim=1), strict=True):
        far, index = far.topk(min(candidates, far.shape[1]), dim=1, largest=False)
        chosen.append(torch.stack([value.gather(1, index), far.isfinite().to(value.dtype)]))
    value, real = torch.cat(chosen, dim=2)
    number = real.sum(dim=1, keepdim=True)
    mean = (value * real).sum(dim=1, keepdim=True) / number.clamp(min=1)
    square = ((value - mean).square() * real).sum(dim=1, keepdim=True)
    threshold = mean + (square / (number - 1).clamp(min=1)).sqrt()
    inside = there & (near >= share * threshold) & (near < threshold)
    weights = torch.where(inside, iou(anchors, boxes), 0)
    index = image_index[:, None].expand_as(weights)
    return weights.new_zeros(counts.shape).scatter_reduce(0, index, weights, "amax")


class LD(DistillLoss):
    r"""Localization distillation: bins of the sides on positives and around them, and classes.

    "Localization Distillation for Dense Object Detection", CVPR 2022. With ``KL_i`` the mean over
    sides and bins of location ``i``'s divergence at temperature ``T``, times ``T^2``:

    .. math:: L_{main} = \sum_{i \in pos} \max_k p^s_{ik} \, KL_i, \qquad
              L_{vlr} = \tfrac14 \sum_i v_i \, KL_i, \qquad
              L_{classes} = \sum_{level} \operatorname{mean}_{i \in pos} \frac{\tau^2}{K}
              \mathrm{KL}(\mathrm{softmax}(t_i / \tau) \,\|\, \mathrm{softmax}(s_i / \tau))

    Positives are those of the student's assigner; ``v`` is the region of locations whose anchor
    overlaps an object, but by less than the threshold of ATSS, and weighs their IoU. Where a head
    has no anchors, or others, the paper's are taken, of one square a cell (``anchor``).

    Needs two heads with bins (GFL and its kin, YOLO before 26) at the same locations, and what the
    student's assigner says; for ``vlr`` anchors and ground truth. It takes no maps into account.

    The released sums of ``main`` and ``vlr`` grow with the batch (its README asks for at most three
    images a GPU); ``normalizer="constant"`` keeps them, so that the published weights keep their
    meaning. ``"weights"`` divides by the sum of weights, as
    :func:`global_kd.functional.localization_loss` does. ``"balanced"`` takes for ``main`` the sum
    over bins of D-FINE (2024), with all locations and no parameter: positives weigh the IoU of the
    student's box with the ground truth, others the teacher's largest score, and the means of both
    count as the roots of their numbers. Its authors take ``temperature=5``. Without ground truth
    all terms are 0, where the released region ends in an error. Whether the threshold of the region
    is one of IoU or of DIoU was not to be had first-hand; here it is of DIoU.

    Args:
        main: Weight, default 0.25.
        vlr: Weight, default 0.25; its memory grows with boxes times locations, 0 leaves it out.
        classes: Weight, default 10.
        temperature: Of the sides.
        class_temperature: Of the classes.
        normalizer: See above.
        anchor: Side of the region's anchors in cells, default that of GFL; ``None``: the head's own
            priors, for heads with several anchors a cell.
        **common: See :class:`global_kd.losses.DistillLoss`. The paper's RetinaNet with bins takes
            ``main=5, vlr=0.15, class_temperature=8``.
    """

    name = "ld"

    def __init__(
        self,
        *,
        main: float | None = None,
        vlr: float | None = None,
        classes: float | None = None,
        temperature: float = 10.0,
        class_temperature: float = 2.0,
        normalizer: str = "constant",
        anchor: float | None = 8.0,
        **common: Unpack[Common],
    ) -> None:
        _check.positive("temperature", temperature)
        _check.positive("class_temperature", class_temperature)
        _check.one_of("normalizer", normalizer, NORMALIZERS)
        self.temperature, self.class_temperature = temperature, class_temperature
        self.normalizer = normalizer
        if anchor is not None:
            _check.positive("anchor", anchor)
        self.anchor = anchor
        self.needs = frozenset({"dense", "bins", "assigned"})
        if vlr != 0:
            self.needs |= {"priors", "targets"}
        if normalizer == "balanced":
            self.needs |= {"boxes", "targets"}
        usual = {"one-stage": {"main": 0.25, "vlr": 0.25, "classes": 10.0}}
        super().__init__({"main": main, "vlr": vlr, "classes": classes}, usual, **common)

    @property
    def adapts(self) -> bool:
        return False

    def terms(self, step: Step) -> dict[str, Tensor]:
        fields = {"bins": "a head without distributions has nothing for LD"}
        if self.normalizer == "balanced":
            fields["boxes"] = "normalizer='constant' does without"
        student, teacher = both_heads(self, step, **fields)
        assert step.assigned is not None
        counts = rows_that_count(self, student, teacher, assigned=step.assigned)
        positive = counts & (step.assigned >= 0)
        robust = self.location_weights(step, student)
        weigh = torch.ones_like(positive, dtype=torch.float32) if robust is None else robust
        terms = {}
        if self.wants("main") or self.wants("vlr"):
            sides = self._sides(student, teacher, counts)
            if self.wants("main"):
                terms["main"] = self._main(step, student, teacher, sides, counts, weigh)
            if self.wants("vlr"):
                terms["vlr"] = self._region(step, student, sides, counts, weigh)
        if self.wants("classes"):
            terms["classes"] = self._classes(student, teacher, positive, weigh)
        return terms

    def _sides(self, student: Dense, teacher: Dense, counts: Tensor) -> Tensor:
        """``(B, N)``, summed over bins."""
        assert student.bins is not None and teacher.bins is not None
        if student.bins.shape != teacher.bins.shape:
            raise ValueError(
                f"dense: LD expected as many bins of both heads, but got {student.bins.shape[-1]} "
                f"of the student and {teacher.bins.shape[-1]} of the teacher"
            )
        bins = quiet(student.bins, counts), quiet(teacher.bins, counts)
        return side_rows(*bins, self.temperature)

    def _main(
        self,
        step: Step,
        student: Dense,
        teacher: Dense,
        sides: Tensor,
        counts: Tensor,
        robust: Tensor,
    ) -> Tensor:
        assert step.assigned is not None and student.bins is not None
        positive = counts & (step.assigned >= 0)
        if self.normalizer == "balanced":
            other = counts & ~positive
            scores = quiet(teacher.probabilities().amax(dim=2), counts)
            near = self._near(step, student, positive)
            weights = torch.where(positive, near, scores) * robust
            parts, roots = [], []
            for rows in (positive, other):
                number = rows.sum().to(sides.dtype)
                parts.append((weights * rows * sides).sum() / number.clamp(min=1))
                roots.append(number.sqrt())
            whole = sum(p * r for p, r in zip(parts, roots, strict=True))
            return whole / (roots[0] + roots[1]).clamp(min=1)
        weights = positive * quiet(student.detach().probabilities().amax(dim=2), counts)
        return self._reduce(sides / student.bins.shape[-1], weights, robust)

    def _region(
        self, step: Step, student: Dense, sides: Tensor, counts: Tensor, robust: Tensor
    ) -> Tensor:
        assert step.targets is not None and student.priors is not None
        assert student.bins is not None
        targets = step.targets
        boxes = targets.boxes, targets.image_index
        priors = student.priors
        if self.anchor is not None:  # cells overlap nothing: a region of cells is all but empty
            priors = squares(priors, student.grids, self.anchor)
        weights = valuable_region(priors, student.grids, *boxes, counts)
        sides = sides / student.bins.shape[-1]
        scale = 0.25 if self.normalizer == "constant" else 1.0  # released: 4 sides over 16
        return scale * self._reduce(sides, weights.to(sides.dtype), robust)

    def _reduce(self, sides: Tensor, weights: Tensor, robust: Tensor) -> Tensor:
        if self.normalizer == "constant":
            return (weights * robust * sides).sum()
        return _mean(sides, weights * robust, weights)

    @torch.no_grad()
    def _near(self, step: Step, student: Dense, positive: Tensor) -> Tensor:
        """IoU of the student's box with its ground truth, ``(B, N)``; 0 elsewhere."""
        assert step.targets is not None and step.assigned is not None and student.boxes is not None
        truth = step.targets.boxes
        truth = torch.cat([truth, truth.new_zeros(1, 4)])  # for rows without one
        box = torch.where(positive, step.assigned, len(truth) - 1)
        return iou(quiet(student.boxes.detach(), positive), truth[box])

    def _classes(self, student: Dense, teacher: Dense, positive: Tensor, robust: Tensor) -> Tensor:
        s, t = (quiet(x.logits, positive).flatten(0, 1) for x in (student, teacher))
        rows = divergences(s, t, self.class_temperature, "softmax")
        rows = self.class_temperature**2 * rows.view(positive.shape) / student.logits.shape[2]
        sums = [x.sum() for x in student.split(rows * positive * robust)]
        numbers = [x.sum().clamp(min=1) for x in student.split(positive)]
        return torch.stack([a / b for a, b in zip(sums, numbers, strict=True)]).sum()
