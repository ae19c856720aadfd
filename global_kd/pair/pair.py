"""Two detectors as one: their paired levels, the facts they can give, and the step they make."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors import Detector, Look, ModuleDetector, Seen, View, fingerprint, translate
from ..detectors.given import refuse_other, refuse_strangers
from ..detectors.pixels import in_colours, telling_channels
from ..hooks import (
    FeatureTap,
    class_names,
    evaluating,
    infer_strides,
    keeping_statistics,
    plain,
    quiet,
    set_mode,
    sharded_modules,
)
from ..ops.boxes import pairwise_iou
from ..pyramid import align_levels, pair_levels
from ..step import Positives, RegionOutputs, Regions, Step, pair_dense
from ..targets import Targets
from .heads import SplitHeads, TeacherHead, scaled
from .refusals import refusals

# What the student's own forward must be tapped for.
_OF_STUDENT = {
    "positives": "positives",
    "proposals": "proposals",
    "student_dense": "dense",
    "dense": "dense",
    "boxes": "boxes",
    "bins": "bins",
    "priors": "priors",
    "assigned": "assigned",
    "regions": "regions",
    "teacher_regions": "regions",
}
_PAIRS: weakref.WeakSet[Pair] = weakref.WeakSet()  # those that are not detached


class Pair:
    """A student's and a teacher's reader.

    Args:
        student: In its role as student.
        teacher: In its role as teacher.
        models: The bare detectors.
        scale: Side of the teacher's input in units of the student's.
        moving: Whether the teacher's weights change on purpose.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        models: tuple[nn.Module, nn.Module],
        scale: float,
        moving: bool = False,
    ) -> None:
        self.moving = moving
        self.student, self.teacher, self.models, self.scale = student, teacher, models, scale
        _PAIRS.add(self)
        seen, looked = self._dry_run()
        self.strides = _strides(seen), [stride / scale for stride in _strides(looked)]
        pairs = pair_levels(*self.strides)
        self.levels = [i for i, _ in pairs], [j for _, j in pairs]
        self.channels = (
            tuple(seen.maps[i].shape[1] for i in self.levels[0]),
            tuple(looked.maps[j].shape[1] for j in self.levels[1]),
        )
        self.refusals = refusals((student, teacher), models, (seen, looked), scale)

    def _dry_run(self) -> tuple[Look, Look]:
        with torch.no_grad():
            with evaluating(self.models[0]):
                seen = self.student.look(self.student.example())
            self._reshard()
            teacher = self.models[1]
            with evaluating(teacher), telling_channels(seen.view.images, teacher):
                return seen, self.look(seen.view)

    def _reshard(self) -> None:
        """After a forward of the student without a backward.

        FSDP2 keeps its root's parameters whole until one comes; an optimizer made now would be
        given those, and they do not stay.
        """
        for module in sharded_modules(self.models[0]):
            module.reshard()

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Context of a step: the teacher is in eval mode.

        One that is another pair's student goes on training afterwards: its modes are put back, and
        no tap takes what it is asked here for its training forward.
        """
        teacher = self.models[1]
        if not any(pair.models[0] is teacher for pair in _PAIRS):
            set_mode(teacher, False)
            yield
            return
        modes = [(module, module.training) for module in teacher.modules()]
        set_mode(teacher, False)
        try:
            with quiet(teacher):
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def detach(self) -> None:
        """Take off the readers' hooks."""
        _PAIRS.discard(self)
        self.student.detach()
        self.teacher.detach()

    def look(self, view: View) -> Look:
        """The teacher's maps of what the student saw."""
        view = replace(view, images=in_colours(view.images, self.models[1]))
        view = translate(view, self.student.pixels, self.teacher, scale=self.scale)
        return self.teacher.look(view)

    def taps(self, facts: frozenset[str]) -> dict[str, str]:
        """Paths in the student to record for these facts."""
        return {**self.student.taps, **self.student.taps_for(self._of_student(facts))}

    def _of_student(self, facts: frozenset[str]) -> frozenset[str]:
        return frozenset(_OF_STUDENT[fact] for fact in facts & _OF_STUDENT.keys())

    @property
    def unlike_classes(self) -> bool:
        """Whether heads of one kind differ in their number of classes, perhaps by mistake."""
        student, teacher = self.student, self.teacher
        counts = student.num_logits, teacher.num_logits
        same_kind = student.kind is not None and student.kind == teacher.kind and self.scale == 1
        return same_kind and None not in counts and counts[0] != counts[1]

    @property
    def other_order(self) -> str | None:
        """Where both call their classes the same, but count them otherwise: the first of those."""
        mine, theirs = (class_names(model) for model in self.models)
        if (
            mine is None
            or theirs is None
            or sorted(map(str.casefold, mine)) != sorted(map(str.casefold, theirs))
        ):
            return None
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a.casefold() != b.casefold():
                return f"class {i} is {a!r} in the student and {b!r} in the teacher"
        return None

    # A step ---------------------------------------------------------------------------------

    def read(self, tap: FeatureTap, images: Any, targets: Any, facts: frozenset[str]) -> Seen:
        """The training step of the student that a tap recorded, as far as the facts ask for it."""
        call, tapped = tap.call, tap.read(images)
        refuse_other(self.student, call, images, targets)
        seen = self.student.read(tapped, images, targets, self._of_student(facts))
        refuse_strangers(seen.truth, len(seen.look.maps[0]))
        return seen

    def maps(self, seen: Look, looked: Look) -> tuple[list[Tensor], list[Tensor]]:
        """The paired levels of both, cell for cell the same places."""
        theirs = [side / self.scale for side in looked.view.size]
        pairs = [
            align_levels(
                plain(seen.maps[i]),
                plain(looked.maps[j]),
                self.strides[0][i],
                self.strides[1][j],
                student_size=seen.view.size,
                teacher_size=theirs,
                slack=max(32.0, self.teacher.divisor),
            )
            for i, j in zip(*self.levels, strict=True)
        ]
        return [s for s, _ in pairs], [t for _, t in pairs]

    def step(self, seen: Seen, looked: Look, facts: frozenset[str]) -> Step:
        """Everything that the facts ask for, of one batch."""
        student, teacher = self.maps(seen.look, looked)
        strides = tuple(self.strides[0][i] for i in self.levels[0])
        step = Step(student, teacher, strides, seen.truth, positives=self._positives(seen, looked))
        return replace(step, **self._facts(seen, looked, facts))

    def observe(self, images: Any, targets: Any) -> Observed:
        """A batch of a loader, with the student in the mode that it is in."""
        return Observed(self, self.student.observe(images, targets))

    def unlabelled(self, images: Any, facts: frozenset[str]) -> Step:
        """Both detectors on images without ground truth, as far as the facts ask for it.

        The student runs in the mode that it is in, no further than its maps and the heads that are
        asked for.
        """
        return self._without_truth(self.student.see(images), facts)

    def dry(self, facts: frozenset[str]) -> Step:
        """Likewise on an example, in eval mode and without gradients."""
        with torch.no_grad(), evaluating(*self.models):
            step = self._without_truth(self.student.example(), facts)
        self._reshard()
        return step

    def _without_truth(self, view: View, facts: frozenset[str]) -> Step:
        look = self.student.look(view)
        with torch.no_grad():
            looked = self.look(view)
        nobody = Targets(
            torch.zeros(0, 4, device=view.images.device),
            *torch.zeros(2, 0, dtype=torch.int64, device=view.images.device),
        )
        return replace(self.step(Seen(look, nobody), looked, facts), targets=None)

    def _positives(self, seen: Seen, looked: Look) -> Positives | None:
        sampled = seen.sampled
        if sampled is None:
            return None
        if sampled.logits is None or "positives" in self.refusals:
            return Positives(sampled.box, sampled.proposals)
        with torch.no_grad():
            theirs, rows = self.teacher.soft_labels(looked, sampled)
        mine = sampled.logits if rows is None else sampled.logits[rows]
        return Positives(sampled.box, sampled.proposals, mine, theirs, rows)

    def _facts(self, seen: Seen, looked: Look, facts: frozenset[str]) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        inner = facts & {"boxes", "bins", "priors"}
        their_own = inner - {"priors"} | ({"boxes"} if "teacher_boxes" in facts else set())
        mine = theirs = rows = None
        if facts & {"dense", "boxes", "bins", "student_dense", "priors"}:
            mine = found["student_dense"] = self.student.dense(seen.look, inner)
        if facts & {"dense", "boxes", "bins", "teacher_dense", "teacher_boxes"}:
            with torch.no_grad():
                theirs = scaled(self.teacher.dense(looked, their_own), self.scale)
            found["teacher_dense"] = theirs
        if facts & {"dense", "boxes", "bins"} and mine is not None and theirs is not None:
            *pair, rows = pair_dense(mine, theirs)
            found["dense"] = tuple(pair)
        if "assigned" in facts and seen.assigned is not None:
            found["assigned"] = seen.assigned if rows is None else seen.assigned[:, rows]
        if "regions" in facts and seen.proposals is not None:
            found["regions"] = self._regions(seen, looked, *seen.proposals)
        if "teacher_regions" in facts:
            with torch.no_grad():
                proposals = self.teacher.proposals(looked)
            boxes = replace(proposals, boxes=proposals.boxes / self.scale)
            with keeping_statistics(self.models[0]):  # its own step remembers its own boxes
                found["teacher_regions"] = self._regions(seen, looked, *_matched(boxes, seen.truth))
        if "queries" in facts:
            with torch.no_grad():
                queries = self.teacher.queries(looked)
            found["queries"] = replace(queries, boxes=queries.boxes / self.scale)
        if "images" in facts:
            found["images"] = seen.look.view.images
        if "teacher_head" in facts:
            found["teacher_head"] = TeacherHead(self, looked, their_own)
        if "split_heads" in facts:
            found["split_heads"] = SplitHeads(self, seen.look, looked, their_own)
        return found

    def _regions(self, seen: Seen, looked: Look, proposals: Targets, box: Tensor) -> Regions:
        mine = self.student.regions(seen.look, proposals)
        with torch.no_grad():
            there = replace(proposals, boxes=proposals.boxes * self.scale)
            theirs: RegionOutputs = self.teacher.regions(
                looked, proposals if self.scale == 1 else there
            )
        if theirs.boxes is not None and self.scale != 1:
            theirs = replace(theirs, boxes=theirs.boxes / self.scale)
        return Regions(proposals, box, mine, theirs)

    def signature(self) -> str:
        """What the teacher's features depend on: its weights, where they are read, its scale."""
        parts = [fingerprint(self.models[1], values=not self.moving)]
        if self.moving:
            parts.insert(0, "moving")
        if isinstance(self.teacher, ModuleDetector):
            path = self.teacher.taps["features"]
            parts.append(
                f"at {path.replace('_fsdp_wrapped_module.', '').replace('_orig_mod.', '')}"
            )
        if self.scale != 1:
            parts.append(f"scale {self.scale:g}")
        return ", ".join(parts)


