"""In which order trials are trained, at what expense, and by which processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from statistics import median

from .declaration import Table, Trial
from .store import Store

GRACE = 90.0  # seconds in which a training that is told to stop can finish its step and save


def in_order(
    tables: Sequence[Table], seeds: int, only: str | None = None
) -> list[tuple[str, Trial]]:
    """Names and trials, the most telling first: by rank, then seed by seed, then as declared.

    So pairs are complete after every seed. A trial in several tables comes once, under its first
    name: "table/arm/seed". `only` is a pattern for names, its end left open.
    """
    named = [
        (table.rank, seed, f"{table.name}/{arm.name}/{seed}", arm.trial.at(seed))
        for table in tables
        for seed in range(min(seeds, table.seeds))
        for arm in table.arms
    ]
    named.sort(key=lambda entry: entry[:2])  # stable: tables and arms as declared
    found: dict[str, tuple[str, Trial]] = {}
    for _, _, name, trial in named:
        if only is None or fnmatch(name, only + "*"):
            found.setdefault(trial.identity, (name, trial))
    return list(found.values())


def next_trial(
    wanted: Sequence[tuple[str, Trial]], store: Store, busy: Sequence[str]
) -> tuple[str, Trial] | None:
    """The first one that has no result and can start now, or what it waits for.

    `busy` are identities that run or were given up.
    """
    for name, trial in wanted:
        if store.result(trial) is not None:
            continue
        for first in store.startable(trial):
            if first.identity not in busy:
                return name if first is trial else f"{name}, before it {first.identity}", first
    return None


def everything(wanted: Sequence[tuple[str, Trial]]) -> Iterator[Trial]:
    """All trials once, with the teachers, starts and partners that they need."""
    seen: set[str] = set()

    def visit(trial: Trial) -> Iterator[Trial]:
        if trial.identity in seen:
            return
        seen.add(trial.identity)
        for other in trial.needs:
            yield from visit(other)
        yield trial

    for _, trial in wanted:
        yield from visit(trial)


def estimate(trial: Trial, results: Sequence[tuple[Trial, dict]]) -> float | None:
    """Seconds of training by the pace of finished trials; None while there is nothing to go by.

    Of those with the same two detectors and size of scenes, or else with the same student.
    """

    def alike(other: Trial, *, loosely: bool) -> bool:
        pairs = [(trial.student, other.student), (trial.data.side, other.data.side)]
        pairs.append((trial.method is None, other.method is None))
        if not loosely and trial.teacher is not None and other.teacher is not None:
            pairs.append((trial.teacher.student, other.teacher.student))
        return all(a == b for a, b in pairs)

    for loosely in (False, True):
        paces = [
            result["seconds"] / result["iterations"]
            for other, result in results
            if "seconds" in result and alike(other, loosely=loosely)
        ]
        if paces:
            return median(paces) * trial.iterations
    return None


def summary(tables: Sequence[Table], seeds: int, store: Store, only: str | None = None) -> str:
    """What `list` prints."""
    wanted = in_order(tables, seeds, only)
    trials = list(everything(wanted))
    results = [(t, r) for t in trials if (r := store.result(t)) is not None]
    lines = [f"{'table':28} {'rank':>4} {'arms':>5} {'trials':>7} {'done':>5}  minutes left"]
    for table in tables:
        mine = in_order([table], seeds, only)
        if mine:
            lines.append(
                f"{table.name:28} {table.rank:>4} {len(table.arms):>5} "
                f"{_progress([t for _, t in mine], store, results)}"
            )
    lines.append(f"{'all, each trial once':28} {'':>4} {'':>5} {_progress(trials, store, results)}")
    lines.append(
        f"At most {seeds} seeds; with teachers and warm starts in the last line. Minutes of "
        "training alone on one process, by the pace of finished trials; + where there is none to "
        "go by."
    )
    return "\n".join(lines)


def _progress(trials: Sequence[Trial], store: Store, results: Sequence[tuple[Trial, dict]]) -> str:
    left = [t for t in trials if store.result(t) is None]
    costs = [estimate(t, results) for t in left]
    known = [cost for cost in costs if cost is not None]
    minutes = f"{sum(known) / 60:.0f}" if known or not left else ""
    minutes += "+" if len(known) < len(left) else ""
    return f"{len(trials):>7} {len(trials) - len(left):>5}  {minutes:>12}"


def work(
    wanted: Sequence[tuple[str, Trial]],
    store: Store,
    train: Callable[[Trial, Store, str], None],
    *,
    processes: int = 1,
    minutes: float | None = None,
    device: str = "cpu",
) -> int:
    """Train what has no result, each trial in a process of its own; returns how many failed.

    After `minutes`, or on Ctrl-C, the trainings save their state and stop; the next call goes on
    from there.
    """
    # Inherited: started processes must have it before they import torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    end = None if minutes is None else time.monotonic() + 60 * minutes
    running: dict[str, tuple[str, BaseProcess]] = {}
    given_up: list[str] = []
    try:
        while end is None or time.monotonic() < end:
            while len(running) < processes:
                found = next_trial(wanted, store, [*running, *given_up])
                if found is None:
                    break
                name, trial = found
                store.draw_scenes(trial)
                print(f"{trial.identity}  {name}", flush=True)
                process: BaseProcess = get_context("spawn").Process(
                    target=train, args=(trial, store, device)
                )
                process.start()
                running[trial.identity] = name, process
            if not running:
                break
            left = None if end is None else max(0.0, end - time.monotonic())
            connection.wait([process.sentinel for _, process in running.values()], left)
            for identity, (name, process) in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[identity]
                given_up.append(identity)  # has a result now, or must not be tried for ever
                if process.exitcode:
                    print(f"{identity}  failed with exit status {process.exitcode}: {name}")
    finally:
        for _, process in running.values():
            process.terminate()  # a training takes this as Ctrl-C
        for _, process in running.values():
            process.join(GRACE)
            process.kill()
            process.join()
    return sum(store.result(t) is None for t in _tried(wanted, given_up))


def _tried(wanted: Sequence[tuple[str, Trial]], identities: Sequence[str]) -> Iterator[Trial]:
    yield from (t for t in everything(wanted) if t.identity in identities)
