"""Every method at equal tuning, alone and with global knowledge beside it.

Each gets the same three shares of the detection gradient (`Distiller.calibrate`), one seed each, on
the tuning split. The share that does best there is trained on the reporting split, over several
seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .declaration import SEEDS_PER_SPLIT, Arm, Method, Others, Table, Trial

SHARES = (0.1, 0.3, 1.0)
BEYOND = 3.0  # for the defaults only, which did best at 1.0 on photographs
METHODS = {  # and what each needs beside feature maps; LD needs box distributions
    "pkd": "nothing",
    "fgd": "boxes",
    "frs": "a teacher with a dense head",
    "cwd": "nothing",
    "mgd": "nothing",
    "crosskd": "a teacher with a dense head",
    "bckd": "two dense heads alike",
}


@dataclasses.dataclass(frozen=True)
class EqualTuning:
    """What its tables share.

    `name` starts theirs, `base` is the student without distillation, `teacher` its teacher, and
    `global_knowledge` the library's defaults with the sizes of the data.
    """

    name: str
    base: Trial
    teacher: Trial
    global_knowledge: Method

    def at_share(self, name: str, share: float) -> Others:
        """A method whose terms pull together with a share of the detection gradient."""
        if name == "defaults":
            return Others("", share, beside=self.global_knowledge, tuned=True)
        return Others(name, share)

    def tuning(self, title: str, rank: int) -> Table:
        """All methods at all shares, one seed."""
        arms = [Arm("none", self.base, ())]
        for share in SHARES:
            for name in ("defaults", *METHODS):
                arms.append(Arm(f"{name}, {share:g}", self._taught(self.at_share(name, share))))
        return Table(self.name, title, rank, tuple(arms), seeds=1)

    def shares(self, title: str, rank: int, seeds: int = SEEDS_PER_SPLIT) -> Table:
        """Global knowledge at its own weights and at each share: how much the choice matters."""
        arms = self._first()
        for share in (*SHARES, BEYOND):
            trial = self._taught(self.at_share("defaults", share))
            against = "none", "defaults"
            arms.append(Arm(f"defaults, {share:g}", trial, against, "defaults at a share", share))
        axis = "share of the detection gradient"
        return Table(self.name, title, rank, tuple(arms), axis, seeds)

    def alone(
        self, title: str, rank: int, shares: Mapping[str, float], seeds: int = SEEDS_PER_SPLIT
    ) -> Table:
        """Each at its share, beside no distillation and the defaults."""
        arms = self._first()
        for name, share in shares.items():
            trial = self._taught(self.at_share(name, share))
            arms.append(Arm(f"{name}, {share:g}", trial, ("none", "defaults")))
        return Table(self.name, title, rank, tuple(arms), seeds=seeds)

    def joined(
        self, title: str, rank: int, shares: Mapping[str, float], seeds: int = SEEDS_PER_SPLIT
    ) -> Table:
        """Each with and without global knowledge: its omega in the method, its terms beside it."""
        arms = self._first()
        for name, share in shares.items():
            if name == "defaults":
                continue
            label = f"{name}, {share:g}"
            arms.append(Arm(label, self._taught(self.at_share(name, share)), ("none", "defaults")))
            both = Others(name, share, robust=True, beside=self.global_knowledge)
            arms.append(Arm(f"{label} + global", self._taught(both), (label, "defaults")))
        return Table(self.name, title, rank, tuple(arms), seeds=seeds)

    def control(self) -> Arm:
        """A method that pulls with next to nothing: what it brings is the noise of a training."""
        return Arm("pkd, a millionth", self._taught(self.at_share("pkd", 1e-6)), ("none",))

    def _first(self) -> list[Arm]:
        return [Arm("none", self.base, ()), Arm("defaults", self._taught(self.global_knowledge))]

    def _taught(self, how: Method | Others) -> Trial:
        return dataclasses.replace(self.base, method=how, teacher=self.teacher)
