"""logit_loss: Kullback-Leibler divergence from the teacher's classes to the student's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from tests import oracles
from tests.strategies import random
from tests.watch import Graphs, NoFloat64, NoHostSync, gradient

pytestmark = pytest.mark.usefixtures("every_form")

ACTIVATIONS = ("softmax", "sigmoid")
REDUCTIONS = ("mean", "sum")
BOTH = pytest.mark.parametrize("activation", ACTIVATIONS)


def rows(n=5, classes=4, seed=0, dtype=torch.float64, scale=3.0):
    """(student, teacher, weights)"""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, generator=generator, dtype=torch.float64).to(dtype)
    logits = [(scale * random((n, classes), seed + i)).to(dtype) for i in (1, 2)]
    return *logits, weights


LOG3 = math.log(3.0)
# Two classes. softmax(log 3, 0) = (3/4, 1/4), softmax(0, 0) = (1/2, 1/2):
SHARP = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # KL of the first from the second
FLAT = 0.5 * math.log(2 / 3) + 0.5 * math.log(2.0)  # and the other way


@pytest.mark.parametrize(
    ("student", "teacher", "options", "loss"),
    [
        pytest.param([0, 0], [LOG3, 0], {"class_reduction": "sum"}, SHARP, id="teacher sharp"),
        pytest.param([LOG3, 0], [0, 0], {"class_reduction": "sum"}, FLAT, id="student sharp"),
        pytest.param([0, 0], [LOG3, 0], {}, SHARP / 2, id="mean over the two classes"),
        pytest.param([5, 5], [LOG3 + 9, 9], {}, SHARP / 2, id="softmax ignores a constant"),
        pytest.param(
            [0, 0], [2 * LOG3, 0], {"temperature": 2.0}, 4 * SHARP / 2, id="T = 2 halves, then x 4"
        ),
        pytest.param(
            [0], [LOG3], {"activation": "sigmoid"}, SHARP, id="sigmoid(log 3) = 3/4 against 1/2"
        ),
        pytest.param(
            [0, 7],
            [LOG3, 7],
            {"activation": "sigmoid"},
            SHARP / 2,
            id="sigmoid: classes are separate, mean",
        ),
        pytest.param(
            [0, LOG3],
            [LOG3, 0],
            {"activation": "sigmoid", "class_reduction": "sum"},
            SHARP + FLAT,
            id="sigmoid: sum over classes",
        ),
        pytest.param(
            [0],
            [2 * LOG3],
            {"activation": "sigmoid", "temperature": 2.0},
            4 * SHARP,
            id="sigmoid at T = 2",
        ),
    ],
)
def test_by_hand(student, teacher, options, loss):
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in (student, teacher))
    value = F.logit_loss(student, teacher, **({"temperature": 1.0} | options))
    assert value.item() == pytest.approx(loss, rel=1e-12)


def test_the_default_temperature_is_two():
    student, teacher, _ = rows()
    assert F.logit_loss(student, teacher) == F.logit_loss(student, teacher, temperature=2.0)


def test_weights_by_hand():
    """Three equal rows with weights 1, 1/2, 0: a sum of 3/2 over N = 3, not over the weights."""
    student = torch.zeros(3, 2, dtype=torch.float64)
    teacher = torch.tensor([[LOG3, 0.0]] * 3, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 0.0])
    loss = F.logit_loss(student, teacher, weights, temperature=1.0, class_reduction="sum")
    assert loss.item() == pytest.approx(SHARP / 2, rel=1e-12)


@given(
    n=st.integers(0, 6),
    classes=st.integers(1, 6),
    temperature=st.sampled_from((0.5, 1.0, 2.0, 15.0)),
    activation=st.sampled_from(ACTIVATIONS),
    reduction=st.sampled_from(REDUCTIONS),
    weighted=st.booleans(),
    dtype=st.sampled_from((torch.float64, torch.float32)),
    seed=st.integers(0, 1000),
)
def test_equals_the_slow_definition(
    n, classes, temperature, activation, reduction, weighted, dtype, seed
):
    student, teacher, weights = rows(n, classes, seed, dtype)
    arguments = (student, teacher, weights if weighted else None)
    options = {"temperature": temperature, "activation": activation, "class_reduction": reduction}
    loss = F.logit_loss(*arguments, **options)
    assert loss.dtype == dtype and loss.dim() == 0
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    slow = oracles.logit_loss(*arguments, **options)
    assert loss.item() == pytest.approx(slow, rel=tolerance, abs=tolerance)


@BOTH
def test_equal_logits_give_zero(activation):
    """Invariant 1: value 0 and gradient 0."""
    teacher = rows(dtype=torch.float32)[1]
    student = teacher.clone().requires_grad_()
    loss = F.logit_loss(student, teacher, activation=activation)
    (grad,) = gradient(loss, student)
    assert loss == 0 and grad.abs().max() < 1e-7


@BOTH
@pytest.mark.parametrize("weights", [None, torch.zeros(0)], ids=["unweighted", "weighted"])
def test_no_rows_give_a_zero_that_back_propagates(activation, weights):
    """Invariant 7: no positives in the batch is a normal day; the released code gives nan."""
    student = torch.zeros(0, 5, requires_grad=True)
    loss = F.logit_loss(student, torch.zeros(0, 5), weights, activation=activation)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 5)


@BOTH
def test_duplicating_the_rows_changes_nothing(activation):
    """Invariant 11."""
    student, teacher, weights = rows()
    twice = F.logit_loss(
        *(torch.cat([x, x]) for x in (student, teacher, weights)), activation=activation
    )
    torch.testing.assert_close(
        twice, F.logit_loss(student, teacher, weights, activation=activation)
    )


@BOTH
def test_order_of_rows_and_classes_does_not_matter(activation):
    student, teacher, weights = rows()
    loss = F.logit_loss(student, teacher, weights, activation=activation)
    order, classes = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 0, 3, 1])
    moved = F.logit_loss(
        student[order][:, classes],
        teacher[order][:, classes],
        weights[order],
        activation=activation,
    )
    torch.testing.assert_close(moved, loss)


def test_binary_divergence_ignores_which_side_is_called_positive():
    """Invariant 5: minus both logits swaps "is there" and "is not there"."""
    student, teacher, weights = rows()
    torch.testing.assert_close(
        F.logit_loss(-student, -teacher, weights, activation="sigmoid"),
        F.logit_loss(student, teacher, weights, activation="sigmoid"),
    )


def test_two_class_softmax_is_one_sigmoid():
    """softmax over (z, 0) is sigmoid(z): the two branches check each other."""
    student, teacher, weights = rows(classes=1)
    pair = [torch.cat([x, torch.zeros_like(x)], 1) for x in (student, teacher)]
    torch.testing.assert_close(
        F.logit_loss(*pair, weights, class_reduction="sum"),
        F.logit_loss(student, teacher, weights, activation="sigmoid"),
    )


@BOTH
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(activation, reduction):
    student, teacher, weights = rows()

    def loss(x):
        return F.logit_loss(x, teacher, weights, activation=activation, class_reduction=reduction)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@BOTH
def test_gradient_equals_the_slope_of_the_slow_definition(activation):
    student, teacher, weights = rows()
    student.requires_grad_()
    (grad,) = gradient(F.logit_loss(student, teacher, weights, activation=activation), student)
    slope = oracles.slope(
        lambda x: oracles.logit_loss(x, teacher, weights, activation=activation), student
    )
    torch.testing.assert_close(grad, torch.from_numpy(slope), rtol=1e-6, atol=1e-9)


@BOTH
def test_only_the_student_learns(activation):
    """Invariant 14."""
    student, teacher, weights = (x.requires_grad_() for x in rows())
    F.logit_loss(student, teacher, weights, activation=activation).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None and weights.grad is None


@BOTH
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pytest.param(1e4, -1e4, id="certain and wrong"),
        pytest.param(-1e4, 1e4, id="certainly absent and wrong"),
        pytest.param(1e4, 1e4, id="certain and right"),
        pytest.param(0.0, 0.0, id="all zero"),
        pytest.param(0.0, 1e30, id="teacher beyond exp"),
    ],
)
def test_extreme_logits_are_finite(activation, student, teacher):
    """p log p at p = 0 is 0, and log of a rounded-off probability never appears."""
    flip = torch.tensor([[1.0, -1.0, 0.0]])
    student, teacher = (student * flip).requires_grad_(), teacher * flip
    loss = F.logit_loss(student, teacher, activation=activation)
    (grad,) = gradient(loss, student)
    assert torch.isfinite(loss) and torch.isfinite(grad).all() and loss >= 0


@BOTH
def test_never_negative_when_nearly_equal(activation):
    """Rounding of almost equal distributions in float32 stays at the level of rounding."""
    student, _, _ = rows(n=50, classes=81, dtype=torch.float32)
    teacher = student + 1e-4 * random(student.shape, 3, torch.float32)
    assert F.logit_loss(student, teacher, activation=activation) > -1e-8


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_float32(activation, dtype):
    student, teacher, weights = rows(n=20, classes=81, dtype=dtype)
    expected = F.logit_loss(student.float(), teacher.float(), weights, activation=activation)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.logit_loss(student, teacher, weights, activation=activation)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert gradient(loss, student)[0].dtype == dtype


@BOTH
@pytest.mark.parametrize("watch", [NoFloat64, NoHostSync])
def test_hot_path(activation, watch):
    student, teacher, weights = rows(dtype=torch.float32)
    student.requires_grad_()
    with watch():
        F.logit_loss(student, teacher, weights, activation=activation).backward()


@BOTH
def test_compiles_once_for_every_number_of_rows(activation):
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(F.logit_loss, fullgraph=True, backend=graphs, dynamic=True)
    for n in (7, 5, 11, 9):
        student, teacher, weights = rows(n, dtype=torch.float32)
        student.requires_grad_()
        loss = compiled(student, teacher, weights, activation=activation)
        loss.backward()
        expected = F.logit_loss(student, teacher, weights, activation=activation)
        torch.testing.assert_close(loss, expected)
    assert graphs.count == 1
