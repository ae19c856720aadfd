"""What losses ask of two detectors, and what of a step each of them is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .arguments import all_methods
from .losses.base import DistillLoss
from .pair import Pair
from .step import FACTS, Step, field_of

OF_TRUTH = frozenset({"targets", "positives", "assigned", "regions", "teacher_regions", "omega"})
"""Facts that tell of ground truth."""


class Asked:
    """The facts that each loss gets: all that it needs, and of its wishes what there is.

    Args:
        losses: By name.
        pair: What they are asked of.

    Raises:
        ValueError: A fact that a loss needs and this pair cannot give, soft labels of other
            classes.
    """

    def __init__(self, losses: Mapping[str, DistillLoss], pair: Pair) -> None:
        self._refusals = dict(pair.refusals)
        if not any(loss.keeps_prototypes for loss in losses.values()):
            self._refusals["omega"] = (
                "no loss beside it keeps prototypes; add a GlobalKnowledgeLoss"
            )
        self._wishes = frozenset[str]().union(*(loss.wishes for loss in losses.values()))
        self._facts = {name: self._asked_by(loss, pair) for name, loss in losses.items()}

    def _asked_by(self, loss: DistillLoss, pair: Pair) -> frozenset[str]:
        refused = self._refusals
        for fact in sorted(loss.needs & refused.keys()):
            able = sorted(
                method.__name__ for method in all_methods() if not method.needs & refused.keys()
            )
            raise ValueError(
                f"losses: {type(loss).__name__} needs {fact} ({FACTS[fact]}), but "
                f"{refused[fact]}. What this pair can give is enough for "
                f"{', '.join(able) or 'no loss that is imported'}"
            )
        if "positives" in loss.wishes and pair.unlike_classes:
            raise ValueError(
                f"teacher: expected {pair.student.num_logits} class logits like the student's, "
                f"but got {pair.teacher.num_logits}; soft labels need the same classes, or switch "
                "them off with logits=0"
            )
        found = loss.needs | (loss.wishes - refused.keys())
        if found & {"positives", "dense"} and (order := pair.other_order):
            raise ValueError(
                f"teacher: expected the student's classes in its order, but {order}: class logits "
                "would be compared crosswise; train both with one list of classes, or leave out "
                f"what {type(loss).__name__} compares (soft labels: logits=0)"
            )
        return found

    def __getitem__(self, name: str) -> frozenset[str]:
        """By one loss."""
        return self._facts[name]

    @property
    def by_all(self) -> frozenset[str]:
        """By any loss."""
        return self.by(self._facts)

    def by(self, names: Iterable[str]) -> frozenset[str]:
        """By losses of these names."""
        return frozenset[str]().union(*(self._facts[name] for name in names))

    def given(self, step: Step, name: str) -> dict[str, Any]:
        """The facts of a step that one loss asked for, but the targets."""
        fields = {field_of(fact) for fact in self._facts[name]} - {"targets"}
        return {field: getattr(step, field) for field in fields}

    def missed(self) -> str:
        """Wishes that cannot be had, and why; empty: there are none."""
        wished = sorted(self._wishes & self._refusals.keys())
        return "; ".join(f"no {fact}: {self._refusals[fact]}" for fact in wished)
