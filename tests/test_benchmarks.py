"""The measurements measure: every command runs, its gate can fail, and growth is noticed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases, compare, measure, methods, pursuit, report, scene, waits
from benchmarks.__main__ import BENCHMARKS, main
from global_kd import losses

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def quick(name, folder, *options):
    """The results of one quick run from the command line."""
    file = folder / f"{name}_cpu.json"
    words = [name, "--quick", "--output", str(file), *options]
    assert main(words if name == "pursuit" else [*words, "--device", "cpu", "--no-compile"]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Every command once, at tiny sizes, as the check of a GPU runs them; and its files."""
    folder = tmp_path_factory.mktemp("dry_run")
    done = subprocess.run(
        [ROOT / "benchmarks/gpu_check.sh", "--dry-run"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHON": sys.executable,
            "NO_COMPILE": "1",
            "OMP_NUM_THREADS": "1",
            "OUT": str(folder),
        },
        capture_output=True,
        text=True,
    )
    return done, folder


@pytest.fixture(scope="module")
def results(dry_run, tmp_path_factory):
    done, files = dry_run
    assert done.returncode == 0, done.stdout.rpartition("==>")[2] + done.stderr[-2000:]
    folder, found = tmp_path_factory.mktemp("results"), {}
    for name in ("ops", "step", "waits", "methods"):
        text = (files / f"{name}_cpu.json").read_text(encoding="utf-8")
        (folder / f"{name}_cpu.json").write_text(text, encoding="utf-8")
        found[name] = json.loads(text)
    return found | {"folder": folder}


def test_every_command_is_documented():
    page = report.PAGE.read_text(encoding="utf-8")
    for name in [*BENCHMARKS, "compare", "report"]:
        assert re.search(rf"\b{name}\b", page), name


@pytest.mark.parametrize("name", ["ops", "step"])
def test_each_contestant_is_gated_and_measured(results, name):
    result = results[name]
    assert result["passed"] and result["quick"] and result["environment"]["gpu"] is None
    expected = {"ops": ["imitation", "pool_boxes", "relation", "logits"], "step": ["step"]}[name]
    assert [case["name"] for case in result["cases"]] == expected
    for case in result["cases"]:
        assert case["bytes"] > 0 and case["flops"] > 0 and case["form"] == "cpu"
        for contestant, row in case["contestants"].items():
            assert row["gate"], contestant
            low, high = row["wall"]["quartiles_s"]
            assert 0 < low <= row["wall"]["median_s"] <= high
            assert row["peak_bytes"] >= row["result_bytes"] > 0
        assert all(bar["met"] is None for bar in case["bars"])  # no bar holds at tiny sizes


def test_the_bars_of_the_full_size_are_judged(results):
    """With the same numbers in place of a full run's."""
    case = next(c for c in results["ops"]["cases"] if c["name"] == "pool_boxes")
    ours, rival = (case["contestants"][x]["wall"] for x in ("library", "slicing each box"))
    for factor, met in ((24.9, False), (25.1, True)):
        rival["median_s"] = factor * ours["median_s"]
        judged = measure.Bar("speedup", "slicing each box", cpu=25).judge(case, "cpu")
        assert judged["met"] is met and judged["measured"] == pytest.approx(factor)
    absent = measure.Bar("speedup", "nobody", cpu=25).judge(case, "cpu")
    assert absent["met"] is None and absent["measured"] is None


def test_every_method_is_measured_and_its_formulation_says_the_same(results):
    found = results["methods"]
    assert found["passed"]
    by_name = {case["name"]: case for case in found["methods"]}
    assert set(by_name) == {
        x.name for x in vars(losses).values() if isinstance(x, type) and hasattr(x, "name")
    }
    compared = 0
    for name, case in by_name.items():
        rows = case["contestants"]
        assert case["gate"] and {"library", "global knowledge"} <= set(rows), name
        assert all(row["wall"]["median_s"] > 0 for row in rows.values())
        assert rows["library"]["peak_bytes"] >= rows["library"]["result_bytes"] > 0
        compared += "formulation" in rows
    assert compared >= 8 and all("formulation" in by_name[x]["contestants"] for x in methods.BARRED)


