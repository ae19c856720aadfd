"""Differences paired over seeds, and how far they can be believed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from statistics import mean, stdev

# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom.
_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_NORMAL = 1.9599640


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond 10 by its expansion around the normal's."""
    if freedom < 1:
        raise ValueError(f"freedom: expected at least 1, but got {freedom}")
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    z = _NORMAL
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean difference over `n` pairs; its 95 % interval is `mean` ± `half` (none for one pair)."""

    n: int
    mean: float
    half: float | None

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:+.1f} (n = 1)"
        told = " (n = 2)" if self.n == 2 else ""
        return f"{self.mean:+.1f} ± {self.half:.1f}{told}"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """`ours` − `theirs` over the seeds that both have, by a paired t interval; None without any."""
    gaps = [ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs]
    if not gaps:
        return None
    half = None
    if len(gaps) > 1:
        half = t_quantile(len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))
    return Difference(len(gaps), mean(gaps), half)
