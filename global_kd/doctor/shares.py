"""Shares of the detection loss's gradient that are held while a student trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..hooks import sharded_modules
from ..losses.base import DistillLoss
from ..prototypes.passes import first_batches
from .calibration import Calibration, calibrate, measure, weights_for
from .trial import DetectionLoss, Setup


class HeldShares:
    """What is wanted, and how often it is looked at.

    Attributes:
        every: Training calls between two looks; ``None``: never.
        band: A share that is off by no more than this part of it stays.
        wanted: By term.
    """

    def __init__(self) -> None:
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
        names = [name for loss in setup.losses.values() for name in loss.term_names]
        for name, value in share.items() if isinstance(share, Mapping) else [("share", share)]:
            if isinstance(share, Mapping):
                _check.one_of("share", name, names)
            _check.positive("share", value)
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
        wanted = share if isinstance(share, Mapping) else dict.fromkeys(names, share)
        self.wanted = dict(wanted) if every is not None else {}
        return calibration

    def due(self, losses: Mapping[str, DistillLoss]) -> bool:
        """Whether the step that comes is one at which to look."""
        step = max(loss.step for loss in losses.values())
        return bool(self.every and step and step % self.every == 0 and torch.is_grad_enabled())

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
