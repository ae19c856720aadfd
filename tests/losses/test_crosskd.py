"""CrossKD: a small convolutional head, the teacher's, judges the student's maps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from global_kd import Targets
from global_kd.losses import CrossKD
from global_kd.losses.crosskd import aligned
from global_kd.ops.boxes import giou
from global_kd.step import Dense, Grid, Hidden
from tests.losses.dense_heads import GRIDS, assigned, built, cast, finite, maps, row_weights, truth
from tests.ops.test_boxes import by_hand
from tests.watch import Graphs, NoFloat64, NoHostSync

SMALL = tuple(replace(g, anchors=1) for g in GRIDS)


class Head(nn.Module):
    """One 3x3 convolution a branch, shared by the levels; a box is its cell moved and grown."""

    def __init__(self, channels=3, classes=3, dtype=torch.float64, seed=0, **options):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classes = nn.Conv2d(channels, classes, 3, padding=1, dtype=dtype)
            self.sides = nn.Conv2d(channels, 4, 3, padding=1, dtype=dtype)
        self.requires_grad_(False)
        self.options = options

    def forward(self, features):
        logits, boxes, grids = [], [], []
        for x, grid in zip(features, GRIDS):
            height, width = x.shape[2:]
            grids.append(Grid(grid.stride, height, width, 1))
            logits.append(self.classes(x).flatten(2).mT)
            sides = grid.stride * nn.functional.softplus(self.sides(x)).flatten(2).mT
            at = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            centre = (torch.stack([at[1], at[0]], 2).flatten(0, 1) + 0.5) * grid.stride
            boxes.append(torch.cat([centre - sides[..., :2], centre + sides[..., 2:]], 2))
        logits, boxes = torch.cat(logits, 1), torch.cat(boxes, 1)
        return Dense(logits, tuple(grids), boxes=boxes, **self.options)


def definition(cross, teacher, ground=None, *, beta=1.0, weights=None):
    """Both terms by loops over the locations of the two predictions."""
    classes = boxes = positives = 0.0
    p_c, p_t = cross.probabilities().tolist(), teacher.probabilities().tolist()
    for b in range(cross.logits.shape[0]):
        for i in range(cross.logits.shape[1]):
            if ground is not None and ground[b, i] == -2:
                continue
            weight = 1.0 if weights is None else weights[b, i].item()
            positives += max(p_t[b][i]) if ground is None else float(ground[b, i] >= 0)
            for c, t in zip(p_c[b][i], p_t[b][i]):
                entropy = -t * math.log(c) - (1 - t) * math.log(1 - c)
                classes += weight * abs(c - t) ** beta * entropy
            near = by_hand(giou, cross.boxes[b, i].tolist(), teacher.boxes[b, i].tolist())
            boxes += weight * max(p_t[b][i]) * (1 - near)
    return classes / max(positives, 1), boxes / max(positives, 1)


def values(terms):
    return terms["kd_crosskd_classes"].item(), terms["kd_crosskd_boxes"].item()


def scene(seed=0, dtype=torch.float64, **options):
    """Student's maps, teacher's maps, the facts."""
    student, teacher, head = maps(seed, dtype=dtype), maps(seed + 9, dtype=dtype), Head(**options)
    head.to(dtype)
    facts = {"teacher_head": head, "teacher_dense": head(teacher).detach()}
    return student, teacher, facts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0, 1, 2])
@pytest.mark.parametrize("ground", [None, 0, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "softmax", "background": -1}, {"classes": 1}],
    ids=["sigmoid", "softmax", "one class"],
)
def test_equals_the_definition(seed, beta, ground, options):
    student, teacher, facts = scene(seed, **options)
    ground = None if ground is None else assigned(seed, grids=SMALL, count=ground)
    terms = built(CrossKD, beta=beta)(student, teacher, assigned=ground, **facts)
    cross = facts["teacher_head"](student)
    expected = definition(cross, facts["teacher_dense"], ground, beta=beta)
    assert values(terms) == pytest.approx(expected, rel=1e-9)


def test_gradients_reach_the_maps_and_nothing_of_the_teacher():
    student, teacher, facts = scene()
    head = facts["teacher_head"]
    dense = head(teacher)
    terms = built(CrossKD)(student, teacher, teacher_head=head, teacher_dense=dense)
    total = terms["kd_crosskd_classes"] + terms["kd_crosskd_boxes"]
    slopes = torch.autograd.grad(total, student, retain_graph=True)
    assert torch.autograd.grad(total, teacher, allow_unused=True) == (None, None)
    assert not any(p.requires_grad for p in head.parameters())
    for level, place in ((0, (0, 1, 2, 3)), (1, (1, 2, 0, 1))):
        moved = []
        for move in (1e-5, -1e-5):
            features = [x.detach().clone() for x in student]
            features[level][place] += move
            moved.append(sum(definition(head(features), dense)))
        expected = (moved[0] - moved[1]) / 2e-5
        assert slopes[level][place].item() == pytest.approx(expected, rel=1e-5)


def test_smooth():
    student, teacher, facts = scene(1)
    loss = built(CrossKD)

    def total(*features):
        return sum(loss(features, teacher, **facts).values())

    assert torch.autograd.gradcheck(total, tuple(student))


def test_the_teachers_own_maps_give_zero():
    _, teacher, facts = scene()
    terms = built(CrossKD)(teacher, teacher, **facts)
    assert values(terms) == (0, pytest.approx(0, abs=1e-12))
    finite(terms, *teacher)


def test_adapters_learn():
    student = maps(channels=5, dtype=torch.float32)
    _, teacher, facts = scene(dtype=torch.float32)
    loss = built(CrossKD, student=5)
    total = sum(loss(student, teacher, **facts).values())
    slopes = torch.autograd.grad(total, list(loss.parameters()))
    assert len(slopes) == 4 and all(x.abs().sum() > 0 for x in slopes)


def test_a_teacher_with_a_larger_grid():
    """Its own output has a row and a column more than the maps that are shared."""
    student, teacher, facts = scene()
    larger = [nn.functional.pad(x.detach(), (0, 1, 0, 1)) for x in teacher]
    dense = facts["teacher_head"](larger)
    cross = facts["teacher_head"](student)
    terms = built(CrossKD)(student, teacher, **facts | {"teacher_dense": dense})
    keep = []
    for start, height, width in ((0, 3, 4), (4 * 5, 2, 2)):
        keep += [start + y * (width + 1) + x for y in range(height) for x in range(width)]
    expected = definition(cross, dense.take(torch.tensor(keep), cross.grids))
    assert values(terms) == pytest.approx(expected, rel=1e-9)


def test_an_assigner_of_other_locations_says_nothing():
    student, teacher, facts = scene()
    plain = built(CrossKD)(student, teacher, **facts)
    other = built(CrossKD)(student, teacher, assigned=assigned(), **facts)  # two anchors a cell
    assert values(other) == values(plain)
    tall = tuple(Grid(g.stride, g.width, g.height, 1) for g in SMALL)  # as many, elsewhere
    dense = Dense(torch.zeros(2, 16, 3), tall)
    ground = assigned(grids=SMALL)
    other = built(CrossKD)(student, teacher, dense=(dense, dense), assigned=ground, **facts)
    assert values(other) == values(plain)


def test_robust():
    student, teacher, facts = scene()
    targets, omega = truth(), torch.rand(2, 4, dtype=torch.float64)
    loss = built(CrossKD, robust=True)
    plain = built(CrossKD)(student, teacher, **facts)
    ones = loss(student, teacher, targets, omega=torch.ones_like(omega), **facts)
    assert values(ones) == pytest.approx(values(plain), rel=1e-6)
    cross = facts["teacher_head"](student)
    weights = row_weights(loss, targets, omega, cross)
    expected = definition(cross, facts["teacher_dense"], weights=weights)
    terms = loss(student, teacher, targets, omega=omega, **facts)
    assert values(terms) == pytest.approx(expected, rel=1e-6)
    assert values(terms) < values(plain)


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_finite(scale):
    """Constant maps, and logits far beyond saturation."""
    student, teacher, facts = scene(dtype=torch.float32)
    student = [(scale * x.detach()).requires_grad_() for x in student]
    ground = torch.full((2, 16), -2)
    for given in (assigned(grids=SMALL), assigned(grids=SMALL, count=0), ground):
        terms = built(CrossKD)(student, teacher, assigned=given, **facts)
        finite(terms, *student)
    assert values(terms) == (0, 0)  # all ignored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Of the predictions: what the head does in half precision is its own affair."""
    student, teacher, facts = scene(dtype=torch.float32)
    cross = cast(facts["teacher_head"](student), dtype)
    own = cast(facts["teacher_dense"], dtype)
    with NoFloat64():
        terms = built(CrossKD)(student, teacher, teacher_head=lambda _: cross, teacher_dense=own)
    assert all(x.dtype == torch.float32 for x in terms.values())
    assert values(terms) == pytest.approx(definition(cross, own), rel=1e-4)


