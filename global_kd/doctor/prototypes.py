"""Will there be prototypes?"""

from collections.abc import Iterable

from torch import Tensor

from ..losses.base import DistillLoss
from ..targets import Targets
from .batch import ENOUGH


def prototype_facts(
    facts: list[str], problems: list[str], keeper: DistillLoss, truth: Targets
) -> None:
    """What a batch tells of those to come."""
    least = keeper.generator.min_side
    small = (truth.boxes[:, 2:] - truth.boxes[:, :2]).amin(dim=1) <= least
    if keeper.uses_prototypes and len(truth) >= ENOUGH and bool(small.all()):
        problems.append(
            f"none of the batch's {len(truth)} boxes is larger than min_side="
            f"{least:g} pixels of the network input both ways, so none of them "
            "can become a prototype; pass a smaller min_side"
        )
    elif keeper.uses_prototypes and (lost := _too_small(truth.labels, small)):
        names = keeper.bank.class_names
        told = ", ".join(f"class {k}" if names is None else names[k] for k in lost)
        facts.append(
            f"larger than min_side={least:g} pixels both ways, as a prototype must be, is no box "
            f"of {told} in this batch"
        )
    if not keeper.bank.valid.any():
        facts.append(
            "no prototypes yet: the terms above use some made of this batch's boxes; in training "
            "omega is 1 and kd_relation 0 until the first refresh"
        )


def schedule_problems(keeper: DistillLoss) -> Iterable[str]:
    """Whether the first refresh comes before the end, of the run and of all schedules."""
    every, steps = getattr(keeper, "refresh_every", None), keeper.total_steps
    if not every or not steps or not keeper.uses_prototypes or keeper.bank.valid.any():
        return
    if every < steps:
        names = keeper.term_names
        if names and not any(keeper.schedules[n](k / steps) for n in names for k in (every, steps)):
            yield (
                f"refresh_every={every} of total_steps={steps}, but by then the schedules of all "
                "terms have ended, so that no prototype is ever used; pass "
                "refresh_every=len(loader), or call kd.refresh(loader) before the first epoch"
            )
    else:
        yield (
            f"refresh_every={every} is not below total_steps={steps}, so no prototypes come from "
            "the training stream, omega stays 1 and kd_relation 0; pass refresh_every=len(loader), "
            "or call kd.refresh(loader) before the first epoch"
        )


def _too_small(labels: Tensor, small: Tensor) -> list[int]:
    """Classes of which there are boxes, all of them small."""
    return sorted(set(labels.tolist()) - set(labels[~small].tolist()))
