"""SoftLabels: logit_loss on the student's positives, the same number as global knowledge's."""

from __future__ import annotations

import pytest
import torch

import global_kd.functional as F
from global_kd import PrototypeBank, RobustDistillLoss
from global_kd.losses import Levels, SoftLabels
from global_kd.step import Positives
from tests import oracles
from tests.losses.dense_heads import built, maps, truth
from tests.strategies import random

BOX = torch.tensor([0, 3, 3, 1, 2])


def positives(n=5, classes=3, dtype=torch.float32, box=BOX):
    student = (3 * random((n, classes), 1)).to(dtype).requires_grad_()
    return Positives(box[:n], None, student, (3 * random((n, classes), 2)).to(dtype))


def test_the_number_of_global_knowledge():
    """Of the module that GlobalKnowledgeLoss runs: value and gradient, to the bit."""
    rows, features, targets = positives(), maps(dtype=torch.float32), truth()
    whole = RobustDistillLoss([8, 16], foreground=0, background=0, logits=5.0, robust=False)
    alone = built(SoftLabels)
    bank = PrototypeBank(2, 3, 10, 3, 3)
    given = {"student_logits": rows.student, "teacher_logits": rows.teacher}
    theirs = whole(features, features, targets, bank, **given)["kd_logits"]
    mine = alone(features, features, targets, positives=rows)["kd_soft_labels"]
    assert mine == theirs > 0
    slopes = [torch.autograd.grad(x, rows.student)[0] for x in (mine, theirs)]
    assert torch.equal(*slopes)


def test_equals_the_slow_definition():
    rows = positives(dtype=torch.float64)
    loss = built(
        SoftLabels, weight=2.0, temperature=3.0, activation="sigmoid", class_reduction="sum"
    )
    value = loss(maps(), maps(), positives=rows)["kd_soft_labels"]
    slow = oracles.logit_loss(
        rows.student, rows.teacher, temperature=3.0, activation="sigmoid", class_reduction="sum"
    )
    assert value.item() == pytest.approx(2 * slow, rel=1e-10)


def test_robust_rows_weigh_what_their_box_does_on_its_level():
    rows, targets = positives(dtype=torch.float64), truth()
    omega = torch.rand(2, 4, dtype=torch.float64)
    loss = built(SoftLabels, weight=1.0, robust=True)
    value = loss(maps(), maps(), targets, positives=rows, omega=omega)["kd_soft_labels"]
    # All boxes are below 2 * 14 * 8 pixels: the first level.
    expected = F.logit_loss(rows.student, rows.teacher, omega[0][BOX])
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    ones = loss(maps(), maps(), targets, positives=rows, omega=torch.ones(2, 4))["kd_soft_labels"]
    plain = built(SoftLabels, weight=1.0)(maps(), maps(), positives=rows)["kd_soft_labels"]
    assert ones.item() == pytest.approx(plain.item(), rel=1e-12)


def test_robust_rows_of_some_positives_weigh_by_their_own_boxes():
    """Logits of rows 4, 0 and 2 of the positives: a teacher may lack the others."""
    chosen = torch.tensor([4, 0, 2])
    some = positives(3, dtype=torch.float64)
    some = Positives(BOX, None, some.student, some.teacher, chosen)
    omega = torch.rand(2, 4, dtype=torch.float64)
    loss = built(SoftLabels, weight=1.0, robust=True)
    value = loss(maps(), maps(), truth(), positives=some, omega=omega)["kd_soft_labels"]
    expected = F.logit_loss(some.student, some.teacher, omega[0][BOX[chosen]])
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_activation_is_the_detectors():
    rows = positives()
    loss = SoftLabels()
    loss.build(Levels((3, 3), (3, 3), (8.0, 16.0), activation="sigmoid"))
    told = built(SoftLabels, activation="sigmoid")
    values = [x(maps(), maps(), positives=rows)["kd_soft_labels"] for x in (loss, told)]
    assert values[0] == values[1]
    assert built(SoftLabels)(maps(), maps(), positives=rows)["kd_soft_labels"] != values[0]


@pytest.mark.parametrize("robust", [False, True])
def test_no_positives_and_no_boxes(robust):
    rows = positives(0)
    loss = built(SoftLabels, robust=robust)
    facts = {"omega": torch.ones(2, 0)} if robust else {}
    value = loss(maps(), maps(), truth(count=0), positives=rows, **facts)["kd_soft_labels"]
    assert value == 0
    (slope,) = torch.autograd.grad(value, rows.student)
    assert slope.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    rows = positives(dtype=dtype)
    value = built(SoftLabels)(maps(), maps(), positives=rows)["kd_soft_labels"]
    wide = Positives(BOX, None, rows.student.double(), rows.teacher.double())
    exact = built(SoftLabels)(maps(), maps(), positives=wide)["kd_soft_labels"]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_missing_logits_are_named():
    loss = built(SoftLabels)
    with pytest.raises(ValueError, match="positives: SoftLabels expected class logits of both"):
        loss(maps(), maps(), positives=Positives(BOX))
    with pytest.raises(ValueError, match="positives"):
        loss(maps(), maps())


def test_it_resumes():
    loss = built(SoftLabels)
    loss(maps(), maps(), positives=positives())
    loss.calibrate({"": 0.25})
    again = built(SoftLabels)
    again.load_state_dict(loss.state_dict())
    assert (again.step, again.weights) == (1, {"": 0.25})
    values = [x(maps(), maps(), positives=positives())["kd_soft_labels"] for x in (loss, again)]
    assert values[0] == values[1]
    assert not list(loss.parameters())
