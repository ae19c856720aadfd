"""The table of docs/methods.md: every method on every detector, as it is trained here."""

import json
from importlib.util import find_spec

import pytest

from . import methods

WRITTEN = json.loads(methods.RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.compatibility] if name in methods.SLOW else [])
        for name in methods.ROWS
    ],
)
@pytest.mark.filterwarnings("ignore")  # of the frameworks
def test_methods_train_what_the_table_says(name):
    package, _ = methods.ROWS[name]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert methods.run(name) == WRITTEN[name]


def test_every_method_has_an_entry_and_every_row_is_in_the_table():
    page = methods.PAGE.read_text(encoding="utf-8")
    table = page.split(methods.MARKS[0])[1].split(methods.MARKS[1])[0]
    assert table.strip() == methods.table(WRITTEN, methods.read(methods.COMPILED))
    assert list(WRITTEN) == list(methods.ROWS)
    for method in methods.methods(3):
        assert f"\n## {method}\n" in page, f"docs/methods.md says nothing of {method}"
        assert all(method in row for row in WRITTEN.values())


def test_every_method_was_run_under_compilation():
    assert list(methods.read(methods.COMPILED)) == list(methods.methods(3))


@pytest.mark.parametrize("method", ["FGD", "GlobalKnowledgeLoss"])
def test_a_compiled_student_gives_the_same_terms(method):
    """As the command does, with the backend that takes no time; the hooks meet the same graphs."""
    assert methods.compiled(method, "aot_eager") == methods.read(methods.COMPILED)[method]


def test_what_goes_wrong_is_no_refusal():
    """A method that fails is an error in the table, which the test above would meet."""
    row = methods.own_row()

    class Broken(methods.losses.PKD):
        def terms(self, step):
            return {"": step.student[0].sum() * float("nan")}

    with pytest.raises(AssertionError):
        methods.put_through(row, Broken)
    assert methods.put_through(row, methods.losses.FRS).startswith("no: the teacher (Detector)")
