"""One line a method, a table a data set."""

import dataclasses

import pytest

from benchmarks.accuracy import report
from benchmarks.accuracy.equal_tuning import METHODS
from benchmarks.accuracy.every_method import Compared, compared, every_method
from benchmarks.accuracy.real import Real
from benchmarks.accuracy.store import Store


@pytest.fixture
def data(tmp_path):
    """Alone 10, 20 and 30; PKD +1, +2 and +6 over that, with global knowledge 2 above PKD."""
    shares = {"defaults": 1.0, "pkd": 0.3} | dict.fromkeys([x for x in METHODS if x != "pkd"], 0.1)
    of = {key: Real("bccd").equal_tuning(key) for key in ("q2-methods", "q3-methods")}
    alone = of["q2-methods"].alone("", 1, shares)
    joined = of["q3-methods"].joined("", 1, shares)
    store = Store(tmp_path / "cpu", tmp_path)
    trials = {arm.name: arm.trial for arm in (*alone.arms, *joined.arms)}
    gains = {
        "none": (0, 0, 0),
        "defaults": (1, 1, 1),
        "pkd, 0.3": (1, 2, 6),
        "pkd, 0.3 + global": (3, 4, 8),
    }
    for name, gain in gains.items():
        for seed in range(3):
            scores = dict.fromkeys(report.METRICS, (10 * (seed + 1) + gain[seed]) / 100)
            store.write(trials[name].at(seed), {"identity": "x", "scores": scores})
    (tmp_path / "steps_cpu.json").write_text('{"bccd-q2-methods": {"none": 1, "pkd, 0.3": 1.25}}')
    return Compared("smears", store, alone, joined, shares)


def rows(lines):
    cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line)
    return {row[0]: row for row in cells}


def test_the_table_by_hand(data):
    found = rows(every_method([data], 3))
    assert found["none"] == ["none", "", "1.00", "", "20.0", "", "", ""]
    assert found["pkd"] == [
        "pkd", "nothing", "1.25", "0.3", "23.0", "+3.0 ± 6.6", "+2.0 ± 6.6", "**+2.0 ± 0.0**"
    ]  # fmt: skip
    assert found["defaults"][3:] == ["own weights", "21.0", "**+1.0 ± 0.0**", "", ""]
    assert found["fgd"] == ["fgd", "boxes", "", "0.1", "", "", "", ""]  # not trained yet
    assert {"defaults at a share", *METHODS} < found.keys()
    assert {line.count("|") for line in every_method([data], 3)} == {0, 9}


def test_the_mean_over_methods_is_of_the_seeds_that_all_have(data):
    for title in ("mean of the 7 methods", "the same with global knowledge"):
        assert rows(every_method([data], 3))[title][3:] == ["", "", "", "", ""]
    arms = {arm.name: arm.trial for arm in (*data.alone.arms, *data.joined.arms)}
    for name in (f"{x}, 0.1" for x in METHODS if x != "pkd"):
        for seed in range(2):  # alone as without distillation, together 1.4 and 2.8 above that
            for end, gain in (("", 0.0), (" + global", 1.4 * (seed + 1))):
                score = (10 * (seed + 1) + gain) / 100
                found = {"identity": "x", "scores": dict.fromkeys(report.METRICS, score)}
                data.store.write(arms[f"{name}{end}"].at(seed), found)
    # PKD brings 1 and 2 by itself: a seventh of that. With global knowledge it has 2 more.
    assert rows(every_method([data], 3))["mean of the 7 methods"][3:] == [
        "", "15.2", "+0.2 ± 0.9 (n = 2)", "-0.8 ± 0.9 (n = 2)", "+2.1 ± 7.6 (n = 2)"
    ]  # fmt: skip
    assert rows(every_method([data], 3))["the same with global knowledge"][3:] == [
        "", "17.3", "+2.3 ± 8.5 (n = 2)", "+1.3 ± 8.5 (n = 2)", ""
    ]  # fmt: skip


def test_data_have_a_table_each(data):
    other = dataclasses.replace(data, title="boards", store=Store(data.store.results / "no", data))
    lines = list(every_method([data, other], 3))
    assert lines[: len(lines) // 2] == list(every_method([data], 3))
    assert lines[0] == "smears:" and lines[len(lines) // 2] == "boards:"


def test_what_was_trained_is_compared():
    found = {one.title: one for one in compared()}
    assert "Blood smears, each at its best share of three" in found
    assert set(found["Playing cards, all at a share of 1, not tuned"].shares.values()) == {1.0}
    assert not any(title.startswith("Circuit boards") for title in found)
    for one in found.values():
        assert set(one.shares) == {"defaults", *METHODS}
        assert {one.alone.arms[0].name, one.joined.arms[0].name} == {"none"}
