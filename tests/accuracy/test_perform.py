"""From the command line to a result and a page, on next to no scenes."""

import json

import pytest
import torch

from benchmarks.accuracy import report
from benchmarks.accuracy.__main__ import main, shrunk
from benchmarks.accuracy.experiments import GRIDS
from benchmarks.accuracy.perform import area_under_roc, first_scenes, perform
from benchmarks.accuracy.store import Store
from digit_scenes import SceneSettings, make_scenes

TABLE = next(shrunk(t) for t in GRIDS["reduced"] if t.name == "q1-time")
PAGE = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of one seed of the arms "none" and "imitation" for equal time."""
    folder = tmp_path_factory.mktemp("accuracy")
    words = ["run", "--quick", "--seeds", "1", "--results", str(folder / "results")]
    words += ["--cache", str(folder / "cache")]
    for arm in ("q1-time/none/", "q1-time/imitation/", "q1-time/none, time of imitation/"):
        assert main([*words, "--only", arm]) == 0
    return folder


@pytest.fixture
def store(folder):
    return Store(folder / "results" / "cpu", folder / "cache")


def result(store, name):
    found = store.result(next(arm.trial for arm in TABLE.arms if arm.name == name))
    assert found is not None
    return found


def test_results_say_what_was_done_and_where(store):
    found = result(store, "imitation")
    assert found["declaration"]["method"]["foreground"] == 2.0
    assert found["declaration"]["start"] != found["identity"]
    assert set(found["scores"]) >= {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert found["iterations"] == 2 and found["seconds"] > 0 and found["curve"]
    assert any(key.startswith("omega/") for key in found["telemetry"][-1])
    assert {"torch", "commit", "cpu"} <= set(found["environment"])


def test_equal_time_is_another_number_of_iterations(store):
    longer = next(a.trial for a in TABLE.arms if a.name == "none, time of imitation")
    assert result(store, "none, time of imitation")["iterations"] == store.iterations(longer)


def test_a_trial_gives_the_same_again(store, tmp_path):
    """On a CPU to the last bit, from its declaration alone."""
    arm = next(arm.trial for arm in TABLE.arms if arm.name == "imitation")
    again = Store(tmp_path, store.cache)
    perform(arm, again)
    fresh, before = again.result(arm), store.result(arm)
    assert fresh["scores"] == before["scores"] and fresh["losses"] == before["losses"]


def test_the_page(store, folder, tmp_path):
    page = tmp_path / "evidence.md"
    page.write_text(PAGE)
    words = ["report", "--quick", "--seeds", "1", "--results", str(folder / "results")]
    assert main([*words, "--page", str(page), "--only", "q1-time"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "3 of 11 trainings" in text and "(n = 1)" in text
    assert result(store, "imitation")["identity"] in text
    assert (tmp_path / "images" / "evidence_q1-time_cpu.png").stat().st_size > 1000
    assert main([*words, "--page", str(page), "--only", "q2"]) == 0
    assert "No runs yet." in page.read_text()


def test_tiny_trainings_are_not_for_quoting():
    with pytest.raises(SystemExit, match="--quick: tiny trainings"):
        main(["report", "--quick"])


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--only", "q9"], ["--processes", "-1"]])
def test_wrong_words(words):
    with pytest.raises(SystemExit, match=words[0]):
        main(["run", "--quick", *words])


def test_the_table_by_hand(tmp_path):
    """AP of "all" over "none": +1, +2 and +6 points; one of a fourth seed diverged."""
    store, table = Store(tmp_path, tmp_path), TABLE
    arms = {arm.name: arm.trial for arm in table.arms}
    for seed, gap in enumerate((0.01, 0.02, 0.06)):
        base = 0.1 * (seed + 1)
        for name, ap in (("none", base), ("all", base + gap)):
            scores = dict.fromkeys(report.METRICS, ap)
            store.write(
                arms[name].at(seed),
                {"identity": f"{name}{seed}", "scores": scores, "seconds": 3.0, "iterations": 2},
            )
    store.write(arms["all"].at(3), {"identity": "x", "failed": "Training diverged"})
    found = report.collect(table, store, 4)
    rows = {row[0]: row for row in report.rows(table, found) if row[0]}
    assert rows["all"][:5] == ["all", "3 (1 diverged)", "23.0", "none", "+3.0 ± 6.6"]
    assert rows["none"][:3] == ["none", "3", "20.0"]
    assert rows["all"][-1] == "1.500"


def test_area_under_roc():
    a, b = torch.tensor([0.9, 0.5]), torch.tensor([0.1, 0.5])
    assert area_under_roc(a, b) == (3 + 0.5) / 4
    assert area_under_roc(b, a) == 0.5 / 4


def test_a_share_of_the_scenes_is_the_first_ones():
    scenes = make_scenes("train", SceneSettings(train=9))
    few = first_scenes(scenes, 4)
    assert len(few) == 4 and len(few.labels) == int(few.first[-1]) == len(few.boxes)
    for i in range(4):
        assert torch.equal(few[i][0], scenes[i][0])
        assert torch.equal(few.target(i)["boxes"], scenes.target(i)["boxes"])


def test_results_are_plain_json(store):
    for file in store.results.glob("*.json"):
        assert json.loads(file.read_text())["identity"] == file.stem
