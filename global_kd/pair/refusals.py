"""Which facts two detectors cannot give, and why."""

from __future__ import annotations

import torch
from torch import nn

from ..detectors import Detector, Look
from ..hooks import evaluating
from ..step import pair_dense
from .heads import scaled

_ALONE = {  # facts that one side gives by itself
    "teacher_dense": (1, "dense"),
    "teacher_boxes": (1, "boxes"),
    "teacher_head": (1, "teacher_head"),
    "queries": (1, "queries"),
    "student_dense": (0, "dense"),
    "priors": (0, "priors"),
    "assigned": (0, "assigned"),
}


def refusals(
    sides: tuple[Detector, Detector],
    models: tuple[nn.Module, nn.Module],
    looks: tuple[Look, Look],
    scale: float,
) -> dict[str, str]:
    """Why a fact cannot be had, of each that cannot.

    Args:
        sides: Student and teacher.
        models: The bare detectors.
        looks: What they made of one example.
        scale: Side of the teacher's input in units of the student's.
    """
    student, teacher = sides
    roles = zip(("student", "teacher"), models, strict=True)
    names = [f"the {role} ({type(model).__name__})" for role, model in roles]
    refused: dict[str, str] = {}
    for fact, (side, given) in _ALONE.items():
        if given not in sides[side].gives:
            refused[fact] = f"{names[side]} gives no {given.removeprefix('teacher_')}"
    for fact in ("dense", "boxes", "bins", "regions", "split_heads"):
        for name, detector in zip(names, sides, strict=True):
            if fact not in detector.gives:
                refused.setdefault(fact, f"{name} gives no {fact}")
    if "dense" not in refused:
        try:
            with torch.no_grad(), evaluating(*models):
                mine, theirs = student.dense(looks[0]), teacher.dense(looks[1])
            pair_dense(mine, scaled(theirs, scale))
        except ValueError as error:
            refused["dense"] = str(error)
    for fact in ("boxes", "bins"):
        if "dense" in refused:
            refused.setdefault(fact, refused["dense"])
    if "regions" in refused:
        refused["teacher_regions"] = refused["regions"]
    elif student.num_logits != teacher.num_logits:
        refused["regions"] = refused["teacher_regions"] = (
            f"the student has {student.num_logits} class logits a region, the teacher "
            f"{teacher.num_logits}"
        )
    one_stage = student.family == teacher.family == "one-stage"
    reason = _no_positives(student, teacher, scale)
    if reason is None and one_stage and all("dense" in x.gives for x in sides):
        reason = refused.get("dense")  # the rows of positives are locations
    if reason is not None:
        refused["positives"] = reason
    return refused


def _no_positives(student: Detector, teacher: Detector, scale: float) -> str | None:
    if student.kind is None or student.kind != teacher.kind:
        return "the two heads give no comparable class logits on positives"
    if scale != 1:
        return "teacher_scale is not 1"
    mine, theirs = student.num_logits, teacher.num_logits
    if mine is not None and theirs is not None and mine != theirs:
        return f"the student has {mine} class logits, the teacher {theirs}"
    return None