def test_some_methods_can_be_measured_alone(capsys, tmp_path):
    words = ["methods", "--quick", "--device", "cpu", "--no-compile", "--seconds", "0.01"]
    assert main([*words, "--only", "cwd", "mgd"]) == 0
    said = capsys.readouterr()
    assert "1 of 2: cwd" in said.err and "2 of 2: mgd" in said.err  # progress, before the table
    assert "written" not in said.out and "pkd" not in said.out
    file = tmp_path / "some.json"
    for name in ("mgd", "cwd"):  # the second run keeps the row of the first
        assert main([*words, "--only", name, "--output", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["methods"]
    assert [x["name"] for x in rows if x["threads"] == rows[0]["threads"]] == ["cwd", "mgd"]


def test_a_formulation_that_says_something_else_fails(monkeypatch):
    at = methods.given(scene.QUICK, CPU)
    monkeypatch.setattr(methods.plain, "cwd", lambda s, t: sum(x.sum() for x in s))
    case = methods.measured("cwd", at, CPU, measure.QUICK, compiled=False, judged=False)
    assert not case["gate"] and "ANOTHER ANSWER" in methods.summary(case)


@pytest.mark.slow
def test_shares_are_those_asked_for(tmp_path):
    result = quick("shares", tmp_path)
    assert result["passed"] and len(result["students"]) == 2
    one, two = result["students"].values()
    assert one.keys() == two.keys() >= {"kd_foreground", "kd_pkd", "kd_fgd_attention"}
    # Of unlike depth: unlike weights, equal shares.
    assert all(one[x]["weight"] != pytest.approx(two[x]["weight"], rel=0.01) for x in one)
    assert all(
        x["measured"] == pytest.approx(0.3, rel=0.05) for x in (*one.values(), *two.values())
    )


def test_nothing_in_a_step_waits(results):
    ours = "1 in global_kd/detectors/torchvision.py"  # how many positives there are
    assert results["waits"]["checks"] == {
        "operations that wait, in the definition": "0",
        # torchvision's own pooling and matching, in the teacher's head and the student's positives
        "waits in kd of Faster R-CNN": f"5: {ours}, 4 in torchvision/ops/poolers.py",
        "waits in kd of RetinaNet": f"3: {ours}, 2 in torchvision/models/detection/_utils.py",
        "waits in kd of FCOS": f"1: {ours}",
    }
    assert results["waits"]["passed"]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).any()),
    ],
)
def test_what_waits_is_counted(work):
    with waits.Waits() as seen:
        work(torch.randn(4))
    assert seen.seen.total() > 0


def case_of(**contestants):
    return measure.Case("case", "", contestants, "right", 1e-6, 1, "", 1, "", [])


def test_a_wrong_answer_fails_the_gate():
    x = torch.randn(8)
    contestants = {"library": lambda: [x + 1e-3], "right": lambda: [x]}
    found = measure.run_case(case_of(**contestants), CPU, measure.QUICK, x)
    assert not found["gate"]
    assert found["contestants"]["library"]["difference"] > 1e-5
    nan = measure.run_case(
        case_of(library=lambda: [x * float("nan")], right=lambda: [x]), CPU, measure.QUICK, x
    )
    assert not nan["gate"]


def test_a_rival_that_cannot_run_is_a_result():
    x = torch.randn(8)

    def broken():
        raise RuntimeError("no compiler\nat all")

    contestants = {"library": lambda: [x], "right": lambda: [x], "rival": broken}
    found = measure.run_case(case_of(**contestants), CPU, measure.QUICK, x)
    assert found["gate"]
    assert found["contestants"]["rival"] == {"failed": "RuntimeError: no compiler"}


def test_peak_memory_counts_what_is_held_at_once():
    """Two temporaries of 4 MB at a time, the second result of three is alive to the end."""

    def work():
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        third = second * 2
        return [third]

    found = measure.peak_memory(work, CPU)
    assert found["peak_bytes"] == pytest.approx(8_000_000, rel=0.01)
    assert found["result_bytes"] == 4_000_000


def test_a_turn_is_taken_by_each_contestant_in_every_round():
    order = []
    works = {name: (lambda name=name: order.append(name)) for name in "ab"}
    measure.take_turns(works, CPU, measure.Effort(seconds=0.0, least=3, most=3))
    assert order[-12:] == list("aabbaabbaabb")  # brief ones once more before it counts


def test_boxes_lie_in_the_image():
    boxes = scene.boxes_like_coco(100, 90, 150, torch.Generator().manual_seed(0))
    assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([150.001, 90.001])).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_compare_names_what_got_slower_or_larger(results, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(results["ops"]))
    assert main(["compare", str(old), str(old)]) == 0
    assert "nothing is worse" in capsys.readouterr().out

    worse = json.loads(old.read_text())
    contestants = worse["cases"][0]["contestants"]
    for name in ("library", "released"):  # a slower rival is no regression of ours
        times = contestants[name]["wall"]
        times["median_s"] *= 3
        times["quartiles_s"] = [3 * times["quartiles_s"][1], 4 * times["quartiles_s"][1]]
    new.write_text(json.dumps(worse))
    assert main(["compare", str(old), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "cases / imitation / contestants / library / wall: 3.00 times the time" in printed
    assert "released" not in printed
    assert main(["compare", str(new), str(old)]) == 0
    assert main(["compare", str(old), str(new), "--threshold", "3"]) == 0


def timing(median, low, high, peak=None):
    part = {"median_s": median, "quartiles_s": [low, high]}
    return {"name": part if peak is None else {**part, "peak_bytes": peak}}


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        (timing(1, 0.9, 1.1), timing(1.3, 1.2, 1.4), 1),
        (timing(1, 0.9, 1.25), timing(1.3, 1.2, 1.4), 0),  # within the noise
        (timing(1, 0.99, 1.01), timing(1.05, 1.04, 1.06), 0),  # beyond it, but small
        (timing(1, 1, 1, 2**22), timing(1, 1, 1, 2**23), 1),
        (timing(1, 1, 1, 2**10), timing(1, 1, 1, 2**11), 0),  # a few numbers
    ],
)
def test_worse_is_beyond_noise_and_threshold(old, new, worse):
    assert len(compare.compare(old, new)) == worse


