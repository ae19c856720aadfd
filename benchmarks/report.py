"""Results files to tables in docs/benchmarks.md and plots beside it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import shares
from .measure import LIBRARY
from .methods import COMPILED_FORMULATION, FORMULATION, GLOBAL_KNOWLEDGE, times
from .suite import described, mebibytes, milliseconds, number

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: written by `python -m benchmarks report` -->", "<!-- /results -->"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
ABSENT = "not measured"

Results = dict[str, dict[str, dict[str, Any]]]  # benchmark, kind of device


def load(folder: Path) -> Results:
    """Full runs in float32 only; quick ones are not for quoting."""
    found: Results = {}
    for name in ("ops", "step", "methods", "training", "scaling", "waits", "ranks", "shares"):
        for kind in KINDS:
            file = folder / f"{name}_{kind}.json"
            if file.exists():
                found.setdefault(name, {})[kind] = json.loads(file.read_text(encoding="utf-8"))
    return found


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in body), ""]


def machines(results: Results) -> Iterator[str]:
    yield "## Where it was measured"
    yield ""
    for name, by_kind in results.items():
        for kind, result in by_kind.items():
            yield f"- `{name}`, {KINDS[kind]}: {described(result['environment'])}."
    yield ""


def bars(results: Results) -> Iterator[str]:
    """Every bar, both devices side by side; what was not measured says so."""
    merged: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name in ("step", "ops", "training", "methods"):
        for kind, result in results.get(name, {}).items():
            alone = [{"name": "training: KD terms", **result}]
            for case in result.get("cases", result.get("methods", alone)):
                for bar in case.get("bars", ()):
                    if any(needed is not None for needed in bar["bars"].values()):
                        threads = f", {threaded(case)}" if "threads" in case else ""
                        key = case["name"] + threads, bar["what"]
                        merged.setdefault(key, {})[kind] = bar
    body = []
    for (case, what), by_kind in merged.items():
        line = [case, what]
        some = next(iter(by_kind.values()))
        for kind in KINDS:
            needed = some["bars"][kind]
            sign = "≥" if some["measure"] == "speedup" else "≤"
            line.append("report" if needed is None else f"{sign} {needed:.4g}")
            bar = by_kind.get(kind)
            met = {True: " met", False: " **missed**", None: ""}[bar["met"] if bar else None]
            line.append((number(bar["measured"]) if bar else ABSENT) + met)
        body.append(line)
    for check in dict.fromkeys(c for r in results.get("waits", {}).values() for c in r["checks"]):
        by_kind = results["waits"]
        outcomes = [by_kind.get(kind, {}).get("checks", {}).get(check, "–") for kind in KINDS]
        body.append(["a step's waiting for the device", check, "", outcomes[0], "0", outcomes[1]])
    if not any("cuda" in by_kind for by_kind in results.values()):
        body.append(["a step's waiting for the device", "synchronisations", "", "–", "0", ABSENT])
    yield "## The bars"
    yield ""
    head = ["case", "ours is", "bar, CPU", "CPU", "bar, GPU", "GPU"]
    yield from rows(head, body)


def cases(results: Results, name: str, title: str) -> Iterator[str]:
    for kind, result in results.get(name, {}).items():
        yield f"## {title}, {KINDS[kind]}"
        yield ""
        yield f"{result['size']}."
        yield ""
        for case in result["cases"]:
            yield f"### {case['name']}, {KINDS[kind]}"
            yield ""
            copy = case["copy"]
            yield (
                f"{case['what']}; the library in its form `{case['form']}`. At the least "
                f"{case['bytes'] / 1e6:.4g} MB: {case['bytes_how']}. {case['flops'] / 1e9:.3g} "
                f"GFLOP: {case['flops_how']}. A copy moves {copy['bytes_per_s'] / 1e9:.3g} GB/s, "
                f"into fresh memory {copy['fresh_bytes_per_s'] / 1e9:.3g} GB/s."
            )
            yield ""
            yield from rows(
                ["", "ms", "device ms", "ours is", "of copy bandwidth", "peak MiB", "error"],
                [contestant(name, row, case) for name, row in case["contestants"].items()],
            )


def contestant(name: str, row: Mapping[str, Any], case: Mapping[str, Any]) -> list[str]:
    if "wall" not in row:
        return [name, f"failed: {row.get('failed')}", "", "", "", "", ""]
    mine, ratio = case["contestants"][LIBRARY], ""
    if name != LIBRARY and "wall" in mine:
        key = "device" if "device" in row and "device" in mine else "wall"
        times = row[key]["median_s"] / mine[key]["median_s"]
        ratio = f"{times:.2f}× {'faster' if times >= 1 else '**slower**'}"
    return [
        f"**{name}**" if name == LIBRARY else name,
        milliseconds(row["wall"]),
        milliseconds(row["device"]) if "device" in row else "–",
        ratio,
        f"{row['of_copy_bandwidth']:.0%}" if row["of_copy_bandwidth"] >= 0.005 else "< 1%",
        mebibytes(row["peak_bytes"]),
        f"{row['difference']:.0e}",
    ]


def threaded(case: Mapping[str, Any]) -> str:
    return f"{case['threads']} thread{'s' if case['threads'] > 1 else ''}"


def loads(cases: Sequence[Mapping[str, Any]]) -> str:
    known = sorted(case["measured"]["load_average"] for case in cases)
    return f"{known[0]:g}" if known[0] == known[-1] else f"{known[0]:g} to {known[-1]:g}"


def methods(results: Results) -> Iterator[str]:
    for kind, result in results.get("methods", {}).items():
        yield f"## The methods, {KINDS[kind]}"
        yield ""
        yield (
            f"{result['size']}. Forward and backward together, weights of one-stage detectors. The "
            "next columns are the time as a multiple of that of a step of global knowledge (all "
            "four terms), of the method's plain formulation, and of that compiled. The load of the "
            f"machine was {loads(result['methods'])} when rows were begun."
        )
        yield ""
        body = []
        for case in result["methods"]:
            mine = case.get("contestants", {}).get(LIBRARY, {})
            if "wall" not in mine:
                failed = case.get("failed", mine.get("failed"))
                body.append([case["name"], threaded(case), f"failed: {failed}", *[""] * 5])
                continue
            ratios = (times(case, x) for x in (GLOBAL_KNOWLEDGE, FORMULATION, COMPILED_FORMULATION))
            gaps = [row["difference"] for row in case["contestants"].values() if "gate" in row]
            body.append(
                [
                    case["name"],
                    threaded(case),
                    milliseconds(mine["wall"]),
                    *("–" if x is None else number(x) for x in ratios),
                    mebibytes(mine["peak_bytes"]),
                    f"{max(gaps):.0e}" if len(gaps) > 1 else "–",
                ]
            )
        head = ["", "", "ms", "of global knowledge", "of its formulation", "of that compiled"]
        yield from rows([*head, "peak MiB", "error"], body)


def training(results: Results) -> Iterator[str]:
    for kind, result in results.get("training", {}).items():
        listed = result.get("list_of_the_sum_of_its_parts")
        yield f"## A training step, {KINDS[kind]}"
        yield ""
        yield f"{result['size']}."
        yield ""
        yield from rows(
            ["", "ms", "of the student's step", "peak MiB"],
            [
                [
                    name,
                    milliseconds(row["wall"]),
                    f"{result['shares'][name]:.1%}",
                    mebibytes(row["peak_bytes"]),
                ]
                for name, row in result["parts"].items()
            ],
        )
        yield (
            "The step with KD, less the student's step and the teacher's forward: "
            f"{result['added_beside_the_teacher']:+.1%} of the student's step."
            + (
                f" A list of two losses takes {listed:.2f} of the time of its parts."
                if listed
                else ""
            )
        )
        yield ""


def ranks(results: Results) -> Iterator[str]:
    for kind, result in results.get("ranks", {}).items():
        yield f"## A refresh on several ranks, {KINDS[kind]}"
        yield ""
        yield (
            f"{result['size']}; processes of one machine over Gloo, so the seconds are those of "
            "processes that share its cores. *Epoch*: the job sees the same instances however many "
            "ranks there are; *full*: every rank holds a full sample of its own. Sent is the most "
            "of any rank."
        )
        yield ""
        yield from rows(
            ["classes", "samples", "ranks", "instances held", "MB sent", "s"],
            [
                [
                    str(p["classes"]),
                    "full" if p["full"] else "epoch",
                    str(p["ranks"]),
                    str(p["held"]),
                    f"{p['sent'] / 1e6:.3g}",
                    f"{p['seconds']:.3g}",
                ]
                for p in result["points"]
            ],
        )


def weights(results: Results) -> Iterator[str]:
    for kind, result in results.get("shares", {}).items():
        yield f"## Weights as shares, {KINDS[kind]}"
        yield ""
        yield (
            f"`kd.calibrate(share={result['share']})` on {result['size']}. A share is the mean "
            "norm of a term's gradient on the student's maps over that of the detection loss's, "
            "measured by hooks of the benchmark's own; at most "
            f"{result['worst_error']:.1e} of it off on the batches that were calibrated on."
        )
        yield ""
        yield from rows(list(shares.HEAD), shares.body(result))


COST = re.compile(r"(<!-- cost: (\w+) -->).*?(<!-- /cost -->)")


def costs(result: Mapping[str, Any], text: str) -> str:
    """The page of the methods with what each was measured to cost, with all threads."""
    cases = {case["name"]: case for case in reversed(result["methods"])}

    def cost(found: re.Match[str]) -> str:
        case = cases.get(found[2], {})
        mine = case.get("contestants", {}).get(LIBRARY, {})
        said = "not measured yet"
        if "wall" in mine:
            beside = number(times(case, GLOBAL_KNOWLEDGE))
            said = f"{beside} of a step of global knowledge, {mebibytes(mine['peak_bytes'])} MiB"
            rival = times(case, COMPILED_FORMULATION)
            if rival is not None:
                said += f"; {number(rival)} of its plain formulation under `torch.compile`"
        return f"{found[1]}{said}{found[3]}"

    return COST.sub(cost, text)


TITLES = {
    "boxes": ("Cost by number of boxes", "boxes an image"),
    "side": ("Cost by image side", "side of the image, pixels"),
    "pursuit": ("Selecting prototypes by number of instances", "instances"),
}


def plots(results: Results, images: Path) -> Iterator[str]:
    """One figure a question and device: log-log, quartiles shaded."""
    for kind, result in results.get("scaling", {}).items():
        for by, (title, axis) in TITLES.items():
            curves = [c for c in result["curves"] if c["by"] == by]
            if not curves:
                continue
            images.mkdir(parents=True, exist_ok=True)
            file = images / f"bench_{by}_{kind}.png"
            draw(curves, axis, file)
            yield f"## {title}, {KINDS[kind]}"
            yield ""
            yield f"{result['size'][by]}. Points are medians, shades quartiles."
            yield ""
            yield f"![{title}](images/{file.name})"
            yield ""


def draw(curves: Sequence[Mapping[str, Any]], axis: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plot = pyplot.subplots(figsize=(7, 4.2))
    for n, curve in enumerate(curves):
        names = dict.fromkeys(name for p in curve["points"] for name in p["contestants"])
        for name in names:
            points = [
                (p["x"], p["contestants"][name]["wall"])
                for p in curve["points"]
                if "wall" in p["contestants"].get(name, {})
            ]
            x = [at for at, _ in points]
            low, high = ([1e3 * t["quartiles_s"][i] for _, t in points] for i in (0, 1))
            plot.loglog(
                x,
                [1e3 * t["median_s"] for _, t in points],
                "o-" if name == LIBRARY else "x--",
                color=f"C{n}",
                label=curve["name"].split(" by ")[0] + ("" if name == LIBRARY else f", {name}"),
            )
            plot.fill_between(x, low, high, color=f"C{n}", alpha=0.2)
    plot.set_xlabel(axis)
    plot.set_ylabel("ms, forward and backward" if "pursuit" not in file.name else "ms")
    plot.grid(which="both", alpha=0.3)
    plot.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(folder: Path, page: Path = PAGE) -> int:
    results = load(folder)
    if not results:
        print(f"no results in {folder}: run `python -m benchmarks ops` and the others first")
        return 1
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page}: expected one line '{BEGIN}' and one '{END}'")
    written = [
        *bars(results),
        *cases(results, "step", "The full step"),
        *cases(results, "ops", "Ops"),
        *methods(results),
        *training(results),
        *ranks(results),
        *weights(results),
        *plots(results, page.parent / "images"),
        *machines(results),
    ]
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    body = "\n".join(written).rstrip("\n")
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
    print(f"written: {page}")
    beside = page.with_name("methods.md")
    if beside.exists() and "cpu" in results.get("methods", {}):
        known = beside.read_text(encoding="utf-8")
        beside.write_text(costs(results["methods"]["cpu"], known), encoding="utf-8")
        print(f"written: {beside}")
    return 0
