"""BCKD: every location, two-point distributions, boxes where classes disagree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from global_kd.losses import BCKD
from global_kd.losses.bckd import disagreement_rows
from global_kd.ops.boxes import giou
from tests.losses.dense_heads import (
    assigned,
    both,
    built,
    cast,
    finite,
    leaves,
    maps,
    row_weights,
    truth,
)
from tests.ops.test_boxes import by_hand
from tests.strategies import random
from tests.watch import Graphs, NoFloat64, NoHostSync

FACTS = maps(), maps()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(row):
    top = max(row)
    return [math.exp(x - top) / sum(math.exp(y - top) for y in row) for x in row]


def definition(student, teacher, ground=None, *, beta=1.0, weights=None):
    """Both terms, weighted, by loops."""

    def scores(dense, b, i):
        row = dense.logits[b, i].tolist()
        if dense.activation == "sigmoid":
            return [sigmoid(x) for x in row]
        p = softmax(row)
        if dense.background is not None:
            del p[dense.background]
        return p

    classes = boxes = positives = 0.0
    for b in range(student.logits.shape[0]):
        for i in range(student.logits.shape[1]):
            valid = all(
                x.valid is None or bool(x.valid.expand(2, -1)[b, i]) for x in (student, teacher)
            )
            if not valid or (ground is not None and ground[b, i] == -2):
                continue
            p_s, p_t = scores(student, b, i), scores(teacher, b, i)
            positives += max(p_t) if ground is None else float(ground[b, i] >= 0)
            weight = 1.0 if weights is None else weights[b, i].item()
            for s, t in zip(p_s, p_t):
                entropy = -t * math.log(s) - (1 - t) * math.log(1 - s)
                classes += weight * abs(t - s) ** beta * entropy
            apart = max(abs(t - s) for s, t in zip(p_s, p_t))
            overlap = by_hand(giou, student.boxes[b, i].tolist(), teacher.boxes[b, i].tolist())
            boxes += weight * apart * (1 - overlap)
    return classes / max(positives, 1), 4 * boxes / max(positives, 1)


def values(terms):
    return terms["kd_bckd_classes"].item(), terms["kd_bckd_boxes"].item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0, 1, 1.7])
@pytest.mark.parametrize("ground", [None, 0, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "softmax", "background": 0}, {"activation": "softmax"}, {"classes": 1}],
    ids=["sigmoid", "softmax with background", "softmax", "one class"],
)
def test_equals_the_definition(seed, beta, ground, options):
    if options.get("classes") == 1 and options.get("activation"):
        pytest.skip("nothing to tell apart")
    student, teacher = both(seed, **options)
    ground = None if ground is None else assigned(seed, count=ground)
    loss = built(BCKD, beta=beta)
    terms = loss(*FACTS, dense=(student, teacher), assigned=ground)
    assert values(terms) == pytest.approx(
        definition(student, teacher, ground, beta=beta), rel=1e-9, abs=1e-12
    )


def test_invalid_rows_do_not_count_whatever_stands_there():
    student, teacher = both()
    valid = torch.arange(32) % 3 != 0
    huge = torch.finfo(torch.float64).max
    student = replace(student, boxes=torch.where(valid[:, None], student.boxes, huge), valid=valid)
    teacher = replace(
        teacher, logits=torch.where(valid[:, None], teacher.logits, -math.inf), valid=valid
    )
    terms = built(BCKD)(*FACTS, dense=(student, teacher))
    assert values(terms) == pytest.approx(definition(student, teacher), rel=1e-9)
    finite(terms, student.logits)


def test_gradients_are_those_of_the_definition():
    """Central differences of the value; the box's weight is held fixed by a second student."""
    student, teacher = both(3)
    loss, ground = built(BCKD), assigned(3)
    terms = loss(*FACTS, dense=(student, teacher), assigned=ground)
    (by_class,) = torch.autograd.grad(terms["kd_bckd_classes"], student.logits, retain_graph=True)
    (by_box,) = torch.autograd.grad(terms["kd_bckd_boxes"], student.boxes, retain_graph=True)
    (none,) = torch.autograd.grad(terms["kd_bckd_boxes"], student.logits, allow_unused=True)
    assert none is None
    places = [(0, 5, 1), (1, 20, 2), (1, 31, 0)]
    for name, slope, part in (("logits", by_class, 0), ("boxes", by_box, 1)):
        for place in places:
            moved = []
            for move in (1e-5, -1e-5):
                x = getattr(student, name).detach().clone()
                x[place] += move
                moved.append(definition(replace(student, **{name: x}), teacher, ground)[part])
            expected = (moved[0] - moved[1]) / 2e-5
            assert slope[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_smooth():
    s, t = random((4, 3), 1).requires_grad_(), random((4, 3), 2)
    for beta in (0, 1, 2):
        assert torch.autograd.gradcheck(lambda x, b=beta: disagreement_rows(x, t, beta=b), s)


def test_beta_0_is_soft_cross_entropy():
    student, teacher = both()
    term = built(BCKD, beta=0)(*FACTS, dense=(student, teacher), assigned=assigned())
    count = (assigned() != -2)[..., None]
    entropy = functional.binary_cross_entropy_with_logits(
        student.logits, teacher.logits.detach().sigmoid(), reduction="none"
    )
    expected = (entropy * count).sum() / (assigned() >= 0).sum()
    assert term["kd_bckd_classes"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_identical_heads():
    """Nothing to learn, and no gradient that is not 0."""
    student, _ = both()
    terms = built(BCKD)(*FACTS, dense=(student, student))
    assert terms["kd_bckd_classes"] == 0 == terms["kd_bckd_boxes"]
    finite(terms, student.logits, student.boxes)


def test_the_teacher_gets_no_gradient():
    student, teacher = both()
    total = sum(built(BCKD)(*FACTS, dense=(student, teacher)).values())
    slopes = torch.autograd.grad(total, leaves(teacher), allow_unused=True)
    assert all(x is None for x in slopes)


@pytest.mark.parametrize("scale", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_finite_when_sure_or_flat(scale, activation):
    student, teacher = both(scale=scale, activation=activation, dtype=torch.float32)
    terms = built(BCKD)(*FACTS, dense=(student, teacher), assigned=assigned())
    finite(terms, *leaves(student))


def test_nothing_counts():
    student, teacher = both()
    terms = built(BCKD)(*FACTS, dense=(student, teacher), assigned=torch.full((2, 32), -2))
    assert all(x == 0 for x in terms.values())
    finite(terms, *leaves(student))


def test_robust():
    student, teacher = both()
    targets, omega = truth(), torch.rand(2, 4, dtype=torch.float64)
    loss = built(BCKD, robust=True)
    facts = {"dense": (student, teacher), "assigned": assigned()}
    plain = built(BCKD)(*FACTS, **facts)
    ones = loss(*FACTS, targets, omega=torch.ones_like(omega), **facts)
    assert values(ones) == pytest.approx(values(plain), rel=1e-6)
    terms = loss(*FACTS, targets, omega=omega, **facts)
    step_weights = row_weights(loss, targets, omega, student)
    expected = definition(student, teacher, facts["assigned"], weights=step_weights)
    assert values(terms) == pytest.approx(expected, rel=1e-6)
    assert values(terms) < values(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    student, teacher = (cast(x, dtype) for x in both(dtype=torch.float32))
    exact = built(BCKD)(*FACTS, dense=(cast(student, torch.float64), cast(teacher, torch.float64)))
    features = maps(dtype=torch.float32), maps(dtype=torch.float32)
    with NoFloat64():
        terms = built(BCKD)(*features, dense=(student, teacher))
    assert all(x.dtype == torch.float32 for x in terms.values())
    assert values(terms) == pytest.approx(values(exact), rel=1e-4)


def test_one_graph_and_no_wait():
    student, teacher = both(dtype=torch.float32)
    loss, facts = built(BCKD), {"dense": (student, teacher), "assigned": assigned()}
    features = maps(dtype=torch.float32), maps(dtype=torch.float32)
    with NoHostSync():
        plain = loss(*features, **facts)
    graphs = Graphs()
    loss.compile(fullgraph=True, backend=graphs)
    assert values(loss(*features, **facts)) == pytest.approx(values(plain), rel=1e-6)
    assert graphs.count == 1


def test_boxes_are_needed_only_with_a_weight():
    student, teacher = (replace(x, boxes=None) for x in both())
    assert BCKD().needs == {"dense", "boxes"} and BCKD(boxes=0).needs == {"dense"}
    with pytest.raises(ValueError, match=r"Dense.boxes of both heads.*boxes=0"):
        built(BCKD)(*FACTS, dense=(student, teacher))
    terms = built(BCKD, boxes=0)(*FACTS, dense=(student, teacher))
    assert list(terms) == ["kd_bckd_classes"]


@pytest.mark.parametrize("beta", [-1, 0.5, float("nan")])
def test_powers_with_infinite_gradients_are_refused(beta):
    with pytest.raises(ValueError, match="beta: expected 0 or a number >= 1"):
        BCKD(beta=beta)


def test_it_resumes():
    facts = {"dense": both(), "assigned": assigned()}
    loss, again = built(BCKD), built(BCKD)
    loss(*FACTS, **facts)
    loss.calibrate({"boxes": 0.5})
    again.load_state_dict(loss.state_dict())
    assert again.step == 1
    assert values(again(*FACTS, **facts)) == values(loss(*FACTS, **facts))
