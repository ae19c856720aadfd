"""Results to tables and plots in docs/evidence_*.md, a page a question."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from workshop.coco_eval import METRICS

from ..digits.suspicion import RULES
from .declaration import Arm, Method, Others, Table, Trial
from .intervals import Difference, paired
from .perform import CURVE_SCENES
from .store import RESULTS, Store

DOCS = Path(__file__).parents[2] / "docs"
PAGES = tuple(
    DOCS / f"evidence_{question}.md"
    for question in ("terms", "relations", "omega", "sizes", "surpassing", "methods")
)
NEIGHBOURS = RESULTS / "neighbours.json"
REAL_PAGE = DOCS / "evidence_real.md"
# A page's marker may name the tables it shows: `results q1: written by ...`.
BEGIN = "<!-- results: written by `python -m benchmarks.accuracy report` -->"
_BEGIN = re.compile(BEGIN.replace("results:", r"results ?(\w*):"))
END = "<!-- /results -->"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}

Runs = dict[int, dict[str, Any]]  # the results of an arm by seed
Sources = Mapping[str, tuple[Store, int]]  # by device: the results, and how many seeds


def collect(table: Table, store: Store, seeds: int) -> dict[str, Runs]:
    """The results there are, by arm and seed."""
    return {
        arm.name: {
            seed: result
            for seed in range(min(seeds, table.seeds))
            if (result := store.result(arm.trial.at(seed))) is not None
        }
        for arm in table.arms
    }


def percent(runs: Runs, metric: str) -> dict[int, float]:
    """A metric in percent by seed, without the trainings that diverged."""
    return {seed: 100 * run["scores"][metric] for seed, run in runs.items() if "scores" in run}


def steps_file(store: Store) -> Path:
    """Beside the folder of the results: how long a step of each arm takes (`steps`)."""
    return store.results.with_name(f"steps_{store.results.name}.json")


def steps_of(table: Table, store: Store) -> Mapping[str, float]:
    """By arm: as multiples of a step without distillation; empty where it was not measured."""
    file = steps_file(store)
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return known.get(table.name, {})


def rows(
    table: Table, found: Mapping[str, Runs], steps: Mapping[str, float]
) -> Iterator[list[str]]:
    """An arm that is compared with several has a row for each.

    The last cell is what a step costs: as `steps` has it, or the seconds that the trainings took.
    """
    for arm in table.arms:
        runs = found[arm.name]
        if not runs:
            continue
        level = percent(runs, "AP")
        diverged = sum("failed" in run for run in runs.values())
        seeds = f"{len(level)}" + (f" ({diverged} diverged)" if diverged else "")
        ap = f"{mean(level.values()):.1f}" if level else ""
        paces = [r["seconds"] / r["iterations"] for r in runs.values() if "seconds" in r]
        pace = f"{mean(paces):.3f}" if paces else ""
        pace = f"{steps[arm.name]:.2f}" if arm.name in steps else pace
        known = [other for other in arm.against if found[other]]
        for n, other in enumerate(known or ("",)):
            head = [arm.name, seeds, ap] if n == 0 else ["", "", ""]
            gaps = [difference(found, arm, other, metric) for metric in METRICS]
            yield [*head, other, *map(cell, gaps), pace if n == 0 else ""]


def difference(found: Mapping[str, Runs], arm: Arm, other: str, metric: str) -> Difference | None:
    """Of an arm to another, paired by seed, in points of percent."""
    return paired(percent(found[arm.name], metric), percent(found.get(other, {}), metric))


def cell(gap: Difference | None) -> str:
    """Bold where the interval leaves out 0."""
    if gap is None:
        return ""
    return f"**{gap}**" if gap.beyond_noise else str(gap)


TERMS: dict[str, dict[str, Any]] = {
    "imitation": {"foreground": 0.0, "background": 0.0},
    "soft labels": {"logits": 0.0},
    "relation": {"relation": 0.0},
    "ω": {"robust": False},
}


def effects(table: Table, found: Mapping[str, Runs]) -> Iterator[tuple[str, int, list[Difference]]]:
    """What a term or omega does on average over all pairs of arms that differ in nothing else.

    Name, number of pairs, and the paired difference of each metric over the seeds that have all
    pairs: a seed counts once, as the mean of its pairs.
    """
    arms = {
        arm.trial.plain() if (how := arm.trial.method) is None else _alike(arm.trial, how): arm
        for arm in table.arms
        if arm.trial.time_of is None  # trained longer
        and not isinstance(arm.trial.method, Others)
    }
    for name, without in TERMS.items():
        pairs = [
            (arm, arms[key])
            for arm in table.arms
            if isinstance(arm.trial.method, Method)
            and (other := dataclasses.replace(arm.trial.method, **without)) != arm.trial.method
            and (key := _alike(arm.trial, other)) in arms
        ]
        if len(pairs) < 2:
            continue
        gaps = []
        for metric in METRICS:
            by_seed: dict[int, list[float]] = {}
            for arm, partner in pairs:
                one, two = (percent(found[x.name], metric) for x in (arm, partner))
                for seed in one.keys() & two.keys():
                    by_seed.setdefault(seed, []).append(one[seed] - two[seed])
            whole = {seed: mean(x) for seed, x in by_seed.items() if len(x) == len(pairs)}
            gaps.append(paired(whole, dict.fromkeys(whole, 0.0)))
        if all(gap is not None for gap in gaps):
            yield name, len(pairs), [gap for gap in gaps if gap is not None]


def _alike(trial: Trial, method: Method) -> Trial:
    """A trial with another method, for as many iterations; without any weight there is none."""
    if not any((method.foreground, method.background, method.relation, method.logits)):
        return trial.plain()
    return dataclasses.replace(trial.plain(), method=method, teacher=trial.teacher)


def averages(table: Table, found: Mapping[str, Runs]) -> Iterator[str]:
    """`effects` as a table."""
    rows = list(effects(table, found))
    if rows:
        yield "What each does on average over all pairs of arms that differ in nothing else:"
        yield ""
        head = ["", "pairs", "seeds", *(f"Δ {m}" for m in METRICS)]
        yield f"| {' | '.join(head)} |"
        yield f"|{' --- |' * len(head)}"
        for name, pairs, gaps in rows:
            yield f"| {' | '.join([name, str(pairs), str(gaps[0].n), *map(cell, gaps)])} |"
        yield ""


def teachers(table: Table, store: Store) -> Iterator[str]:
    """How good they are, on the scenes that the reported students are scored on."""
    known = {arm.trial.teacher for arm in table.arms if arm.trial.teacher is not None}
    parts = [
        f"`{teacher.identity}` AP {100 * result['scores']['AP']:.1f}"
        for teacher in sorted(known, key=lambda x: x.identity)
        if (result := store.result(teacher)) is not None and "scores" in result
    ]
    if parts:
        yield f"Teachers: {', '.join(parts)}."
        yield ""


def sources_of(found: Mapping[str, Runs]) -> Iterator[str]:
    """Which pictures were trained and scored on, where they are not digit scenes."""
    told = {
        f"{x['name']} of {x['repository']} at {x['commit']} ({x['licence']}), {x['trained on']} "
        f"pictures to train on and {x['scored on']} to be scored on, digest `{x['digest']}`"
        for runs in found.values()
        for run in runs.values()
        if (x := run.get("data"))
    }
    if told:
        yield f"Data: {'; '.join(sorted(told))}."
        yield ""


def separations(table: Table, found: Mapping[str, Runs]) -> Iterator[str]:
    """How well omega told disturbed instances from clean ones, where there are such."""
    parts = []
    for arm in table.arms:
        areas: dict[str, list[float]] = {}
        for run in found[arm.name].values():
            for kind, area in run.get("omega_separates", {}).items():
                areas.setdefault(kind, []).append(area)
        parts += [
            f"{arm.name}: {kind} {mean(values):.2f} (n = {len(values)})"
            for kind, values in areas.items()
        ]
    if parts:
        yield (
            "Area under the ROC curve of a low ω for the disturbed instances (1: told apart, 0.5: "
            f"chance): {'; '.join(parts)}."
        )
        yield ""


def section(table: Table, store: Store, seeds: int, device: str, images: Path) -> Iterator[str]:
    """One table with its plots; nothing until more than half of the arms have a result."""
    found = collect(table, store, seeds)
    # Shared arms alone, such as the one without distillation, make no table.
    if 2 * sum(map(bool, found.values())) <= len(found):
        return
    yield f"### {table.title}, {DEVICES[device]}"
    yield ""
    done, total = sum(map(len, found.values())), min(seeds, table.seeds) * len(table.arms)
    yield f"`{table.name}`: {done} of {total} trainings."
    yield ""
    steps = steps_of(table, store)
    cost = "step" if steps else "s/iteration"
    head = ["arm", "seeds", "AP", "against", *(f"Δ {m}" for m in METRICS), cost]
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows(table, found, steps):
        yield f"| {' | '.join(row)} |"
    yield ""
    yield from averages(table, found)
    yield from separations(table, found)
    yield from teachers(table, store)
    yield from sources_of(found)
    for file, what in plots(table, found, device, images):
        yield f"![{what}](images/{file.name})"
        yield ""
    identities = (
        f"{arm.name}: " + ", ".join(f"`{run['identity']}`" for run in found[arm.name].values())
        for arm in table.arms
        if found[arm.name]
    )
    yield f"<details><summary>Identities</summary>{'; '.join(identities)}</details>"
    yield ""


def plots(
    table: Table, found: Mapping[str, Runs], device: str, images: Path
) -> Iterator[tuple[Path, str]]:
    """Paired differences of AP with their intervals, and AP over the training."""
    stem = f"evidence_{table.name}_{device}"
    if table.axis:
        drawn, what = draw_lines(table, found, images / f"{stem}.png"), f"AP by {table.axis}"
    else:
        drawn = draw_differences(table, found, images / f"{stem}.png")
        what = "paired differences of AP"
    if drawn:
        yield images / f"{stem}.png", f"{table.title}: {what}"
    if draw_curves(table, found, images / f"{stem}_curves.png"):
        yield images / f"{stem}_curves.png", f"{table.title}: AP over the training"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plot = pyplot.subplots(figsize=(width, height))
    plot.grid(alpha=0.3)
    return figure, plot


def _save(figure: Any, file: Path) -> bool:
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    # Long names and legends stand outside of the axes, whose size they do not change.
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return True


def draw_differences(table: Table, found: Mapping[str, Runs], file: Path) -> bool:
    """A line a comparison: the seeds as dots, mean and interval beside them."""
    lines = [
        (f"{arm.name} − {other}", arm, other)
        for arm in table.arms
        for other in arm.against
        if difference(found, arm, other, "AP") is not None
    ]
    if not lines:
        return False
    figure, plot = _figure(6, 1.2 + 0.32 * len(lines))
    most = 0
    for y, (_, arm, other) in enumerate(lines):
        gap = difference(found, arm, other, "AP")
        assert gap is not None
        ours, theirs = percent(found[arm.name], "AP"), percent(found[other], "AP")
        seeds = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        most = max(most, gap.n)
        plot.plot(seeds, [y] * len(seeds), "o", color="C0", alpha=0.4, markersize=4)
        plot.errorbar(gap.mean, y, xerr=gap.half, fmt="D", color="C0", capsize=3)
    plot.axvline(0, color="black", linewidth=0.8)
    plot.set_yticks(range(len(lines)), [name for name, _, _ in lines], fontsize=8)
    plot.invert_yaxis()
    plot.margins(y=0.6 / len(lines))
    shown = "seeds, mean and 95 % interval" if most > 1 else "one seed, no interval"
    plot.set_xlabel(f"difference of AP in percent: {shown}")
    return _save(figure, file)


def draw_lines(table: Table, found: Mapping[str, Runs], file: Path) -> bool:
    """AP along the table's axis: each seed a thin line, their mean a thick one.

    Only seeds that a line has at all its points; arms that lie on no line are drawn across.
    """
    lines: dict[str, dict[float, dict[int, float]]] = {}
    across: dict[str, dict[int, float]] = {}
    for arm in table.arms:
        if not (level := percent(found[arm.name], "AP")):
            continue
        if arm.x is None:
            across[arm.name] = level
        else:
            lines.setdefault(arm.line, {})[arm.x] = level
    if not any(len(points) > 1 for points in lines.values()):
        return False
    figure, plot = _figure(7, 4.2)
    for n, (line, points) in enumerate(lines.items()):
        x, color = list(points), f"C{n}"
        if not (seeds := sorted(set.intersection(*map(set, points.values())))):
            continue
        for seed in seeds:
            plot.plot(x, [points[i][seed] for i in x], color=color, alpha=0.3, linewidth=1)
        means = [mean(points[i][seed] for seed in seeds) for i in x]
        plot.plot(x, means, "o-", color=color, label=f"{line} (n = {len(seeds)})")
    for style, (name, level) in zip(itertools.cycle(("--", ":", "-.")), across.items()):
        plot.axhline(mean(level.values()), color="black", linestyle=style, label=name)
    plot.set_xscale("log")
    ticks = sorted({x for points in lines.values() for x in points})
    plot.set_xticks(ticks, [f"{x:g}" for x in ticks])
    plot.minorticks_off()
    plot.set_xlabel(table.axis)
    plot.set_ylabel("AP in percent; thin: seeds")
    plot.legend(fontsize=8)
    return _save(figure, file)


def draw_curves(table: Table, found: Mapping[str, Runs], file: Path) -> bool:
    """Mean AP of each arm over the training, over the seeds that all arms with curves have.

    Arms without omega are left out. Two points make no curve: where a run has no more, nothing is
    drawn, nor where there are more arms than colours and styles tell apart.
    """
    curves = {
        arm.name: {seed: run["curve"] for seed, run in found[arm.name].items() if run.get("curve")}
        for arm in table.arms
        if not arm.name.endswith("no omega")
    }
    curves = {name: runs for name, runs in curves.items() if runs}
    seeds = sorted(set.intersection(*map(set, curves.values()))) if curves else []
    shortest = min((len(x) for runs in curves.values() for x in runs.values()), default=0)
    if not seeds or shortest < 3 or len(curves) > 20:
        return False
    figure, plot = _figure(7, 4.2)
    for n, (name, runs) in enumerate(curves.items()):
        # Arms of equal time have as many points at other iterations; some trainings have fewer.
        count = min(len(runs[s]) for s in seeds)
        shared = [_thinned(runs[s], count) for s in seeds]
        x, y = (
            [mean(p[key] for p in points) for points in zip(*shared, strict=True)]
            for key in ("iteration", "AP")
        )
        style = "--" if name.startswith("none") else ("-" if n < 10 else ":")
        plot.plot(x, [100 * ap for ap in y], style, label=name)
    plot.set_xlabel("iterations")
    over = f"mean over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    plot.set_ylabel(f"AP in percent on {CURVE_SCENES} images, {over}")
    plot.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves
    return _save(figure, file)


def _thinned(points: Sequence[Any], count: int) -> Sequence[Any]:
    """So many of evenly spread points, the last among them."""
    step = len(points) // count
    return points[step - 1 :: step][-count:]


def machines(sources: Sources, tables: Sequence[Table]) -> Iterator[str]:
    """Where the results come from."""
    runs = {
        run["identity"]: run["environment"]
        for store, seeds in sources.values()
        for table in tables
        for by_seed in collect(table, store, seeds).values()
        for run in by_seed.values()
    }
    names = Counter(
        f"{env['gpu']['name'] if env['gpu'] else env['cpu']}, torch {env['torch']}, commit "
        f"{env['commit']}"
        for env in runs.values()
    )
    yield "### Where it was trained"
    yield ""
    yield from (f"- {number} trainings: {name}." for name, number in names.items())
    yield ""


def body(sources: Sources, tables: Sequence[Table], images: Path) -> str:
    """What stands between the markers."""
    written = [
        line
        for n, table in enumerate(tables)
        for device, (store, seeds) in sources.items()
        if has_own(table, tables[:n], store, seeds)
        for line in section(table, store, seeds, device, images)
    ]
    if not written:
        return "No runs yet."
    legend = (
        "AP in percent, mean over seeds; Δ: paired differences over the seeds that both arms have, "
        "with 95 % intervals (t); bold: the interval leaves out 0. s, m, l: boxes up to 16² px, "
        "up to 28² px, larger. *step*: time of a step as a multiple of one without distillation."
    )
    return "\n".join([legend, "", *written, *machines(sources, tables)]).rstrip("\n")


def has_own(table: Table, earlier: Sequence[Table], store: Store, seeds: int) -> bool:
    """Whether it says something that the tables before it do not: arms of theirs are no news."""
    known = {arm.trial.identity for other in earlier for arm in other.arms}
    own = [arm for arm in table.arms if arm.trial.identity not in known]
    trials = [arm.trial.at(seed) for arm in own or table.arms for seed in range(seeds)]
    return any(store.result(trial) is not None for trial in trials)


def nearest(file: Path) -> Iterator[str]:
    """How often what is nearest has the right class, and what tells wrong labels."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not known:
        yield "No numbers yet."
        yield ""
        return
    kinds = ("instance", "prototype", "prototype, centred", "projection")
    head = ["teacher of", "space", "instances", "most frequent class", "chance", *kinds]
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for name, one in known.items():
        # Levels from the finest on, then what is no level.
        spaces = sorted(one["spaces"].items(), key=lambda x: (x[0][0] != "s", len(x[0]), x[0]))
        for n, (space, told) in enumerate(spaces):
            first = [name, space, str(one["instances"]), f"{100 * one['most frequent']:.0f} %"]
            if n:
                first = ["", space, "", ""]
            cells = [f"{100 * told[k]['classes']:.0f} ({100 * told[k]['all']:.0f})" for k in kinds]
            chance = "" if n else f"{100 / one['classes']:.0f} %"
            yield f"| {' | '.join([*first, chance, *cells])} |"
    yield ""
    for name, one in known.items():
        if (labels := one.get("wrong labels")) is not None:
            yield (
                f"Area under the ROC curve for {100 * labels['share']:.0f} % wrong labels, {name}, "
                f"{labels['instances']} boxes:"
            )
            yield ""
            yield "| rule | area |"
            yield "| --- | --- |"
            yield from (f"| {RULES[rule]} | {area:.2f} |" for rule, area in labels["areas"].items())
            yield ""


def main(
    sources: Sources,
    tables: Sequence[Table],
    page: Path,
    others: Mapping[str, Iterable[str]] | None = None,
) -> int:
    """Write a page anew between its markers.

    What stands between a marker that names other tables than these stays as it is. `others` are
    lines for markers that name no tables.
    """
    others = {"neighbours": nearest(NEIGHBOURS)} | dict(others or {})
    text = page.read_text(encoding="utf-8")
    begins = list(_BEGIN.finditer(text))
    if not begins or text.count(END) != len(begins):
        raise SystemExit(f"{page}: expected lines '{BEGIN}', and as many '{END}'")
    for begin in reversed(begins):
        mine = [x for x in tables if x.name.removeprefix("full-").startswith(begin[1])]
        if begin[1] in others:
            written = "\n".join(others[begin[1]]).rstrip("\n")
        elif mine or not begin[1]:
            written = body(sources, mine, page.parent / "images")
        else:
            continue
        before, after = text[: begin.end()], text[text.index(END, begin.end()) :]
        text = f"{before}\n\n{written}\n\n{after}"
    page.write_text(text, encoding="utf-8")
    print(f"written: {page}")
    return 0