def test_one_graph_and_no_wait():
    student, teacher, facts = scene(dtype=torch.float32)
    facts["assigned"] = assigned(grids=SMALL)
    cross = facts["teacher_head"](student)
    with NoHostSync():
        plain = built(CrossKD)(student, teacher, **facts | {"teacher_head": lambda _: cross})
    loss, graphs = built(CrossKD), Graphs()
    loss.compile(fullgraph=True, backend=graphs)
    assert values(loss(student, teacher, **facts)) == pytest.approx(values(plain), rel=1e-6)
    assert graphs.count == 1


def test_what_is_missing_is_named():
    student, teacher, facts = scene()
    bare = replace(facts["teacher_dense"], boxes=None)
    with pytest.raises(ValueError, match=r"Dense.boxes of both.*boxes=0"):
        built(CrossKD, boxes=1.0)(student, teacher, **facts | {"teacher_dense": bare})
    # By default the boxes are left out where the head has none.
    terms = built(CrossKD)(student, teacher, **facts | {"teacher_dense": bare})
    assert list(terms) == ["kd_crosskd_classes"]
    terms = built(CrossKD, boxes=0)(student, teacher, **facts | {"teacher_dense": bare})
    assert list(terms) == ["kd_crosskd_classes"]
    with pytest.raises(ValueError, match="teacher_head: CrossKD expected"):
        built(CrossKD)(student, teacher, teacher_dense=bare)
    with pytest.raises(ValueError, match="levels: CrossKD expected None"):
        CrossKD(levels=[8])
    with pytest.raises(ValueError, match="beta"):
        CrossKD(beta=0.5)


