"""What a trial is, and which trials are never mixed."""

import dataclasses
import inspect

import pytest

from benchmarks.accuracy.declaration import Arm, Data, Method, Table, Trial, declared
from benchmarks.accuracy.experiments import GRIDS, STUDENT, TEACHER
from benchmarks.accuracy.perform import build
from benchmarks.accuracy.real import REAL
from benchmarks.accuracy.store import RESULTS
from benchmarks.accuracy.work import everything, in_order
from benchmarks.digits.disturbances import Disturbance
from global_kd import PAPER, RobustDistillLoss

TABLES = [table for grid in GRIDS.values() for table in grid]


def test_equal_declarations_are_one_trial():
    taught = dataclasses.replace(STUDENT, method=Method(relation=1.0), teacher=TEACHER)
    again = Trial(method=Method(relation=1.0), teacher=TEACHER)
    assert taught.identity == again.identity
    assert len(taught.identity) == 12 and int(taught.identity, 16) >= 0


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"split": "tuning"},
        {"iterations": 999},
        {"lr": 1e-3},
        {"batch_size": 8},
        {"student": TEACHER.student},
        {"data": Data(share=0.25)},
        {"start": STUDENT},
        {"method": Method(), "teacher": TEACHER},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_changes_a_training_changes_its_identity(other):
    assert dataclasses.replace(STUDENT, **other).identity != STUDENT.identity


def test_what_a_trial_rests_on_is_part_of_it():
    """Its teacher's and start's declarations, not only that it has some."""
    longer = dataclasses.replace(TEACHER, iterations=3000)
    one, other = (Trial(method=Method(), teacher=t) for t in (TEACHER, longer))
    assert one.identity != other.identity
    one, other = (Trial(start=dataclasses.replace(STUDENT, iterations=n)) for n in (10, 20))
    assert one.identity != other.identity


def test_equal_trials_have_equal_identities():
    known = {}
    for grid in GRIDS.values():
        for trial in everything(in_order(grid, 2)):
            assert known.setdefault(trial, trial.identity) == trial.identity
    assert Trial(lr=1).identity == Trial(lr=1.0).identity


def test_a_field_that_came_later_changes_no_older_identity():
    known = declared(Method())
    assert not {"form", "space", "pick", "standardize"} & set(known)
    assert declared(Method(form="softened")) == known | {"form": "softened"}
    # As it was when the first results were committed.
    assert STUDENT.identity == "6fd70724bbc5"


