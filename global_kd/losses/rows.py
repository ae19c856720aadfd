"""What losses on the locations of dense heads have in common: which rows count, and how many."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ranks import Ranks
from ..step import Dense, Step
from .base import DistillLoss


def both_heads(loss: DistillLoss, step: Step, **fields: str) -> tuple[Dense, Dense]:
    """The step's pair, the teacher's half without gradient.

    Args:
        loss: For whom.
        step: Of training.
        **fields: What both must have beside logits, and the advice where they have not.
    """
    assert step.dense is not None  # checked with the loss's needs
    for name, advice in fields.items():
        if any(getattr(x, name) is None for x in step.dense):
            raise ValueError(
                f"dense: {type(loss).__name__} expected Dense.{name} of both heads, but got None; "
                f"{advice}"
            )
    student, teacher = step.dense
    if student.grids != teacher.grids:
        raise ValueError(
            f"dense: expected the same locations of both heads, but got {list(student.grids)} and "
            f"{list(teacher.grids)}; pair_dense finds those that they share"
        )
    return student, teacher.detach()


def rows_that_count(loss: DistillLoss, *heads: Dense, assigned: Tensor | None = None) -> Tensor:
    """Bool ``(B, N)``: what stands for a place in all heads, is not ignored, on wanted levels."""
    logits = heads[0].logits
    counts = torch.ones_like(logits[..., 0], dtype=torch.bool)
    for head in heads:
        if head.valid is not None:
            counts = counts & head.valid
    if loss._strides_wanted is not None:
        wanted = [
            counts.new_full((g.rows,), g.stride in loss._strides_wanted) for g in heads[0].grids
        ]
        counts = counts & torch.cat(wanted)
    return counts if assigned is None else counts & (assigned != -2)


def count_positives(
    loss: DistillLoss, counts: Tensor, assigned: Tensor | None, scores: Tensor
) -> Tensor:
    """A scalar >= 1: the batch's positives, or, without an assigner, the sum of the scores.

    In training mode the mean over ranks, which must call the loss equally often.
    """
    if assigned is None:
        number = (scores.detach() * counts).sum()
    else:
        number = (counts & (assigned >= 0)).sum().to(scores.dtype)
    ranks = Ranks(loss.distributed and loss.training)
    if ranks.size > 1:
        ranks.add(number)
        number = number / ranks.size
    return number.clamp(min=1)


def quiet(x: Tensor, counts: Tensor) -> Tensor:
    """``x (B, N, ...)`` with zeros where rows do not count: what stands there may be infinite."""
    return torch.where(counts.view(*counts.shape, *[1] * (x.dim() - 2)), x, 0)