def test_compare_reads_the_pursuit(capsys):
    file = str(ROOT / "benchmarks/results/pursuit.json")
    assert main(["compare", file, file]) == 0
    assert re.search(r"^[1-9]\d* measurements", capsys.readouterr().out, re.MULTILINE)


def test_report_writes_the_tables(results, tmp_path):
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    page.write_text(f"before\n{report.BEGIN}\nold numbers\n{report.END}\nafter\n")
    for _ in range(2):  # the second finds what the first wrote
        assert main(["report", "--results", str(results["folder"]), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n")
    assert "old numbers" not in text
    assert re.search(
        r"\| step \| times faster than released \| ≥ 25 .* ≥ 150 \| not measured", text
    )
    for case in ("imitation", "pool_boxes", "relation", "logits", "step"):
        assert f"### {case}, CPU" in text
    for name in methods.names():
        assert re.search(rf"^\| {name} \| 1 thread \| [\d.e+]+ \(", text, re.MULTILINE), name
    assert re.search(r"\| cwd, 1 thread \| of the time of compiled formulation \| ≤ 1.5 ", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_report_writes_what_each_method_costs(results, tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    beside = tmp_path / "methods.md"
    words = "| Cost | <!-- cost: {} -->{}<!-- /cost --> |\n"
    beside.write_text(words.format("fgd", "old") + words.format("unknown", ""))
    for _ in range(2):
        main(["report", "--results", str(results["folder"]), "--page", str(page)])
    fgd, unknown = beside.read_text(encoding="utf-8").splitlines()
    assert re.search(r"-->[\d.e+]+ of a step of global knowledge, [\d.]+ MiB<!--", fgd)
    assert unknown.endswith("-->not measured yet<!-- /cost --> |")


def test_report_draws_the_curves(tmp_path):
    pytest.importorskip("matplotlib")
    times = {"median_s": 1e-3, "quartiles_s": [9e-4, 2e-3]}
    points = [
        {"x": x, "contestants": {"library": {"wall": times}, "released": {"wall": times}}}
        for x in (1, 4)
    ]
    result = {
        "size": {"boxes": "small"},
        "curves": [{"name": "step by boxes", "by": "boxes", "points": points}],
    }
    lines = list(report.plots({"scaling": {"cpu": result}}, tmp_path))
    assert "![Cost by number of boxes](images/bench_boxes_cpu.png)" in lines
    assert (tmp_path / "bench_boxes_cpu.png").stat().st_size > 1000


def test_report_without_results_says_so(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().out


@pytest.mark.slow
def test_the_compiled_definition_gives_the_same():
    setting = cases.Setting(CPU, scene.QUICK)
    case, largest = cases.imitation(setting)
    found = measure.run_case(case, CPU, measure.QUICK, largest)
    row = found["contestants"][cases.COMPILED]
    if "failed" in row:
        pytest.skip(row["failed"])  # no compiler here
    assert row["gate"]


def test_gpu_check_runs_dry(dry_run):
    """Scaling curves and training steps, too: no other test runs them."""
    done, files = dry_run
    summary = done.stdout.rpartition("==>")[2]
    assert done.returncode == 0, summary + done.stderr[-2000:]
    assert "all passed" in summary and "compute-sanitizer" in summary
    training, scaling = (
        json.loads((files / f"{name}_cpu.json").read_text(encoding="utf-8"))
        for name in ("training", "scaling")
    )
    parts = training["parts"]
    assert {"student step", "teacher forward", "kd terms, identity"} <= set(parts)
    one, other, both = (
        parts[name]["wall"]["median_s"]
        for name in ("kd terms, identity", "pkd terms", "terms of a list of both")
    )
    assert training["list_of_the_sum_of_its_parts"] == pytest.approx(both / (one + other))
    assert {curve["by"] for curve in scaling["curves"]} == {"boxes", "side", "pursuit"}


def test_the_pursuit_is_still_measured():
    row = pursuit.against_released(30, threads=1, repetitions=2)
    assert row["gate"] and row["speedup"] > 0


def test_gpu_check_refuses_other_words():
    done = subprocess.run(
        [ROOT / "benchmarks/gpu_check.sh", "--wrong"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "usage" in done.stderr


def test_a_refresh_on_several_ranks_gives_the_same_prototypes(tmp_path):
    result = quick("ranks", tmp_path)
    assert result["passed"]
    sent = {(p["ranks"], p["full"]): p["sent"] for p in result["points"]}
    assert sent[1, False] == sent[1, True] == 0 < sent[2, False]
