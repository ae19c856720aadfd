"""Every method on each data set on which it was trained: gain, cost, what it needs."""

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
from .real import BEST, REAL, Real
from .report import cell, collect, percent, steps_of
from .store import RESULTS, Store

TUNED = "each at its best share of three"
NAMES = {"bccd": "Blood smears", "cards": "Playing cards", "deeppcb": "Circuit boards"}


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
        share, name = self.named(method)
        if not ap[name]:
            return [share, "", "", "", ""]
        good = f"{mean(ap[name].values()):.1f}"
        if method == "none":
            return [share, good, "", "", ""]
        both = collect(self.joined, self.store, seeds).get(f"{name} + global", {})
        gains = (
            paired(ap[name], ap["none"]),
            None if name == "defaults" else paired(ap[name], ap["defaults"]),
            paired(percent(both, "AP"), ap[name]),
        )
        return [share, good, *map(cell, gains)]

    def averages(self, seeds: int) -> list[list[str]]:
        """The cells of the means over `METHODS`, alone and joined, of seeds that all have."""
        found = {
            arm: percent(runs, "AP")
            for table in (self.alone, self.joined)
            for arm, runs in collect(table, self.store, seeds).items()
        }
        own, both = (
            over_all([found[f"{self.named(method)[1]}{end}"] for method in METHODS])
            for end in ("", " + global")
        )
        rows = []
        for means, last in (own, cell(paired(both, own))), (both, ""):
            gains = [cell(paired(means, found[other])) for other in ("none", "defaults")]
            good = f"{mean(means.values()):.1f}" if means else ""
            rows.append(["", good, *gains, last])
        return rows

    def named(self, method: str) -> tuple[str, str]:
        """The share of a method as the table has it, and its arm."""
        if method in self.shares:
            share = f"{self.shares[method]:g}"
            return share, f"{method}, {share}"
        return ("" if method == "none" else "own weights"), method


def over_all(several: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """By seed the mean over several arms, of the seeds that all of them have."""
    seeds = set.intersection(*(set(one) for one in several))
    return {seed: mean(one[seed] for one in several) for seed in sorted(seeds)}


def compared() -> list[Compared]:
    """Data on which methods were trained: at the shares chosen there, or all at one."""
    found = []
    if "" in DIGITS_BEST:
        tables = {table.name: table for table in REDUCED.tables()}
        store = Store(RESULTS / "cpu", Path())
        pair = tables["q6-methods"], tables["q6-joined"]
        found.append(Compared(f"Digit scenes, {TUNED}", store, *pair, DIGITS_BEST[""]))
    for source in REAL:
        tables = {table.name: table for table in REAL[source]}
        store = Store(RESULTS / source / "cpu", Path())
        title, key, shares = TUNED, "methods", BEST.get(source)
        if shares is None:
            usual = Real(source).usual_share
            title, key = f"all at a share of {usual:g}, not tuned", "share"
            shares = dict.fromkeys(("defaults", *METHODS), usual)
        pair = tables[f"{source}-q2-{key}"], tables[f"{source}-q3-{key}"]
        found.append(Compared(f"{NAMES[source]}, {title}", store, *pair, shares))
    return [one for one in found if one.begun]


def every_method(data: Sequence[Compared], seeds: int) -> Iterator[str]:
    """A table for each data set, a line a method."""
    kinds = "AP", "Δ to none", "Δ to defaults", "Δ by global knowledge"
    head = ["method", "needs, beside maps", "step", "share", *kinds]
    needs = {"none": "", "defaults": "boxes, equal classes"} | METHODS
    for one in data:
        yield f"{one.title}:"
        yield ""
        yield f"| {' | '.join(head)} |"
        yield f"|{' --- |' * len(head)}"
        for method in ("none", "defaults", "defaults at a share", *METHODS):
            key = "defaults" if method.startswith("defaults") else method
            own = dataclasses.replace(one, shares={}) if method == "defaults" else one
            row = [method, needs[key], step_of(own, key), *own.cells(key, seeds)]
            yield f"| {' | '.join(row)} |"
        titles = f"mean of the {len(METHODS)} methods", "the same with global knowledge"
        for title, cells in zip(titles, one.averages(seeds), strict=True):
            yield f"| {' | '.join([title, '', '', *cells])} |"
        yield ""


def step_of(one: Compared, method: str) -> str:
    """Time of a step as a multiple of one without distillation, where it was measured."""
    known = steps_of(one.alone, one.store)
    name = one.named(method)[1]
    return f"{known[name]:.2f}" if name in known else ""
