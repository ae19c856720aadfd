"""One step tried out: the student's own loss and the terms of copies, and their gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..detectors import Detector, Look, Seen
from ..hooks import FeatureTap, quiet, set_mode
from ..losses.base import DistillLoss
from ..pair import Pair
from .untouched import untouched, wait_for_no_rank

PassOn = Callable[[Mapping[str, DistillLoss], Seen, Look], dict[str, Tensor]]
DetectionLoss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Setup:
    """What is tried out.

    Attributes:
        pair: Both detectors.
        losses: By name, the one that keeps prototypes first.
        tap: On the student.
        pass_on: Gives losses of these names a step.
        facts: All that they ask for.
    """

    pair: Pair
    losses: Mapping[str, DistillLoss]
    tap: FeatureTap
    pass_on: PassOn
    facts: frozenset[str]


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        detection: The student's own loss; ``None``: unknown.
        seen: Its maps and boxes, from the forward that gave this loss.
        looked: The teacher's.
        losses: Copies of the losses, which have run.
        terms: What they put out.
    """

    detection: Tensor | None
    seen: Seen
    looked: Look
    losses: dict[str, DistillLoss]
    terms: dict[str, Tensor]


@contextmanager
def trial(
    setup: Setup,
    images: Any,
    targets: Any,
    detection_loss: DetectionLoss | None,
    *,
    shares: bool = False,
) -> Iterator[Trial]:
    """A step on a batch; within, its graphs are there, and afterwards everything is as it was.

    Terms relate to prototypes of this batch where there are none yet.

    Args:
        setup: What to try.
        images: A training batch.
        targets: Likewise.
        detection_loss: The detector's own loss, where it is not known.
        shares: For shares: without schedules and warm-ups, and the detection loss must be known.

    Raises:
        ValueError: It is not.
    """
    student, teacher = setup.pair.models
    with untouched(student, teacher), setup.tap.aside(), quiet(teacher):
        student.train()
        wait_for_no_rank(student)
        set_mode(teacher, False)
        with torch.enable_grad():
            own = own_loss(student, setup.pair.student, images, targets, detection_loss)
            if own is None and shares:
                raise ValueError(
                    "detection_loss: expected a function model -> scalar, the detector's own "
                    f"training loss on this batch, since that of {type(student).__name__} is not "
                    "known here, but got None; call kd.calibrate(..., detection_loss=...), and "
                    "leave out share= if the Distiller was given one"
                )
            seen = setup.pair.read(setup.tap, images, targets, setup.facts)
            with torch.no_grad():
                looked = setup.pair.look(seen.look.view)
            losses = _copies(setup.losses, lambda some: setup.pass_on(some, seen, looked))
            if shares:
                for loss in losses.values():
                    loss.at_full_weight()
            terms = setup.pass_on(losses, seen, looked)
        yield Trial(own, seen, looked, losses, terms)


def own_loss(
    model: nn.Module,
    detector: Detector,
    images: Any,
    targets: Any,
    detection_loss: DetectionLoss | None,
) -> Tensor | None:
    """A detector's own training loss on a batch; ``None``: unknown."""
    if detection_loss is None:
        return detector.losses(images, targets)
    return one_number(detection_loss, model)


def one_number(detection_loss: DetectionLoss, model: nn.Module) -> Tensor:
    """What the user's function says of a model.

    Raises:
        TypeError, ValueError: No function, or one that gives something else than a scalar.
    """
    expected = "detection_loss: expected a function model -> scalar tensor"
    if not callable(detection_loss):
        raise TypeError(
            f"{expected}, but got {type(detection_loss).__name__}; write lambda model: ..., which "
            "runs the forward of the model that it is given"
        )
    value: Any = detection_loss(model)
    if isinstance(value, Mapping):
        raise TypeError(
            f"{expected}, but it gave a dictionary; write lambda model: sum(model(...).values())"
        )
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"{expected}, but it gave {_check.shape_of(value)}; sum its parts up")
    return value.reshape(())


def _copies(
    losses: Mapping[str, DistillLoss], run: Callable[[Mapping[str, DistillLoss]], Any]
) -> dict[str, DistillLoss]:
    """Copies of the losses, in train mode, with prototypes of one batch where they have none."""
    copies = {name: copy.deepcopy(loss).train() for name, loss in losses.items()}
    for loss in copies.values():
        loss.distributed = False  # one rank may look alone
        if loss.keeps_prototypes:
            loss.generator.distributed = False
    keeper = next((loss for loss in copies.values() if loss.keeps_prototypes), None)
    if keeper is not None and not keeper.bank.valid.any():
        keeper.generator.min_side, step = 0.0, keeper.step
        keeper.collect()
        run({keeper.name: keeper})
        keeper.refresh()
        keeper.step = step  # the terms are those of the step to come
    return copies


def gradients(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Of a scalar, for each of some tensors; ``None`` where there is none. Its graph stays."""
    # What a tap recorded may be a copy, which the detector's own head does not see.
    wanted = {i: _as_put_out(x) for i, x in enumerate(inputs) if x.requires_grad}
    found: list[Tensor | None] = [None] * len(inputs)
    if value.requires_grad and wanted:
        given = torch.autograd.grad(
            value, list(wanted.values()), retain_graph=True, allow_unused=True
        )
        for i, g in zip(wanted, given, strict=True):
            found[i] = g
    return found


def norm(found: Sequence[Tensor | None]) -> float:
    """Of several gradients together; 0 where there is none."""
    return math.sqrt(sum(float(g.float().square().sum()) for g in found if g is not None))


def _as_put_out(x: Tensor) -> Any:
    """A tensor, or the place in the graph that it was cloned from."""
    if x.grad_fn is None or x.grad_fn.name() != "CloneBackward0":
        return x
    node, output = x.grad_fn.next_functions[0]
    return x if node is None else torch.autograd.graph.GradientEdge(node, output)
