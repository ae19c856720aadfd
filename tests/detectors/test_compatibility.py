"""Every pair of the compatibility table, as a test; and the table is what was measured."""

import dataclasses
import json

import pytest

from .compatibility import COLUMNS, MARKS, PAGE, RESULTS, Bench, cases, table


def put_through(case):
    """One made pair goes through all columns, in their order: the last ones change it."""
    bench = Bench(case)
    for check in COLUMNS.values():
        check(bench)


@pytest.mark.slow
@pytest.mark.compatibility
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_pair(case):
    put_through(case)


def test_the_home_made_pair_is_put_through_always():
    put_through(next(case for case in cases() if case.name.startswith("home-made")))


def test_a_check_that_is_broken_says_no():
    """Boxes a quarter to the right: the table would say so."""
    case = next(case for case in cases() if case.name.startswith("home-made"))

    def beside(scenes):
        images, targets = case.batch(scenes)
        return images, dataclasses.replace(targets, boxes=targets.boxes + 24)

    with pytest.raises(AssertionError, match="dark inside the box"):
        COLUMNS["boxes"](Bench(dataclasses.replace(case, batch=beside)))


def test_the_table_is_what_was_measured():
    results = json.loads(RESULTS.read_text())
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(MARKS[0])[1].split(MARKS[1])[0].strip() == table(results)
    for name, row in results["rows"].items():
        failed = {column: row[column] for column in COLUMNS if row[column].startswith("no")}
        assert not failed, (name, failed)


def test_the_table_has_a_row_for_every_case_that_can_be_made_here():
    assert {case.name for case in cases()} <= set(json.loads(RESULTS.read_text())["rows"])
