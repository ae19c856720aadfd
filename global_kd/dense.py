"""What a dense head says at every location, and which locations two heads share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The locations of one level: row by row of cells, the anchors of a cell side by side.

    Attributes:
        stride: Pixels of the network input per cell.
        height: In cells.
        width: In cells.
        anchors: Per cell; 1 for anchor-free heads.
    """

    stride: float
    height: int
    width: int
    anchors: int = 1

    @property
    def rows(self) -> int:
        """How many locations the level has."""
        return self.height * self.width * self.anchors


@dataclass(frozen=True)
class Dense:
    """What a detector's dense head says at every location of every level.

    ``N`` counts the locations, level by level as in ``grids``. The student's tensors carry
    gradients, the teacher's do not. Boxes and priors are xyxy in pixels of the student's network
    input, and may reach beyond it.

    Attributes:
        logits: Class logits ``(B, N, K)``.
        grids: Of each level, finest first; equal strides stay in the head's order.
        activation: Of the logits, ``"sigmoid"`` or ``"softmax"``.
        background: The column of a softmax head that means no object; ``None``: there is none.
        boxes: Decoded boxes ``(B, N, 4)``.
        bins: Logits ``(B, N, 4, D)`` of the distances to the left, top, right and bottom side.
        priors: Anchors ``(N, 4)``; where a head has none, the cells, ``stride`` pixels wide.
        valid: bool ``(N,)`` or ``(B, N)``, False at locations that stand for nothing; ``None``:
            all do.
    """

    logits: Tensor
    grids: tuple[Grid, ...]
    activation: str = "sigmoid"
    background: int | None = None
    boxes: Tensor | None = None
    bins: Tensor | None = None
    priors: Tensor | None = None
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        rows = sum(grid.rows for grid in self.grids)
        if self.logits.dim() != 3 or self.logits.shape[1] != rows:
            raise ValueError(
                f"logits: expected (B, {rows}, K), the locations of {list(self.grids)}, but got "
                f"{tuple(self.logits.shape)}"
            )
        count = tuple(self.logits.shape[:2])
        for name, x, shape in (
            ("boxes", self.boxes, (*count, 4)),
            ("bins", self.bins, (*count, 4)),
            ("priors", self.priors, (rows, 4)),
        ):
            if x is not None and tuple(x.shape[: len(shape)]) != shape:
                raise ValueError(f"{name}: expected shape {shape}, but got {tuple(x.shape)}")

    def probabilities(self) -> Tensor:
        """Of each class of objects, ``(B, N, K')`` in at least float32, without the background."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        if self.activation == "sigmoid":
            return logits.sigmoid()
        p = logits.softmax(dim=2)
        return p if self.background is None else _without(p, self.background)

    def binary_logits(self) -> Tensor:
        """``(B, N, K')`` in at least float32, whose sigmoids are :meth:`probabilities`.

        ``log p - log(1 - p)``: what losses of two-point distributions take without rounding.
        """
        z = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        if self.activation == "sigmoid":
            return z
        log_p = z.log_softmax(dim=2)
        # Only the largest p can be near 1, where 1 - p rounds to 0: there the others are summed.
        top = z.argmax(dim=2, keepdim=True)
        others = z.scatter(2, top, torch.finfo(z.dtype).min).logsumexp(dim=2, keepdim=True)
        is_top = torch.zeros_like(z, dtype=torch.bool).scatter(2, top, True)
        log_rest = torch.log1p(-torch.where(is_top, 0, log_p.exp()))
        odds = torch.where(is_top, z - others, log_p - log_rest)
        return odds if self.background is None else _without(odds, self.background)

    @cached_property
    def scores(self) -> Tensor:
        """The largest probability at each location, ``(B, N)``; 0 where it stands for nothing."""
        if self.activation == "sigmoid":  # which rises: of the largest logit alone
            largest = self.logits.amax(dim=2)
            scores = largest.to(torch.promote_types(largest.dtype, torch.float32)).sigmoid()
        else:
            scores = self.probabilities().amax(dim=2)
        return scores if self.valid is None else scores * self.valid

    def split(self, rows: Tensor) -> list[Tensor]:
        """What has a row for each location, ``(B, N, ...)``, by level."""
        return list(rows.split([grid.rows for grid in self.grids], dim=1))

    def score_maps(self) -> list[Tensor]:
        """The location view ``(B, H, W)`` of each level: the largest score of a cell's anchors."""
        return [
            x.unflatten(1, (g.height, g.width, g.anchors)).amax(dim=3)
            for g, x in zip(self.grids, self.split(self.scores), strict=True)
        ]

    def score_map(self, stride: float, size: tuple[int, int]) -> Tensor | None:
        """The location view of the last level of a stride; ``None``: the head has no such level.

        It is cut to ``(H, W)`` cells from the top left, or filled up with 0.
        """
        for grid, x in reversed(list(zip(self.grids, self.score_maps(), strict=True))):
            if grid.stride == stride:
                down, right = size[0] - grid.height, size[1] - grid.width
                return torch.nn.functional.pad(x, (0, right, 0, down)) if down or right else x
        return None

    def prior_map(self, stride: float, size: tuple[int, int]) -> Tensor | None:
        """The priors ``(H, W, A, 4)`` of the last level of a stride; ``None``: there are none.

        They are cut to ``(H, W)`` cells from the top left, or filled up with boxes without area,
        which also stand where a location stands for nothing.
        """
        if self.priors is None:
            return None
        priors = self.priors
        if self.valid is not None:
            valid = self.valid if self.valid.dim() == 1 else self.valid.any(dim=0)
            priors = torch.where(valid[:, None], priors, 0)
        by_level = priors.split([grid.rows for grid in self.grids])
        for grid, x in reversed(list(zip(self.grids, by_level, strict=True))):
            if grid.stride == stride:
                down, right = size[0] - grid.height, size[1] - grid.width
                x = x.view(grid.height, grid.width, grid.anchors, 4)
                return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, right, 0, down))
        return None

    def take(self, rows: Tensor, grids: tuple[Grid, ...]) -> Dense:
        """The locations ``rows``, int64 ``(M,)``, which fill other grids."""
        return replace(
            self,
            logits=self.logits[:, rows],
            grids=grids,
            boxes=None if self.boxes is None else self.boxes[:, rows],
            bins=None if self.bins is None else self.bins[:, rows],
            priors=None if self.priors is None else self.priors[rows],
            valid=None if self.valid is None else self.valid[..., rows],
        )

    def detach(self) -> Dense:
        """The same without gradients."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach()

        return replace(
            self, logits=self.logits.detach(), boxes=cut(self.boxes), bins=cut(self.bins)
        )


@dataclass(frozen=True)
class Hidden:
    """What the branches of a dense head hold after some convolutions, before the activation.

    Attributes:
        classes: ``(B, C, H, W)`` for each level, in the order of the head's maps.
        boxes: Likewise; the same tensors where both branches have one trunk.
    """

    classes: Sequence[Tensor]
    boxes: Sequence[Tensor]


def _without(x: Tensor, column: int) -> Tensor:
    """Without one of the last dimension's columns."""
    column %= x.shape[-1]
    return torch.cat([x[..., :column], x[..., column + 1 :]], dim=-1)


