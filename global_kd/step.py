"""What one training step gives a loss: paired maps, ground truth, and the facts it asks for.

A reader (``detectors/``) fills these records and knows no loss; a loss (``losses/``) reads them and
knows no framework.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from .targets import Targets

FACTS: Mapping[str, str] = MappingProxyType(
    {
        "targets": "ground truth: Targets",
        "positives": "class logits of both detectors on the rows that the student's own loss "
        "trains as objects: Positives",
        "teacher_dense": "the teacher's class logits at every location: Dense",
        "teacher_boxes": "the decoded boxes of the teacher's head: Dense.boxes",
        "dense": "class logits of both detectors at the same locations, with the same columns: "
        "(Dense, Dense)",
        "boxes": "decoded boxes at these locations: Dense.boxes",
        "bins": "distributions of the four sides at these locations: Dense.bins",
        "priors": "the student's anchors or points: Dense.priors",
        "assigned": "which ground truth the student's own loss assigns to each location: int64 "
        "(B, N)",
        "regions": "both second stages on the student's sampled proposals: Regions",
        "teacher_regions": "both second stages on the teacher's proposals: Regions",
        "queries": "the teacher's decoder queries: Queries",
        "images": "the student's network input: (B, C, H, W)",
        "teacher_head": "the teacher's dense head as a function of maps: maps -> Dense",
        "split_heads": "hidden features of both dense heads, and the rest of the teacher's: int -> "
        "(Hidden, Hidden, Hidden -> Dense)",
        "omega": "robust weights of the boxes: (L, R); they come from a GlobalKnowledgeLoss in the "
        "same list",
    }
)
"""Every fact that a loss can need, and what it is. All but the maps are optional in a step."""


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

    def take(self, rows: Tensor, grids: tuple[Grid, ...]) -> "Dense":
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

    def detach(self) -> "Dense":
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


@dataclass(frozen=True)
class Positives:
    """The rows that the student's own loss trains as objects, and what both detectors say of them.

    Attributes:
        box: int64 ``(N,)``, the ground-truth box of each, an index into the targets.
        proposals: Their own boxes and labels, for two-stage detectors.
        student: Class logits ``(M, K)``; ``None``: not comparable, or nobody asked for them.
        teacher: Of the same rows.
        rows: int64 ``(M,)``, which of the ``N`` the logits belong to; ``None``: all.
    """

    box: Tensor
    proposals: Targets | None = None
    student: Tensor | None = None
    teacher: Tensor | None = None
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.student is None) != (self.teacher is None):
            raise ValueError("student, teacher: expected class logits of both or of neither")

    @property
    def logit_box(self) -> Tensor:
        """The ground-truth box of each row of logits, int64 ``(M,)``."""
        return self.box if self.rows is None else self.box[self.rows]


@dataclass(frozen=True)
class RegionOutputs:
    """What one second stage says of ``N`` boxes.

    Attributes:
        logits: Class logits ``(N, K + 1)``, the background included.
        boxes: Regressed boxes ``(N, K, 4)``, or ``(N, 1, 4)`` where the head does not tell classes
            apart, in pixels of the student's network input; ``K`` counts as in ``logits`` without
            the background.
        activation: Of the logits.
        background: The column of the background.
    """

    logits: Tensor
    boxes: Tensor | None = None
    activation: str = "softmax"
    background: int | None = 0

    def boxes_of(self, labels: Tensor) -> Tensor:
        """The box ``(N, 4)`` that is regressed for a class, int64 ``(N,)``, of each row."""
        if self.boxes is None:
            raise ValueError("boxes: expected regressed boxes (N, K, 4), but got None")
        count = self.boxes.shape[1]
        if count == 1:
            return self.boxes[:, 0]
        if self.background is not None:
            labels = labels - (labels > self.background % self.logits.shape[1]).long()
        index = labels.clamp(0, count - 1)[:, None, None].expand(-1, 1, 4)
        return self.boxes.gather(1, index)[:, 0]


@dataclass(frozen=True)
class Regions:
    """Both second stages on the same boxes.

    Attributes:
        proposals: The boxes; their label is that of their ground truth, and means nothing where
            ``box`` is negative.
        box: int64 ``(N,)``: index of the ground truth that each is matched with, -1 background, -2
            ignored.
        student: With gradients.
        teacher: Without.
    """

    proposals: Targets
    box: Tensor
    student: RegionOutputs
    teacher: RegionOutputs


@dataclass(frozen=True)
class Queries:
    """The last decoder layer of a DETR.

    Attributes:
        embeddings: ``(B, Q, C)``; ``C`` equals the channels of its maps.
        logits: Class logits ``(B, Q, K)``.
        boxes: xyxy ``(B, Q, 4)`` in pixels of the student's network input.
        activation: Of the logits; with ``"softmax"`` the last class is no object.
        bins: Logits ``(B, Q, 4, D)`` of the sides, where the head has them.
    """

    embeddings: Tensor
    logits: Tensor
    boxes: Tensor
    activation: str = "sigmoid"
    bins: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One training step as a loss sees it.

    Attributes:
        student: Maps ``(B, Cs, H, W)``, one for each level, finest first, with gradients.
        teacher: Maps ``(B, Ct, H, W)``, cell for cell the same places, without gradient.
        strides: Pixels of the student's network input per cell of each level.
        targets: Ground truth, in pixels of the student's network input.
        positives: See :class:`Positives`.
        teacher_dense: The teacher's head by itself, on all of its own levels.
        student_dense: The student's head by itself, likewise; who asks for no more than
            ``"priors"`` gets it where the two heads cannot be compared.
        dense: Both heads on the locations that they share, equal in grids and columns.
        assigned: int64 ``(B, N)`` for the locations of ``dense`` (or of the student's head alone,
            where ``dense`` is missing): index into ``targets``, -1 background, -2 ignored.
        regions: On the student's sampled proposals.
        teacher_regions: On the teacher's proposals.
        queries: The teacher's.
        images: The student's network input ``(B, C, H, W)``.
        teacher_head: The teacher's dense head: takes maps with the teacher's channels (the levels
            above), gives :class:`Dense`, with gradients to the maps and none to its parameters.
        split_heads: Takes a number of convolutions; gives :class:`Hidden` of the student, with
            gradients, and of the teacher, for the levels above, and a function that runs the rest
            of the teacher's head on such features and gives :class:`Dense`.
        omega: Robust weights ``(L, R)`` in [0, 1] of the targets' boxes on each level, detached.
    """

    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    strides: tuple[float, ...]
    targets: Targets | None = None
    positives: Positives | None = None
    teacher_dense: Dense | None = None
    student_dense: Dense | None = None
    dense: tuple[Dense, Dense] | None = None
    assigned: Tensor | None = None
    regions: Regions | None = None
    teacher_regions: Regions | None = None
    queries: Queries | None = None
    images: Tensor | None = None
    teacher_head: Callable[[Sequence[Tensor]], Dense] | None = None
    split_heads: Callable[[int], tuple[Hidden, Hidden, Callable[[Hidden], Dense]]] | None = None
    omega: Tensor | None = None

    @property
    def student_head(self) -> Dense | None:
        """What the student's head says, by itself or as one of two; ``None``: nobody asked."""
        if self.student_dense is not None:
            return self.student_dense
        return None if self.dense is None else self.dense[0]

    def at(self, levels: Sequence[int]) -> "Step":
        """The step with some of its levels only."""
        if list(levels) == list(range(len(self.strides))):
            return self
        return replace(
            self,
            student=[self.student[i] for i in levels],
            teacher=[self.teacher[i] for i in levels],
            strides=tuple(self.strides[i] for i in levels),
            omega=None if self.omega is None else self.omega[list(levels)],
        )
