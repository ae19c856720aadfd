"""From the command line to a result and a page, on next to no scenes."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.accuracy import pace, report
from benchmarks.accuracy.__main__ import main, quick, shrunk
from benchmarks.accuracy.experiments import GRIDS, STUDENT, TEACHER
from benchmarks.accuracy.perform import (
    equal_time,
    first_scenes,
    load_data,
    perform,
    separation,
    trained,
)
from benchmarks.accuracy.store import Store
from benchmarks.digits.disturbances import KINDS, Disturbance
from workshop import storage
from workshop.digit_scenes import SceneSettings, make_scenes

TABLE = next(shrunk(t) for t in GRIDS["reduced"] if t.name == "q1-time")
PAGE = f"before\n{report.BEGIN}\nformer\n{report.END}\nafter\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of one seed of an arm, of its partner, and of that for equal time."""
    folder = tmp_path_factory.mktemp("accuracy")
    words = ["run", "--quick", "--seeds", "1", "--results", str(folder / "results")]
    words += ["--cache", str(folder / "cache")]
    for name in ("imitation", "none, time of imitation"):
        assert main([*words, "--only", f"q1-time/{name}/"]) == 0
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
    assert set(found["scores"]) >= {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert found["iterations"] == 2 and found["seconds"] > 0 and found["curve"]
    assert any(key.startswith("omega/") for key in found["telemetry"][-1])
    assert {"torch", "commit", "cpu"} <= set(found["environment"])


def test_equal_time_is_by_the_pace_of_both(store, tmp_path, monkeypatch):
    """Half of it from the start, half from trained weights: (100 + 140) / (80 + 80)."""
    longer = next(a.trial for a in TABLE.arms if a.name == "none, time of imitation")
    longer = dataclasses.replace(
        longer, iterations=4, time_of=dataclasses.replace(longer.time_of, iterations=4)
    )
    mine = Store(tmp_path, store.cache)
    perform(longer.plain(), mine)
    starts, seconds = [], iter([[100.0, 80.0], [140.0, 80.0]])

    def stepped(trainers, batches):
        with_kd, without = trainers
        assert with_kd.kd is not None and without.kd is None
        one, two = (dict(t.model.named_parameters()) for t in trainers)
        assert all(torch.equal(one[name], two[name]) for name in one)
        starts.append({name: x.detach().clone() for name, x in two.items()})
        return next(seconds)

    monkeypatch.setattr(pace, "seconds", stepped)
    perform(longer, mine)
    assert mine.result(longer)["iterations"] == 6
    ended = dict(trained(longer.plain(), mine).named_parameters())
    assert all(torch.equal(x, ended[name]) for name, x in starts[1].items())
    assert not all(torch.equal(x, ended[name]) for name, x in starts[0].items())


def test_an_unfinished_training_of_equal_time_keeps_its_number_of_iterations(store, tmp_path):
    longer = next(a.trial for a in TABLE.arms if a.name == "none, time of imitation")
    mine = Store(tmp_path, tmp_path)
    mine.state(longer).parent.mkdir()
    storage.save({"recipe": {"iterations": 7}}, mine.state(longer))
    data, _ = load_data(longer, store)
    assert equal_time(longer, longer.time_of, data, mine, "cpu") == 7


def test_pace_counts_the_time_of_each_trainer(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    class Stepped:
        model, device = torch.nn.Identity(), torch.device("cpu")

        def __init__(self, seconds):
            self.seconds, self.batches = seconds, []

        def step(self, batch):
            clock.now += self.seconds
            self.batches.append(batch)

    monkeypatch.setattr(pace.time, "process_time", lambda: clock.now)
    fast, slow = Stepped(1.0), Stepped(3.0)
    batches = list(range(pace.WARM_UP + 4))
    assert pace.seconds([slow, fast], batches) == [12, 4]
    assert slow.batches == fast.batches == batches


def test_a_trial_gives_the_same_again(store, tmp_path):
    """On a CPU to the last bit, from its declaration alone."""
    arm = next(arm.trial for arm in TABLE.arms if arm.name == "imitation")
    again = Store(tmp_path, store.cache)
    perform(arm, again)
    fresh, before = again.result(arm), store.result(arm)
    assert fresh["scores"] == before["scores"] and fresh["losses"] == before["losses"]


def test_the_page(store, tmp_path):
    page = tmp_path / "evidence.md"
    page.write_text(PAGE)
    done = tuple(arm for arm in TABLE.arms if store.result(arm.trial) is not None)
    assert len(done) == 3
    small = dataclasses.replace(TABLE, arms=done)
    assert report.main({"cpu": (store, 1)}, [small], page) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "former" not in text
    assert "3 of 3 trainings" in text and "(n = 1)" in text
    assert result(store, "imitation")["identity"] in text
    assert (tmp_path / "images" / "evidence_q1-time_cpu.png").stat().st_size > 1000
    assert report.main({"cpu": (store, 1)}, [TABLE], page) == 0  # 3 of 11: too little to show
    assert "No runs yet." in page.read_text()


def test_a_page_shows_the_tables_of_its_question(store, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "section", lambda table, *_: [table.name])
    tables = [SimpleNamespace(name=name) for name in ("q1-cold", "q2-alone", "full-q2-alone")]
    monkeypatch.setattr(report, "machines", lambda *_: [])
    monkeypatch.setattr(report, "has_own", lambda *_: True)
    page = tmp_path / "evidence.md"
    page.write_text(PAGE.replace("results:", "results q2:"))
    assert report.main({"cpu": (store, 1)}, tables, page) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- results q2: written") and text.endswith("after\n")
    assert "\nq2-alone\nfull-q2-alone\n" in text and "q1" not in text


def test_a_page_of_another_question_stays_as_it_is(store, tmp_path):
    page = tmp_path / "page.md"
    written = PAGE.replace("results:", "results q3:")
    page.write_text(written)
    assert report.main({"cpu": (store, 1)}, [TABLE], page) == 0
    assert page.read_text() == written


def test_every_table_has_one_page():
    shown = [x[1] for page in report.PAGES for x in report._BEGIN.finditer(page.read_text())]
    for table in (table for tables in GRIDS.values() for table in tables):
        assert sum(table.name.removeprefix("full-").startswith(x) for x in shown) == 1


def test_tiny_trainings_are_not_for_quoting():
    with pytest.raises(SystemExit, match="--quick: tiny trainings"):
        main(["report", "--quick"])


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--only", "q9"], ["--processes", "-1"]])
def test_wrong_words(words):
    with pytest.raises(SystemExit, match=words[0]):
        main(["run", "--quick", *words])


def test_the_table_by_hand(tmp_path):
    """AP of "all" over "none": +1, +2 and +6 points; one of a fourth seed diverged."""
    store, table = Store(tmp_path, tmp_path), dataclasses.replace(TABLE, seeds=4)
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
    rows = {row[0]: row for row in report.rows(table, found, {}) if row[0]}
    assert rows["all"][:5] == ["all", "3 (1 diverged)", "23.0", "none", "+3.0 ± 6.6"]
    assert rows["none"][:3] == ["none", "3", "20.0"]
    assert rows["all"][-1] == "1.500"
    measured = {row[0]: row[-1] for row in report.rows(table, found, {"all": 1.3}) if row[0]}
    assert measured["all"] == "1.30" and measured["none"] == "1.500"


def test_average_effects_by_hand(tmp_path):
    """AP = seed + 3 imitation + 2 soft labels - relation, and half a point for omega."""
    table = next(t for t in GRIDS["reduced"] if t.name == "q1-cold")
    store = Store(tmp_path, tmp_path)
    for seed in range(3):
        for arm in table.arms:
            ap = 10.0 + seed
            if (how := arm.trial.method) is not None:
                ap += 3 * (how.foreground > 0) + 2 * (how.logits > 0) - (how.relation > 0)
                ap += 0.5 * how.robust
            scores = dict.fromkeys(report.METRICS, ap / 100)
            if (arm.name, seed) != ("all", 2):  # a seed that is not complete does not count
                store.write(arm.trial.at(seed), {"identity": "x", "scores": scores})
    found = {
        n: (pairs, gaps[0])
        for n, pairs, gaps in report.effects(table, report.collect(table, store, 3))
    }
    # Of 8 pairs one is that of the term alone with omega, which has no omega on the other side.
    alone = 0.5 / 8
    for name, wanted, pairs in (
        ("imitation", 3 + alone, 8),
        ("soft labels", 2 + alone, 8),
        ("relation", -1 + alone, 8),
        ("ω", 0.5, 7),
    ):
        assert found[name][0] == pairs and found[name][1].n == 2
        assert found[name][1].mean == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["q5-self", "q1-time"])
def test_average_effects_are_of_one_teacher_and_equal_iterations(tmp_path, name):
    """AP = 10 - relation, + 5 for the usual teacher, + 9 for a longer training."""
    table = next(t for t in GRIDS["reduced"] if t.name == name)
    store = Store(tmp_path, tmp_path)
    for arm in table.arms:
        how = arm.trial.method
        usual = name == "q5-self" and arm.trial.teacher == TEACHER
        ap = 10 + 5 * usual - (how is not None and how.relation > 0)
        ap += 9 * (arm.trial.time_of is not None)
        scores = dict.fromkeys(report.METRICS, ap / 100)
        store.write(arm.trial, {"identity": "x", "scores": scores})
    found = report.effects(table, report.collect(table, store, 1))
    assert [(pairs, gaps[0].mean) for term, pairs, gaps in found if term == "relation"] == [
        (2, pytest.approx(-1))
    ]


def test_a_share_of_the_scenes_is_the_first_ones():
    scenes = make_scenes("train", SceneSettings(train=9))
    few = first_scenes(scenes, 4)
    assert len(few) == 4 and len(few.labels) == int(few.first[-1]) == len(few.boxes)
    for i in range(4):
        assert torch.equal(few[i][0], scenes[i][0])
        assert torch.equal(few.target(i)["boxes"], scenes.target(i)["boxes"])


def test_steps_are_multiples_of_one_without_distillation(folder, tmp_path, monkeypatch, capsys):
    """By turns, in seconds of the process; what it measured before stays where it was."""
    seconds = {"none": 2.0, "imitation": 3.0, "none, time of imitation": 2.0}
    few = dataclasses.replace(TABLE, arms=tuple(a for a in TABLE.arms if a.name in seconds))
    monkeypatch.setattr("benchmarks.accuracy.__main__.GRIDS", {"reduced": [few], "full": []})
    asked = []

    def measure(trainers, batches):
        asked.extend(trainers)
        return [seconds[arm.name] for arm in few.arms]

    monkeypatch.setattr(pace, "seconds", measure)
    file = tmp_path / "steps_cpu.json"
    file.write_text('{"other": {"none": 1.0}}')
    words = ["steps", "--results", str(tmp_path), "--cache", str(folder / "cache")]
    monkeypatch.setattr("benchmarks.accuracy.__main__.shrunk", lambda table: table)
    assert main([*words, "--quick"]) == 0
    found = json.loads(file.read_text())
    assert found == {
        "other": {"none": 1.0},
        few.name: {"none": 1.0, "imitation": 1.5, "none, time of imitation": 1.0},
    }
    assert [x.kd is None for x in asked] == [arm.trial.method is None for arm in few.arms]
    assert report.steps_of(few, Store(tmp_path / "cpu", tmp_path)) == found[few.name]
    assert main([*words, "--quick", "--cache", str(tmp_path)]) == 0
    assert "a teacher of it has no weights" in capsys.readouterr().out


def test_results_are_plain_json(store):
    for file in store.results.glob("*.json"):
        assert json.loads(file.read_text())["identity"] == file.stem


TINY = quick(STUDENT)


def test_a_warm_start_goes_on_from_the_weights_of_its_start(store, tmp_path):
    first = dataclasses.replace(TINY, iterations=1)
    then = dataclasses.replace(TINY, iterations=1, lr=1e-12, start=first)
    mine = Store(tmp_path, store.cache)
    perform(first, mine)
    perform(then, mine)
    before, after = (dict(trained(x, mine).named_parameters()) for x in (first, then))
    for name, x in after.items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=1e-9)