def pair_dense(student: Dense, teacher: Dense) -> tuple[Dense, Dense, Tensor | None]:
    """Both on the locations that they share: levels of equal stride, cut to the smaller grid.

    Returns:
        Both with equal grids, and which of the student's locations they are, int64 ``(M,)``;
        ``None``: all.

    Raises:
        ValueError: No common stride, unlike numbers of anchors or classes, unlike activations.
    """
    if (
        student.logits.shape[2] != teacher.logits.shape[2]
        or student.activation != teacher.activation
        or student.background != teacher.background
    ):
        mine, theirs = (f"{x.logits.shape[2]} of {x.activation}" for x in (student, teacher))
        raise ValueError(f"the student has {mine} class logits a location, the teacher {theirs}")
    device = student.logits.device
    mine_rows, their_rows, grids = shared_locations(student.grids, teacher.grids, device)
    if mine_rows is not None:
        student = student.take(mine_rows, grids)
    if their_rows is not None:
        teacher = teacher.take(their_rows, grids)
    masks = [x.valid for x in (student, teacher) if x.valid is not None]
    if masks:  # a row that stands for nothing on either side stands for nothing
        valid = masks[0] & masks[-1]
        student, teacher = replace(student, valid=valid), replace(teacher, valid=valid)
    return student, teacher, mine_rows


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept from one step to the next, which may need gradients
def shared_locations(
    student: tuple[Grid, ...], teacher: tuple[Grid, ...], device: torch.device
) -> tuple[Tensor | None, Tensor | None, tuple[Grid, ...]]:
    """Which locations two dense heads share: levels of equal stride, cut to the smaller grid.

    Of several levels of one stride the last ones belong together.

    Returns:
        Indices of the shared locations on either side, int64 ``(M,)`` (``None``: all, in order),
        and their grids. Do not write to them: they are kept.

    Raises:
        ValueError: No common stride, or unlike numbers of anchors at one.
    """
    partners: list[tuple[int, int]] = []
    free = list(range(len(teacher)))
    for i in reversed(range(len(student))):
        fitting = [j for j in free if teacher[j].stride == student[i].stride]
        if fitting:
            free.remove(fitting[-1])
            partners.append((i, fitting[-1]))
    partners.reverse()
    if not partners:
        raise ValueError(
            f"no level of equal stride: the student's head has {[g.stride for g in student]}, the "
            f"teacher's {[g.stride for g in teacher]}"
        )
    grids, mine, theirs = [], [], []
    for i, j in partners:
        a, b = student[i], teacher[j]
        if a.anchors != b.anchors:
            raise ValueError(
                f"at stride {a.stride:g} the student has {a.anchors} anchors a cell, the teacher "
                f"{b.anchors}"
            )
        grid = Grid(a.stride, min(a.height, b.height), min(a.width, b.width), a.anchors)
        grids.append(grid)
        mine.append(_window(student, i, grid, device))
        theirs.append(_window(teacher, j, grid, device))
    same = tuple(grids)
    return (
        None if same == student else torch.cat(mine),
        None if same == teacher else torch.cat(theirs),
        same,
    )


def _window(grids: tuple[Grid, ...], level: int, window: Grid, device: torch.device) -> Tensor:
    """Indices of the top left part of a level."""
    grid, first = grids[level], sum(g.rows for g in grids[:level])
    rows = torch.arange(grid.rows, device=device).view(grid.height, grid.width, grid.anchors)
    return rows[: window.height, : window.width].flatten() + first