class Observed:
    """A batch of a loader as the student sees it in eval mode, and the teacher if need be.

    Attributes:
        truth: Its ground truth.
        images: What the student's network was given.
        student: The student's maps on the paired levels, uncut.
    """

    def __init__(self, pair: Pair, seen: Seen) -> None:
        refuse_strangers(seen.truth, len(seen.look.maps[0]))
        self._pair, self._seen = pair, seen
        self.truth: Targets = seen.truth
        self.images: Any = seen.look.view.images
        self.student = [seen.look.maps[i] for i in pair.levels[0]]

    def both(self) -> tuple[list[Tensor], list[Tensor]]:
        """Maps of student and teacher on one grid; runs the teacher."""
        look = self._seen.look
        return self._pair.maps(look, self._pair.look(look.view))


def _matched(proposals: Targets, truth: Targets) -> tuple[Targets, Tensor]:
    """Proposals with the ground truth that each overlaps by half or more (-1: none)."""
    if len(truth) == 0:
        return proposals, torch.full_like(proposals.labels, -1)
    iou = pairwise_iou(proposals.boxes, truth.boxes.to(proposals.boxes.device))
    iou = iou * (proposals.image_index[:, None] == truth.image_index[None])
    best, box = iou.max(dim=1)
    box = torch.where(best >= 0.5, box, -1)
    labels = torch.where(box >= 0, truth.labels[box.clamp(min=0)], proposals.labels)
    return replace(proposals, labels=labels), box


def _strides(look: Look) -> list[float]:
    sizes = [(x.shape[2], x.shape[3]) for x in look.maps]
    return list(infer_strides(look.view.size, sizes))
