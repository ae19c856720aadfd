"""DeFeat: objects and background apart, in the maps and in the box head."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from global_kd import Schedule, Targets
from global_kd.losses import DeFeat
from global_kd.ops.dispatch import force
from tests import oracles
from tests.losses.heads import maps, regions
from tests.strategies import boxes_in
from tests.watch import NoFloat64, NoHostSync, gradient

SIZES, STRIDES = [(6, 7), (3, 4)], [8, 16]
CHANNELS = {"student_channels": [3, 3], "teacher_channels": [4, 4], "strides": STRIDES}
NAMES = ["foreground", "background", "classes_foreground", "classes_background"]
ALL = dict.fromkeys(NAMES, 1.0)
MAPS = {"classes_foreground": 0, "classes_background": 0}


def pyramids(dtype=torch.float64):
    return maps(SIZES, 3, seed=5, dtype=dtype), maps(SIZES, 4, seed=9, dtype=dtype)


def targets(boxes=((4.0, 4, 20, 30), (-200, -200, 60, 50), (0, 0, 300, 280)), index=(0, 1, 1)):
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    index = torch.tensor(index, dtype=torch.int64)
    return Targets(boxes, torch.arange(len(index)) % 3 + 1, index)


def own_level(box) -> int:
    side = math.sqrt((box[2] - box[0] + 1) * (box[3] - box[1] + 1))
    return min(max(math.floor(math.log2(side / (14 * STRIDES[0]) + 1e-6)), 0), 1)


def slow(adapted, teacher, truth):
    sides = [0.0, 0.0]
    for level, (s, t, stride) in enumerate(zip(adapted, teacher, STRIDES)):
        batch, channels, height, width = t.shape
        inside = {
            (b, y, x)
            for box, b in zip(truth.boxes.tolist(), truth.image_index.tolist())
            if own_level(box) == level
            for y, x in oracles.cells(box, stride, height, width)
        }
        error, count = [0.0, 0.0], [0, 0]
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    side = int((b, y, x) not in inside)
                    count[side] += 1
                    error[side] += float(((s[b, :, y, x] - t[b, :, y, x]) ** 2).sum())
        for i in range(2):
            sides[i] += error[i] / (2 * channels * max(count[i], 1)) / len(STRIDES)
    return sides


def slow_heads(found, temperatures=(1.0, 1.0), weights=None):
    total, count = [0.0, 0.0], [0, 0]
    for i, box in enumerate(found.box.tolist()):
        if box == -2:
            continue
        side = int(box < 0)
        T = temperatures[side]
        p, q = (
            [math.exp(z / T) / sum(math.exp(v / T) for v in x.logits[i].tolist()) for z in row]
            for x in (found.teacher, found.student)
            for row in [x.logits[i].tolist()]
        )
        weight = 1.0 if weights is None or side else float(weights[box])
        total[side] += weight * T**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
        count[side] += 1
    return [x / max(n, 1) for x, n in zip(total, count)]


@st.composite
def truths(draw):
    boxes = [
        draw(boxes_in(6, 7, draw(st.sampled_from([8, 40])))) for _ in range(draw(st.integers(0, 4)))
    ]
    return targets(boxes, [draw(st.integers(0, 1)) for _ in boxes])


@given(truths())
def test_the_maps_part_equals_the_slow_definition(truth):
    student, teacher = pyramids()
    loss = DeFeat(**MAPS, **CHANNELS).double()
    terms = loss(student, teacher, truth)
    expected = slow([a(x).detach() for a, x in zip(loss.adapters, student)], teacher, truth)
    found = [terms[f"kd_defeat_{n}"].item() for n in NAMES[:2]]
    assert found == pytest.approx([3 * expected[0], 12 * expected[1]], rel=1e-9)
    sum(terms.values()).backward()
    assert all(x.grad is not None for x in loss.parameters())


def test_it_is_global_knowledges_imitation_with_other_factors():
    """One level, omega 1, ground truth, (3, 12); and with robust weights theirs too."""
    student, teacher = pyramids()
    truth, omega = targets(), torch.tensor([[0.5, 0.1, 0.9]], dtype=torch.float64)
    one = {"levels": [8], "adapter": "identity"} | CHANNELS | {"student_channels": [4, 4]}
    given = (truth.boxes, truth.image_index, 8)
    student = [x + 1 for x in teacher]
    for weights, more in ((None, {}), (omega[0], {"omega": omega.expand(2, 3)})):
        loss = DeFeat(robust=weights is not None, **MAPS, **one)
        terms = loss(student, teacher, truth, **more)
        expected = F.imitation_loss(
            student[0], teacher[0], *given, weights, foreground=3, background=12
        )
        torch.testing.assert_close(tuple(terms.values()), expected)


@pytest.mark.parametrize("box", [[0, 1, -1, 2, -2, -1, 0], [-1, -2], [0, 2], []])
@pytest.mark.parametrize("temperature", [(1.0, 1.0), (2.0, 3.0)])
def test_the_heads_part_equals_the_slow_definition(box, temperature):
    student, teacher = pyramids()
    truth = targets()
    found = regions(truth, box)
    found.student.logits.requires_grad_()
    omega = torch.tensor([[0.5, 0.2, 0.9], [0.4, 0.1, 0.3]], dtype=torch.float64)
    # The level of each box by its size: 0, 1, 1.
    for weights, more in ((None, {}), ([0.5, 0.1, 0.3], {"omega": omega})):
        loss = DeFeat(temperature=temperature, robust=bool(more), **CHANNELS).double()
        terms = loss(student, teacher, truth, teacher_regions=found, **more)
        expected = slow_heads(found, temperature, weights)
        values = [terms[f"kd_defeat_{n}"] for n in NAMES[2:]]
        assert [x.item() for x in values] == pytest.approx([2 * x for x in expected], rel=1e-9)
        assert gradient(values[0] + values[1], found.student.logits)[0].isfinite().all()


def test_gradients():
    student, teacher = pyramids()
    found = regions(targets(), [0, -1, 2, -2])
    teacher = [x.requires_grad_() for x in teacher]
    loss = DeFeat(adapter="conv1x1", **(ALL | CHANNELS)).double()
    logits = found.student.logits.requires_grad_()
    inputs = [x.requires_grad_() for x in student]

    def total(*inputs):
        *levels, z = inputs
        object.__setattr__(found.student, "logits", z)
        return sum(loss(levels, teacher, targets(), teacher_regions=found).values())

    assert torch.autograd.gradcheck(total, (*inputs, logits))
    total(*inputs, logits).backward()
    assert all(x.grad is None for x in teacher)
    assert logits.grad[3].eq(0).all() and logits.grad[:3].abs().sum() > 0  # the ignored row


def test_omega_of_one_changes_nothing():
    student, teacher = pyramids()
    found = regions(targets(), [0, -1, 2, -2])
    one = torch.ones(2, 3, dtype=torch.float64)
    plain, robust = (DeFeat(robust=r, **CHANNELS).double() for r in (False, True))
    torch.testing.assert_close(
        robust(student, teacher, targets(), teacher_regions=found, omega=one),
        plain(student, teacher, targets(), teacher_regions=found),
    )


@pytest.mark.parametrize("value", [100.0, -100.0, 0.0])
def test_saturated_logits_and_equal_maps_are_finite(value):
    _, teacher = pyramids(torch.float32)
    found = regions(targets(), [0, -1, 2], dtype=torch.float32)
    student = [x.clone().requires_grad_() for x in teacher]
    found.student.logits[:, 0], found.teacher.logits[:, 1] = value, value
    found.student.logits.requires_grad_()
    loss = DeFeat(adapter="identity", **(CHANNELS | {"student_channels": [4, 4]}))
    terms = loss(student, teacher, targets(), teacher_regions=found)
    assert terms["kd_defeat_foreground"] == terms["kd_defeat_background"] == 0
    grads = gradient(sum(terms.values()), *student, found.student.logits)
    assert all(x.isfinite().all() for x in (*grads, *terms.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    _, teacher = pyramids(dtype)
    student = [x * 0.5 for x in teacher]
    truth = targets()
    truth = Targets(truth.boxes.float(), truth.labels, truth.image_index)
    found = regions(truth, [0, -1, 2, -2], dtype=dtype)
    same = CHANNELS | {"student_channels": [4, 4]}
    loss = DeFeat(adapter="identity", **(ALL | same))
    with force("definition"), NoFloat64(), NoHostSync():
        terms = loss(student, teacher, truth, teacher_regions=found)
    for x in (found.student, found.teacher):
        object.__setattr__(x, "logits", x.logits.float())
    wide = [[x.float() for x in levels] for levels in (student, teacher)]
    for name, x in loss(*wide, truth, teacher_regions=found).items():
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], x, rtol=1e-5, atol=0)


def test_what_it_asks_for():
    assert DeFeat().needs == {"targets"} and DeFeat().wishes == {"teacher_regions"}
    assert DeFeat(classes_background=1.0).needs == {"targets", "teacher_regions"}
    assert not DeFeat(**MAPS).wishes and DeFeat(**MAPS).needs == {"targets"}
    student, teacher = pyramids()
    terms = DeFeat(**CHANNELS).double()(student, teacher, targets())
    assert sorted(terms) == ["kd_defeat_background", "kd_defeat_foreground"]
    with pytest.raises(ValueError, match="teacher_regions: DeFeat expected both second stages"):
        DeFeat(classes_foreground=1.0, **CHANNELS).double()(student, teacher, targets())
    head = DeFeat(foreground=0, background=0, **CHANNELS)
    found = regions(targets(), [0, -1])
    assert len(head(student, teacher, targets(), teacher_regions=found)) == 2
    assert not list(head.parameters())
    for option in ({"temperature": (1.0, 0.0)}, {"normalizer": "boxes"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            DeFeat(**option)


def test_defaults_decay_and_state():
    student, teacher = pyramids(torch.float32)
    options = {"schedule": Schedule("linear"), "total_steps": 4} | CHANNELS
    loss = DeFeat(small_start=True, **options)
    assert list(loss.weights.values()) == [3, 12, 2, 2]
    assert loss.adapters[0].weight.shape[2:] == (3, 3)
    assert loss.adapters[0].weight.abs().max() < 2e-4
    found = [loss(student, teacher, targets())["kd_defeat_background"].item() for _ in range(2)]
    assert found[1] == pytest.approx(0.75 * found[0])
    copy = DeFeat(**options)
    copy.load_state_dict(loss.state_dict())
    assert copy(student, teacher, targets()) == loss(student, teacher, targets())


def test_compiles_whole():
    student, teacher = pyramids()
    found = regions(targets(), [0, -1, 2, -2])
    loss = DeFeat(**CHANNELS).double()
    expected = loss(student, teacher, targets(), teacher_regions=found)
    loss.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss(student, teacher, targets(), teacher_regions=found), expected)
