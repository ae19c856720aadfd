"""Is the teacher one: the same maps twice, a smaller loss, objects that it finds?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors import Detections, Look
from ..hooks import set_mode
from ..pair import Pair
from .boxes import SCORE
from .trial import DetectionLoss, Trial, one_number
from .untouched import train_all_but_statistics

FindObjects = Callable[[nn.Module], Sequence[Detections | Mapping[str, Tensor]]]
_ALIKE = 0.9  # of the student's loss: a teacher's that is above this is no better
_FAR = 0.5  # a loss below this share of the student's is that of a teacher who knows these boxes
_FLAT = 1e-8  # variance of maps that say nothing


@dataclass(frozen=True)
class Findings:
    """What a teacher does with a batch.

    Attributes:
        again: Its maps on a second look.
        own: The student's detection loss; ``None``: unknown.
        theirs: Its own; likewise.
        found: The objects that it detects, in pixels of its view; likewise.
        scale: Side of that view in units of the student's.
        unchecked: Why something is unknown.
    """

    again: Look
    own: float | None
    theirs: float | None
    found: list[Detections] | None
    scale: float
    unchecked: list[str]

    @property
    def bad(self) -> bool:
        """Whether its loss is no better than the student's."""
        return None not in (self.own, self.theirs) and self.theirs >= _ALIKE * self.own  # type: ignore[operator]

    @property
    def fits(self) -> bool:
        """Whether its loss on these boxes, as they are read, is far below the student's.

        A teacher of low scores may find few of them all the same, as a young dense head does.
        """
        return None not in (self.own, self.theirs) and self.theirs < _FAR * self.own  # type: ignore[operator]


def teacher_findings(
    pair: Pair, step: Trial, detection_loss: DetectionLoss | None, detections: FindObjects | None
) -> Findings:
    """Run the teacher on what it sees in training, which may be converted, resized and padded."""
    teacher, looked = pair.models[1], step.looked
    unchecked: list[str] = []
    theirs: float | None = None
    with torch.no_grad():
        again = pair.look(step.seen.look.view)
        try:
            theirs = _loss(pair, step, detection_loss)
        except Exception as error:
            unchecked.append(f"the teacher's detection loss: it fails with {_short(error)}")
        set_mode(teacher, False)
        found, scale = None, pair.scale
        try:
            if detections is None:
                found = pair.teacher.detections(looked.view)
            else:
                found, scale = [_as_detections(x) for x in detections(teacher)], 1.0
                if len(found) != len(looked.maps[0]):
                    raise ValueError(
                        "detections: expected a function of the teacher that returns one "
                        f"dictionary for each of the {len(looked.maps[0])} images, but got "
                        f"{len(found)}"
                    )
        except (ValueError, TypeError):
            if detections is not None:
                raise
            unchecked.append("what the teacher detects: it fails on this batch")
        except Exception as error:
            if detections is not None:
                raise
            unchecked.append(f"what the teacher detects: it fails with {_short(error)}")
    own = None if step.detection is None else float(step.detection.detach())
    if theirs is None and not unchecked:
        way = "" if detection_loss else "; pass detection_loss= for that"
        unchecked.append(f"whether the teacher is better than the student at detection{way}")
    if found is None:
        unchecked.append(
            "whether the teacher detects anything, whether the boxes are xyxy in pixels of its "
            "images, and whether its labels are those of the boxes; pass detections= for that, a "
            "function of the teacher that gives its boxes, scores and labels on this batch"
        )
    return Findings(again, own, theirs, found, scale, unchecked)


def _loss(pair: Pair, step: Trial, detection_loss: DetectionLoss | None) -> float | None:
    """The teacher's own loss, on the view that it is shown."""
    teacher, same = pair.models[1], pair.student.kind == pair.teacher.kind
    like = next(teacher.parameters(), None)  # in half precision few compute their own losses
    whole = like is None or like.dtype in (torch.float32, torch.float64)
    if detection_loss is None and (pair.student.kind is None or not same or not whole):
        return None
    train_all_but_statistics(teacher)
    if detection_loss is not None:
        value: Tensor | None = one_number(detection_loss, teacher)
    else:
        truth = replace(step.seen.truth, boxes=step.seen.truth.boxes * pair.scale)
        value = pair.teacher.losses_of(step.looked.view, truth)
    return None if value is None else float(value)


def judge(findings: Findings, looked: Look) -> tuple[list[str], list[str]]:
    """Facts and problems."""
    facts, problems = ["the teacher is in eval mode at every step and gets no gradient"], []
    pairs = zip(looked.maps, findings.again.maps, strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        problems.append(
            "the teacher gives other maps when it sees the same images twice: it draws random "
            "numbers in eval mode (functional dropout without training=False?); switch that off"
        )
    if not all(x.isfinite().all() for x in looked.maps):
        problems.append("the teacher's maps hold NaN or infinities; load its weights anew")
    elif flat := [i for i, x in enumerate(looked.maps) if x.numel() > 1 and _spread(x) < _FLAT]:
        problems.append(
            f"the teacher's maps of levels {flat} hardly vary (variance "
            f"{max(_spread(looked.maps[i]) for i in flat):.1g}), as those of random weights or of "
            "an empty image may; load its trained weights"
        )
    if findings.found is None:
        facts.append("whether the teacher detects anything is unknown for this kind of model")
    else:
        count = sum(int((x.scores >= SCORE).sum()) for x in findings.found)
        facts.append(
            f"the teacher finds {count} objects of score >= {SCORE} in {len(findings.found)} images"
        )
        if count == 0:
            problems.append(
                "the teacher detects nothing on this batch: load its trained weights, and check "
                "that it sees images in its own format (teacher_pixels)"
            )
    own, theirs = findings.own, findings.theirs
    if own is not None and theirs is not None:
        facts.append(f"detection loss: student {own:.4g}, teacher {theirs:.4g}")
        if findings.bad:
            problems.append(
                f"the teacher's detection loss on this batch ({theirs:.4g}) is not below "
                f"the student's ({own:.4g}) by a tenth: load its trained weights, and check that "
                "both use the same class numbers"
            )
    return facts, problems


def _spread(x: Tensor) -> float:
    return float(x.float().var())


def _as_detections(one: Any) -> Detections:
    if isinstance(one, Detections):
        return one
    if not isinstance(one, Mapping) or {"boxes", "scores", "labels"} - set(one):
        got = sorted(one) if isinstance(one, Mapping) else type(one).__name__
        raise ValueError(
            "detections: expected a function of the teacher that returns one dictionary per image "
            f"with 'boxes', 'scores' and 'labels', but got {got}"
        )
    order = one["scores"].argsort(descending=True)
    return Detections(*(one[key][order] for key in ("boxes", "scores", "labels")))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
