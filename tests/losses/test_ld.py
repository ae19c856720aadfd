"""LD: distributions of the sides on positives and around them, classes on positives."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

import global_kd.functional as F
from global_kd.detectors.locations import cells_of
from global_kd.losses import LD
from global_kd.losses.ld import squares, valuable_region
from global_kd.ops.boxes import diou, iou
from global_kd.step import Grid
from tests.losses.dense_heads import (
    GRIDS,
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
NORMALIZERS = ("constant", "weights", "balanced")


def softmax(row, temperature=1.0):
    top = max(row)
    p = [math.exp((x - top) / temperature) for x in row]
    return [x / sum(p) for x in p]


def divergence(student, teacher, temperature):
    s, t = softmax(student, temperature), softmax(teacher, temperature)
    return temperature**2 * sum(q * math.log(q / p) for p, q in zip(s, t))


def sides(student, teacher, temperature=10.0):
    """Of one location (4, D): mean over sides, sum over bins."""
    return sum(divergence(a, b, temperature) for a, b in zip(student, teacher)) / 4


def largest(dense, b, i):
    return max(1 / (1 + math.exp(-x)) for x in dense.logits[b, i].tolist())


def region(priors, grids, targets, counts):
    """Weights (B, N), by the definition of the region."""
    weights = [[0.0] * len(priors) for _ in counts]
    for box, image in zip(targets.boxes.double().tolist(), targets.image_index.tolist()):
        candidates, start = [], 0
        for grid in grids:
            rows = [i for i in range(start, start + grid.rows) if counts[image][i]]
            start += grid.rows

            def far(i, box=box):
                return sum(
                    (priors[i][k] + priors[i][k + 2] - box[k] - box[k + 2]) ** 2 for k in (0, 1)
                )

            candidates += [by_hand(diou, priors[i], box) for i in sorted(rows, key=far)[:9]]
        if not candidates:
            continue
        spread = statistics.stdev(candidates) if len(candidates) > 1 else 0.0
        threshold = statistics.mean(candidates) + spread
        for i, prior in enumerate(priors):
            near = by_hand(diou, prior, box)
            if counts[image][i] and 0.25 * threshold <= near < threshold:
                weights[image][i] = max(weights[image][i], by_hand(iou, prior, box))
    return weights


def anchors(dense, side):
    """Squares of so many cells around the centres of the priors; `None`: the priors."""
    found, start = dense.priors.tolist(), 0
    for grid in dense.grids if side is not None else ():
        for i in range(start, start + grid.rows):
            x1, y1, x2, y2 = found[i]
            x, y, half = (x1 + x2) / 2, (y1 + y2) / 2, side * grid.stride / 2
            found[i] = [x - half, y - half, x + half, y + half]
        start += grid.rows
    return found


def definition(student, teacher, ground, targets, normalizer="constant", weights=None, anchor=8.0):
    """The three weighted terms; of locations, `weights` are the robust ones."""
    batch, n, _ = student.logits.shape
    counts = [
        [
            ground[b, i] != -2
            and all(x.valid is None or bool(x.valid[i]) for x in (student, teacher))
            for i in range(n)
        ]
        for b in range(batch)
    ]
    around = region(anchors(student, anchor), student.grids, targets, counts)
    bins = student.bins.shape[-1]
    main = vlr = main_by = vlr_by = classes = 0.0
    sums, numbers = [0.0, 0.0], [0, 0]
    start = 0
    for grid in student.grids:
        level, positives = 0.0, 0
        for b in range(batch):
            for i in range(start, start + grid.rows):
                if not counts[b][i]:
                    continue
                robust = 1.0 if weights is None else weights[b, i].item()
                rows = student.bins[b, i].tolist(), teacher.bins[b, i].tolist()
                apart = sides(*rows)
                vlr += robust * around[b][i] * apart / bins
                vlr_by += around[b][i]
                matched = ground[b, i] >= 0
                if matched:
                    positives += 1
                    main += robust * largest(student, b, i) * apart / bins
                    main_by += largest(student, b, i)
                    pair = student.logits[b, i].tolist(), teacher.logits[b, i].tolist()
                    level += robust * divergence(*pair, 2.0) / len(pair[0])
                    near = student.boxes[b, i].tolist(), targets.boxes[ground[b, i]].tolist()
                    weight = by_hand(iou, *near)
                else:
                    weight = largest(teacher, b, i)
                sums[not matched] += robust * weight * apart
                numbers[not matched] += 1
        classes += level / max(positives, 1)
        start += grid.rows
    if normalizer == "constant":
        vlr /= 4
    else:
        main, vlr = main / (main_by or 1), vlr / (vlr_by or 1)
    if normalizer == "balanced":
        roots = [math.sqrt(x) for x in numbers]
        means = [s / max(n, 1) for s, n in zip(sums, numbers)]
        main = sum(m * r for m, r in zip(means, roots)) / max(sum(roots), 1)
    return 0.25 * main, 0.25 * vlr, 10 * classes


def values(terms):
    return tuple(terms[f"kd_ld_{x}"].item() for x in ("main", "vlr", "classes"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("anchor", [8.0, 1.5, None])
def test_equals_the_definition(seed, normalizer, count, anchor):
    student, teacher = both(seed, bins=5)
    ground, targets = assigned(seed, count=count), truth(seed, count=count)
    loss = built(LD, normalizer=normalizer, anchor=anchor)
    terms = loss(*FACTS, targets, dense=(student, teacher), assigned=ground)
    expected = definition(student, teacher, ground, targets, normalizer, anchor=anchor)
    assert values(terms) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert (values(terms)[1] > 0) == (count > 0)


@pytest.mark.parametrize("seed", range(6))
def test_the_region(seed):
    """Boxes with no area, beyond the border and shared by images; some locations count for none."""
    student, _ = both(seed)
    targets = truth(seed, count=5)
    targets.boxes[0, 2:] = targets.boxes[0, :2]
    targets.boxes[1] += 200
    counts = torch.rand(2, 32, generator=torch.Generator().manual_seed(seed)) < 0.8
    if seed == 5:
        counts[0] = False
    boxes = targets.boxes.double(), targets.image_index
    weights = valuable_region(student.priors, GRIDS, *boxes, counts)
    expected = region(student.priors.tolist(), GRIDS, targets, counts)
    assert weights.tolist() == pytest.approx([pytest.approx(x, rel=1e-9) for x in expected])
    assert (weights > 0).any()


@pytest.mark.parametrize("side", [60.0, 150.0, 400.0])
def test_a_head_without_anchors_has_a_region(side):
    """A cell overlaps no object of many cells: with cells for anchors the region is all but empty.

    For objects of one or two cells the difference is small.
    """
    grids = tuple(Grid(s, 640 // s, 640 // s) for s in (8, 16, 32))
    priors = cells_of(grids, torch.zeros(1))
    box = torch.tensor([[-side / 2, -side / 2, side / 2, side / 2]]) + 311
    given = grids, box, torch.zeros(1, dtype=torch.int64), torch.ones(1, len(priors)).bool()
    region = valuable_region(squares(priors, grids, 8.0), *given)
    cells = valuable_region(priors, *given)
    assert (region > 0).sum() > 10 * (cells > 0).sum() and region.sum() > 40 * cells.sum() > 0


def rows(n=5, bins=4, dtype=torch.float64):
    student = (3 * random((n, 4, bins), 1)).to(dtype).requires_grad_()
    return student, (3 * random((n, 4, bins), 2)).to(dtype), torch.linspace(0, 1, n, dtype=dtype)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_function(temperature, weighted):
    student, teacher, weights = rows()
    weights = weights if weighted else torch.ones_like(weights)
    loss = F.localization_loss(
        student, teacher, weights if weighted else None, temperature=temperature
    )
    expected = sum(
        w * sides(s, t, temperature) / 4
        for s, t, w in zip(student.tolist(), teacher.tolist(), weights.tolist())
    )
    assert loss.item() == pytest.approx(expected / weights.sum().item(), rel=1e-10)


def test_smooth_and_the_teacher_detached():
    student, teacher, weights = rows()
    teacher.requires_grad_(), weights.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: F.localization_loss(x, teacher.detach(), weights.detach()), student
    )
    loss = F.localization_loss(student, teacher, weights)
    assert torch.autograd.grad(loss, (teacher, weights), allow_unused=True) == (None, None)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_equal_bins_and_no_weights(n):
    student, teacher, weights = rows(n)
    for loss in (
        F.localization_loss(student, student.detach()),
        F.localization_loss(student, teacher, torch.zeros_like(weights)),
    ):
        (slope,) = torch.autograd.grad(loss, student)
        assert loss == 0 and slope.isfinite().all() and slope.abs().sum() < 1e-12


def test_the_class_by_weights_is_the_function_on_positives():
    student, teacher = both(bins=5)
    ground = assigned()
    there = ground >= 0
    loss = built(LD, main=1.0, vlr=0, classes=0, normalizer="weights")
    terms = loss(*FACTS, dense=(student, teacher), assigned=ground)
    weights = student.scores[there]
    expected = F.localization_loss(student.bins[there], teacher.bins[there], weights)
    assert list(terms) == ["kd_ld_main"]
    assert terms["kd_ld_main"].item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_identical_heads_and_no_gradient_of_the_teacher(normalizer):
    student, teacher = both(bins=5)
    facts = {"assigned": assigned()}
    loss = built(LD, normalizer=normalizer)
    same = loss(*FACTS, truth(), dense=(student, student), **facts)
    assert values(same) == (0, 0, 0)
    finite(same, student.logits, student.bins)
    total = sum(loss(*FACTS, truth(), dense=(student, teacher), **facts).values())
    assert all(x is None for x in torch.autograd.grad(total, leaves(teacher), allow_unused=True))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_finite(normalizer, count, scale):
    student, teacher = (
        replace(x, bins=(scale * x.bins.detach()).requires_grad_())
        for x in both(scale=scale, bins=5, dtype=torch.float32)
    )
    loss = built(LD, normalizer=normalizer)
    facts = {"dense": (student, teacher), "assigned": assigned(count=count)}
    finite(loss(*FACTS, truth(count=count), **facts), *leaves(student))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_invalid_rows_do_not_count_whatever_stands_there(normalizer):
    student, teacher = both(bins=5)
    valid = torch.arange(32) % 4 != 1
    huge = torch.where(valid[:, None], student.priors, torch.finfo(torch.float64).max)
    broken = replace(
        student,
        priors=huge,
        boxes=torch.where(valid[:, None], student.boxes, math.inf),
        valid=valid,
    )
    facts = {"assigned": assigned()}
    terms = built(LD, normalizer=normalizer)(*FACTS, truth(), dense=(broken, teacher), **facts)
    plain = replace(student, valid=valid)
    expected = definition(plain, teacher, facts["assigned"], truth(), normalizer)
    assert values(terms) == pytest.approx(expected, rel=1e-6)
    finite(terms, student.logits, student.bins)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_robust(normalizer):
    student, teacher = both(bins=5)
    targets, omega = truth(), torch.rand(2, 4, dtype=torch.float64)
    facts = {"dense": (student, teacher), "assigned": assigned()}
    loss = built(LD, normalizer=normalizer, robust=True)
    plain = built(LD, normalizer=normalizer)(*FACTS, targets, **facts)
    ones = loss(*FACTS, targets, omega=torch.ones_like(omega), **facts)
    assert values(ones) == pytest.approx(values(plain), rel=1e-6)
    weights = row_weights(loss, targets, omega, student)
    expected = definition(student, teacher, facts["assigned"], targets, normalizer, weights)
    terms = loss(*FACTS, targets, omega=omega, **facts)
    assert values(terms) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    student, teacher = (cast(x, dtype) for x in both(bins=5, dtype=torch.float32))
    ground, targets = assigned(), truth()
    features = maps(dtype=torch.float32), maps(dtype=torch.float32)
    with NoFloat64():
        terms = built(LD)(*features, targets, dense=(student, teacher), assigned=ground)
    wide = cast(student, torch.float64), cast(teacher, torch.float64)
    exact = built(LD)(*features, targets, dense=wide, assigned=ground)
    assert all(x.dtype == torch.float32 for x in terms.values())
    assert values(terms) == pytest.approx(values(exact), rel=1e-4)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_one_graph_and_no_wait(normalizer):
    student, teacher = both(bins=5, dtype=torch.float32)
    loss, targets = built(LD, normalizer=normalizer), truth()
    facts = {"dense": (student, teacher), "assigned": assigned()}
    features = maps(dtype=torch.float32), maps(dtype=torch.float32)
    with NoHostSync():
        plain = loss(*features, targets, **facts)
    graphs = Graphs()
    loss.compile(fullgraph=True, backend=graphs)
    assert values(loss(*features, targets, **facts)) == pytest.approx(values(plain), rel=1e-6)
    assert graphs.count == 1


def test_what_is_missing_is_named():
    assert LD().needs == {"dense", "bins", "assigned", "priors", "targets"}
    assert LD(vlr=0).needs == {"dense", "bins", "assigned"}
    assert LD(vlr=0, normalizer="balanced").needs >= {"boxes", "targets"}
    student, teacher = both(bins=5)
    facts = {"assigned": assigned()}
    with pytest.raises(ValueError, match=r"Dense.bins of both heads"):
        built(LD)(*FACTS, truth(), dense=(replace(student, bins=None), teacher), **facts)
    with pytest.raises(ValueError, match=r"LD expected the student's anchors"):
        built(LD)(*FACTS, truth(), dense=(replace(student, priors=None), teacher), **facts)
    with pytest.raises(ValueError, match="5 of the student and 6 of the teacher"):
        built(LD)(*FACTS, truth(), dense=(student, both(bins=6)[1]), **facts)
    with pytest.raises(ValueError, match="student: expected shape"):
        F.localization_loss(torch.zeros(2, 4, 3), torch.zeros(2, 4, 4))


def test_the_side_of_anchors_is_checked():
    with pytest.raises(ValueError, match="anchor: expected a number > 0, but got 0"):
        LD(anchor=0)


def test_it_resumes():
    loss, again = built(LD), built(LD)
    facts = {"dense": both(bins=5), "assigned": assigned()}
    loss(*FACTS, truth(), **facts)
    loss.calibrate({"vlr": 0.5})
    again.load_state_dict(loss.state_dict())
    assert again.step == 1
    assert values(again(*FACTS, truth(), **facts)) == values(loss(*FACTS, truth(), **facts))
