"""Named terms with weights that schedules move over training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import _check
from ..schedules import Schedule
from .options import schedules_of


class WeightedTerms(nn.Module):
    """What a loss knows of its terms: their weights, when they count, what they were.

    Args:
        weights: Of each part, in the order of the terms; ``None``: that of the family.
        defaults: Weights by family; families not named take those of ``"one-stage"``.
        schedule: Factor of the terms over training, one for all or one by term name.
        warmup_steps: Training calls over which all weights rise linearly from 0.
        total_steps: Training calls in the whole run, from which progress is counted.
    """

    name: ClassVar[str]
    """Of the method in term names: ``kd_<name>`` or ``kd_<name>_<part>``."""
    default_schedule: ClassVar[Mapping[str, Schedule]] = {}
    """By part; constant where not named."""

    def __init__(
        self,
        weights: Mapping[str, float | None],
        defaults: Mapping[str, Mapping[str, float]] | None = None,
        *,
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        warmup_steps: int = 0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        for name, weight in weights.items():
            if weight is not None:
                _check.not_negative(name or "weight", weight)
        _check.count("total_steps", total_steps)
        _check.count("warmup_steps", warmup_steps, or_none=False, least=0)
        self.parts = tuple(weights)
        self.weights: dict[str, float] = {}  # resolved when the family is known
        self._given = dict(weights)
        self._defaults = {} if defaults is None else defaults
        self._calibrated: dict[str, float] = {}
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        usual = {
            self.term_name(part): self.default_schedule.get(part, Schedule("constant"))
            for part in self.parts
        }
        self.schedules = schedules_of(schedule, usual)
        self.step = 0
        self._last: dict[str, tuple[Tensor, float]] = {}  # value and factor of each term

    @property
    def built(self) -> bool:
        """Whether levels and channels are known."""
        raise NotImplementedError

    def _require_built(self) -> None:
        if not self.built:
            raise RuntimeError(
                f"{type(self).__name__}: levels and channels are unknown; pass student_channels, "
                "teacher_channels and strides, call build(Levels(...)), or give the loss to a "
                "Distiller"
            )

    # Names and weights ----------------------------------------------------------------------

    @property
    def prefix(self) -> str:
        """What the names of the terms begin with."""
        return f"kd_{self.name}"

    def term_name(self, part: str) -> str:
        """``kd_<name>_<part>``."""
        return f"{self.prefix}_{part}" if part else self.prefix

    @property
    def term_names(self) -> list[str]:
        """Of all parts that have a weight."""
        self._require_built()
        return [self.term_name(part) for part in self.parts if self.wants(part)]

    def wants(self, part: str) -> bool:
        """Whether a part has a weight."""
        return self.weights.get(part, 0.0) > 0

    @property
    def active(self) -> bool:
        """Whether any term has a weight."""
        self._require_built()
        return any(weight > 0 for weight in self.weights.values())

    def _resolve_weights(self, family: str) -> None:
        usual = self._defaults.get(family, self._defaults.get("one-stage", {}))
        for part, weight in self._given.items():
            self.weights[part] = float(usual.get(part, 1.0) if weight is None else weight)
        self.weights |= self._calibrated  # a state was loaded before it was built

    @property
    def calibrated(self) -> frozenset[str]:
        """Parts whose weights :meth:`calibrate` has fixed."""
        return frozenset(self._calibrated)

    def calibrate(self, weights: Mapping[str, float]) -> None:
        """Fix the weights of some parts, by part; they are kept in ``state_dict``."""
        for part, weight in weights.items():
            _check.one_of("weights", part, self.parts)
            _check.not_negative(part or "weight", weight)
        self._calibrated |= weights
        self.weights |= weights

    # Over training --------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Fraction of ``total_steps`` done, in [0, 1]."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    def factor(self, name: str) -> float:
        """Of a term at this step: schedule and warm-up."""
        factor = self.schedules[name](self.progress)
        return factor * min(1.0, self.step / self.warmup_steps) if self.warmup_steps else factor

    def at_full_weight(self) -> None:
        """Without schedules and warm-up from now on."""
        self.schedules = dict.fromkeys(self.schedules, Schedule("constant"))
        self.warmup_steps = 0

    def _check_pace(self) -> None:
        """At the first call, and at the one after the last: can the schedules mean this?"""
        name = type(self).__name__
        if self.step == 0 and self.total_steps is None:
            moving = {n: self.schedules[n] for n in self.term_names}
            late = [n for n, s in moving.items() if s.start or s.warmup]
            if late:
                raise ValueError(
                    f"total_steps: expected the number of training calls, since the schedule of "
                    f"{', '.join(late)} begins at 0 and would stay there, but got None"
                )
            decaying = [n for n, s in moving.items() if s != Schedule("constant")]
            if decaying:
                warnings.warn(
                    f"{name}: total_steps is not given, so the weights of "
                    f"{', '.join(decaying)} stay constant; pass total_steps=epochs * len(loader)",
                    stacklevel=4,
                )
        if self.step == self.total_steps:
            over = [n for n in self.term_names if self.schedules[n](1.0) == 0]
            if over:
                warnings.warn(
                    f"{name}: training goes on after total_steps={self.total_steps} "
                    f"calls, where the weights of {', '.join(over)} are 0; count the calls of the "
                    "whole run: epochs * len(loader)",
                    stacklevel=4,
                )

    @torch._compile._disable_dynamo
    def _end(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw parts as terms; in training mode also one step."""
        terms, factors = {}, {}
        for part, value in raw.items():
            if self.wants(part):
                name = self.term_name(part)
                factors[name] = self.factor(name)
                terms[name] = factors[name] * (self.weights[part] * value)
        if self.training:
            self._last = {name: (x.detach(), factors[name]) for name, x in terms.items()}
        self.step += self.training
        return terms

    # What is told and kept ------------------------------------------------------------------

    @torch.no_grad()
    def telemetry(self, detection_loss: Tensor | float | None = None) -> dict[str, float]:
        """Plain numbers about the training so far, for TensorBoard or a log.

        Calls in training mode leave them on the device; only reading them waits for it.

        Args:
            detection_loss: The detector's own loss at the last step, a scalar; gives the shares.

        Returns:
            By name: ``step``, calls in training mode so far; ``term/<name>``, each term of the last
            call, weighted and scheduled; ``schedule/<name>``, the factor in it; ``share/<name>``,
            the term divided by ``detection_loss``, NaN where that is 0.

        Raises:
            TypeError: A detection loss that is no number, such as a dictionary of losses.
            ValueError: A tensor of more than one number.
        """
        self._require_built()
        if detection_loss is not None:
            _check.scalar("detection_loss", detection_loss)
        numbers = {"step": float(self.step)}
        values = {name: float(x) for name, (x, _) in self._last.items()}
        numbers |= {f"term/{name}": x for name, x in values.items()}
        numbers |= {f"schedule/{name}": factor for name, (_, factor) in self._last.items()}
        if detection_loss is not None:
            given = detection_loss
            detection = given.item() if isinstance(given, Tensor) else float(given)
            numbers |= {
                f"share/{name}": x / detection if detection else math.nan
                for name, x in values.items()
            }
        return numbers

    def get_extra_state(self) -> Tensor:
        """The step and the calibrated weights (-1: none), for ``state_dict``."""
        weights = [self._calibrated.get(part, -1.0) for part in self.parts]
        return torch.tensor([float(self.step), *weights], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Continue at the saved step, with the calibrated weights."""
        step, *weights = state.tolist()
        self.step = int(step)
        if len(weights) != len(self.parts):
            raise ValueError(
                f"state_dict: expected {len(self.parts)} weights ({', '.join(self.parts)}), but "
                f"got {len(weights)}"
            )
        known = {p: w for p, w in zip(self.parts, weights, strict=True) if w >= 0}
        self._calibrated = known
        if self.built:
            self.weights |= known

    def extra_repr(self) -> str:
        shown = {part or "weight": weight for part, weight in (self.weights or self._given).items()}
        return ", ".join(f"{name}={x}" for name, x in shown.items())
