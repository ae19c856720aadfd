"""How the cost grows: with the boxes, the image's side, and the pursuit's instances.

A rival leaves a curve where its next point would take too long; ours runs to the end.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import global_kd.functional as F

from . import cases, pursuit
from .cases import END_TO_END, OPS, Setting
from .measure import LIBRARY, QUICK, Effort, run_case, say, take_turns
from .scene import QUICK as QUICK_SIZE
from .scene import Size
from .suite import described, milliseconds

RIVALS = {"imitation": cases.RELEASED, "pool_boxes": "slicing each box", "step": cases.RELEASED}
GROWTH = 4  # of the work from one point to the next
PURSUIT_CHANNELS = 64  # a million rows of both spaces and their copies fit into 8 GiB


def run(
    *,
    quick: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> dict[str, Any]:
    if quick:
        base, effort, limit = replace(QUICK_SIZE, dtype=dtype), QUICK, 0.2
        boxes, sides, instances = [1, 4, 16], [64, 128], [100, 400]
    else:
        base = replace(Size(height=512, width=512, batch=1), dtype=dtype)
        effort, limit = Effort(seconds=1.0, least=3, most=20), 4.0
        boxes, sides = [4**n for n in range(7)], [256, 512, 1024, 2048]
        instances = [10**n for n in range(3, 7)]
    by_boxes = [(n, replace(base, boxes=n)) for n in boxes]
    by_side = [(n, replace(base, batch=1, height=n, width=n)) for n in sides]
    curves = [
        *grown("boxes", by_boxes, device, effort, limit),
        *grown("side", by_side, device, effort, limit),
        *pursued(instances, (2, 5) if quick else (10, 100), 4 if quick else 80, device, effort),
    ]
    return {
        "size": {
            "boxes": by_boxes[0][1].words().replace(" 1 boxes", " n boxes"),
            "side": by_side[0][1].words().replace(f"{sides[0]} x {sides[0]}", "n x n"),
            "pursuit": f"C = {PURSUIT_CHANNELS}, every row a candidate",
        },
        "curves": curves,
        "passed": all(point["gate"] for curve in curves for point in curve["points"]),
    }


def grown(
    by: str, sizes: list[tuple[int, Size]], device: torch.device, effort: Effort, limit: float
) -> Iterator[dict[str, Any]]:
    for name, rival in RIVALS.items():
        build, points, running = {**OPS, **END_TO_END}[name], [], True
        for x, size in sizes:
            say(f"{name}, {by} {x}")
            case, largest = build(Setting(device, size, compile=False))
            names = [LIBRARY, rival] if running else [LIBRARY]
            case = replace(
                case,
                contestants={n: case.contestants[n] for n in names},
                reference=case.reference if running else LIBRARY,
                bars=[],
            )
            done = run_case(case, device, effort, largest)
            points.append({"name": str(x), "x": x, **done, "gated": running})
            if running:
                took = done["contestants"][rival].get("wall", {}).get("median_s", limit)
                running = took * GROWTH < limit
            del case, largest
        yield {"name": f"{name} by {by}", "by": by, "points": points}


def pursued(
    counts: list[int],
    picks: tuple[int, ...],
    classes: int,
    device: torch.device,
    effort: Effort,
) -> Iterator[dict[str, Any]]:
    """Prototypes of all classes together, `M` of each, from `N` rows in all."""
    rows = {m: {k: [] for k in (1, classes)} for m in picks}  # type: ignore[var-annotated]
    for count in counts:
        say(f"pursuit, {count} instances")
        student, teacher = (
            x.to(device) for x in pursuit.instances(count, channels=PURSUIT_CHANNELS)
        )
        if count >= 100_000:
            effort = replace(effort, least=2)
        works: dict[tuple[int, int], Callable[[], object]] = {
            (m, k): partial(select, student, teacher, m, k)
            for m in picks
            for k in (1, classes)
            if count >= m * k
        }
        for (m, k), work in works.items():
            say(f"  {m} prototypes, {k} classes")
            times = take_turns({LIBRARY: work}, device, effort)[LIBRARY]
            point = {"name": str(count), "x": count, "gate": True}
            rows[m][k].append({**point, "contestants": {LIBRARY: {"wall": times}}})
    for m in picks:
        for k in (1, classes):
            what = f"pursuit, {m} prototypes, {k} class{'es' if k > 1 else ''}"
            yield {"name": what, "by": "pursuit", "points": rows[m][k]}


def select(student: torch.Tensor, teacher: torch.Tensor, picks: int, classes: int) -> None:
    for s, t in zip(student.chunk(classes), teacher.chunk(classes), strict=True):
        F.select_prototypes(s, t, picks)


def table(results: Mapping[str, Any]) -> str:
    lines = [described(results["environment"])]
    lines += [f"{by}: {words}" for by, words in results["size"].items()]
    for curve in results["curves"]:
        lines += ["", f"{curve['name']}: ms, median (quartiles)"]
        for point in curve["points"]:
            parts = [
                f"{name} {milliseconds(row['wall'])}" if "wall" in row else f"{name} failed"
                for name, row in point["contestants"].items()
            ]
            same = "" if point["gate"] else "  NOT THE SAME ANSWER"
            lines.append(f"{point['x']:>8}  {'   '.join(parts)}{same}")
    return "\n".join(lines)
