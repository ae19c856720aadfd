"""The golden record itself: the same twice, and not blind."""

import copy
import random

import numpy
import pytest
import torch

from .golden import CASES, SETTINGS, differences, run


@pytest.fixture(scope="module")
def record():
    return run(CASES["home_made"], SETTINGS["paper"])


def global_random_states():
    return torch.get_rng_state(), numpy.random.get_state()[1], random.getstate()


def test_two_records_of_one_process_are_equal(record):
    """Whatever the global random state was, and it stays as it is."""
    torch.manual_seed(5)
    before = global_random_states()
    assert differences(record, run(CASES["home_made"], SETTINGS["paper"])) == []
    after = global_random_states()
    assert torch.equal(after[0], before[0])
    assert (after[1] == before[1]).all()
    assert after[2] == before[2]


def test_the_library_draws_no_global_random_numbers(record):
    """Nor does this detector; those of torchvision draw samples."""
    assert record["random state"] == "as before"


def test_every_part_of_the_method_is_at_work(record):
    """Else a record would say nothing of it: prototypes, relations, omega, the faded schedule."""
    steps = [{k: float.fromhex(x) for k, x in step.items()} for step in record["steps"]]
    telemetry = {k: float.fromhex(x) for k, x in record["telemetry"].items()}
    assert [step["kd_relation"] > 0 for step in steps] == [False] * 2 + [True] * 4
    assert telemetry["prototypes"] > 0
    assert 0 < telemetry["omega/class_1"] < 1
    assert 0 < telemetry["schedule/kd_foreground"] < 1
    assert record["bank"] != {k: record["refreshed"][k] for k in record["bank"]}


def test_another_setting_gives_another_record(record):
    other = run(CASES["home_made"], SETTINGS["others"])
    places = {line.split(":")[0].split(" / ")[0] for line in differences(record, other)}
    assert places == {*record} - {"random state"}


@pytest.mark.parametrize("change", ["last bit", "missing", "new"])
def test_a_single_difference_is_told(record, change):
    other = copy.deepcopy(record)
    step = other["steps"][3]
    if change == "last bit":
        x = torch.tensor(float.fromhex(step["kd_foreground"]))
        step["kd_foreground"] = torch.nextafter(x, torch.tensor(9.0)).item().hex()
    elif change == "missing":
        del step["kd_foreground"]
    else:
        step["kd_new"] = (0.0).hex()
    (line,) = differences(record, other)
    assert line.startswith("steps / 3 / kd_")
