"""agreement="projection": coefficients on the prototypes in place of cosines to them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

import global_kd.functional as F
from global_kd import GlobalKnowledgeLoss, PrototypeBank, RobustDistillLoss, Targets
from global_kd.losses import RelationOptions
from tests import oracles
from tests.strategies import random, relation, relations
from tests.watch import Graphs, NoFloat64, NoHostSync, gradient

pytestmark = pytest.mark.usefixtures("every_form")

X, Y = [1.0, 0.0], [0.0, 1.0]


def coefficients(row, prototypes, labels):
    """By least squares with a tail of 0.1 I, one class after another."""
    row, prototypes, labels = oracles.array(row), oracles.array(prototypes), oracles.indices(labels)
    found = np.zeros(len(labels))
    for c in set(labels) - {-1}:
        own = [k for k, label in enumerate(labels) if label == c]
        basis = np.stack([oracles.unit(prototypes[k]) for k in own], axis=1)
        system = np.concatenate([basis, 0.1 * np.eye(len(own))])
        wanted = np.concatenate([oracles.unit(row), np.zeros(len(own))])
        found[own] = np.linalg.lstsq(system, wanted, rcond=None)[0]
    return found


def slow_omega(r, at=slice(None)):
    s, t, g_s, g_t = (x[at] for x in r.features)
    labels = oracles.indices(r.prototype_labels[at])
    weights = []
    for n, label in enumerate(oracles.indices(r.labels)):
        own = [k for k, c in enumerate(labels) if c == label]
        gap = coefficients(s[n], g_s, labels) - coefficients(t[n], g_t, labels)
        away = math.sqrt(sum(gap[k] ** 2 for k in own) / max(len(own), 1))
        weights.append(min(max(1 - away, 0.0), 1.0))
    return torch.tensor(weights, dtype=torch.float64)


def slow_relation(r, weights, beta=1.0, at=slice(None), labels=None):
    s, t, g_s, g_t = (x[at] for x in r.features)
    labels = oracles.indices(r.prototype_labels[at]) if labels is None else labels
    values = []
    for n in range(len(s)):
        gap = coefficients(s[n], g_s, labels) - coefficients(t[n], g_t, labels)
        values += [oracles.smooth_l1(float(weights[at][n]) * x, beta) for x in gap]
    return sum(values) / max(len(values), 1)


def weigh(r):
    return F.robust_weights(*r.features, r.prototype_labels, r.labels, agreement="projection")


def related(r, labels="own", beta=1.0):
    given = *r.features, r.weights
    labels = r.prototype_labels if labels == "own" else labels
    return F.relation_loss(*given, beta=beta, agreement="projection", prototype_labels=labels)


@given(relations())
def test_equals_the_slow_definition(r):
    levels = [slice(None)] if r.student.dim() == 2 else range(len(r.student))
    omega, losses = weigh(r), []
    for at in levels:
        torch.testing.assert_close(omega[at], slow_omega(r, at), rtol=0, atol=1e-9)
        losses.append(slow_relation(r, r.weights, 0.3, at))
    loss = related(r, beta=0.3)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-9)


def test_without_labels_all_prototypes_are_one_basis():
    r = relation()
    expected = slow_relation(r, r.weights, labels=[0] * r.student_prototypes.shape[0])
    assert related(r, labels=None).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("student", "teacher", "labels", "omega"),
    [
        pytest.param(X, X, (0, 0), 1.0, id="equal"),
        pytest.param(X, Y, (0, 0), 1 - 1 / 1.01, id="(1, 0) against (0, 1), over the root of 2"),
        pytest.param(X, Y, (0, 1), 1 - 1 / 1.01, id="a class of one prototype: its cosine"),
        pytest.param(X, Y, (1, 1), 1.0, id="a class without prototypes"),
        pytest.param(X, Y, (-1, -1), 1.0, id="empty slots"),
        pytest.param([0.0, 0.0], [0.0, 0.0], (0, 0), 1.0, id="two zero rows agree"),
    ],
)
def test_by_hand(student, teacher, labels, omega):
    axes = torch.tensor([X, Y])
    found = F.robust_weights(
        *(torch.tensor([x]) for x in (student, teacher)),
        axes,
        axes,
        torch.tensor(labels),
        torch.tensor([0]),
        agreement="projection",
    )
    assert found.item() == pytest.approx(omega, abs=1e-6)


def test_orthogonal_prototypes_have_the_cosines_for_coefficients():
    axes = torch.eye(4, dtype=torch.float64)
    s, t = random((5, 4), 1), random((5, 4), 2)
    labels = torch.zeros(4, dtype=torch.int64)
    given = {"beta": 9.0}  # squares only
    found = F.relation_loss(
        s, t, axes, axes, agreement="projection", prototype_labels=labels, **given
    )
    expected = F.relation_loss(s, t, axes, axes, **given)
    assert found.item() == pytest.approx(expected.item() / 1.01**2)


def test_lengths_do_not_matter_and_one_space_twice_agrees():
    r = relation(rows=6, prototypes=5)
    scaled = [3.0 * x for x in r.features]
    omega = F.robust_weights(*scaled, r.prototype_labels, r.labels, agreement="projection")
    torch.testing.assert_close(omega, weigh(r))
    same = F.robust_weights(
        r.student,
        r.student,
        r.student_prototypes,
        r.student_prototypes,
        r.prototype_labels,
        r.labels,
        agreement="projection",
    )
    assert (same == 1).all()


def test_smooth_and_for_the_student_alone():
    r = relation(rows=4, prototypes=5, cs=4)
    for x in r.features:
        x.requires_grad_()
    assert not weigh(r).requires_grad
    slopes = torch.autograd.grad(related(r), r.features, allow_unused=True)
    assert slopes[0] is not None and slopes[1:] == (None, None, None)
    fixed = [x.detach() for x in r.features[1:]]

    def loss(x):
        return F.relation_loss(
            x, *fixed, agreement="projection", prototype_labels=r.prototype_labels
        )

    assert torch.autograd.gradcheck(loss, r.student)


@pytest.mark.parametrize(
    "kind", ["zeros", "one row", "nearly one row", "large", "small", "fewer channels"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite(kind, dtype):
    """Prototypes that coincide, more of them than channels, lengths that overflow."""
    r = relation(rows=7, prototypes=12, cs=2 if kind == "fewer channels" else 6, classes=1)
    features = [x.clone() for x in r.features]
    for x in features:
        if kind == "zeros":
            x.zero_()
        if "one row" in kind:
            x.copy_(x[:1].clone() + (1e-4 if "nearly" in kind else 0) * x)
        x.mul_({"large": 1e4, "small": 1e-4}.get(kind, 1))
    features = [x.to(dtype) for x in features]
    features[0].requires_grad_()
    labels = r.prototype_labels, r.labels
    with NoFloat64():
        omega = F.robust_weights(*features, *labels, agreement="projection")
        loss = F.relation_loss(*features, omega, agreement="projection", prototype_labels=labels[0])
        slope = gradient(loss, features[0])[0]
    assert omega.dtype == loss.dtype == torch.float32 and slope.dtype == dtype
    assert omega.isfinite().all() and loss.isfinite() and slope.isfinite().all()
    exact = F.robust_weights(
        *(x.detach().double() for x in features), *labels, agreement="projection"
    )
    torch.testing.assert_close(omega.double(), exact, rtol=0, atol=2e-4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = F.robust_weights(*features, *labels, agreement="projection")
    torch.testing.assert_close(mixed, omega)


def test_no_rows_and_no_prototypes():
    assert weigh(relation(rows=0)).shape == (0,)
    r = relation(prototypes=0)
    assert (weigh(r) == 1).all() and related(r) == 0
    r.student.requires_grad_()
    assert gradient(related(r), r.student)[0].eq(0).all()


def test_one_graph_and_no_wait():
    r = relation(rows=6, prototypes=8, dtype=torch.float32, levels=2)
    with NoHostSync():
        expected = weigh(r), related(r)
    for function, value in zip((weigh, related), expected):
        torch._dynamo.reset()
        graphs = Graphs()
        compiled = torch.compile(function, fullgraph=True, backend=graphs)
        torch.testing.assert_close(compiled(r), value)
        assert graphs.count == 1


def scene(dtype=torch.float64):
    bank = PrototypeBank(2, 3, 4, 3, 5)
    bank.student.copy_(random(bank.student.shape, 1))
    bank.teacher.copy_(random(bank.teacher.shape, 2))
    bank.valid.copy_(random(bank.valid.shape, 3) > -0.5)
    student = [random((2, 3, n, n), n, dtype).requires_grad_() for n in (8, 4)]
    teacher = [random((2, 5, n, n), n + 1, dtype) for n in (8, 4)]
    boxes = torch.tensor([[2.0, 3, 20, 30], [0, 0, 60, 60], [30, 8, 50, 31]], dtype=dtype)
    targets = Targets(boxes, torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1]))
    return student, teacher, targets, bank.to(dtype)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_the_module_equals_the_functions(own, center):
    student, teacher, targets, bank = scene()
    how = RelationOptions(own_class=own, center=center, agreement="projection")
    options = {"relation": 2.0, "foreground": 0.0, "background": 0.0}
    rdm = RobustDistillLoss((8, 16), relation_options=how, **options)
    terms, omega = rdm(student, teacher, targets, bank, return_weights=True)
    rows = [
        torch.stack(
            [F.pool_boxes(x, targets.boxes, targets.image_index, s) for x, s in zip(y, (8, 16))]
        )
        for y in (student, teacher)
    ]
    *prototypes, labels = bank.flat()
    if center:
        for side in (0, 1):
            filled = (labels >= 0)[..., None]
            middle = (prototypes[side] * filled).sum(1, keepdim=True) / filled.sum(1, keepdim=True)
            rows[side], prototypes[side] = rows[side] - middle, prototypes[side] - middle
    expected = F.robust_weights(*rows, *prototypes, labels, targets.labels, agreement="projection")
    torch.testing.assert_close(omega, expected)
    torch.testing.assert_close(rdm.weigh(student, teacher, targets, bank), expected)
    pairs = labels[:, None, :] >= 0
    if own:
        pairs = pairs & (labels[:, None, :] == targets.labels[:, None])
    relation = F.relation_loss(
        *rows, *prototypes, expected, pairs=pairs, agreement="projection", prototype_labels=labels
    )
    torch.testing.assert_close(terms["kd_relation"], 2 * relation)
    how = replace(how, agreement="cosine")
    other = RobustDistillLoss((8, 16), relation_options=how, **options)
    assert not torch.equal(other.weigh(student, teacher, targets, bank), expected)


def test_the_option_of_the_whole_loss():
    student, teacher, targets, bank = scene(torch.float32)
    sizes = {"student_channels": [3, 3], "teacher_channels": [5, 5], "strides": [8, 16]}
    how = RelationOptions(agreement="projection")
    loss = GlobalKnowledgeLoss(
        3, num_prototypes=4, relation_options=how, relation=1, refresh_every=None, **sizes
    )
    loss.bank.update(bank)
    terms = loss(student, teacher, targets)
    assert terms["kd_relation"] > 0
    torch.testing.assert_close(
        loss.weigh(student, teacher, targets),
        loss.rdm.weigh(student, teacher, targets, loss.bank),
    )
    terms["kd_relation"].backward()
    assert student[0].grad.abs().sum() > 0
    with pytest.raises(ValueError, match="agreement: expected one of 'cosine', 'projection'"):
        RelationOptions(agreement="angle")
    r = relation()
    with pytest.raises(ValueError, match="agreement: expected one of"):
        F.robust_weights(*r.features, r.prototype_labels, r.labels, agreement="angle")
    with pytest.raises(ValueError, match=r"prototype_labels: expected shape \(4,\)"):
        related(r, labels=torch.zeros(3, dtype=torch.int64))
