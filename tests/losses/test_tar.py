"""TAR: bells on objects; answers taken only where the teacher's are better."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

import global_kd.functional as F
from global_kd import Schedule, Targets
from global_kd.losses import TAR
from global_kd.ops.dispatch import force
from global_kd.step import RegionOutputs, Regions
from tests import oracles
from tests.losses.heads import maps, regions
from tests.strategies import scene, scenes
from tests.watch import NoFloat64, NoHostSync, gradient

SIZES, STRIDES = [(6, 7), (3, 4)], [8, 16]
CHANNELS = {"student_channels": [3, 3], "teacher_channels": [4, 4], "strides": STRIDES}
FLAT = {"schedule": Schedule("constant")} | CHANNELS
HEAD = {"features": 0} | FLAT


def slow_mask(boxes, image_index, stride, size):
    mask = torch.zeros(size, dtype=torch.float64)
    for box, b in zip(boxes.tolist(), image_index.tolist()):
        x1, y1, x2, y2 = (v / stride for v in box)
        half_x, half_y = max((x2 - x1) / 2, 0.5), max((y2 - y1) / 2, 0.5)
        for y, x in oracles.cells(box, stride, *size[1:]):
            u, v = (x + 0.5 - (x1 + x2) / 2) / half_x, (y + 0.5 - (y1 + y2) / 2) / half_y
            mask[b, y, x] = max(mask[b, y, x].item(), math.exp(-(u * u + v * v) / 2))
    return mask


@given(scenes())
def test_the_mask_equals_the_slow_definition(s):
    size = (len(s.student), *s.size)
    found = F.gaussian_mask(s.boxes, s.image_index, s.stride, size)
    expected = slow_mask(s.boxes, s.image_index, s.stride, size)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_mask_by_hand():
    """1 at the centre, exp(-1/2) near the middle of an edge, exp(-1) near a corner, 0 outside."""
    box = torch.tensor([[10.0, 10, 1011, 1011]])
    mask = F.gaussian_mask(box, torch.tensor([0]), 1, (1, 1100, 1100))
    assert mask[0, 510, 510] == 1 == mask.max() and mask[0, 9].eq(0).all()
    assert mask[0, 510, 10].item() == pytest.approx(math.exp(-0.5), rel=2e-3)
    assert mask[0, 10, 10].item() == pytest.approx(math.exp(-1), rel=3e-3)


def test_padding_moves_no_cell():
    s = scene()
    small = F.gaussian_mask(s.boxes, s.image_index, 8, (2, 6, 8))
    large = F.gaussian_mask(s.boxes, s.image_index, 8, (2, 9, 12))
    assert torch.equal(large[:, :5, :7], small[:, :5, :7])


def test_the_mask_checks_and_compiles():
    s = scene(dtype=torch.float32)
    given = s.boxes, s.image_index, 8, (2, 6, 8)
    compiled = torch.compile(F.gaussian_mask, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), F.gaussian_mask(*given))
    with NoFloat64(), NoHostSync():
        half = F.gaussian_mask(s.boxes.half(), *given[1:])
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="stride: expected a number > 0"):
        F.gaussian_mask(s.boxes, s.image_index, 0, (2, 6, 8))


# --- the maps -----------------------------------------------------------------------------------


def pyramids(dtype=torch.float64):
    return maps(SIZES, 3, seed=5, dtype=dtype), maps(SIZES, 4, seed=9, dtype=dtype)


def targets(boxes=((4.0, 4, 20, 30), (-200, -200, 60, 50), (0, 0, 300, 280)), index=(0, 1, 1)):
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    index = torch.tensor(index, dtype=torch.int64)
    return Targets(boxes, torch.arange(len(index)) % 3 + 1, index)


OWN = (0, 1, 1)  # the level of each of these boxes, by 14 cells of the first


@pytest.mark.parametrize("boxes", [3, 1, 0])
@pytest.mark.parametrize("robust", [False, True])
def test_the_feature_term_equals_the_slow_definition(boxes, robust):
    student, teacher = pyramids()
    all_of = targets()
    truth = Targets(all_of.boxes[:boxes], all_of.labels[:boxes], all_of.image_index[:boxes])
    loss = TAR(robust=robust, **FLAT).double()
    omega = torch.tensor([[0.3, 0.6, 0.2], [0.9, 0.1, 0.7]], dtype=torch.float64)[:, :boxes]
    extra = {"omega": omega} if robust else {}
    term = loss(student, teacher, truth, **extra)["kd_tar_features"]
    expected = 0.0
    for level, stride in enumerate(STRIDES):
        size = (2, *SIZES[level])
        mask, weighted = torch.zeros(size).double(), torch.zeros(size).double()
        for k in range(boxes):
            if OWN[k] == level:
                one = slow_mask(truth.boxes[k : k + 1], truth.image_index[k : k + 1], stride, size)
                mask = mask.maximum(one)
                weighted = weighted.maximum(one * (omega[level, k] if robust else 1))
        d = (loss.adapters[level](student[level]) - teacher[level]).square().sum(1)
        expected += (weighted * d).sum().item() / 2 / max(1, mask.sum().item())
    assert term.item() == pytest.approx(expected, rel=1e-9)
    term.backward()
    assert all(x.grad is not None for x in loss.parameters())
    assert (term > 0) == (boxes > 0)


# --- the heads ----------------------------------------------------------------------------------


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def overlap(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - shared)


def deltas(box, proposal):
    w, h = proposal[2] - proposal[0], proposal[3] - proposal[1]
    return [
        10 * ((box[0] + box[2]) - (proposal[0] + proposal[2])) / 2 / w,
        10 * ((box[1] + box[3]) - (proposal[1] + proposal[3])) / 2 / h,
        5 * math.log((box[2] - box[0]) / w),
        5 * math.log((box[3] - box[1]) / h),
    ]


def slow_heads(found, truth, gate, reference, weights):
    """(classes, boxes) for a softmax head whose background is column 0."""
    classes, boxes = [], []
    for i, k in enumerate(found.box.tolist()):
        if k == -2:
            continue
        weight = float(weights[k]) if weights is not None and k >= 0 else 1.0
        label = int(truth.labels[k]) if k >= 0 else 0
        q, p = (softmax(x.logits[i].tolist()) for x in (found.student, found.teacher))
        better = {"probability": p[label] > q[label], "correct": max(p) == p[label], "all": True}
        if better[gate]:
            classes.append(weight * sum(a * math.log(a / b) for a, b in zip(p, q)))
        if k >= 0:
            s, t = (x.boxes[i, label - 1].tolist() for x in (found.student, found.teacher))
            proposal, goal = found.proposals.boxes[i].tolist(), truth.boxes[k].tolist()
            if overlap(t, goal) > overlap(proposal if reference == "proposal" else s, goal):
                differences = [abs(a - b) for a, b in zip(deltas(s, proposal), deltas(t, proposal))]
                boxes.append(weight * sum(d * d / 2 if d < 1 else d - 0.5 for d in differences))
    return [sum(x) / max(1, len(x)) for x in (classes, boxes)]


MANY = [0, 1, -1, 2, -2, -1, 0, 0, 1, 2, -1, 0, 2, 1, -1]
OMEGA = torch.tensor([[0.3, 0.6, 0.2], [0.9, 0.1, 0.7]], dtype=torch.float64)


@pytest.mark.parametrize("gate", ["probability", "correct", "all"])
@pytest.mark.parametrize("reference", ["proposal", "student"])
@pytest.mark.parametrize("box", [MANY, [-1, -2], [0], []])
def test_the_heads_terms_equal_the_slow_definition(gate, reference, box):
    student, teacher = pyramids()
    truth = targets()
    found = regions(truth, box, seed=len(box))
    inputs = found.student.logits.requires_grad_(), found.student.boxes.requires_grad_()
    for weights, extra in ((None, {}), ([0.3, 0.1, 0.7], {"omega": OMEGA})):
        loss = TAR(gate=gate, reference=reference, robust=bool(extra), **HEAD)
        terms = loss(student, teacher, truth, regions=found, **extra)
        values = terms["kd_tar_classes"], terms["kd_tar_boxes"]
        expected = slow_heads(found, truth, gate, reference, weights)
        assert [x.item() for x in values] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert all(x.isfinite().all() for x in gradient(sum(values), *inputs))
    if box == MANY:
        assert expected[0] > 0 and expected[1] > 0


def test_omega_of_one_changes_nothing():
    student, teacher = pyramids()
    found = regions(targets(), MANY)
    plain, robust = (TAR(robust=r, **FLAT).double() for r in (False, True))
    torch.testing.assert_close(
        robust(student, teacher, targets(), regions=found, omega=torch.ones_like(OMEGA)),
        plain(student, teacher, targets(), regions=found),
    )


def test_gradients_are_the_students_alone():
    student, teacher = pyramids()
    found = regions(targets(), MANY)
    s, t = found.student, found.teacher
    inputs = (*student, s.logits, s.boxes)
    others = (*teacher, t.logits, t.boxes, found.proposals.boxes)
    for x in (*inputs, *others):
        x.requires_grad_()
    loss = TAR(adapter="conv1x1", **FLAT).double()

    def total(a, b, logits, boxes):
        now = Regions(found.proposals, found.box, RegionOutputs(logits, boxes), t)
        return sum(loss([a, b], teacher, targets(), regions=now).values())

    assert torch.autograd.gradcheck(total, inputs)
    total(*inputs).backward()
    assert all(x.grad is None for x in others)
    assert all(x.grad.abs().sum() > 0 for x in inputs)


def test_no_rows_are_better_than_ones_own():
    """Equal heads: nothing to learn, and no NaN."""
    student, teacher = pyramids()
    found = regions(targets(), MANY)
    same = Regions(found.proposals, found.box, found.teacher, found.teacher)
    terms = TAR(reference="student", **HEAD)(student, teacher, targets(), regions=same)
    assert terms == {"kd_tar_classes": 0, "kd_tar_boxes": 0}


def test_heads_without_a_background_and_with_one_at_the_end():
    """No object is what no class claims; labels are columns, and boxes follow the columns."""
    student, teacher = pyramids()
    truth = Targets(targets().boxes, torch.tensor([0, 1, 2]), targets().image_index)
    last = regions(truth, [2, -1], background=3)
    assert torch.equal(
        last.student.boxes_of(torch.tensor([2, 0])), last.student.boxes[[0, 1], [2, 0]]
    )
    for outputs in (last.student, last.teacher):
        outputs.logits.zero_()
    last.teacher.logits[0, 2], last.teacher.logits[1, 3] = 5.0, 5.0
    loss = TAR(**(HEAD | {"boxes": 0}))
    expected = sum(p * math.log(4 * p) for p in softmax([5.0, 0, 0, 0]))
    term = loss(student, teacher, truth, regions=last)["kd_tar_classes"]
    assert term.item() == pytest.approx(expected)

    z = torch.zeros(2, 3, dtype=torch.float64)
    t = torch.tensor([[0.0, 0, 2], [-2, -2, -2]], dtype=torch.float64)
    heads = [RegionOutputs(x, None, "sigmoid", None) for x in (z, t)]
    term = loss(student, teacher, truth, regions=Regions(last.proposals, last.box, *heads))
    p = 1 / (1 + math.exp(-2))
    each = p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p)
    assert term["kd_tar_classes"].item() == pytest.approx(4 * each / 2)  # 1 and 3 of the columns


def test_one_box_for_all_classes():
    truth = targets()
    found = regions(truth, [0, -1])
    one = RegionOutputs(found.student.logits, found.student.boxes[:, :1])
    assert torch.equal(one.boxes_of(torch.tensor([3, 1])), one.boxes[:, 0])
    with pytest.raises(ValueError, match="boxes: expected regressed boxes"):
        RegionOutputs(found.student.logits).boxes_of(truth.labels)


@pytest.mark.parametrize("value", [100.0, -100.0])
def test_saturated_logits_and_boxes_without_area_are_finite(value):
    student, teacher = pyramids(torch.float32)
    found = regions(targets(), MANY, dtype=torch.float32)
    found.student.logits[:, 0], found.teacher.logits[:, 1] = value, value
    found.student.boxes[::2, :, 2:] = found.student.boxes[::2, :, :2]
    found.proposals.boxes[3, 2:] = found.proposals.boxes[3, :2]
    inputs = found.student.logits.requires_grad_(), found.student.boxes.requires_grad_()
    terms = TAR(**FLAT)(student, teacher, targets(), regions=found)
    grads = gradient(sum(terms.values()), *inputs)
    assert len(terms) == 3 and all(x.isfinite().all() for x in (*terms.values(), *grads))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    _, teacher = pyramids(dtype)
    student = [x * 0.5 for x in teacher]
    truth = Targets(targets().boxes.float(), targets().labels, targets().image_index)
    found = regions(truth, MANY, dtype=dtype)
    loss = TAR(adapter="identity", **(FLAT | {"student_channels": [4, 4]}))
    with force("definition"), NoFloat64(), NoHostSync():
        terms = loss(student, teacher, truth, regions=found)
    wide = [[x.float() for x in levels] for levels in (student, teacher)]
    p, heads = found.proposals, (found.student, found.teacher)
    heads = [RegionOutputs(x.logits.float(), x.boxes.float()) for x in heads]
    exact = Regions(Targets(p.boxes.float(), p.labels, p.image_index), found.box, *heads)
    for name, x in loss(*wide, truth, regions=exact).items():
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], x, rtol=1e-5, atol=0)


def test_what_it_asks_for():
    assert TAR().needs == {"targets"} and TAR().wishes == {"regions"}
    assert TAR(boxes=1.0).needs == {"targets", "regions"}
    assert not TAR(classes=0, boxes=0).wishes
    student, teacher = pyramids()
    assert list(TAR(**FLAT).double()(student, teacher, targets())) == ["kd_tar_features"]
    with pytest.raises(ValueError, match="regions: TAR expected both second stages"):
        TAR(classes=1.0, **FLAT).double()(student, teacher, targets())
    bare = regions(targets(), MANY, boxes=False)
    assert list(TAR(**HEAD)(student, teacher, targets(), regions=bare)) == ["kd_tar_classes"]
    with pytest.raises(ValueError, match="boxes: expected regressed boxes"):
        TAR(boxes=1.0, **HEAD)(student, teacher, targets(), regions=bare)
    for option in ({"gate": "none"}, {"reference": "anchor"}, {"temperature": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            TAR(**option)


def test_the_weights_decay_and_resume():
    """r(t) = 1 - (t - 1) / t_max."""
    student, teacher = pyramids(torch.float32)
    loss = TAR(total_steps=4, **CHANNELS)
    found = [loss(student, teacher, targets())["kd_tar_features"].item() for _ in range(3)]
    assert found == pytest.approx([found[0] * (1 - t / 4) for t in range(3)])
    copy = TAR(total_steps=4, **CHANNELS)
    copy.load_state_dict(loss.state_dict())
    assert copy(student, teacher, targets()) == loss(student, teacher, targets())


def test_compiles_whole():
    student, teacher = pyramids()
    found = regions(targets(), MANY)
    loss = TAR(**FLAT).double()
    expected = loss(student, teacher, targets(), regions=found)
    loss.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss(student, teacher, targets(), regions=found), expected)
