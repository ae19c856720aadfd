"""What got slower, or holds more memory, between two results files of the same benchmark."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cases import COMPILED, DEFINITION, RELEASED
from .measure import COPY
from .methods import COMPILED_FORMULATION, FORMULATION, GLOBAL_KNOWLEDGE
from .training import STUDENT, TEACHER

# Whose times are not ours to keep. In the pursuit's file, those of the released formulation.
RIVALS = {
    COMPILED,
    COMPILED_FORMULATION,
    COPY,
    DEFINITION,
    FORMULATION,
    GLOBAL_KNOWLEDGE,
    RELEASED,
    STUDENT,
    TEACHER,
    "kl_div",
    "released_density_cut",
    "roi_align",
    "slicing each box",
}
ALIKE = ("cpu", "cores", "threads", "gpu", "torch")
LEAST_BYTES = 2**20  # below, memory is noise


def measurements(part: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part with a median or a peak, by the names on the way to it."""
    if isinstance(part, dict):
        if "median_s" in part or "peak_bytes" in part:
            yield " / ".join(path), part
        for name, inner in part.items():
            yield from measurements(inner, (*path, name))
    elif isinstance(part, list):
        for inner in part:
            if isinstance(inner, dict):
                yield from measurements(inner, (*path, label(inner)))


def label(entry: dict[str, Any]) -> str:
    keys = ("instances", "candidates", "picks", "threads")
    known = [f"{k} {entry[k]}" for k in keys if k in entry]
    return ", ".join([entry["name"], *known] if "name" in entry else known)


def ours(path: str) -> bool:
    return not RIVALS & set(path.split(" / "))


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float = 0.1) -> list[str]:
    """One line for each measurement of ours that got worse.

    Slower: the median grew by more than the threshold, and the new lower quartile lies above the
    old upper one.
    """
    before = dict(measurements(old))
    worse = []
    for path, now in measurements(new):
        then = before.get(path)
        if then is None or not ours(path):
            continue
        if "median_s" in now and "median_s" in then:
            ratio = now["median_s"] / then["median_s"]
            if ratio > 1 + threshold and now["quartiles_s"][0] > then["quartiles_s"][1]:
                worse.append(
                    f"{path}: {ratio:.2f} times the time, {1e3 * then['median_s']:.4g} ms before, "
                    f"{1e3 * now['median_s']:.4g} ms now"
                )
        peak = now.get("peak_bytes", 0)
        old_peak = then.get("peak_bytes", peak)
        if peak > LEAST_BYTES and peak > (1 + threshold) * old_peak:
            worse.append(
                f"{path}: {peak / max(1, old_peak):.2f} times the memory, "
                f"{old_peak / 2**20:.4g} MiB before, {peak / 2**20:.4g} MiB now"
            )
    return worse


def main(old_file: Path, new_file: Path, threshold: float) -> int:
    old, new = (json.loads(file.read_text(encoding="utf-8")) for file in (old_file, new_file))
    if old["benchmark"] != new["benchmark"]:
        raise SystemExit(
            f"expected two results of one benchmark, but got {old['benchmark']} and "
            f"{new['benchmark']}"
        )
    for key in ALIKE:
        then, now = (x["environment"].get(key) for x in (old, new))
        if then != now:
            print(f"note: {key} was {then} and is {now}")
    for key in ("size", "quick"):
        if old.get(key) != new.get(key):
            print(f"note: {key} was {old.get(key)} and is {new.get(key)}")
    both = {path for path, _ in measurements(old)} & {path for path, _ in measurements(new)}
    print(f"{sum(map(ours, both))} measurements of ours in both")
    worse = compare(old, new, threshold)
    print("\n".join(worse) if worse else f"nothing is worse by more than {threshold:.0%}")
    return 1 if worse else 0