def test_training_scenes_are_disturbed_and_validation_scenes_are_not(store):
    wrong = dataclasses.replace(TINY.data, disturbance=Disturbance(labels=0.5))
    clean, _ = load_data(TINY, store)
    data, disturbed = load_data(dataclasses.replace(TINY, data=wrong), store)
    labels = [torch.cat([t["labels"] for _, t in x.train]) for x in (clean, data)]
    assert torch.equal(labels[0] != labels[1], disturbed[:, KINDS.index("labels")])
    assert disturbed.sum() == round(0.5 * len(labels[0]))
    for one, two in zip(clean.validation, data.validation, strict=True):
        assert torch.equal(one[1]["labels"], two[1]["labels"])


def test_a_low_omega_on_the_disturbed_instances_separates_them(store):
    """Omega 0 on them and 1 elsewhere: 1; the other way round: 0."""
    wrong = dataclasses.replace(TINY.data, disturbance=Disturbance(blur=0.5))
    data, disturbed = load_data(dataclasses.replace(TINY, data=wrong), store)
    met = disturbed.any(dim=1)

    class Weighed:
        loss = SimpleNamespace(rdm=SimpleNamespace(strides=(4, 8, 16), finest_scale=16))

        def __init__(self, low):
            self.low, self.seen = low.float(), 0

        def weigh(self, images, targets):
            boxes = torch.cat([t["boxes"] for t in targets])
            low = self.low[self.seen : self.seen + len(boxes)]
            self.seen += len(boxes)
            return SimpleNamespace(boxes=boxes), (1 - low).expand(3, -1)

    assert separation(Weighed(met), data, disturbed, "cpu") == {"blur": 1}
    assert separation(Weighed(~met), data, disturbed, "cpu") == {"blur": 0}
