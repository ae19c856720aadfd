"""relation_loss: do instances stand to the prototypes as they do for the teacher?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from global_kd.ops.dispatch import force
from tests import oracles
from tests.strategies import random, relation, relations
from tests.watch import Graphs, NoFloat64, NoHostSync, gradient

pytestmark = pytest.mark.usefixtures("every_form")

X, Y = [1.0, 0.0], [0.0, 1.0]
AXES = torch.tensor([X, Y])


def pairs_of(r, seed=0, share=0.6):
    """A random choice of counted pairs, shape (..., R, P)."""
    shape = (*r.student.shape[:-1], r.student_prototypes.shape[-2])
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def slow(r, weights=None, pairs=None, beta=1.0):
    """Mean over levels of the slow definition; one level where there is no level dimension."""
    if r.student.dim() == 2:
        return oracles.relation_loss(*r.features, weights, pairs, beta)
    values = [
        oracles.relation_loss(
            *(x[level] for x in r.features),
            None if weights is None else weights[level],
            None if pairs is None else pairs[level],
            beta,
        )
        for level in range(len(r.student))
    ]
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("student", "teacher", "weight", "beta", "loss"),
    [
        pytest.param([X], [X], None, 1.0, 0.0, id="equal"),
        pytest.param([X], [Y], None, 1.0, 0.5, id="cosines (1, 0) against (0, 1): 1/2 each"),
        pytest.param([X], [[-1.0, 0]], None, 1.0, 0.75, id="difference 2 is linear: (1.5 + 0) / 2"),
        pytest.param([X], [Y], [0.5], 1.0, 0.125, id="the weight is inside the square"),
        pytest.param([X], [[-1.0, 0]], [0.5], 1.0, 0.25, id="and may bring it back to the square"),
        pytest.param([X], [Y], None, 0.5, 0.75, id="beta 1/2: |1| is linear, 1 - 1/4"),
        pytest.param([X], [Y], None, 2.0, 0.25, id="beta 2: 1/2 * 1/2"),
        pytest.param([X], [Y], [0.0], 1.0, 0.0, id="weight 0"),
        pytest.param([X, X], [Y, X], None, 1.0, 0.25, id="mean over rows"),
        pytest.param([X, X], [Y, Y], [1.0, 0.0], 1.0, 0.25, id="rows of weight 0 still count"),
        pytest.param([[3.0, 0]], [[0, 0.2]], None, 1.0, 0.5, id="lengths do not matter"),
        pytest.param([[0.0, 0]], [Y], None, 1.0, 0.25, id="a zero row has cosine 0"),
    ],
)
def test_by_hand(student, teacher, weight, beta, loss):
    weights = None if weight is None else torch.tensor(weight)
    value = F.relation_loss(
        torch.tensor(student), torch.tensor(teacher), AXES, AXES, weights, beta=beta
    )
    assert value.item() == pytest.approx(loss, abs=1e-7)


def test_pairs_by_hand():
    """Row X against X and Y, teacher Y: both pairs give 1/2; row 2 is perfect and gives 0."""
    student, teacher = torch.tensor([X, X]), torch.tensor([Y, X])

    def loss(pairs):
        return F.relation_loss(student, teacher, AXES, AXES, pairs=torch.tensor(pairs)).item()

    assert loss([[True, False], [False, False]]) == 0.5
    assert loss([[True, False], [True, False]]) == 0.25
    assert loss([[True, True], [True, True]]) == 0.25
    assert loss([[False, False], [False, False]]) == 0.0


def test_levels_by_hand():
    """Each level has its own mean; a level without pairs counts as zero among the levels."""
    student = torch.tensor([[X, X], [X, X]])
    teacher = torch.tensor([[Y, X], [Y, Y]])
    axes = AXES.expand(2, 2, 2)
    assert F.relation_loss(student, teacher, axes, axes).item() == 0.375  # (1/4 + 1/2) / 2
    pairs = torch.ones(2, 2, 2, dtype=torch.bool)
    pairs[0] = False
    assert F.relation_loss(student, teacher, axes, axes, pairs=pairs).item() == 0.25
    pairs[1, 0] = False  # the second level's mean is over its own two pairs
    assert F.relation_loss(student, teacher, axes, axes, pairs=pairs).item() == 0.25


@given(
    relations(),
    st.booleans(),
    st.booleans(),
    st.sampled_from((0.05, 1.0, 3.0)),
    st.integers(0, 1000),
)
def test_equals_the_slow_definition(r, weighted, paired, beta, seed):
    weights, pairs = r.weights if weighted else None, pairs_of(r, seed) if paired else None
    loss = F.relation_loss(*r.features, weights, pairs=pairs, beta=beta)
    assert loss.dtype == torch.float64 and loss.dim() == 0
    assert loss.item() == pytest.approx(slow(r, weights, pairs, beta), rel=1e-9, abs=1e-12)


@given(relations(dtype=torch.float32))
def test_equals_the_slow_definition_in_float32(r):
    loss = F.relation_loss(*r.features, r.weights)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(r, r.weights), rel=1e-4, abs=1e-6)


@given(relations())
def test_the_same_space_twice_gives_zero(r):
    """Invariant 1: S = T, finite gradients."""
    student = r.student.clone().requires_grad_()
    loss = F.relation_loss(student, r.student, r.student_prototypes, r.student_prototypes)
    (grad,) = gradient(loss, student)
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("levels", [None, 2], ids=["one level", "two levels"])
@pytest.mark.parametrize(
    ("rows", "prototypes", "share"),
    [
        pytest.param(0, 4, 1.0, id="no boxes"),
        pytest.param(3, 0, 1.0, id="no prototypes"),
        pytest.param(0, 0, 1.0, id="neither"),
        pytest.param(3, 4, 0.0, id="no pair counts"),
    ],
)
def test_nothing_to_relate_gives_a_zero_that_back_propagates(rows, prototypes, share, levels):
    """Invariant 7."""
    r = relation(rows=rows, prototypes=prototypes, levels=levels)
    student = r.student.requires_grad_()
    loss = F.relation_loss(*r.features, r.weights, pairs=pairs_of(r, share=share))
    (grad,) = gradient(loss, student)
    assert loss == 0 and (grad == 0).all()


@given(relations(), st.randoms(use_true_random=False))
def test_order_of_rows_prototypes_and_levels_does_not_matter(r, shuffle):
    """Invariant 10: the weights and pairs travel with their rows."""
    rows, columns = list(range(r.student.shape[-2])), list(range(r.student_prototypes.shape[-2]))
    shuffle.shuffle(rows)
    shuffle.shuffle(columns)
    pairs = pairs_of(r)
    loss = F.relation_loss(*r.features, r.weights, pairs=pairs)
    moved = [
        r.student[..., rows, :],
        r.teacher[..., rows, :],
        r.student_prototypes[..., columns, :],
        r.teacher_prototypes[..., columns, :],
        r.weights[..., rows],
    ]
    pairs = pairs[..., rows, :][..., columns]
    if r.student.dim() == 3:
        moved, pairs = [x.flip(0) for x in moved], pairs.flip(0)
    torch.testing.assert_close(F.relation_loss(*moved, pairs=pairs), loss)


def test_duplicating_the_rows_changes_nothing():
    """Invariant 11."""
    r = relation(rows=6, prototypes=5)
    twice = [torch.cat([x, x]) for x in (r.student, r.teacher)]
    prototypes = r.student_prototypes, r.teacher_prototypes
    torch.testing.assert_close(
        F.relation_loss(*twice, *prototypes, torch.cat([r.weights] * 2)),
        F.relation_loss(*r.features, r.weights),
    )


def test_pairs_broadcast():
    """One row of pairs for all boxes: the filled slots of a bank, say."""
    r = relation(rows=4, prototypes=5)
    filled = torch.tensor([True, False, True, True, False])
    loss = F.relation_loss(*r.features, pairs=filled[None, :])
    expected = F.relation_loss(
        r.student, r.teacher, r.student_prototypes[filled], r.teacher_prototypes[filled]
    )
    torch.testing.assert_close(loss, expected)


def test_uncounted_pairs_may_hold_anything():
    """Empty slots of a bank are zeros, but a nan there must not leak into the value either."""
    r = relation(rows=3, prototypes=4)
    pairs = torch.tensor([[True, True, False, True]]).expand(3, 4)
    expected = F.relation_loss(*r.features, pairs=pairs)
    student_prototypes = r.student_prototypes.clone()
    student_prototypes[2] = float("nan")
    loss = F.relation_loss(
        r.student, r.teacher, student_prototypes, r.teacher_prototypes, pairs=pairs
    )
    torch.testing.assert_close(loss, expected)


@given(relations(), st.sampled_from((0.2, 1.0)))
def test_gradcheck(r, beta):
    student = r.student.requires_grad_()

    def loss(x):
        rest = (r.teacher, r.student_prototypes, r.teacher_prototypes, r.weights)
        return F.relation_loss(x, *rest, pairs=pairs_of(r), beta=beta)

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("levels", [None, 2], ids=["one level", "two levels"])
def test_gradient_equals_the_slope_of_the_slow_definition(levels):
    r = relation(rows=4, prototypes=3, levels=levels)
    student = r.student.clone().requires_grad_()
    rest = (r.teacher, r.student_prototypes, r.teacher_prototypes)
    (grad,) = gradient(F.relation_loss(student, *rest, r.weights), student)

    def definition(x):
        r.student = torch.from_numpy(x)
        return slow(r, r.weights)

    slope = oracles.slope(definition, student)
    torch.testing.assert_close(grad, torch.from_numpy(slope), rtol=1e-6, atol=1e-9)


def test_only_the_student_learns():
    """Invariant 14: not the teacher, not the prototypes of either space, not the weights."""
    r = relation()
    for x in (*r.features, r.weights):
        x.requires_grad_()
    F.relation_loss(*r.features, r.weights).backward()
    assert r.student.grad.abs().sum() > 0
    assert all(x.grad is None for x in (*r.features[1:], r.weights))


ODD = {
    "zero student rows": lambda r: r.student.zero_(),
    "zero teacher rows": lambda r: r.teacher.zero_(),
    "zero prototypes": lambda r: (r.student_prototypes.zero_(), r.teacher_prototypes.zero_()),
    "constant rows": lambda r: (r.student.fill_(2.0), r.teacher.fill_(2.0)),
    "identical rows": lambda r: r.student.copy_(r.student[:1].clone().expand_as(r.student)),
    "rows equal to prototypes": lambda r: r.student[:3].copy_(r.student_prototypes[:3]),
    "rows opposite to prototypes": lambda r: r.student[:3].copy_(-r.student_prototypes[:3]),
    "tiny rows": lambda r: r.student.mul_(1e-25),
    "huge rows": lambda r: r.student.mul_(1e25),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
def test_odd_features_are_finite(make):
    """Promise 5, in float32 where squares of tiny and huge rows leave the range."""
    r = relation(dtype=torch.float32)
    make(r)
    student = r.student.requires_grad_()
    loss = F.relation_loss(*r.features, r.weights)
    (grad,) = gradient(loss, student)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert loss.item() == pytest.approx(slow(r, r.weights), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_prototypes_of_any_length(scale):
    """Beside an empty slot; squares of such lengths leave the range of float32."""
    r = relation(rows=3, prototypes=4, dtype=torch.float32)
    for x in (r.student_prototypes, r.teacher_prototypes):
        x[1] = 0
    expected = F.relation_loss(*r.features)
    r.student_prototypes[2] *= scale
    r.teacher_prototypes[0] *= scale
    student = r.student.requires_grad_()
    loss = F.relation_loss(*r.features)
    torch.testing.assert_close(loss, expected)
    assert gradient(loss, student)[0].isfinite().all()


def test_a_zero_row_does_not_explode():
    """The cosine has no direction at zero: a gradient of 1 / eps would wreck the step."""
    r = relation(dtype=torch.float32)
    r.student.zero_()
    student = r.student.requires_grad_()
    (grad,) = gradient(F.relation_loss(*r.features), student)
    assert grad.abs().max() < 1e3


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
def test_autocast_keeps_float32(rows):
    r = relation(rows=16, prototypes=12, cs=64, ct=48, dtype=torch.float32)
    features = [x.to(rows) for x in r.features]
    expected = F.relation_loss(*(x.float() for x in features), r.weights)
    student = features[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.relation_loss(*features, r.weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    assert gradient(loss, student)[0].dtype == rows


def test_float16_rows_do_not_overflow():
    r = relation(rows=5, prototypes=4)
    half = [(x.clamp(-3, 3) * 1e4).half() for x in r.features]
    loss = F.relation_loss(*half)
    exact = F.relation_loss(*(x.double() for x in half))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("watch", [NoFloat64, NoHostSync])
def test_hot_path(watch):
    r = relation(dtype=torch.float32, levels=2)
    pairs = pairs_of(r)
    r.student.requires_grad_()
    with watch(), force("definition"):  # what an accelerator runs without Triton
        F.relation_loss(*r.features, r.weights, pairs=pairs).backward()


def test_compiles_once_for_every_number_of_boxes():
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(F.relation_loss, fullgraph=True, backend=graphs, dynamic=True)
    for rows in (11, 13, 17, 12):
        r = relation(rows=rows, prototypes=7, cs=8, ct=9, seed=rows, dtype=torch.float32)
        r.student.requires_grad_()
        loss = compiled(*r.features, r.weights)
        loss.backward()
        torch.testing.assert_close(loss, F.relation_loss(*r.features, r.weights))
    assert graphs.count == 1


def test_linear_in_small_weights_squared():
    """Inside the square, the loss scales with the square of the weight."""
    r = relation()
    full = F.relation_loss(*r.features, torch.full((5,), 0.4, dtype=torch.float64))
    half = F.relation_loss(*r.features, torch.full((5,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(full, 4 * half)


def test_scale_of_rows_and_prototypes_does_not_matter():
    r = relation()
    scaled = [x * (random((len(x), 1), seed).abs() + 0.1) for seed, x in enumerate(r.features)]
    torch.testing.assert_close(F.relation_loss(*scaled), F.relation_loss(*r.features))
