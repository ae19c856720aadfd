"""PFI and RM: features where predictions differ, ranks of positives (Li et al., AAAI 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _check
from ..instances import assign_levels
from ..ops.precision import accumulate
from ..step import Dense, Grid, Step
from .base import Common, DistillLoss
from .rows import both_heads, quiet, rows_that_count

if TYPE_CHECKING:
    from typing_extensions import Unpack

PREDICTIONS = ("probabilities", "logits")


def prediction_guided_loss(
    student: Tensor,
    teacher: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None = None,
    *,
    predictions: str = "probabilities",
    detach: bool = True,
) -> Tensor:
    r"""Squared error of two maps, weighted by the squared error of the predictions of a cell.

    .. math:: L = \operatorname{mean}_{b,y,x} \omega \;
              \operatorname{mean}_k (p^s_k - p^t_k)^2 \;
              \operatorname{mean}_c (s_c - t_c)^2

    Args:
        student: Map ``(B, C, H, W)``, adapted.
        teacher: Map of the same shape, detached inside.
        student_logits: ``(B, A K, H, W)`` of a sigmoid head's ``A`` anchors and ``K`` classes.
        teacher_logits: Of the same shape, detached inside.
        weights: ``(B, H, W)`` of the cells, detached inside.
        predictions: ``"probabilities"`` compares sigmoids, ``"logits"`` what is given as it is.
        detach: Take the predictions' difference for a weight alone. ``False`` pushes the student's
            predictions, too.

    Returns:
        Scalar in at least float32.

    Example:
        >>> import torch
        >>> from global_kd.functional import prediction_guided_loss
        >>> student, teacher = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
        >>> low, high = torch.full((1, 4, 3, 3), -100.0), torch.full((1, 4, 3, 3), 100.0)
        >>> prediction_guided_loss(student, teacher, low, high).item()
        1.0
    """
    _check.same_maps(student, teacher)
    for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        _check.tensor(name, x, 4, "(B, A*K, H, W)")
        _check.floating(name, x)
        size = student.shape[0], teacher_logits.shape[1], *student.shape[2:]
        _check.shape(name, x, size)
    _check.one_of("predictions", predictions, PREDICTIONS)
    s, t = accumulate(student_logits), accumulate(teacher_logits.detach())
    if predictions == "probabilities":
        s, t = s.sigmoid(), t.sigmoid()
    apart = (s - t).square().mean(dim=1)
    if detach:
        apart = apart.detach()
    if weights is not None:
        _check.shape("weights", weights, tuple(apart.shape))
        apart = apart * weights.detach()
    error = (accumulate(student) - accumulate(teacher.detach())).square().mean(dim=1)
    return (apart * error).mean()


def rank_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    box: Tensor,
    weights: Tensor | None = None,
    *,
    num_boxes: int | None = None,
) -> Tensor:
    r"""Divergence of the shares that the positives of a ground truth have in its score.

    .. math:: L = \operatorname{mean}_g \omega_g \, \mathrm{KL}(q^t_g \,\|\, q^s_g), \qquad
              q_{gi} = \frac{\exp z_i}{\sum_{j \in g} \exp z_j}

    the mean over the ground truths that have positives. A constant added to all scores of one
    changes nothing. The order of the rows is of no account.

    Args:
        student_scores: ``(P,)``, of the class of each row's ground truth.
        teacher_scores: ``(P,)`` of the same rows, detached inside.
        box: int64 ``(P,)``, the ground truth of each row; rows with a negative one do not count.
        weights: ``(R,)`` of the ground truths, detached inside.
        num_boxes: ``R``, larger than any of ``box``. Left out, it is read from the weights or from
            ``box``, for which an accelerator waits.

    Returns:
        Scalar in at least float32; a zero that still back-propagates without positives.

    Example:
        >>> import torch
        >>> from global_kd.functional import rank_loss
        >>> scores, box = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 0, 1])
        >>> round(rank_loss(scores + 3, scores, box).item(), 6)
        0.0
    """
    for name, x in (("student_scores", student_scores), ("teacher_scores", teacher_scores)):
        _check.tensor(name, x, 1, "(P,)")
        _check.floating(name, x)
    _check.tensor("box", box, 1, "(P,)")
    _check.integer("box", box)
    _check.shape("teacher_scores", teacher_scores, tuple(student_scores.shape))
    _check.shape("box", box, tuple(student_scores.shape))
    if weights is not None:
        _check.tensor("weights", weights, 1, "(R,)")
        num_boxes = len(weights)
    if num_boxes is None:
        num_boxes = 1 + max([-1, *box.tolist()])
    there = box >= 0
    group = torch.where(there, box, num_boxes)  # one more, for rows that do not count
    log_s = _log_shares(torch.where(there, student_scores, 0), group, num_boxes + 1)
    log_t = _log_shares(torch.where(there, teacher_scores.detach(), 0), group, num_boxes + 1)
    rows = torch.where(there, log_t.exp() * (log_t - log_s), 0)
    members = rows.new_zeros(num_boxes + 1).index_add(0, group, there.to(rows.dtype))
    number = (members > 0).sum().clamp(min=1)
    if weights is not None:
        rows = rows * torch.cat([weights.detach(), weights.new_zeros(1)])[group]
    return rows.sum() / number


def _log_shares(scores: Tensor, group: Tensor, groups: int) -> Tensor:
    """Logarithms of the softmax within each group, ``(P,)``."""
    scores = accumulate(scores)
    low = scores.new_full((groups,), -torch.inf)
    top = low.scatter_reduce(0, group, scores.detach(), "amax")
    shifted = scores - top[group]
    total = scores.new_zeros(groups).index_add(0, group, shifted.exp())
    return shifted - total[group].log()


class PFI(DistillLoss):
    r"""Prediction-guided feature imitation, and rank mimicking of the positives.

    "Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-guided Feature
    Imitation", AAAI 2022: :func:`global_kd.functional.prediction_guided_loss`, mean over levels,
    and :func:`global_kd.functional.rank_loss` of the scores of each ground truth's class.

    Needs both dense heads with the same locations and classes, and what the student's assigner
    says unless ``ranks=0``.

    There is no released code, and the paper could not be read: the equations are third-hand, from
    notes and an outside implementation. That one compares raw logits (``predictions="logits"``),
    lets the product push the predictions (``detach=False``), and sorts scores before their
    softmax, which loses whose they are; the last is left behind. Softmax heads count by the
    probabilities of their object classes, and for ranks by that of the ground truth's.

    With ``robust=True`` a cell weighs what its box does, and a ground truth what it does on the
    level of its size.

    Args:
        features: Weight, default 1.5.
        ranks: Weight, default 4; 0 where nobody knows the assigner.
        predictions: ``"probabilities"`` or ``"logits"``.
        detach: Take the predictions' difference for a weight alone.
        **common: See :class:`global_kd.losses.DistillLoss`.
    """

    name = "pfi"

    def __init__(
        self,
        *,
        features: float | None = None,
        ranks: float | None = None,
        predictions: str = "probabilities",
        detach: bool = True,
        **common: Unpack[Common],
    ) -> None:
        _check.one_of("predictions", predictions, PREDICTIONS)
        self.predictions, self.detach_predictions = predictions, detach
        self.needs = frozenset({"dense"} if ranks == 0 else {"dense", "assigned", "targets"})
        usual = {"one-stage": {"features": 1.5, "ranks": 4.0}}
        super().__init__({"features": features, "ranks": ranks}, usual, **common)

    @property
    def adapts(self) -> bool:
        return self.wants("features")

    def terms(self, step: Step) -> dict[str, Tensor]:
        student, teacher = both_heads(self, step)
        terms = {}
        if self.wants("features"):
            terms["features"] = self._features(step, student, teacher)
        if self.wants("ranks"):
            terms["ranks"] = self._ranks(step, student, teacher)
        return terms

    def _features(self, step: Step, student: Dense, teacher: Dense) -> Tensor:
        counts = rows_that_count(self, student, teacher)
        heads = [quiet(self._compared(x), counts) for x in (student, teacher)]
        levels = {}
        for grid, p_s, p_t in zip(student.grids, *map(student.split, heads), strict=True):
            if grid.stride in step.strides:  # of equal strides the last
                levels[step.strides.index(grid.stride)] = (_cells(p_s, grid), _cells(p_t, grid))
        if not levels:
            raise ValueError(
                f"dense: PFI expected a level with one of the maps' strides {list(step.strides)}, "
                f"but got {[g.stride for g in student.grids]}"
            )
        values, adapted = [], self.adapted(step)
        for i, (p_s, p_t) in sorted(levels.items()):
            weights = self.cell_weights(step, i)
            s, t, p_s, p_t = _cut(adapted[i], step.teacher[i], p_s, p_t)
            if weights is not None:
                weights = weights[:, : s.shape[2], : s.shape[3]]
            values.append(
                prediction_guided_loss(
                    s, t, p_s, p_t, weights, predictions="logits", detach=self.detach_predictions
                )
            )
        return torch.stack(values).mean()

    def _compared(self, dense: Dense) -> Tensor:
        if self.predictions == "logits":
            return accumulate(dense.logits)
        return dense.probabilities()

    def _ranks(self, step: Step, student: Dense, teacher: Dense) -> Tensor:
        assert step.targets is not None and step.assigned is not None
        targets, omega = step.targets, self.box_weights(step)
        counts = rows_that_count(self, student, teacher, assigned=step.assigned)
        positive = counts & (step.assigned >= 0)
        # One more label, for rows without a ground truth.
        labels = torch.cat([targets.labels, targets.labels.new_zeros(1)])
        label = labels[torch.where(positive, step.assigned, len(targets))]
        scores = [_scores(x, label, positive) for x in (student, teacher)]
        weights = None
        if omega is not None:
            level = assign_levels(targets.boxes.detach(), step.strides)
            weights = omega.gather(0, level[None])[0]
        return rank_loss(
            scores[0].flatten(),
            scores[1].flatten(),
            torch.where(positive, step.assigned, -1).flatten(),
            weights,
            num_boxes=len(targets),
        )


def _scores(dense: Dense, label: Tensor, positive: Tensor) -> Tensor:
    """Probability ``(B, N)`` of one column a location; a head with one column has that alone."""
    z = quiet(accumulate(dense.logits), positive)
    column = label.clamp(max=0) if z.shape[2] == 1 else label
    own = z.gather(2, column[..., None])[..., 0]
    if dense.activation == "sigmoid":
        return own.sigmoid()
    p: Tensor = (own - z.logsumexp(dim=2)).exp()
    return p


def _cells(rows: Tensor, grid: Grid) -> Tensor:
    """``(B, A K, H, W)`` of a level's rows ``(B, H W A, K)``."""
    maps: Tensor = rows.unflatten(1, (grid.height, grid.width, grid.anchors))
    return maps.flatten(3).permute(0, 3, 1, 2)


def _cut(*maps: Tensor) -> Iterator[Tensor]:
    """To the cells that all have, from the top left."""
    height, width = (min(x.shape[i] for x in maps) for i in (2, 3))
    return (x[:, :, :height, :width] for x in maps)
