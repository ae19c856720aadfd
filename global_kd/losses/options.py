"""Options of every method, and how they are read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from .. import _check
from ..schedules import Schedule


class Common(TypedDict, total=False):
    """Options of every method, see :class:`global_kd.losses.DistillLoss`."""

    adapter: str
    levels: Sequence[float] | None
    schedule: Schedule | Mapping[str, Schedule] | None
    warmup_steps: int
    total_steps: int | None
    robust: bool
    family: str | None
    seed: int
    distributed: bool
    student_channels: Sequence[int] | None
    teacher_channels: Sequence[int] | None
    strides: Sequence[float] | None


def options_of(method: type, base: type) -> set[str]:
    """Names of what may be given to a method's constructor, or to those it hands options on to."""
    names = {
        name
        for kind in method.__mro__
        if issubclass(kind, base) and "__init__" in vars(kind)
        for name, x in inspect.signature(vars(kind)["__init__"]).parameters.items()
        if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
    }
    return names - {"self", "weights", "defaults"}


def strides_of(levels: Any) -> tuple[float, ...]:
    """The strides of the levels to distil."""
    try:
        strides = tuple(float(x) for x in levels if not isinstance(levels, str))
    except (TypeError, ValueError):
        strides = ()
    if not strides:
        raise TypeError(
            f"levels: expected the strides of the levels to distil, but got {levels!r}; write "
            "levels=[8, 16, 32], or leave it out for all"
        )
    return strides


def schedules_of(given: Any, usual: Mapping[str, Schedule]) -> dict[str, Schedule]:
    """The schedule of each term.

    Args:
        given: One for all, or some by name; ``None``: none.
        usual: Those of all terms, by name.
    """
    if isinstance(given, Schedule):
        return dict.fromkeys(usual, given)
    if not isinstance(given, Mapping | None) or not all(
        isinstance(x, Schedule) for x in (given or {}).values()
    ):
        raise TypeError(
            "schedule: expected a Schedule, or one for each term in a dictionary, but got "
            f"{given!r}"
        )
    for term in given or {}:
        _check.one_of("schedule", term, usual)
    return dict(usual) | dict(given or {})


def all_or_none(*given: Sequence[Any] | None) -> bool:
    """Whether channels and strides were given, which must be all of them or none."""
    if any(x is not None for x in given) and any(x is None for x in given):
        raise ValueError("student_channels, teacher_channels, strides: expected all three or none")
    return given[0] is not None
