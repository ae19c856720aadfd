"""The levels that a loss is built for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import _check


@dataclass(frozen=True)
class Levels:
    """What a loss is built for: the paired levels of two detectors, finest first.

    Attributes:
        student_channels: Of each level.
        teacher_channels: Of each level.
        strides: Pixels of the student's network input per cell.
        activation: Of the student's class logits, where known.
        family: ``"two-stage"``, ``"one-stage"`` or ``"query"``; ``None``: unknown.
    """

    student_channels: tuple[int, ...]
    teacher_channels: tuple[int, ...]
    strides: tuple[float, ...]
    activation: str | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        if not len(self.student_channels) == len(self.teacher_channels) == len(self.strides):
            raise ValueError(
                "student_channels, teacher_channels, strides: expected one entry per level each, "
                f"but got {self.student_channels}, {self.teacher_channels}, {self.strides}"
            )
        if not self.strides or list(self.strides) != sorted(set(self.strides)):
            raise ValueError(
                f"strides: expected increasing numbers > 0, but got {list(self.strides)}"
            )
        _check.positive("strides", self.strides[0])

    def at(self, levels: Sequence[int]) -> Levels:
        """Some of them."""
        return Levels(
            tuple(self.student_channels[i] for i in levels),
            tuple(self.teacher_channels[i] for i in levels),
            tuple(self.strides[i] for i in levels),
            self.activation,
            self.family,
        )

    def of_strides(self, wanted: Sequence[float] | None) -> list[int]:
        """Which of them have these strides; ``None``: all.

        Raises:
            ValueError: A stride that none has.
        """
        missing = set(wanted or ()) - set(self.strides)
        if missing:
            raise ValueError(
                f"levels: expected strides among those that student and teacher share, "
                f"{list(self.strides)}, but got {sorted(missing)}"
            )
        return [i for i, x in enumerate(self.strides) if wanted is None or x in wanted]

    def refuse_other(self, other: Levels) -> None:
        """Levels other than these, for which a loss was built, are an error."""
        built = self.student_channels, self.teacher_channels, self.strides
        wanted = other.student_channels, other.teacher_channels, other.strides
        if built != wanted:
            raise ValueError(
                "build: expected the levels the loss was built for (student channels, teacher "
                f"channels, strides) {built[:2]}, {built[2]}, but got {wanted[:2]}, {wanted[2]}"
            )
