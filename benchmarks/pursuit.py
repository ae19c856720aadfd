"""Selecting prototypes: against the released formulation, at scale, and as the data grow.

The bars: at least 100 times faster than the released formulation for 10 of 800 instances, C = 256;
100 of 200 000 instances in under a minute on two cores and 4 GiB.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import global_kd.functional as F

from . import released
from .environment import peak_memory

CHANNELS = 256
PICKS = 10
SPEEDUP_BAR = 100.0
LARGE_SECONDS_BAR = 60.0
LARGE_BYTES_BAR = 4 * 2**30


def instances(count: int, seed: int = 0, channels: int = CHANNELS) -> tuple[Tensor, Tensor]:
    """Paired rows like those of one class: a common direction, a few modes, noise of both nets.

    Two networks see the same instances: a low-dimensional description, mapped differently into both
    spaces, and noise that is each network's own. About two fifths pass the density cut of both.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    modes = normal(12, 24)
    mode = torch.randint(len(modes), (count,), generator=generator)
    described = 1.5 * modes[mode] + normal(count, 24) / torch.arange(1, 25).sqrt()

    def seen() -> Tensor:
        rows = (described @ normal(24, channels)).div_(24**0.5)
        rows += 2.0 * normal(channels)
        for chunk in rows.split(10_000):
            chunk += 0.3 * normal(*chunk.shape)
        return rows

    return seen(), seen()


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and seconds of all threads' work, which other jobs disturb less."""
    clock, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - worked


def spread(times: list[tuple[float, float]]) -> dict[str, Any]:
    clock = [each[0] for each in times]
    low, median, high = statistics.quantiles(clock, n=4, method="inclusive")
    return {
        "median_s": median,
        "quartiles_s": [low, high],
        "median_cpu_s": statistics.median(each[1] for each in times),
        "repetitions": len(times),
    }


def same_picks(student: Tensor, teacher: Tensor, candidates: Tensor, picks: int) -> dict[str, Any]:
    """The gate: our picks from these rows are those of the released formulation in float64."""
    agree: dict[str, Any] = {}
    for unique in (False, True):
        ours = F.select_prototypes(student, teacher, picks, candidates=candidates, unique=unique)
        theirs = released.pursuit(
            student.double(), teacher.double(), picks, candidates=candidates, unique=unique
        )
        agree["unique picks" if unique else "picks as released"] = ours.tolist() == theirs.tolist()
        if not unique:
            single = released.pursuit(student, teacher, picks, candidates=candidates)
            # For the record only: in float32 the released formulation may differ from itself.
            agree["released formulation in float32"] = single.tolist() == theirs.tolist()
    return agree


def against_released(count: int, threads: int, repetitions: int) -> dict[str, Any]:
    """One size: the gate, then all in turn; three of ours for each one of the released."""
    say(f"{PICKS} of {count}, {threads} threads: against the released formulation")
    student, teacher = instances(count)
    candidates = F.density_candidates(student, teacher)
    picks = min(PICKS, len(candidates))
    agree = same_picks(student, teacher, candidates, picks)
    contestants = {
        "ours": lambda: F.select_prototypes(student, teacher, picks, candidates=candidates),
        "ours_density_cut": lambda: F.density_candidates(student, teacher),
        "released": lambda: released.pursuit(student, teacher, picks, candidates=candidates),
        "released_density_cut": lambda: released.density_candidates(student, teacher),
    }
    turns = ["ours", "ours", "ours", *contestants]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for repetition in range(repetitions + 1):
            for name in turns:
                took = timed(contestants[name])
                if repetition:  # the first round warms up
                    times[name].append(took)
    finally:
        torch.set_num_threads(before)
    rows = {name: spread(taken) for name, taken in times.items()}

    def ratio(measure: str, *parts: str) -> float:
        ours = sum(rows["ours" + part][measure] for part in parts)
        return float(sum(rows["released" + part][measure] for part in parts) / ours)

    return {
        "instances": count,
        "candidates": len(candidates),
        "picks": picks,
        "threads": threads,
        "same_picks": agree,
        "gate": agree["picks as released"] and agree["unique picks"],
        **rows,
        "speedup": ratio("median_s", ""),
        "speedup_cpu": ratio("median_cpu_s", ""),
        "speedup_with_density_cut": ratio("median_s", "", "_density_cut"),
    }


def large(count: int, picks: int) -> dict[str, Any]:
    """A data set of one class: a process of its own, so that its peak of memory is its own."""
    say(f"{picks} of {count}")
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.pursuit", str(count), str(picks)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the pursuit of {picks} of {count} failed:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return {"instances": count, "candidates": count, "picks": picks, **measured}


