"""Weights as shares: how large is each term's gradient beside the detection loss's?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..losses.base import DistillLoss
from ..ranks import Ranks
from .report import table
from .trial import DetectionLoss, Setup, gradients, norm, trial

_ROUNDING = 1e-6  # a share below it is no gradient; a weight that makes much of it would destroy


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
        return (
            f"{table(shown)}\n\nA share of 1 is {self.detection:.3g}, the norm of the detection "
            "loss's gradient on the student's maps."
        )


def measure(
    setup: Setup, images: Any, targets: Any = None, *, detection_loss: DetectionLoss | None = None
) -> tuple[float, dict[str, float]]:
    """Gradients on the student's maps of one batch: the detection loss's, each term's at weight 1.

    Nothing is changed.

    Raises:
        ValueError: The detection loss is not known.
    """
    with trial(setup, images, targets, detection_loss, shares=True) as step:
        assert step.detection is not None
        maps = step.seen.look.maps
        whole = norm(gradients(step.detection, maps))
        norms = {}
        for loss in step.losses.values():
            for part, weight in loss.weights.items():
                if (name := loss.term_name(part)) in step.terms:
                    norms[name] = norm(gradients(step.terms[name], maps)) / weight
    return whole, norms


def calibrate(
    setup: Setup,
    batches: Iterable[tuple[Any, ...]],
    share: float | Mapping[str, float],
    detection_loss: DetectionLoss | None,
) -> Calibration:
    """Measure on batches, and set the weights.

    Raises:
        ValueError: The detection loss is not known, or its gradient does not reach the maps.
    """
    found = [measure(setup, *batch, detection_loss=detection_loss) for batch in batches]
    if not all(whole for whole, _ in found):
        raise ValueError(
            "student: expected a detection loss with a gradient on the feature maps, but it "
            "has none; tap maps that are trained, and compute the loss from the forward pass "
            "that detection_loss runs"
        )
    return weights_for(setup.losses, found, share)


def weights_for(
    losses: Mapping[str, DistillLoss],
    measured: Sequence[tuple[float, dict[str, float]]],
    share: float | Mapping[str, float],
    band: float | None = None,
) -> Calibration:
    """Set the weights so that each term's gradient is its share; the means over batches count.

    With a ``band`` a term whose share is off by no more than this part of it keeps its weight, and
    no weight changes by more than a factor of 10.
    """
    names = [name for loss in losses.values() for name in loss.term_names]
    total = torch.zeros(2, len(names) + 1, dtype=torch.float64, device="cpu")
    for whole, norms in measured:
        row = [whole, *(norms.get(name, 0.0) for name in names)]
        seen = [row, [float(x > 0) for x in row]]
        total += torch.tensor(seen, dtype=torch.float64, device="cpu")
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
            now = before * size / detection if size and detection else math.nan
            # A step of a training may have had no box at all: then nothing is known, and stays.
            # And a student that begins as a copy of its teacher differs by rounding alone.
            if wanted is None or not _ROUNDING < now < math.inf:
                shares[name] = Share(before, before, now, now)
                continue
            factor = wanted / now
            if band is None:
                found[part] = before * factor
            elif abs(now / wanted - 1) > band:
                factor = min(10.0, max(0.1, factor))
                found[part] = before * factor
            after = found.get(part, before)
            shares[name] = Share(
                before, after, now, wanted if band is None else now * after / before
            )
        loss.calibrate(found)
    return Calibration(detection, shares)
