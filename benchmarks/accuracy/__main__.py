"""The command line: `python -m benchmarks.accuracy list|run|steps|report`."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

from workshop import storage

from . import gradients, neighbours, pace, report
from .declaration import CLASSES, Table, Trial
from .every_method import compared, every_method
from .experiments import GRIDS
from .perform import perform, steps
from .real import REAL
from .store import RESULTS, Store
from .work import in_order, summary, work

SEEDS = 5  # at most, where a table does not name fewer
GRID = {"cpu": "reduced", "cuda": "full"}  # by device
QUICK = Path("runs/accuracy_quick")


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description="Train what experiments.py declares; turn the results into docs/evidence_*.md.",
    )
    commands = described.add_subparsers(dest="name", required=True)
    for name, what in (
        ("list", "how many trainings there are, how many are done, what the others cost"),
        ("run", "train what has no result, the most telling first; goes on where it stopped"),
        ("steps", "how long a step of each arm takes beside one without distillation"),
        ("report", "tables and plots of docs/evidence_*.md"),
        ("gradients", "how large each term's gradient is beside that of the detection losses"),
        ("pull", "the same of the library's own weights, at the start of a training"),
        ("neighbours", "how often what is nearest in a teacher's space has the right class"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument(
            "--data",
            choices=("digits", *CLASSES),
            default="digits",
            help="digit scenes, or real pictures: blood smears, playing cards, circuit boards",
        )
        command.add_argument("--only", metavar="PATTERN", help="beginning of names, such as 'q1'")
        command.add_argument("--grid", choices=GRIDS, help="default: reduced on a CPU, else full")
        if name != "report":
            command.add_argument("--device", choices=GRID, default="cpu")
        command.add_argument(
            "--seeds", type=int, help="at most; default: 5, or fewer where a table says so"
        )
        command.add_argument("--results", type=Path, help="folder of JSON files")
        command.add_argument(
            "--quick", action="store_true", help=f"tiny trainings to see that it works, in {QUICK}"
        )
        if name in ("run", "steps", "pull", "neighbours"):
            command.add_argument(
                "--root", type=Path, help="a checkout of the repository that holds the pictures"
            )
        if name in ("run", "steps", "gradients", "pull", "neighbours"):
            command.add_argument("--cache", type=Path, default=storage.cache_folder() / "accuracy")
        if name == "neighbours":
            command.add_argument(
                "--yolox", type=Path, metavar="ONNX", help="a YOLOX to look with, too"
            )
        if name == "run":
            command.add_argument(
                "--minutes", type=float, help="then save and stop; the same command goes on"
            )
            command.add_argument(
                "--processes", type=int, default=1, help="trainings at a time, one thread each"
            )
        if name == "report":
            command.add_argument("--page", type=Path, help="default: each docs/evidence_*.md")
    return described


def quick(trial: Trial) -> Trial:
    """The same with next to no scenes and iterations."""
    parts: dict[str, Any] = {
        name: None if part is None else quick(part)
        for name in ("teacher", "start", "time_of")
        for part in [getattr(trial, name)]
    }
    return dataclasses.replace(
        trial,
        data=trial.data.quick(),
        iterations=max(2, trial.iterations // 500),
        batch_size=4,
        **parts,
    )


def shrunk(table: Table) -> Table:
    """A table of quick trials."""
    arms = (dataclasses.replace(arm, trial=quick(arm.trial)) for arm in table.arms)
    return dataclasses.replace(table, arms=tuple(arms))


def stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM is Ctrl-C, so that trainings are stopped and saved."""
    raise KeyboardInterrupt


def main(words: Sequence[str] | None = None) -> int:
    args = parser().parse_args(words)
    for name in ("seeds", "minutes", "processes"):
        if getattr(args, name, None) is not None and getattr(args, name) <= 0:
            raise SystemExit(f"--{name}: expected more than 0, but got {getattr(args, name)}")
    results = args.results or (QUICK / "results" if args.quick else RESULTS)
    digits = args.data == "digits"
    results = results if digits else results / args.data
    if args.name == "report":
        if args.quick and args.page is None:
            raise SystemExit("--quick: tiny trainings are not for quoting; name another --page")
        sources = {
            device: (Store(results / device, Path()), args.seeds or SEEDS) for device in GRID
        }
        both = [table for grid in GRIDS if args.grid in (None, grid) for table in GRIDS[grid]]
        both = both if digits else REAL[args.data]
        tables = [shrunk(table) for table in both] if args.quick else both
        pages = report.PAGES if digits else (report.REAL_PAGE,)
        pages = pages if args.page is None else (args.page,)
        tables, seeds = matching(tables, args.only), args.seeds or SEEDS
        return max(
            report.main(
                sources,
                tables,
                page,
                {"methods": every_method(compared(), seeds), "pull": gradients.pulls()},
            )
            for page in pages
        )
    tables = GRIDS[args.grid or GRID[args.device]] if digits else REAL[args.data]
    tables = [shrunk(table) for table in tables] if args.quick else tables
    cache, root = getattr(args, "cache", Path()), getattr(args, "root", None)
    store = Store(results / args.device, cache, root)
    if args.name == "neighbours":
        neighbours.write(args.data, store, RESULTS / "neighbours.json", args.yolox)
        return 0
    if args.name == "gradients":
        gradients.write(store)
        return 0
    if args.name == "pull":
        arms = (arm for table in matching(tables, args.only) for arm in table.arms)
        trial = next(arm.trial for arm in arms if arm.name in ("defaults", "the library's"))
        trials = [trial.at(seed) for seed in range(args.seeds or SEEDS)]
        gradients.write_pull(args.only or args.data, trials, store)
        return 0
    if args.name == "steps":
        return write_steps(matching(tables, args.only), store, args.device)
    seeds = args.seeds or SEEDS
    if args.name == "list":
        print(summary(tables, seeds, store, args.only))
        return 0
    wanted = in_order(tables, seeds, args.only)
    if not wanted:
        raise SystemExit(f"--only: no training's name begins with {args.only!r}; try `list`")
    signal.signal(signal.SIGTERM, stop)
    try:
        failed = work(
            wanted,
            store,
            perform,
            processes=args.processes,
            minutes=args.minutes,
            device=args.device,
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return 130
    done = sum(store.result(trial) is not None for _, trial in wanted)
    print(f"{done} of {len(wanted)} trainings have a result; {failed} failed")
    return 1 if failed else 0


def write_steps(tables: Sequence[Table], store: Store, device: str) -> int:
    """Of tables whose teachers are trained; their first arm is the one without distillation."""
    for table in tables:
        lacking = [
            x for arm in table.arms for x in arm.trial.needs if not store.weights(x).is_file()
        ]
        if lacking:
            print(f"{table.name}: left out, a teacher of it has no weights in {store.cache}")
            continue
        pace.write(table, steps(table, store, device), report.steps_file(store))
        print(f"{table.name}: written")
    return 0


def matching(tables: Sequence[Table], only: str | None) -> list[Table]:
    """The tables whose name begins with a pattern."""
    found = [t for t in tables if only is None or fnmatch(t.name, only + "*")]
    if not found:
        raise SystemExit(f"--only: no table's name begins with {only!r}; try `list`")
    return found


if __name__ == "__main__":
    sys.exit(main())
