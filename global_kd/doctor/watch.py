"""What training steps tell of a student that does not learn: told once, without waiting."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..losses.base import DistillLoss

_LOOKS = 64, 1024  # steps after which something should have moved


class _State:
    """Of a parameter; two are equal where nothing has moved it in between."""

    def __init__(self, parameter: Tensor) -> None:
        self._version = parameter._version
        # Fused optimizers write past the counter. Distributed tensors would have to be gathered.
        plain = type(parameter) is nn.Parameter
        self._some = parameter.detach().flatten()[:8].clone() if plain else None

    def __eq__(self, other: object) -> bool:
        """An accelerator waits, but only where the counters have not moved."""
        if not isinstance(other, _State) or self._version != other._version:
            return False
        if self._some is None or other._some is None:
            return self._some is other._some
        return torch.equal(self._some, other._some)


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
        self._still_told = False
        self._first: dict[str, dict[str, _State]] = {}

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
        if self.steps == 1:
            self._first = self._learning()
        if self.steps not in _LOOKS or self._still_told:
            return
        now = self._learning()
        still = {whose for whose, them in now.items() if them and them == self._first[whose]}
        if len(still) == 2 and self.steps == _LOOKS[0] and self._adds_up():
            return
        self._still_told = True
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

    def _learning(self) -> dict[str, dict[str, _State]]:
        """What the optimizer is to move."""
        adapters = {
            f"{name}.{n}": p
            for name, loss in self._losses.items()
            for n, p in loss.named_parameters()
        }
        both = {"adapters": adapters, "student": dict(self._student.named_parameters())}
        return {
            whose: {n: _State(p) for n, p in them.items() if p.requires_grad}
            for whose, them in both.items()
        }

    def _adds_up(self) -> bool:
        """Whether the gradients of many calls may be meant for one step of the optimizer."""
        return any(p.grad is not None for p in self._student.parameters())

    def _tell(self, what: str) -> None:
        warnings.warn(f"Distiller: {what}", stacklevel=6)
