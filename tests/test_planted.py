"""The list of planted bugs fits the source; whether they are noticed, `python -m tests.planted`."""

import pytest

from tests.planted import PLANTS, ROOT


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.what)
def test_each_bug_has_its_place(plant):
    source = (ROOT / "global_kd" / plant.file).read_text()
    assert source.count(plant.right) == 1
    assert plant.right != plant.wrong
    assert all((ROOT / path).exists() for path in plant.tests.split())
