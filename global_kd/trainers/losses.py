"""What a trainer distils where the user names no loss, and how long the training will be."""

from collections.abc import Iterable, Mapping

from ..losses.base import DistillLoss
from ..losses.global_knowledge import GlobalKnowledgeLoss

Losses = DistillLoss | Iterable[DistillLoss] | None
Share = float | Mapping[str, float] | None  # see the Distiller


def losses_for(
    losses: Losses, num_classes: int, total_steps: int, steps_per_epoch: int
) -> list[DistillLoss]:
    """The losses given, or global knowledge with new prototypes each epoch.

    Those that do not know the length of the training are told.
    """
    if losses is None:
        refresh_every = min(steps_per_epoch, max(1, total_steps // 2))
        losses = GlobalKnowledgeLoss(num_classes, refresh_every=refresh_every)
    several = [losses] if isinstance(losses, DistillLoss) else list(losses)
    for loss in several:
        if loss.total_steps is None:
            loss.total_steps = total_steps
    return several
