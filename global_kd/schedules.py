"""How the weight of a loss term changes over training."""

import math
from dataclasses import dataclass

_DECAYS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """Factor in [0, 1] as a function of training progress in [0, 1].

    The factor is 0 before ``start``, rises linearly to 1 over ``warmup``, decays from there until
    ``stop`` and is 0 (1 for ``"constant"`` with ``stop=1``) after that.

    Args:
        decay: ``"constant"``, ``"linear"`` (1 to 0; the paper's) or ``"cosine"`` (1 to 0).
        start: Progress before which the factor is 0.
        warmup: Length of the linear rise after ``start``.
        stop: Progress at which the decay ends; past it the factor is 0.
        steps: If given, the decay moves in this many equal steps: ``Schedule("linear",
            steps=24)`` is the released ``1 - epoch / 24``.

    Example:
        >>> from global_kd import Schedule
        >>> [Schedule("linear")(p) for p in (0.0, 0.25, 1.0)]
        [1.0, 0.75, 0.0]
        >>> Schedule("linear", steps=2)(0.75)
        0.5
    """

    decay: str = "linear"
    start: float = 0.0
    warmup: float = 0.0
    stop: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.decay not in _DECAYS:
            raise ValueError(f"decay: expected one of {_DECAYS}, but got {self.decay!r}")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"start, stop: expected 0 <= start < stop <= 1, but got {self.start}, {self.stop}"
            )
        if not 0 <= self.warmup <= self.stop - self.start:
            raise ValueError(
                f"warmup: expected between 0 and stop - start, but got {self.warmup!r}"
            )
        if self.decay != "constant" and self.warmup == self.stop - self.start:
            raise ValueError(
                f"warmup: expected less than stop - start, so that a {self.decay} decay has room "
                f"after it, but got {self.warmup!r}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected at least 1, but got {self.steps!r}")

    def __call__(self, progress: float) -> float:
        if progress < self.start or (progress > self.stop and self.stop < 1):
            return 0.0
        since = progress - self.start
        if since < self.warmup:
            return since / self.warmup
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (since - self.warmup) / (self.stop - self.start - self.warmup))
        if self.steps is not None:
            done = math.floor(done * self.steps + 1e-9) / self.steps
        if self.decay == "linear":
            return 1 - done
        return 0.5 * (1 + math.cos(math.pi * done))
