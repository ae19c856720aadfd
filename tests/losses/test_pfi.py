"""PFI and RM: features where predictions differ, ranks of the positives of a ground truth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import global_kd.functional as F
from global_kd.losses import PFI
from global_kd.step import Grid
from tests import oracles
from tests.losses.dense_heads import assigned, both, built, cast, finite, leaves, maps, truth
from tests.strategies import random
from tests.watch import Graphs, NoFloat64, NoHostSync

SOFTMAX = {"activation": "softmax", "background": 0}
KINDS = pytest.mark.parametrize(
    "options", [{}, SOFTMAX, {"classes": 1}], ids=["sigmoid", "softmax", "one class"]
)


def guided(student, teacher, p_s, p_t, weights=None):
    """By loops over cells; predictions (B, H, W, anything)."""
    total, cells = 0.0, 0
    for b in range(student.shape[0]):
        for y in range(student.shape[2]):
            for x in range(student.shape[3]):
                s, t = p_s[b, y, x].flatten().tolist(), p_t[b, y, x].flatten().tolist()
                apart = sum((i - j) ** 2 for i, j in zip(s, t)) / len(s)
                f, g = student[b, :, y, x].tolist(), teacher[b, :, y, x].tolist()
                error = sum((i - j) ** 2 for i, j in zip(f, g)) / len(f)
                total += (1.0 if weights is None else weights[b, y, x].item()) * apart * error
                cells += 1
    return total / cells


def ranks(student, teacher, box, weights=None):
    total, members = 0.0, sorted({b for b in box.tolist() if b >= 0})
    for g in members:
        rows = [i for i, b in enumerate(box.tolist()) if b == g]
        shares = []
        for scores in (student, teacher):
            z = [math.exp(scores[i].item()) for i in rows]
            shares.append([x / sum(z) for x in z])
        kl = sum(t * math.log(t / s) for s, t in zip(*shares))
        total += kl * (1.0 if weights is None else weights[g].item())
    return total / max(len(members), 1)


def definition(
    student, teacher, features, targets, ground, predictions="probabilities", omega=None
):
    """The two weighted terms."""
    levels, start = [], 0
    for level, grid in enumerate(student.grids):
        rows = slice(start, start + grid.rows)
        start += grid.rows
        p = [
            x.probabilities() if predictions == "probabilities" else x.logits
            for x in (student, teacher)
        ]
        valid = [
            1.0 if x.valid is None else x.valid[..., None].double() for x in (student, teacher)
        ]
        shape = len(p[0]), grid.height, grid.width, -1
        p = [(x * valid[0] * valid[1])[:, rows].reshape(shape) for x in p]
        weights = None
        if omega is not None:
            weights = torch.ones(shape[:3])
            for b in range(shape[0]):
                for y in range(grid.height):
                    for x in range(grid.width):
                        on = [
                            omega[level, r].item()
                            for r in range(len(targets))
                            if targets.image_index[r] == b
                            and (y, x)
                            in oracles.cells(targets.boxes[r], grid.stride, grid.height, grid.width)
                        ]
                        weights[b, y, x] = max(on, default=1.0)
        levels.append(guided(features[0][level], features[1][level], *p, weights))
    student_scores, teacher_scores = [], []
    for dense, scores in ((student, student_scores), (teacher, teacher_scores)):
        p = dense.logits.sigmoid() if dense.activation == "sigmoid" else dense.logits.softmax(2)
        for b in range(p.shape[0]):
            for i in range(p.shape[1]):
                label = targets.labels[ground[b, i]] if ground[b, i] >= 0 else 0
                scores.append(p[b, i, label if p.shape[2] > 1 else 0])
    box = ground.clone()
    for x in (student, teacher):
        if x.valid is not None:
            box[~x.valid.expand_as(box)] = -1
    return 1.5 * sum(levels) / len(levels), 4 * ranks(
        student_scores, teacher_scores, box.flatten(), None if omega is None else omega[0]
    )


def values(terms):
    return terms["kd_pfi_features"].item(), terms["kd_pfi_ranks"].item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("predictions", ["probabilities", "logits"])
@pytest.mark.parametrize("count", [0, 4])
@KINDS
def test_equals_the_definition(seed, predictions, count, options):
    student, teacher = both(seed, **options)
    features = maps(seed), maps(seed + 5)
    ground, targets = assigned(seed, count=count), truth(seed, count=count)
    loss = built(PFI, predictions=predictions)
    terms = loss(*features, targets, dense=(student, teacher), assigned=ground)
    expected = definition(student, teacher, features, targets, ground, predictions)
    assert values(terms) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def scores(n=9, groups=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    box = torch.randint(-2, groups, (n,), generator=generator)
    student = random((n,), seed + 1, dtype).requires_grad_()
    return student, random((n,), seed + 2, dtype), box


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [0, 1, 9])
def test_ranks(seed, n):
    student, teacher, box = scores(n, seed=seed)
    weights = torch.rand(4, dtype=torch.float64)
    for given in (None, weights):
        loss = F.rank_loss(student, teacher, box, given)
        expected = ranks(student, teacher, box, given)
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-14)
        (slope,) = torch.autograd.grad(loss, student)
        assert slope.isfinite().all()
    assert F.rank_loss(student, teacher, box, num_boxes=7) == F.rank_loss(student, teacher, box)


def test_a_constant_for_a_ground_truth_and_the_order_change_nothing():
    student, teacher, box = scores()
    shift = torch.tensor([5.0, -3, 0, 9])[box.clamp(min=0)]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    plain = F.rank_loss(student, teacher, box).item()
    assert F.rank_loss(student + shift, teacher - shift, box).item() == pytest.approx(plain)
    assert F.rank_loss(student[order], teacher[order], box[order]).item() == pytest.approx(plain)
    assert F.rank_loss(student + 1e3, teacher, box).item() == pytest.approx(plain)  # no overflow


def test_smooth():
    student, teacher, box = scores()
    assert torch.autograd.gradcheck(lambda x: F.rank_loss(x, teacher, box), student)
    s, t = maps()[0], maps(4)[0]
    p_s, p_t = random((2, 4, 3, 4), 1).requires_grad_(), random((2, 4, 3, 4), 2)
    for predictions in ("probabilities", "logits"):

        def loss(x, p, predictions=predictions):
            return F.prediction_guided_loss(
                x, t.detach(), p, p_t, predictions=predictions, detach=False
            )

        assert torch.autograd.gradcheck(loss, (s, p_s))


def test_the_difference_is_a_weight_or_pushes():
    s, t = maps()[0], maps(4)[0]
    p_s, p_t = (random((2, 4, 3, 4), i).requires_grad_() for i in (1, 2))
    held = F.prediction_guided_loss(s, t, p_s, p_t)
    pushed = F.prediction_guided_loss(s, t, p_s, p_t, detach=False)
    assert held == pushed > 0
    assert torch.autograd.grad(held, (t, p_s, p_t), allow_unused=True) == (None, None, None)
    slopes = torch.autograd.grad(pushed, (t, p_t, p_s), allow_unused=True)
    assert slopes[:2] == (None, None) and slopes[2].abs().sum() > 0


def test_option_of_the_class():
    student, teacher = both()
    features, facts = (maps(), maps(3)), {"dense": (student, teacher)}
    held = built(PFI, ranks=0)(*features, **facts)["kd_pfi_features"]
    pushed = built(PFI, ranks=0, detach=False)(*features, **facts)["kd_pfi_features"]
    assert torch.autograd.grad(held, student.logits, allow_unused=True) == (None,)
    assert torch.autograd.grad(pushed, student.logits)[0].abs().sum() > 0


def test_identical():
    """Same maps, or same predictions: 0. Same scores: 0."""
    student, teacher = both()
    facts = {"assigned": assigned()}
    one, other = maps(), maps(3)
    assert built(PFI)(one, one, truth(), dense=(student, teacher), **facts)["kd_pfi_features"] == 0
    terms = built(PFI)(one, other, truth(), dense=(student, student), **facts)
    assert values(terms) == (0, 0)
    finite(terms, *one, student.logits)


def test_the_teacher_gets_no_gradient():
    student, teacher = both()
    one, other = maps(), maps(3)
    facts = {"dense": (student, teacher), "assigned": assigned()}
    total = sum(built(PFI, detach=False)(one, other, truth(), **facts).values())
    slopes = torch.autograd.grad(total, [*leaves(teacher), *other], allow_unused=True)
    assert all(x is None for x in slopes)


@KINDS
def test_invalid_rows_do_not_count_whatever_stands_there(options):
    student, teacher = both(**options)
    valid = torch.arange(32) % 3 != 0
    student = replace(student, valid=valid)
    broken = replace(student, logits=torch.where(valid[:, None], student.logits, -math.inf))
    features, ground = (maps(), maps(3)), assigned()
    terms = built(PFI, detach=False)(*features, truth(), dense=(broken, teacher), assigned=ground)
    expected = definition(student, teacher, features, truth(), ground)
    assert values(terms) == pytest.approx(expected, rel=1e-9)
    finite(terms, student.logits)


def test_levels_that_the_head_or_the_maps_lack():
    """A level of the head alone, one of the maps alone, and a grid a row larger than its map."""
    grids = (Grid(4, 2, 2, 1), Grid(8, 4, 4, 2))
    student, teacher = both(grids=grids)
    features = maps(), maps(3)
    value = built(PFI, ranks=0)(*features, dense=(student, teacher))["kd_pfi_features"]
    p = [x.probabilities()[:, 4:].reshape(2, 4, 4, -1)[:, :3] for x in (student, teacher)]
    expected = 1.5 * guided(features[0][0], features[1][0], *p)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    lone = both(grids=grids[:1])
    with pytest.raises(ValueError, match=r"one of the maps' strides \[8.*got \[4\]"):
        built(PFI, ranks=0)(*features, dense=lone)


def test_robust():
    student, teacher = both()
    features, targets = (maps(), maps(3)), truth()
    omega = torch.rand(2, 4, dtype=torch.float64)
    facts = {"dense": (student, teacher), "assigned": assigned()}
    loss = built(PFI, robust=True)
    plain = built(PFI)(*features, targets, **facts)
    ones = loss(*features, targets, omega=torch.ones_like(omega), **facts)
    assert values(ones) == pytest.approx(values(plain), rel=1e-6)
    terms = loss(*features, targets, omega=omega, **facts)
    # All boxes are below 2 * 14 * 8 pixels: their own level is the first.
    expected = definition(student, teacher, features, targets, facts["assigned"], omega=omega)
    assert values(terms) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e3])
@pytest.mark.parametrize("count", [0, 4])
@KINDS
def test_finite(scale, count, options):
    student, teacher = both(scale=scale, dtype=torch.float32, **options)
    zeros = [torch.zeros_like(x).requires_grad_() for x in maps(dtype=torch.float32)]
    facts = {"dense": (student, teacher), "assigned": assigned(count=count)}
    for features in (zeros, maps(dtype=torch.float32)):
        terms = built(PFI, detach=False)(features, zeros, truth(count=count), **facts)
        finite(terms, *features, student.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    student, teacher = (cast(x, dtype) for x in both(dtype=torch.float32))
    features = [[x.detach().to(dtype) for x in maps(i)] for i in (0, 3)]
    facts, targets = {"assigned": assigned()}, truth()
    with NoFloat64():
        terms = built(PFI)(*features, targets, dense=(student, teacher), **facts)
    wide = cast(student, torch.float64), cast(teacher, torch.float64)
    features = [[x.double() for x in y] for y in features]
    exact = built(PFI)(*features, targets, dense=wide, **facts)
    assert all(x.dtype == torch.float32 for x in terms.values())
    assert values(terms) == pytest.approx(values(exact), rel=1e-4)


def test_one_graph_and_no_wait():
    student, teacher = both(dtype=torch.float32)
    loss, targets = built(PFI), truth()
    facts = {"dense": (student, teacher), "assigned": assigned()}
    features = maps(dtype=torch.float32), maps(3, dtype=torch.float32)
    with NoHostSync():
        plain = loss(*features, targets, **facts)
    graphs = Graphs()
    loss.compile(fullgraph=True, backend=graphs)
    assert values(loss(*features, targets, **facts)) == pytest.approx(values(plain), rel=1e-6)
    assert graphs.count == 1


def test_what_is_missing_is_named():
    assert PFI().needs == {"dense", "assigned", "targets"} and PFI(ranks=0).needs == {"dense"}
    features = maps(), maps(3)
    with pytest.raises(ValueError, match="assigned: PFI expected"):
        built(PFI)(*features, truth(), dense=both())
    s = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match=r"student_logits: expected shape \(1, 4, 3, 3\)"):
        F.prediction_guided_loss(s, s, torch.zeros(1, 5, 3, 3), torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match=r"box: expected shape \(3,\)"):
        F.rank_loss(torch.zeros(3), torch.zeros(3), torch.zeros(2).long())


def test_it_resumes():
    features = maps(channels=5, dtype=torch.float32), maps(dtype=torch.float32)
    facts = {"dense": both(), "assigned": assigned()}
    loss, again = built(PFI, student=5), built(PFI, student=5, seed=1)
    loss(*features, truth(), **facts)
    loss.calibrate({"ranks": 0.5})
    again.load_state_dict(loss.state_dict())
    assert again.step == 1
    assert values(again(*features, truth(), **facts)) == values(loss(*features, truth(), **facts))
    assert not list(built(PFI, student=5, features=0).parameters())