def test_tuning_and_reporting_share_neither_seeds_nor_validation_scenes():
    trials = list(everything([pair for grid in GRIDS.values() for pair in in_order(grid, 5)]))
    by_split = {
        split: [t for t in trials if t.split == split]
        for split in ("teaching", "tuning", "reporting")
    }
    seeds = {split: {t.training_seed for t in group} for split, group in by_split.items()}
    assert all(seeds.values())
    assert not seeds["tuning"] & seeds["reporting"] and not seeds["teaching"] & seeds["reporting"]
    scenes = {split: {t.validation_seed for t in by_split[split]} for split in by_split}
    assert not scenes["tuning"] & scenes["reporting"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"split": "test"}, "split: expected one of"),
        ({"seed": 1000}, "seed: expected 0 <= seed < 1000"),
        ({"method": Method()}, "method, teacher: expected both or neither"),
        ({"method": Method(), "teacher": STUDENT}, "teacher: expected a trial of the split"),
        ({"start": STUDENT.at(1)}, "start: expected a trial of split 'reporting' and seed 0"),
        ({"start": Trial(split="tuning")}, "start: expected a trial of split"),
        ({"time_of": Trial(iterations=5)}, "time_of: expected a trial of 1000 iterations"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_trials_that_cannot_be_compared_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        Trial(**how)


def test_tables_are_of_one_split_and_name_their_arms():
    with pytest.raises(ValueError, match="one split"):
        Table("t", "", 1, (Arm("a", STUDENT, ()), Arm("b", Trial(split="tuning"), ())))
    with pytest.raises(ValueError, match="unknown 'none'"):
        Table("t", "", 1, (Arm("a", STUDENT),))
    with pytest.raises(ValueError, match="different names"):
        Table("t", "", 1, (Arm("a", STUDENT, ()), Arm("a", STUDENT, ())))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_arms_are_compared_with_what_differs_in_nothing_else(table):
    """The same scenes, start, seed and length; or what a table says it varies."""
    arms = {arm.name: arm.trial for arm in table.arms}
    varied = {"method", "teacher", "time_of"} | ({"data"} if "q3" in table.name else set())
    varied |= {"iterations"} if "length" in table.name else set()
    for arm in table.arms:
        for other in arm.against:
            one, two = vars(arm.trial), vars(arms[other])
            assert {key for key in one if one[key] != two[key]} <= varied, (arm.name, other)


def test_settings_of_a_method_arrive_in_its_loss():
    student, teacher = build(STUDENT), build(TEACHER)
    method = Method(alpha=3.0, standardize=False, adapter="conv1x1", foreground=7.0)
    loss = method.distiller(student, teacher, num_classes=11, steps=10, seed=0).loss
    assert loss.generator.alpha == 3
    assert loss.rdm.foreground == 7
    assert not loss.rdm.standardize
    assert [x.kernel_size for x in loss.adapters] == [(1, 1)] * 3


def test_a_misled_teacher_saw_the_wrong_labels_that_its_student_sees():
    for grid in GRIDS.values():
        (table,) = (t for t in grid if t.name.endswith("q3-misled"))
        taught = {a.name: a.trial for a in table.arms if a.trial.teacher is not None}
        clean = {name for name, t in taught.items() if t.teacher.data.disturbance == Disturbance()}
        assert clean == {name for name in taught if "clean" in name}
        for name in taught.keys() - clean:
            assert taught[name].teacher.data == taught[name].data


@pytest.mark.parametrize("data", ["digits", *REAL])
def test_every_committed_result_is_declared(data):
    grids = GRIDS.values() if data == "digits" else [REAL[data]]
    declared_now = {trial.identity for grid in grids for trial in everything(in_order(grid, 20))}
    folder = RESULTS if data == "digits" else RESULTS / data
    found = {file.stem for device in ("cpu", "cuda") for file in folder.glob(f"{device}/*.json")}
    assert found <= declared_now
    assert found or data == "deeppcb"


def test_both_grids_ask_the_same_questions():
    full = {t.name.removeprefix("full-") for t in GRIDS["full"]}
    reduced = {t.name for t in GRIDS["reduced"]}
    assert full < reduced
    assert reduced - full == {"q6-methods", "q6-joined"}  # their shares were chosen on the reduced


def test_the_defaults_are_those_that_were_trained():
    """Of the library, and of what it calls the paper's."""
    arms = {
        arm.name: arm.trial.method
        for table in GRIDS["reduced"]
        if table.name == "q1-defaults"
        for arm in table.arms
    }
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(RobustDistillLoss).parameters.items()
    }
    for name, settings in (("the library's", defaults), ("the paper's", PAPER)):
        options = arms[name].options()
        assert {key: options[key] for key in PAPER} == {key: settings[key] for key in PAPER}
    switches = [key for key in defaults if key.startswith("robust_")]
    assert all(defaults[key] == arms["the library's"].options()[key] for key in switches)


def test_the_control_pulls_with_next_to_nothing():
    table = next(t for t in GRIDS["reduced"] if t.name == "q6-methods")
    control, like = (
        next(a for a in table.arms if a.name == f"pkd, {x}") for x in ("a millionth", "0.1")
    )
    assert control.trial.method.share == 1e-6
    assert dataclasses.replace(control.trial, method=like.trial.method) == like.trial
