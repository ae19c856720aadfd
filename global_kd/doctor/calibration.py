"""Weights as shares: how large is each term's gradient beside the detection loss's?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import FeatureTap
from ..losses.base import DistillLoss
from ..pair import Pair
from ..ranks import Ranks
from ..schedules import Schedule
from .examine import PassOn, own_loss, trial_of
from .report import table
from .untouched import untouched, wait_for_no_rank


@dataclass(frozen=True)
class Share:
    """A term before and after.

    Attributes:
        before: Its weight.
        after: Likewise.
        measured: Norm of its gradient on the student's maps with the weight before, in units of the
            detection loss's; NaN where there is no gradient.
        wanted: The same with the weight after.
    """

    before: float
    after: float
    measured: float
    wanted: float


@dataclass(frozen=True)
class Calibration:
    """What :meth:`global_kd.Distiller.calibrate` measured; ``print`` shows it as a table.

    Attributes:
        detection: Norm of the detection loss's gradient on the student's maps, mean over batches.
        shares: By term.
    """

    detection: float
    shares: dict[str, Share]

    def __str__(self) -> str:
        shown = [["term", "weight before", "share", "weight after", "share"]]
        for name, x in self.shares.items():
            now = "no gradient" if math.isnan(x.measured) else f"{x.measured:.3g}"
            then = "-" if math.isnan(x.wanted) else f"{x.wanted:.3g}"
            shown.append([name, f"{x.before:.4g}", now, f"{x.after:.4g}", then])
        return f"{table(shown)}\n\nshares of {self.detection:.3g}, the detection loss's gradient"


def gradient_norm(value: Tensor, inputs: Sequence[Tensor]) -> float:
    """Norm of a scalar's gradient over some tensors together; 0 where there is none."""
    # What a tap recorded may be a copy, which the detector's own head does not see.
    wanted = [_as_put_out(x) for x in inputs if x.requires_grad]
    if not value.requires_grad or not wanted:
        return 0.0
    found = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(g.float().square().sum()) for g in found if g is not None))


def _as_put_out(x: Tensor) -> Any:
    """A tensor, or the place in the graph that it was cloned from."""
    if x.grad_fn is None or x.grad_fn.name() != "CloneBackward0":
        return x
    node, output = x.grad_fn.next_functions[0]
    return x if node is None else torch.autograd.graph.GradientEdge(node, output)


def measure(
    pair: Pair,
    losses: Mapping[str, DistillLoss],
    tap: FeatureTap,
    pass_on: PassOn,
    facts: frozenset[str],
    images: Any,
    targets: Any,
    detection_loss: Callable[[nn.Module], Tensor] | None,
) -> tuple[float, dict[str, float]]:
    """Gradients on the student's maps of one batch: the detection loss's, each term's at weight 1.

    Terms relate to prototypes of this batch where there are none yet. Nothing is changed.

    Raises:
        ValueError: The detection loss is not known, or its gradient does not reach the maps.
    """
    student, teacher = pair.models
    with untouched(*pair.models), torch.enable_grad():
        student.train()
        wait_for_no_rank(student)
        teacher.eval()
        detection = own_loss(student, pair.student, images, targets, detection_loss)
        if detection is None:
            raise ValueError(
                "detection_loss: expected a function model -> scalar, the detector's own training "
                f"loss on this batch, since that of {type(student).__name__} is not known here, "
                "but got None"
            )
        seen = pair.read(tap.read(images), images, targets, facts)
        with torch.no_grad():
            looked = pair.look(seen.look.view)
        trial = trial_of(losses, lambda copies: pass_on(copies, seen, looked))
        for loss in trial.values():
            loss.schedules = dict.fromkeys(loss.schedules, Schedule("constant"))
            loss.warmup_steps = 0
        terms = pass_on(trial, seen, looked)
        whole = gradient_norm(detection, seen.look.maps)
        if whole == 0:
            raise ValueError(
                "student: expected a detection loss with a gradient on the feature maps, but it "
                "has none; tap maps that are trained, and compute the loss from the forward pass "
                "that detection_loss runs"
            )
        norms = {}
        for loss in trial.values():
            for part, weight in loss.weights.items():
                if (name := loss.term_name(part)) in terms:
                    norms[name] = gradient_norm(terms[name], seen.look.maps) / weight
    return whole, norms


def weights_for(
    losses: Mapping[str, DistillLoss],
    measured: Sequence[tuple[float, dict[str, float]]],
    share: float | Mapping[str, float],
) -> Calibration:
    """Set the weights so that each term's gradient is its share; the means over batches count."""
    names = [name for loss in losses.values() for name in loss.term_names]
    total = torch.zeros(2, len(names) + 1, dtype=torch.float64)
    for whole, norms in measured:
        row = [whole, *(norms.get(name, 0.0) for name in names)]
        total += torch.tensor([row, [float(x > 0) for x in row]], dtype=torch.float64)
    Ranks().add(total)  # ranks saw other batches, and end with the same weights
    detection, *sizes = (total[0] / total[1].clamp(min=1)).tolist()
    by_name = dict(zip(names, sizes, strict=True))
    shares: dict[str, Share] = {}
    for loss in losses.values():
        found: dict[str, float] = {}
        for part in loss.parts:
            name, before = loss.term_name(part), loss.weights[part]
            if name not in by_name:
                continue
            wanted = share.get(name) if isinstance(share, Mapping) else share
            size = by_name[name]
            measured_share = before * size / detection if size else math.nan
            if wanted is None or not size:
                shares[name] = Share(before, before, measured_share, measured_share)
                continue
            found[part] = wanted * detection / size
            shares[name] = Share(before, found[part], measured_share, wanted)
        loss.calibrate(found)
    return Calibration(detection, shares)
