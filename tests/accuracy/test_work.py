"""The order of the work, and that nothing is done twice."""

import dataclasses

import pytest

from benchmarks.accuracy.declaration import Arm, Method, Table, Trial
from benchmarks.accuracy.experiments import GRIDS, STUDENT, TEACHER
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.work import estimate, in_order, next_trial, summary, work

TAUGHT = dataclasses.replace(STUDENT, method=Method(), teacher=TEACHER)
LATE = Table("late", "", 2, (Arm("none", STUDENT, ()), Arm("all", TAUGHT)))
EARLY = Table("early", "", 1, (Arm("none", dataclasses.replace(STUDENT, lr=1e-3), ()),))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results", tmp_path / "cache")


def finish(store, trial, **result):
    store.write(trial, {"identity": trial.identity, "scores": {"AP": 0.1}} | result)
    store.weights(trial).parent.mkdir(parents=True, exist_ok=True)
    store.weights(trial).touch()


def test_by_rank_then_seed_by_seed():
    names = [name for name, _ in in_order([LATE, EARLY], 2)]
    assert names == [
        "early/none/0",
        "early/none/1",
        "late/none/0",
        "late/all/0",
        "late/none/1",
        "late/all/1",
    ]


def test_a_trial_of_several_tables_comes_once():
    again = Table("again", "", 3, (Arm("the same", TAUGHT, ()),))
    assert [name for name, _ in in_order([LATE, again], 1)] == ["late/none/0", "late/all/0"]
    assert [name for name, _ in in_order([LATE, again], 1, "again")] == ["again/the same/0"]


def test_what_a_trial_needs_comes_first(store):
    start = dataclasses.replace(TAUGHT, start=STUDENT)
    wanted = [("arm", start)]

    def following(busy=()):
        found = next_trial(wanted, store, list(busy))
        return None if found is None else found[1]

    assert following() == TEACHER
    assert following([TEACHER.identity]) == STUDENT
    assert following([TEACHER.identity, STUDENT.identity]) is None
    finish(store, TEACHER)
    finish(store, STUDENT)
    assert following() == start
    finish(store, start)
    assert following() is None


def test_weights_that_were_lost_are_trained_again(store):
    finish(store, STUDENT)
    store.weights(STUDENT).unlink()
    wanted = [("arm", dataclasses.replace(STUDENT, start=STUDENT))]
    found = next_trial(wanted, store, [])
    assert found is not None and found[1] == STUDENT


def test_nothing_rests_on_what_diverged(store):
    store.write(STUDENT, {"failed": "Training diverged"})
    assert next_trial([("arm", dataclasses.replace(STUDENT, start=STUDENT))], store, []) is None


def test_equal_time_rests_on_its_partner_and_the_teacher(store):
    longer = dataclasses.replace(STUDENT, time_of=TAUGHT)
    for first in (STUDENT, TEACHER):
        assert next_trial([("arm", longer)], store, [])[1] == first
        finish(store, first)
    assert next_trial([("arm", longer)], store, []) == ("arm", longer)


def test_the_first_result_stays(store):
    store.write(STUDENT, {"scores": 1})
    store.write(STUDENT, {"scores": 2})
    assert store.result(STUDENT) == {"scores": 1}


def test_pace_of_the_like(store):
    results = [
        (STUDENT, {"seconds": 100.0, "iterations": 1000}),
        (TAUGHT, {"seconds": 300.0, "iterations": 1000}),
    ]
    assert estimate(dataclasses.replace(STUDENT, iterations=10), results) == pytest.approx(1)
    assert estimate(dataclasses.replace(TAUGHT, iterations=10), results) == pytest.approx(3)
    assert estimate(Trial(student=TEACHER.student), results) is None


def note_down(trial, store, device):
    """Stands in for a training."""
    with (store.cache / "trained").open("a") as log:
        log.write(f"{trial.identity}\n")
    if trial.seed == 1 and trial.method is not None:
        raise SystemExit(3)
    finish(store, trial)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_done_is_not_done_again(store, monkeypatch, capfd, processes):
    monkeypatch.setattr(Store, "draw_scenes", lambda *_: None)
    store.cache.mkdir()
    wanted = in_order([LATE], 2)

    def trained():
        return (store.cache / "trained").read_text().splitlines()

    assert work(wanted, store, note_down, processes=processes) == 1
    assert set(trained()) == {t.identity for _, t in wanted} | {TEACHER.identity}
    assert len(trained()) == 5
    assert "failed with exit status 3: late/all/1" in capfd.readouterr().out
    assert work(wanted, store, note_down) == 1  # only what failed is tried again
    assert trained()[5:] == [TAUGHT.at(1).identity]


def test_no_minutes_no_work(store):
    assert work(in_order([LATE], 1), store, note_down, minutes=0) == 0
    assert not store.results.exists()


def test_the_list(store):
    finish(store, STUDENT, seconds=120.0, iterations=1000)
    lines = summary([LATE, EARLY], 1, store).splitlines()
    assert lines[1].split() == ["late", "2", "2", "2", "1", "+"]
    assert lines[2].split() == ["early", "1", "1", "1", "0", "2"]
    assert lines[3].split()[-4:] == ["once", "4", "1", "2+"]


def test_question_1_is_asked_first():
    first = [name.split("/")[0] for name, _ in in_order(GRIDS["reduced"], 3)][: 3 * 15]
    assert set(first) == {"q1-cold"}
