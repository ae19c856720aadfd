"""The dense heads of a pair as functions of maps, in pixels of the student's network input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..detectors import Look
from ..hooks import frozen, keeping_statistics
from ..step import Dense, Grid, Hidden

if TYPE_CHECKING:
    from .pair import Pair


class TeacherHead:
    """The teacher's dense head on maps of its channels, on the paired levels or all of them."""

    def __init__(self, pair: Pair, looked: Look, facts: frozenset[str]) -> None:
        self._pair, self._looked, self._facts = pair, looked, facts

    def __call__(self, maps: Sequence[Tensor]) -> Dense:
        whole = _put_in(maps, self._looked.maps, self._pair.levels[1])
        with frozen(self._pair.models[1]):
            dense = self._pair.teacher.head(whole, self._looked, self._facts)
        return scaled(dense, self._pair.scale)


class SplitHeads:
    """Both dense heads after some convolutions, on the paired levels, and the teacher's rest."""

    def __init__(self, pair: Pair, seen: Look, looked: Look, facts: frozenset[str]) -> None:
        self._pair, self._seen, self._looked, self._facts = pair, seen, looked, facts

    def __call__(self, after: int) -> tuple[Hidden, Hidden, Callable[[Hidden], Dense]]:
        pair = self._pair
        with keeping_statistics(pair.models[0]), _named("student", pair):  # own step remembers them
            mine = pair.student.hidden(self._seen, after)
        with torch.no_grad(), _named("teacher", pair):
            whole = pair.teacher.hidden(self._looked, after)

        def tail(hidden: Hidden) -> Dense:
            filled = Hidden(
                _put_in(hidden.classes, whole.classes, pair.levels[1]),
                _put_in(hidden.boxes, whole.boxes, pair.levels[1]),
            )
            with frozen(pair.models[1]):
                dense = pair.teacher.tail(filled, after, self._looked, self._facts)
            return scaled(dense, pair.scale)

        sides = []
        for hidden, levels in ((mine, pair.levels[0]), (whole, pair.levels[1])):
            classes, boxes = ([x[i] for i in levels] for x in (hidden.classes, hidden.boxes))
            sides.append(Hidden(classes, boxes))
        return sides[0], sides[1], tail


@contextmanager
def _named(role: str, pair: Pair) -> Iterator[None]:
    """Context in which an error says whose head it is about."""
    model = pair.models[("student", "teacher").index(role)]
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the {role}'s head ({type(model).__name__}): {error}") from None


def _put_in(maps: Sequence[Tensor], whole: Sequence[Tensor], levels: Sequence[int]) -> list[Tensor]:
    """A teacher's levels with some of them replaced, on the cells that both have."""
    if len(maps) != len(levels):
        raise ValueError(f"maps: expected {len(levels)} paired levels, but got {len(maps)}")
    result = list(whole)
    for j, x in zip(levels, maps, strict=True):
        theirs = whole[j]
        if x.shape[2:] != theirs.shape[2:]:  # cut to the shared cells
            theirs = theirs.to(x.dtype, copy=True)
            height, width = (min(a, b) for a, b in zip(x.shape[2:], theirs.shape[2:], strict=True))
            theirs[:, :, :height, :width] = x[:, :, :height, :width]
            x = theirs
        result[j] = x.to(whole[j].dtype)
    return result


def scaled(dense: Dense, scale: float) -> Dense:
    """A teacher's head in pixels of the student's network input."""
    if scale == 1:
        return dense
    return replace(
        dense,
        grids=tuple(Grid(g.stride / scale, g.height, g.width, g.anchors) for g in dense.grids),
        boxes=None if dense.boxes is None else dense.boxes / scale,
        priors=None if dense.priors is None else dense.priors / scale,
    )
