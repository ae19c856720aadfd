"""One table of every method over all data on which it was tuned: gain, cost, what it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from .declaration import Table
from .equal_tuning import METHODS
from .experiments import BEST as DIGITS_BEST
from .experiments import REDUCED
from .intervals import paired
from .real import BEST, REAL
from .report import cell, collect, percent, steps_of
from .store import RESULTS, Store


@dataclasses.dataclass(frozen=True)
class Compared:
    """One data set: its results, and the tables of methods alone and with global knowledge."""

    title: str
    store: Store
    alone: Table
    joined: Table
    shares: Mapping[str, float]

    @property
    def begun(self) -> bool:
        """Whether a method beside the defaults was trained."""
        trials = [arm.trial for arm in self.alone.arms if not arm.name.startswith("defaults")]
        return any(self.store.result(trial) is not None for trial in trials[1:])

    def cells(self, method: str, seeds: int) -> list[str]:
        """Share, AP with its gain over none, over the defaults, and with global knowledge."""
        own = collect(self.alone, self.store, seeds)
        ap = {name: percent(runs, "AP") for name, runs in own.items()}
        name, share = method, "" if method == "none" else "own weights"
        if method in self.shares:
            share = f"{self.shares[method]:g}"
            name = f"{method}, {share}"
        if not ap[name]:
            return [share, "", "", ""]
        good = f"{mean(ap[name].values()):.1f}"
        if method == "none":
            return [share, good, "", ""]
        both = collect(self.joined, self.store, seeds).get(f"{name} + global", {})
        gains = (
            paired(ap[name], ap["none"]),
            None if name == "defaults" else paired(ap[name], ap["defaults"]),
            paired(percent(both, "AP"), ap[name]),
        )
        first, *others = map(cell, gains)
        return [share, f"{good}, {first}", *others]


def compared() -> list[Compared]:
    """Data on which shares were chosen, and methods trained at them."""
    found = []
    if "" in DIGITS_BEST:
        tables = {table.name: table for table in REDUCED.tables()}
        store = Store(RESULTS / "cpu", Path())
        pair = tables["q6-methods"], tables["q6-joined"]
        found.append(Compared("digits", store, *pair, DIGITS_BEST[""]))
    for source, best in BEST.items():
        tables = {table.name: table for table in REAL[source]}
        store = Store(RESULTS / source / "cpu", Path())
        pair = tables[f"{source}-q2-methods"], tables[f"{source}-q3-methods"]
        found.append(Compared(source, store, *pair, best))
    return [one for one in found if one.begun]


def every_method(data: Sequence[Compared], seeds: int) -> Iterator[str]:
    """A line a method."""
    head = ["method", "needs, beside maps", "step"]
    for one in data:
        kinds = "share", "AP, Δ to none", "Δ to defaults", "Δ by global knowledge"
        head += [f"{one.title}: {kinds[0]}", *kinds[1:]]
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    needs = {"none": "", "defaults": "boxes, equal classes"} | METHODS
    for method in ("none", "defaults", "defaults at its best share", *METHODS):
        key = "defaults" if method.startswith("defaults") else method
        row = [method, needs[key], step_of(data, key)]
        for one in data:
            own = dataclasses.replace(one, shares={}) if method == "defaults" else one
            row += own.cells(key, seeds)
        yield f"| {' | '.join(row)} |"


def step_of(data: Sequence[Compared], method: str) -> str:
    """Time of a step as a multiple of one without distillation, where it was measured."""
    for one in data:
        known = steps_of(one.alone, one.store)
        names = (method, f"{method}, {one.shares.get(method, 0):g}")
        for name in names:
            if name in known:
                return f"{known[name]:.2f}"
    return ""