def test_no_boxes_and_a_robust_weight():
    student, teacher, facts = scene()
    none = Targets(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).long())
    loss = built(CrossKD, robust=True)
    terms = loss(student, teacher, none, omega=torch.ones(2, 0), **facts)
    assert values(terms) == pytest.approx(values(built(CrossKD)(student, teacher, **facts)))


def test_it_resumes():
    student, teacher, facts = scene(dtype=torch.float32)
    student = maps(channels=5, dtype=torch.float32)
    loss, again = built(CrossKD, student=5), built(CrossKD, student=5, seed=1)
    loss(student, teacher, **facts)
    loss.calibrate({"boxes": 0.5})
    assert values(again(student, teacher, **facts)) != values(loss(student, teacher, **facts))
    again.load_state_dict(loss.state_dict())
    assert again.step == 2
    assert values(again(student, teacher, **facts)) == values(loss(student, teacher, **facts))


def test_aligned_features_have_the_teachers_mean_and_deviation():
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 4, 5).double(), 3 + 2 * torch.randn(2, 3, 6, 5).double()
    s.requires_grad_()
    x = aligned(s, t)
    torch.testing.assert_close(x.mean((0, 2, 3)), t.mean((0, 2, 3)))
    torch.testing.assert_close(x.std((0, 2, 3)), t.std((0, 2, 3)), rtol=1e-5, atol=0)
    assert torch.autograd.gradcheck(lambda y: aligned(y, t), (s,))
    # One cell, and a constant channel: finite, with a finite gradient.
    for shape in ((1, 3, 1, 1), (2, 3, 2, 2)):
        flat = torch.ones(shape, requires_grad=True)
        value = aligned(flat, torch.ones(shape))
        (slope,) = torch.autograd.grad(value.sum(), flat)
        assert value.isfinite().all() and slope.isfinite().all()


def test_hidden_features_are_judged_by_the_rest_of_the_head():
    student, teacher, facts = scene()
    head = facts["teacher_head"]
    asked = []

    def split_heads(after):
        asked.append(after)
        return Hidden(student, student), Hidden(teacher, teacher), lambda x: head(x.classes)

    terms = built(CrossKD, after=3)(
        student, teacher, split_heads=split_heads, teacher_dense=facts["teacher_dense"]
    )
    cross = head([aligned(s, t) for s, t in zip(student, teacher)])
    assert asked == [3]
    assert values(terms) == pytest.approx(definition(cross, facts["teacher_dense"]), rel=1e-9)
