"""FGFI: imitation on the cells whose anchors come near a box's best overlap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from global_kd import Targets
from global_kd.losses import FGFI
from global_kd.step import Dense, Grid
from tests.losses.heads import anchors, dense, grids, maps
from tests.strategies import boxes_in
from tests.watch import NoFloat64, NoHostSync, gradient

SIZES, STRIDES = [(6, 7), (3, 4)], [8, 16]
CHANNELS = {"student_channels": [3, 3], "teacher_channels": [4, 4], "strides": STRIDES}


def overlap(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return shared / (sum(area) - shared) if shared else 0.0


def near(priors, box, limit) -> set[tuple[int, int]]:
    height, width, count, _ = priors.shape
    return {
        (y, x)
        for y in range(height)
        for x in range(width)
        if any(overlap(priors[y, x, a].tolist(), box) > limit for a in range(count))
    }


def best(priors, box) -> float:
    return max(overlap(a, box) for a in priors.reshape(-1, 4).tolist())


def slow_mask(priors, boxes, image_index, batch, threshold):
    mask = torch.zeros(batch, *priors.shape[:2], dtype=torch.bool)
    for box, b in zip(boxes.tolist(), image_index.tolist()):
        for y, x in near(priors, box, threshold * best(priors, box)):
            mask[b, y, x] = True
    return mask


@st.composite
def anchored(draw, max_boxes=4):
    height, width, count = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    grid = Grid(8, height, width, count)
    batch, boxes = draw(st.integers(1, 3)), draw(st.integers(0, max_boxes))
    boxes = [draw(boxes_in(height, width, 8)) for _ in range(boxes)]
    index = [draw(st.integers(0, batch - 1)) for _ in boxes]
    priors = anchors(grid, draw(st.integers(0, 999))).view(height, width, count, 4)
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return priors, boxes, torch.tensor(index, dtype=torch.int64), batch


@given(anchored(), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_the_mask_equals_the_slow_definition(case, threshold):
    found = F.anchor_mask(*case, threshold=threshold)
    assert found.dtype == torch.bool
    assert torch.equal(found, slow_mask(*case, threshold))


@given(anchored())
def test_a_larger_threshold_marks_fewer_cells(case):
    """Monotone; strict, so that 1 leaves none."""
    masks = [F.anchor_mask(*case, threshold=p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for larger, smaller in zip(masks, masks[1:]):
        assert not (smaller & ~larger).any()
    assert not masks[-1].any()


def test_padding_moves_no_cell():
    grid = Grid(8, 4, 5, 2)
    wide = Grid(8, 6, 9, 2)
    boxes, index = torch.tensor([[3.0, 4, 20, 25], [10, 2, 40, 32]]), torch.tensor([0, 1])
    priors = anchors(wide, 3).view(6, 9, 2, 4).float()
    small = F.anchor_mask(priors[:4, :5], boxes, index, 2)
    large = F.anchor_mask(priors, boxes, index, 2)
    assert grid.rows == 40 and torch.equal(large[:, :4, :5], small)


def test_the_mask_checks_and_compiles():
    case = (
        anchors(Grid(8, 3, 3, 2)).view(3, 3, 2, 4),
        torch.tensor([[0.0, 0, 9, 9]]),
        torch.tensor([0]),
        1,
    )
    with pytest.raises(ValueError, match="threshold: expected a number in"):
        F.anchor_mask(*case, threshold=1.5)
    with pytest.raises(ValueError, match=r"anchors: expected shape \(H, W, A, 4\)"):
        F.anchor_mask(case[0][0], *case[1:])
    compiled = torch.compile(F.anchor_mask, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*case), F.anchor_mask(*case))
    half = (case[0].float(), case[1].half(), *case[2:])
    with NoFloat64(), NoHostSync():
        found = F.anchor_mask(*half)
    assert torch.equal(found, F.anchor_mask(*case))


def test_anchors_as_large_as_the_dtype_count_for_nothing():
    """RT-DETR marks invalid anchors so."""
    case = (torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0]), 1)
    priors = torch.tensor([[0.0, 0, 8, 8], [-3e38, -3e38, 3e38, 3e38]]).view(1, 2, 1, 4)
    assert F.anchor_mask(priors, *case).tolist() == [[[True, False]]]


# --- the class --------------------------------------------------------------------------------

BOXES = [[4.0, 4, 20, 30], [30, 10, 50, 40], [0, 0, 56, 48], [-30, 8, 6, 20], [9, 9, 9, 9]]
INDEX = [0, 1, 0, 1, 0]


def targets(boxes=BOXES, index=INDEX, dtype=torch.float64):
    boxes = torch.tensor(boxes, dtype=dtype).reshape(-1, 4)
    index = torch.tensor(index, dtype=torch.int64)
    return Targets(boxes, torch.zeros_like(index), index)


def pyramids(dtype=torch.float64):
    return maps(SIZES, 3, seed=5, dtype=dtype), maps(SIZES, 4, seed=9, dtype=dtype)


def head(places=None, dtype=torch.float64, **more) -> Dense:
    places = grids(SIZES, STRIDES, 2) if places is None else places
    priors = torch.cat([anchors(g, i, dtype) * (1 + i) for i, g in enumerate(places)])
    return dense(places, priors=priors, dtype=dtype, **more)


def views(found: Dense):
    return [found.prior_map(g.stride, (g.height, g.width)) for g in found.grids]


def own_level(box) -> int:
    """14 cells of the first level, doubled: sides up to 224 pixels on the first of two."""
    side = math.sqrt((box[2] - box[0] + 1) * (box[3] - box[1] + 1))
    return min(max(math.floor(math.log2(side / (14 * STRIDES[0]) + 1e-6)), 0), 1)


def slow(adapted, teacher, truth, priors, joint, normalizer, threshold=0.5, weights=None):
    total = 0.0
    for level, (s, t) in enumerate(zip(adapted, teacher)):
        weight: dict[tuple, float] = {}
        for k, (box, b) in enumerate(zip(truth.boxes.tolist(), truth.image_index.tolist())):
            if joint == "level" and own_level(box) != level:
                continue
            top = best(priors[level], box)
            if joint == "levels":
                top = max(best(x, box) for x in priors)
            for y, x in near(priors[level], box, threshold * top):
                w = 1.0 if weights is None else float(weights[level, k])
                weight[b, y, x] = max(w, weight.get((b, y, x), 0.0))
        error = sum(
            w * float((s[b, c, y, x] - t[b, c, y, x]) ** 2)
            for (b, y, x), w in weight.items()
            for c in range(t.shape[1])
        )
        norm = 2 * max(1, len(weight)) * (t.shape[1] if normalizer == "channels" else 1)
        total += error / norm
    return total / len(teacher)


BIG = [[4.0, 4, 20, 30], [-200, -200, 60, 50], [0, 0, 300, 280]]  # two on the second level


@pytest.mark.parametrize("joint", ["level", "levels"])
@pytest.mark.parametrize("normalizer", ["cells", "channels"])
@pytest.mark.parametrize("boxes, index", [(BOXES, INDEX), (BIG, [0, 1, 1]), ([], [])])
def test_the_class_equals_the_slow_definition(joint, normalizer, boxes, index):
    student, teacher = pyramids()
    truth, priors = targets(boxes, index), head()
    for robust in (False, True):
        loss = FGFI(joint=joint, normalizer=normalizer, robust=robust, **CHANNELS).double()
        omega = torch.linspace(0, 1, 2 * len(boxes), dtype=torch.float64).view(2, -1)
        adapted = [a(x).detach() for a, x in zip(loss.adapters, student)]
        extra = {"omega": omega} if robust else {}
        term = loss(student, teacher, truth, student_dense=priors, **extra)["kd_fgfi"]
        weights = omega if robust else None
        expected = slow(adapted, teacher, truth, views(priors), joint, normalizer, weights=weights)
        assert term.item() == pytest.approx(3 * expected, rel=1e-9)
        term.backward()  # also without boxes
        assert all(x.grad is not None for x in loss.parameters())
        assert (expected > 0) == bool(boxes) and all(x.grad is None for x in teacher)


def test_gradients():
    student, teacher = pyramids()
    loss = FGFI(adapter="conv1x1", **CHANNELS).double()
    teacher = [x.requires_grad_() for x in teacher]

    def term(*levels):
        return loss(levels, teacher, targets(), student_dense=head())["kd_fgfi"]

    term(*(x.requires_grad_() for x in student)).backward()
    assert all(x.grad is None for x in teacher)
    assert torch.autograd.gradcheck(term, tuple(student))


def test_omega_of_one_changes_nothing():
    student, teacher = pyramids()
    plain, robust = (FGFI(robust=r, **CHANNELS).double() for r in (False, True))
    one = torch.ones(2, len(BOXES), dtype=torch.float64)
    torch.testing.assert_close(
        robust(student, teacher, targets(), student_dense=head(), omega=one),
        plain(student, teacher, targets(), student_dense=head()),
    )


def test_equal_maps_give_zero():
    _, teacher = pyramids(torch.float32)
    student = [x.clone().requires_grad_() for x in teacher]
    loss = FGFI(adapter="identity", **(CHANNELS | {"student_channels": [4, 4]}))
    term = loss(student, teacher, targets(), student_dense=head())["kd_fgfi"]
    assert term == 0 and all(g.abs().sum() == 0 for g in gradient(term, *student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    student, teacher = pyramids(dtype)
    loss = FGFI(adapter="identity", levels=[8], **(CHANNELS | {"student_channels": [4, 3]}))
    student[0] = teacher[0] * 0.5
    truth, priors = targets(dtype=torch.float32), head(dtype=torch.float32)
    with NoFloat64(), NoHostSync():
        term = loss(student, teacher, truth, student_dense=priors)["kd_fgfi"]
    whole = loss(
        [x.float() for x in student], [x.float() for x in teacher], truth, student_dense=priors
    )["kd_fgfi"]
    assert term.dtype == torch.float32
    torch.testing.assert_close(term, whole, rtol=1e-5, atol=0)


def test_priors_come_from_either_fact():
    student, teacher = pyramids()
    loss = FGFI(**CHANNELS).double()
    alone = loss(student, teacher, targets(), student_dense=head())
    assert loss(student, teacher, targets(), dense=(head(), dense(grids(SIZES, STRIDES)))) == alone
    with pytest.raises(ValueError, match="student_dense: FGFI expected the student's anchors"):
        loss(student, teacher, targets())
    with pytest.raises(ValueError, match="student_dense: FGFI expected the student's anchors"):
        loss(student, teacher, targets(), student_dense=dense(grids(SIZES, STRIDES)))


def test_levels_and_cells_that_the_head_lacks():
    student, teacher = pyramids()
    loss = FGFI(joint="levels", **CHANNELS).double()
    first = head(grids([(4, 4)], [8], 2))
    term = loss(student, teacher, targets(), student_dense=first)["kd_fgfi"]
    cut = [x[:, :, :4, :4].detach() for x in (loss.adapters[0](student[0]), teacher[0])]
    expected = slow(cut[:1], cut[1:], targets(), views(first), "levels", "channels")
    assert term.item() == pytest.approx(3 * expected / 2)  # the mean is over two levels
    term.backward()
    assert loss.adapters[1].weight.grad.abs().sum() == 0
    with pytest.raises(ValueError, match=r"anchors at stride \[8, 16\], but got \[32\]"):
        loss(student, teacher, targets(), student_dense=head(grids([(2, 2)], [32])))


def test_locations_that_stand_for_nothing_have_no_anchor():
    student, teacher = pyramids()
    loss, whole = FGFI(**CHANNELS).double(), head()
    valid = torch.arange(len(whole.priors)) % 3 > 0
    terms = []
    for value in (whole.priors, 0.0, torch.finfo(torch.float64).max):
        priors = torch.where(valid[:, None], whole.priors, value)
        found = Dense(whole.logits, whole.grids, priors=priors, valid=valid.expand(2, -1))
        terms.append(loss(student, teacher, targets(), student_dense=found)["kd_fgfi"])
    assert terms[0] == terms[1] == terms[2]
    assert terms[0] != loss(student, teacher, targets(), student_dense=whole)["kd_fgfi"]


def test_delay_small_start_and_relu():
    student, teacher = pyramids(torch.float32)
    loss = FGFI(delay=2, small_start=True, relu=True, **CHANNELS)
    found = [loss(student, teacher, targets(), student_dense=head())["kd_fgfi"] for _ in range(4)]
    assert [x > 0 for x in found] == [False, False, True, True]
    weight = loss.adapters[0][0].weight
    assert (
        1e-5 < weight.abs().mean() < weight.abs().max() < 2e-4
        and loss.adapters[0][0].bias.eq(0).all()
    )
    assert (loss.adapters[0](student[0]) >= 0).all()
    copy = FGFI(delay=2, relu=True, **CHANNELS)
    copy.load_state_dict(loss.state_dict())
    given = student, teacher, targets()
    assert copy(*given, student_dense=head()) == loss(*given, student_dense=head())
    assert copy.step == loss.step == 5


def test_defaults():
    loss = FGFI(family="two-stage", **CHANNELS)
    assert loss.weights == {"": 3.0} and loss.adapters[0].kernel_size == (3, 3)
    assert loss.needs == {"targets", "priors"}
    for option in ({"joint": "all"}, {"normalizer": "boxes"}, {"threshold": -1}, {"delay": -1}):
        with pytest.raises(ValueError, match=next(iter(option))):
            FGFI(**option)