def large_here(count: int, picks: int) -> dict[str, Any]:
    student, teacher = instances(count)
    before = peak_memory()
    found: list[Tensor] = []
    clock, worked = timed(lambda: found.append(F.select_prototypes(student, teacher, picks)))
    return {
        "seconds": clock,
        "cpu_seconds": worked,
        "threads": torch.get_num_threads(),
        "peak_bytes": peak_memory(),
        "peak_bytes_before": before,
        "input_bytes": student.nbytes + teacher.nbytes,
        "distinct_picks": len(set(found[0].tolist())),
    }


def scaling(counts: list[int], repetitions: int) -> list[dict[str, Any]]:
    """Ours alone, every row a candidate; the sizes take turns."""
    times: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for repetition in range(repetitions + 1):
        say(f"{PICKS} of {counts}, round {repetition} of {repetitions}")
        for count in counts:
            student, teacher = instances(count)
            took = timed(partial(F.select_prototypes, student, teacher, PICKS))
            if repetition:
                times[count].append(took)
    return [{"instances": n, "picks": PICKS, **spread(taken)} for n, taken in times.items()]


def run(quick: bool) -> dict[str, Any]:
    threads = torch.get_num_threads()
    # The large one first: a machine without the memory for it says so at once.
    big = large(20_000 if quick else 200_000, 100)
    sizes = [20, 800] if quick else [20, 50, 100, 200, 400, 800]
    repetitions = 2 if quick else 5
    compared = [against_released(count, threads, repetitions) for count in sizes]
    if threads > 1:
        compared.append(against_released(sizes[-1], 1, repetitions))
    grown = scaling([1_000, 10_000] if quick else [1_000, 3_000, 10_000, 30_000, 100_000], 3)
    bars = {"every speed-up has the same picks": all(row["gate"] for row in compared)}
    for row in compared:
        if row["instances"] == sizes[-1]:
            bar = f"{row['picks']} of {row['instances']}, {row['threads']} threads: at least "
            bars[f"{bar}{SPEEDUP_BAR:g} times faster"] = row["speedup"] >= SPEEDUP_BAR
    bar = f"{big['picks']} of {big['instances']}: under "
    bars[f"{bar}{LARGE_SECONDS_BAR:g} s"] = big["seconds"] < LARGE_SECONDS_BAR
    bars[f"{bar}4 GiB"] = big["peak_bytes"] < LARGE_BYTES_BAR
    return {
        "channels": CHANNELS,
        "against_released": compared,
        "large": big,
        "scaling": grown,
        "bars": bars,
        "passed": all(bars.values()),
    }


def _ms(part: dict[str, Any]) -> str:
    low, high = (1e3 * q for q in part["quartiles_s"])
    return f"{1e3 * part['median_s']:.1f} ({low:.1f}-{high:.1f})"


def table(results: dict[str, Any]) -> str:
    """What is printed: medians, quartiles in brackets, wins and losses alike."""
    where = results["environment"]
    lines = [
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads, load "
        f"{where['load_average']}, torch {where['torch']}, commit {where['commit']}",
        f"C = {results['channels']}, {PICKS} picks, milliseconds: median (quartiles)",
        "",
        f"{'N':>6} {'Q':>4} {'threads':>7} {'ours':>19} {'released':>27} {'ratio':>8} "
        f"{'of CPU time':>11} {'with cut':>8}  {'same picks':<10} result",
    ]
    for row in results["against_released"]:
        lines.append(
            f"{row['instances']:>6} {row['candidates']:>4} {row['threads']:>7} "
            f"{_ms(row['ours']):>19} {_ms(row['released']):>27} {row['speedup']:>7.1f}x "
            f"{row['speedup_cpu']:>10.1f}x {row['speedup_with_density_cut']:>7.1f}x  "
            f"{'yes' if row['gate'] else 'NO':<10} {'win' if row['speedup'] > 1 else 'LOSS'}"
        )
    lines.append("with cut: the density cut included on both sides")
    lines += ["", "every row a candidate, ours alone"]
    lines += [f"{row['instances']:>7} {_ms(row):>27}" for row in results["scaling"]]
    big = results["large"]
    lines += [
        "",
        f"{big['picks']} picks of {big['instances']}, every row a candidate: "
        f"{big['seconds']:.1f} s, {big['peak_bytes'] / 2**30:.2f} GiB at the peak "
        f"({big['input_bytes'] / 2**30:.2f} GiB of it the rows)",
        "",
    ]
    lines += [f"{'met   ' if met else 'MISSED'} {bar}" for bar, met in results["bars"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    json.dump(large_here(int(sys.argv[1]), int(sys.argv[2])), sys.stdout)
