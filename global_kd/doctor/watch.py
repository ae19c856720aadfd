"""What training steps tell of a student that does not learn: told once, without waiting."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..losses.base import DistillLoss

_STEPS_UNTIL_WARNING = 64


class Watch:
    """Warns of a student, or of adapters, that training does not move.

    Args:
        student: The detector in training.
        losses: By name.
        paths: The modules that put out its maps, for the message.
    """

    def __init__(
        self, student: nn.Module, losses: Mapping[str, DistillLoss], paths: Sequence[str]
    ) -> None:
        self._student, self._losses, self._paths = student, losses, tuple(paths)
        self.steps = 0  # in training, so far
        self._told = False
        self._versions: dict[str, dict[str, int]] = {}

    def gradients(self, maps: Sequence[Tensor]) -> None:
        """Of a step in training: terms from which the student learns nothing."""
        if self._told or not torch.is_grad_enabled() or any(x.requires_grad for x in maps):
            return
        if not any(p.requires_grad for p in self._student.parameters()):
            if self.steps == 0:
                self._told = True
                self._tell(
                    "no parameter of the student requires a gradient, so nothing trains it, though "
                    "the adapters give the terms a graph. Call student.requires_grad_(True), as "
                    "models from some frameworks' checkpoints need it"
                )
            return
        if any(loss.uses_maps for loss in self._losses.values()):
            self._told = True
            self._tell(
                "the student's feature maps carry no gradient, so imitation and relation "
                "teach it nothing. Run its training forward outside torch.no_grad(), and "
                f"checkpoint what puts out {', '.join(self._paths)} with use_reentrant=False. If "
                "these layers are frozen on purpose, ignore this"
            )

    def step(self) -> None:
        """A step in training is over: what the optimizer has moved since the first."""
        self.steps += 1
        if self.steps not in (1, _STEPS_UNTIL_WARNING):
            return
        versions = {
            "adapters": {
                f"{name}.{n}": p._version
                for name, loss in self._losses.items()
                for n, p in loss.named_parameters()
            },
            "student": {
                n: p._version for n, p in self._student.named_parameters() if p.requires_grad
            },
        }
        if self.steps == 1:
            self._versions = versions
            return
        still = {whose for whose, now in versions.items() if now and now == self._versions[whose]}
        if "adapters" in still:
            also = ", nor was the student" if "student" in still else ""
            self._tell(
                f"the adapters were not updated in {self.steps} steps{also}; give kd.parameters() "
                "to the optimizer beside student.parameters()"
            )
        elif still:
            self._tell(
                f"no parameter of the student changed in {self.steps} steps; give "
                "student.parameters() to the optimizer beside kd.parameters(), and call its step()"
            )

    def _tell(self, what: str) -> None:
        warnings.warn(f"Distiller: {what}", stacklevel=6)
