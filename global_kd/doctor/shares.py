"""Shares of the detection loss's gradient: set in the first step, held while a student trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..hooks import sharded_modules
from ..losses.base import DistillLoss
from ..prototypes.passes import first_batches
from .calibration import Calibration, calibrate, measure, weights_for
from .trial import DetectionLoss, Setup

_PATIENCE = 20  # calls in which a term may have its first gradient, as one of boxes in a batch


class HeldShares:
    """What is wanted, and when it is looked at.

    Attributes:
        first: By term: the share that the first training calls give it, unless it was calibrated.
        every: Training calls between two looks; ``None``: never.
        band: A share that is off by no more than this part of it stays.
        wanted: By term.
    """

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.every: int | None = None
        self.band = 0.0
        self.wanted: dict[str, float] = {}

    def calibrate(
        self,
        setup: Setup,
        images: Any,
        targets: Any,
        *,
        share: float | Mapping[str, float],
        loader: Iterable[Any] | None,
        batches: int,
        every: int | None,
        band: float,
        detection_loss: DetectionLoss | None,
    ) -> Calibration:
        """Set the weights once, and hold the shares from now on if asked to.

        See :meth:`global_kd.Distiller.calibrate`.
        """
        wanted = _by_term(share, setup.losses)
        if (images is None) == (loader is None):
            raise ValueError(
                "calibrate: expected a batch (images, targets), or loader=..., but got "
                f"{'neither' if loader is None else 'both'}"
            )
        if loader is not None and detection_loss is not None:
            raise ValueError(
                "detection_loss: expected None beside loader, since it computes the loss of one "
                "batch; pass images and targets instead"
            )
        student = setup.pair.models[0]
        _may_hold(student, every, band, detection_loss)
        given: Iterable[tuple[Any, ...]] = [(images, targets)]
        if loader is not None:
            given = first_batches(loader, batches, next(student.parameters()).device)
        calibration = calibrate(setup, given, share, detection_loss)
        self.every, self.band = every, band
        self.wanted = wanted if every is not None else {}
        return calibration

    def set_at_first(
        self, share: float | Mapping[str, float], losses: Mapping[str, DistillLoss], *, known: bool
    ) -> None:
        """Calibrate in the first training calls; the detector's own loss must be `known`."""
        self.first = _by_term(share, losses)
        if not known:
            raise ValueError(
                "share: expected None for a student of no known framework, whose own loss is not "
                "known here, but got a share; call kd.calibrate(..., detection_loss=...) before "
                "the first step"
            )

    def missing(self, losses: Mapping[str, DistillLoss]) -> dict[str, float]:
        """By term, the shares that the call to come is to set."""
        if not self.first or max(loss.step for loss in losses.values()) >= _PATIENCE:
            return {}
        done = {loss.term_name(x) for loss in losses.values() for x in loss.calibrated}
        return {name: share for name, share in self.first.items() if name not in done}

    def before_step(self, setup: Setup, images: Any, targets: Any) -> None:
        """Set or bring back weights, where the training call to come is one to look at."""
        if not torch.is_grad_enabled():
            return
        if missing := self.missing(setup.losses):
            if sharded_modules(setup.pair.models[0]):
                raise ValueError(
                    "share: expected None with FSDP2, which allows no second forward before the "
                    "backward; call kd.calibrate(images, targets) before the first step"
                )
            weights_for(setup.losses, [measure(setup, images, targets)], missing)
        elif self.due(setup.losses):
            self.hold(setup, images, targets)

    @contextmanager
    def as_in_the_first_step(self, setup: Setup, images: Any, targets: Any) -> Iterator[None]:
        """Within, weights are those that a first step with this batch would set."""
        if not (missing := self.missing(setup.losses)):
            yield
            return
        losses = setup.losses.values()
        before = [(dict(loss.weights), loss.get_extra_state()) for loss in losses]
        try:
            weights_for(setup.losses, [measure(setup, images, targets)], missing)
            yield
        finally:
            for loss, (weights, state) in zip(losses, before, strict=True):
                loss.set_extra_state(state)
                loss.weights.update(weights)

    def due(self, losses: Mapping[str, DistillLoss]) -> bool:
        """Whether the step that comes is one at which to look."""
        step = max(loss.step for loss in losses.values())
        return bool(self.every and step and step % self.every == 0)

    def hold(self, setup: Setup, images: Any, targets: Any) -> Calibration:
        """Look at a batch, and bring back the weights of terms whose share has left its band."""
        found = [measure(setup, images, targets)]
        return weights_for(setup.losses, found, self.wanted, self.band)

    def state(self, losses: Mapping[str, DistillLoss]) -> Tensor:
        """``every`` (0: never), ``band``, and the share of each term by its name (-1: none)."""
        wanted = [self.wanted.get(name, -1.0) for name in _names(losses)]
        numbers = [float(self.every or 0), self.band, *wanted]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def load(self, state: Tensor, losses: Mapping[str, DistillLoss]) -> None:
        """Go on with these."""
        every, band, *wanted = state.tolist()
        names = _names(losses)
        if len(wanted) != len(names):
            raise ValueError(
                f"state_dict: expected the shares of {len(names)} terms ({', '.join(names)}), but "
                f"got {len(wanted)}; make the Distiller with the losses that were saved"
            )
        self.every, self.band = int(every) or None, band
        self.wanted = {name: x for name, x in zip(names, wanted, strict=True) if x >= 0}


def _by_term(
    share: float | Mapping[str, float], losses: Mapping[str, DistillLoss]
) -> dict[str, float]:
    """Checked."""
    names = [name for loss in losses.values() for name in loss.term_names]
    for name, value in share.items() if isinstance(share, Mapping) else [("share", share)]:
        if isinstance(share, Mapping):
            _check.one_of("share", name, names)
        _check.positive("share", value)
    return dict(share) if isinstance(share, Mapping) else dict.fromkeys(names, share)


def _may_hold(student: nn.Module, every: int | None, band: float, detection_loss: Any) -> None:
    _check.count("every", every)
    _check.positive("band", band)
    if every is not None and (detection_loss is not None or sharded_modules(student)):
        who = "detection_loss, which" if detection_loss is not None else "FSDP2, where a loss"
        raise ValueError(
            f"every: expected None with {who} is computed for one batch alone; call "
            f"calibrate yourself every {every} steps instead"
        )


def _names(losses: Mapping[str, DistillLoss]) -> list[str]:
    """Of all terms, with and without a weight, whatever order the losses are in."""
    return sorted(loss.term_name(part) for loss in losses.values() for part in loss.parts)
