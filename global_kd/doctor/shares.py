"""Shares of the detection loss's gradient that are held while a student trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..losses.base import DistillLoss
from .calibration import Calibration, measure, weights_for
from .trial import Setup


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


def _names(losses: Mapping[str, DistillLoss]) -> list[str]:
    """Of all terms, with and without a weight, whatever order the losses are in."""
    return sorted(loss.term_name(part) for loss in losses.values() for part in loss.parts)
