"""The dense heads of Ultralytics' YOLOs: one-to-many branch, one anchor point a cell."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..step import Dense, Grid, Hidden
from ..targets import Targets
from .locations import cells_of, rows_of
from .towers import cut

_GAINS = ("box", "cls", "dfl")


class YoloHead:
    """A ``Detect`` head or a subclass of it.

    Args:
        head: With ``cv2`` for the sides and ``cv3`` for the classes, ``cv4`` after it where classes
            are texts.
        path: Its path in the model.
        texts: Whether classes are texts.
    """

    def __init__(self, head: Any, path: str, *, texts: bool) -> None:
        self._head, self._path, self._texts = head, path, texts
        self._strides = [float(s) for s in head.stride]
        # A plan may name the head's levels in any order.
        self._order = sorted(range(len(self._strides)), key=lambda i: self._strides[i])
        self._classes = "cv4" if texts else "cv3"

    @property
    def gives(self) -> frozenset[str]:
        """Facts that it supplies."""
        facts = {"positives", "dense", "boxes", "priors", "assigned", "teacher_head", "split_heads"}
        return frozenset(facts | ({"bins"} if self._head.reg_max > 1 else set()))

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        """Modules to record while a student trains."""
        taps = {}
        if facts & {"positives", "assigned"}:
            taps["head"] = self._path
        if facts & {"positives", "dense", "boxes", "bins", "priors"}:
            taps |= self._paths("logits", self._classes)
        if facts & {"boxes", "bins"}:
            taps |= self._paths("sides", "cv2")
        return taps

    def _paths(self, name: str, branch: str) -> dict[str, str]:
        return {f"{name} {i}": f"{self._path}.{branch}.{i}" for i in self._order}

    def dense(
        self,
        maps: Sequence[Tensor],
        facts: frozenset[str],
        tapped: Mapping[str, Any] | None = None,
        text: Tensor | None = None,
    ) -> Dense:
        """Of the maps in the head's order.

        Boxes are the points moved by the expectations of the four sides' distributions (Li et al.
        2020, "Generalized focal loss", eq. 4), or by the sides themselves where there are no bins.

        Args:
            maps: ``(B, C, H, W)`` each.
            facts: What to give beside the logits.
            tapped: What :meth:`taps_for` recorded.
            text: What the classes mean ``(B, K, C)``, for heads with texts.
        """
        tapped = tapped or {}
        logits, sides = [], []
        for i in self._order:
            found = tapped.get(f"logits {i}")
            logits.append(self._scores(i, maps[i], text) if found is None else found)
            if facts & {"boxes", "bins"}:
                found = tapped.get(f"sides {i}")
                sides.append(self._head.cv2[i](maps[i]) if found is None else found)
        grids = tuple(
            Grid(self._strides[i], x.shape[2], x.shape[3])
            for i, x in zip(self._order, logits, strict=True)
        )
        cells = cells_of(grids, logits[0]) if facts & {"boxes", "priors"} else None
        distances = rows_of(sides).unflatten(2, (4, -1)) if sides else None
        return Dense(
            rows_of(logits),
            grids,
            boxes=_boxes(cells, distances) if "boxes" in facts else None,
            bins=distances if "bins" in facts and self._head.reg_max > 1 else None,
            priors=cells if "priors" in facts else None,
        )

    def hidden(self, maps: Sequence[Tensor], after: int) -> Hidden:
        """What the branches hold after some blocks of convolutions, before the activation."""
        classes, boxes = (
            [cut(f, after, p)[0](x) for f, x in zip(branch, maps, strict=True)]
            for branch, p in self._branches()
        )
        return Hidden(classes, boxes)

    def tail(
        self, hidden: Hidden, after: int, facts: frozenset[str], text: Tensor | None = None
    ) -> Dense:
        """The rest of the branches on such features."""
        tapped = {}
        (classes, p), (sides, q) = self._branches()
        for i, x in enumerate(hidden.classes):
            scores = cut(classes[i], after, p)[1](x)
            tapped[f"logits {i}"] = self._head.cv4[i](scores, text) if self._texts else scores
            if facts & {"boxes", "bins"}:
                tapped[f"sides {i}"] = cut(sides[i], after, q)[1](hidden.boxes[i])
        return self.dense(hidden.classes, facts, tapped, text)

    def _branches(self) -> tuple[tuple[Any, int], tuple[Any, int]]:
        """For classes and for sides, with the number of predicting convolutions at their ends."""
        return (self._head.cv3, 1), (self._head.cv2, 1)

    def _scores(self, level: int, x: Tensor, text: Tensor | None) -> Tensor:
        x = self._head.cv3[level](x)
        scores: Tensor = self._head.cv4[level](x, text) if self._texts else x
        return scores

    def assigned(
        self,
        criterion: Any,
        output: Any,
        batch: dict[str, Any],
        truth: Targets,
        maps: Sequence[Tensor],
    ) -> Tensor | None:
        """Which box the criterion trains each location on, int64 ``(B, N)``; -1: none.

        ``None``: not Ultralytics' own criterion.
        """
        criterion = getattr(criterion, "one2many", criterion)
        if not hasattr(criterion, "assigner"):  # the user computes a loss of his own
            return None
        output = output[1] if isinstance(output, tuple) else output  # in eval mode
        if isinstance(output, Mapping):
            output = output.get("one2many", output)
        mask, index = _assign(criterion, output, batch)
        if not len(truth):
            return torch.full_like(index, -1, dtype=torch.int64)
        # The criterion counts the boxes of each image from 0.
        order = truth.image_index.argsort(stable=True)
        images = torch.arange(len(mask), device=mask.device)
        first = (truth.image_index[None] < images[:, None]).sum(dim=1, keepdim=True)
        box = order[(first + index.long()).clamp(max=len(truth) - 1)]
        box = torch.where(mask, box, -1)
        levels = box.split([x.shape[2] * x.shape[3] for x in maps], dim=1)
        return torch.cat([levels[i] for i in self._order], dim=1)


def _boxes(cells: Tensor | None, distances: Tensor | None) -> Tensor:
    """``(B, N, 4)`` in pixels from sides ``(B, N, 4, D)`` in strides; ``D`` 1: not distributed."""
    assert cells is not None and distances is not None
    distances = distances.to(cells.dtype)
    if distances.shape[3] > 1:
        steps = torch.arange(distances.shape[3], dtype=cells.dtype, device=cells.device)
        distances = distances.softmax(dim=3) @ steps[:, None]
    centre, stride = (cells[:, :2] + cells[:, 2:]) / 2, cells[:, 2:] - cells[:, :2]
    low, high = (distances[..., 0] * stride.repeat(1, 2)).chunk(2, dim=2)
    return torch.cat([centre - low, centre + high], dim=2)


class _Enough(Exception):
    """The assigner has run: the rest of the criterion is not needed."""


@torch.no_grad()
def _assign(criterion: Any, output: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which anchor points the criterion trains as objects, bool ``(B, A)``, and their boxes."""
    found: list[Any] = []

    def assigner(*args: Any, **kwargs: Any) -> None:
        found.extend(criterion.assigner(*args, **kwargs))
        raise _Enough

    twin = copy.copy(criterion)
    twin.assigner = assigner
    with contextlib.suppress(_Enough):
        twin(output, batch)
    return found[3].bool(), found[4]


@contextlib.contextmanager
def arguments(model: Any) -> Iterator[None]:
    """Within, the model has the settings that its criterion reads, as the trainer sets them.

    In checkpoints they are a dictionary, in models from YAML there are none; what is there comes
    before Ultralytics' defaults. Afterwards the model's own are back, and its own criterion.
    """
    known = getattr(model, "args", None)
    if all(hasattr(known, gain) for gain in _GAINS) and hasattr(model, "nc"):
        yield
        return
    from ultralytics.cfg import get_cfg

    given = dict(known) if isinstance(known, Mapping) else vars(known) if known else {}
    names = ("args", "criterion", "nc")
    before = {x: getattr(model, x) for x in names if hasattr(model, x)}
    model.args, model.criterion = SimpleNamespace(**(vars(get_cfg()) | given)), None
    model.nc = before.get("nc", model.model[-1].nc)  # the trainer's, too; RT-DETR's loss reads it
    try:
        yield
    finally:
        for name in names:
            if name in before:
                setattr(model, name, before[name])
            else:
                delattr(model, name)
