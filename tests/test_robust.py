"""robust_weights: how far the two spaces agree, between 0 and 1, one where nothing is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

import global_kd.functional as F
from global_kd.ops.cosine import unit_rows
from tests import oracles
from tests.strategies import random, relation, relations
from tests.watch import Graphs, NoFloat64, NoHostSync

pytestmark = pytest.mark.usefixtures("every_form")

X, Y = [1.0, 0.0], [0.0, 1.0]


def weigh(r, **changes):
    values = {
        "student": r.student,
        "teacher": r.teacher,
        "student_prototypes": r.student_prototypes,
        "teacher_prototypes": r.teacher_prototypes,
        "prototype_labels": r.prototype_labels,
        "labels": r.labels,
    }
    return F.robust_weights(**(values | changes))


def one(student, teacher, prototypes_s, prototypes_t, prototype_labels=(0,), label=0):
    return F.robust_weights(
        torch.tensor([student]),
        torch.tensor([teacher]),
        torch.tensor(prototypes_s),
        torch.tensor(prototypes_t),
        torch.tensor(prototype_labels),
        torch.tensor([label]),
    ).item()


ROOT = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("arguments", "weight"),
    [
        pytest.param((X, X, [X], [X]), 1.0, id="both on the prototype"),
        pytest.param((X, Y, [X], [X]), 0.0, id="cosines 1 and 0"),
        pytest.param(([1.0, 1.0], X, [X], [X]), ROOT, id="cosines sqrt(1/2) and 1"),
        pytest.param((X, [-1.0, 0.0], [X], [X]), 0.0, id="cosines 1 and -1: 1 - 2 clamps to 0"),
        pytest.param(([7.0, 7.0], X, [[0.1, 0.0]], [X]), ROOT, id="lengths do not matter"),
        pytest.param((X, X, [X, Y], [Y, X], (0, 0)), 1.0, id="maxima at different prototypes"),
        pytest.param(
            (X, X, [Y, X], [Y, Y], (0, 1)), 1.0, id="another class's prototype is not seen"
        ),
        pytest.param((X, X, [X], [Y], (1,)), 1.0, id="a class without prototypes"),
        pytest.param((X, X, [X], [Y], (-1,)), 1.0, id="an empty slot"),
        pytest.param(
            (X, X, [X], [Y], (-1,), -1), 1.0, id="an empty slot matches no label, not even -1"
        ),
        pytest.param(([0.0, 0.0], X, [X], [X]), 0.0, id="a zero row has cosine 0"),
        pytest.param(([0.0, 0.0], [0.0, 0.0], [X], [X]), 1.0, id="two zero rows agree"),
        pytest.param((X, Y, [[0.0, 0.0]], [X]), 1.0, id="a zero prototype has cosine 0"),
        pytest.param((X, X, [Y, [-1.0, 0.0]], [Y, Y], (1, 0)), 0.0, id="best of class is -1"),
    ],
)
def test_by_hand(arguments, weight):
    assert one(*arguments) == pytest.approx(weight, abs=1e-6)


@given(relations())
def test_equals_the_slow_definition(r):
    omega = weigh(r)
    assert omega.dtype == torch.float64 and omega.shape == r.student.shape[:-1]
    levels = [None] if r.student.dim() == 2 else range(len(r.student))
    for level in levels:
        place = slice(None) if level is None else level
        features = [x[place] for x in r.features]
        slow = oracles.robust_weights(*features, r.prototype_labels[place], r.labels)
        torch.testing.assert_close(omega[place], torch.from_numpy(slow), rtol=0, atol=1e-10)


@given(relations(dtype=torch.float32))
def test_always_between_zero_and_one(r):
    omega = weigh(r)
    assert omega.dtype == torch.float32
    assert ((omega >= 0) & (omega <= 1)).all()


@given(relations())
def test_the_same_space_twice_gives_one(r):
    """Invariant 1: student and teacher equal, so are their cosines."""
    same = weigh(r, teacher=r.student, teacher_prototypes=r.student_prototypes)
    assert (same == 1).all()


def test_levels_are_independent():
    """A leading dimension is a batch of levels, in any order."""
    r = relation(levels=3, rows=6, prototypes=5)
    omega = weigh(r)
    order = torch.tensor([2, 0, 1])
    moved = F.robust_weights(*(x[order] for x in r.features), r.prototype_labels[order], r.labels)
    torch.testing.assert_close(moved, omega[order])


def test_no_rows_and_no_prototypes():
    none = weigh(relation(rows=0))
    assert none.shape == (0,)
    r = relation(prototypes=0)
    assert weigh(r).tolist() == [1.0] * len(r.labels)
    r = relation(prototypes=0, levels=2)
    assert weigh(r).shape == (2, len(r.labels)) and (weigh(r) == 1).all()


def test_detached_from_everything():
    r = relation()
    for x in r.features:
        x.requires_grad_()
    assert not weigh(r).requires_grad


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        pytest.param(1e-25, torch.float32, id="squares underflow float32"),
        pytest.param(1e25, torch.float32, id="squares overflow float32"),
        pytest.param(1e-4, torch.float16, id="squares underflow float16"),
        pytest.param(1e4, torch.float16, id="squares overflow float16"),
    ],
)
def test_lengths_that_break_a_naive_norm(scale, dtype):
    r = relation(rows=8, prototypes=6)
    tiny = [(x.clamp(-3, 3) * scale).to(dtype) for x in r.features]
    omega = F.robust_weights(*tiny, r.prototype_labels, r.labels)
    exact = F.robust_weights(*(x.double() for x in tiny), r.prototype_labels, r.labels)
    assert omega.dtype == torch.float32
    torch.testing.assert_close(omega.double(), exact, rtol=0, atol=1e-5)


def test_autocast_keeps_float32():
    """A matrix product in bfloat16 would move cosines by half a percent."""
    r = relation(rows=20, prototypes=9, cs=32, ct=48, dtype=torch.float32)
    expected = weigh(r)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        omega = weigh(r)
    assert omega.dtype == torch.float32
    torch.testing.assert_close(omega, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("watch", [NoFloat64, NoHostSync])
def test_hot_path(watch):
    r = relation(dtype=torch.float32, levels=2)
    with watch():
        weigh(r)


def test_compiles_once_for_every_number_of_rows():
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(F.robust_weights, fullgraph=True, backend=graphs, dynamic=True)
    for rows in (11, 13, 17, 12):
        r = relation(rows=rows, prototypes=7, cs=8, ct=9, seed=rows, dtype=torch.float32)
        arguments = (*r.features, r.prototype_labels, r.labels)
        torch.testing.assert_close(compiled(*arguments), F.robust_weights(*arguments))
    assert graphs.count == 1


def test_classes_do_not_see_each_other():
    """Many classes at once: each row sees its own, the count of the others does not matter."""
    rows, classes = 30, 7
    labels = torch.arange(rows) % classes
    student, teacher = random((rows, 5), 0), random((rows, 6), 1)
    prototypes = random((classes * 3, 5), 2), random((classes * 3, 6), 3)
    prototype_labels = torch.arange(classes).repeat_interleave(3)
    together = F.robust_weights(student, teacher, *prototypes, prototype_labels, labels)
    for c in range(classes):
        own = prototype_labels == c
        alone = F.robust_weights(
            student[labels == c],
            teacher[labels == c],
            prototypes[0][own],
            prototypes[1][own],
            prototype_labels[own],
            labels[labels == c],
        )
        torch.testing.assert_close(together[labels == c], alone)


def test_a_row_of_zeros_has_a_gradient_of_zero():
    """Also beside others, and where the scale of what comes from above is not 0."""
    rows = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], requires_grad=True)
    unit = unit_rows(rows)
    assert unit.tolist()[0] == [0, 0, 0] and unit[1].tolist() == pytest.approx([0.6, 0, 0.8])
    unit.backward(torch.tensor([[1.0, 2.0, -3.0], [0.0, 1.0, 0.0]]))
    assert rows.grad[0].tolist() == [0, 0, 0]
    assert rows.grad[1].tolist() == pytest.approx([0, 0.2, 0])
