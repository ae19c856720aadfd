"""What one training step gives a loss: paired maps, ground truth, and the facts it asks for.

A reader (``detectors/``) fills these records and knows no loss; a loss (``losses/``) reads them and
knows no framework.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from .dense import Dense as Dense
from .dense import Grid as Grid
from .dense import Hidden as Hidden
from .dense import pair_dense as pair_dense
from .dense import shared_locations as shared_locations
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

_FIELDS = {
    "boxes": "dense",
    "bins": "dense",
    "priors": "student_dense",
    "teacher_boxes": "teacher_dense",
    "proposals": "positives",
}


def field_of(fact: str) -> str:
    """The field of a :class:`Step` that holds a fact."""
    return _FIELDS.get(fact, fact)


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
        embeddings: ``(B, Q, C)``; ``C`` equals the channels of the maps that the decoder reads.
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

    def has(self, fact: str) -> bool:
        """Whether somebody gave a fact."""
        if fact == "priors":  # of either record of the student's head
            return self.student_head is not None and self.student_head.priors is not None
        return getattr(self, field_of(fact), None) is not None

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
