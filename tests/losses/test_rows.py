"""What row-wise losses share: which locations count, their weights, and two-point logits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from global_kd import Targets
from global_kd.losses import SoftLabels
from global_kd.losses.rows import both_heads, count_positives, rows_that_count
from global_kd.step import Dense, Grid, Step
from tests import oracles
from tests.losses.dense_heads import GRIDS, assigned, both, built, head, maps, truth
from tests.strategies import random


def step(**facts) -> Step:
    return Step(maps(), maps(), (8.0, 16.0), **facts)


def test_a_row_weighs_what_its_box_does_on_the_level_of_its_size():
    """Boxes of up to 224 px belong to stride 8, larger ones to stride 16; no box: 1."""
    boxes = torch.tensor([[0.0, 0, 30, 30], [0, 0, 400, 400], [5, 5, 60, 40]])
    targets = Targets(boxes, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))
    omega = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    given = step(targets=targets, omega=omega)
    rows = torch.tensor([2, -1, 1, 0, 1, -1])
    weights = built(SoftLabels, robust=True).row_weights(given, rows)
    assert torch.equal(weights, torch.tensor([0.3, 1.0, 0.5, 0.1, 0.5, 1.0]))
    assert built(SoftLabels).row_weights(given, rows) is None
    empty = Targets(boxes[:0], *torch.zeros(2, 0, dtype=torch.int64))
    nobody = step(targets=empty, omega=omega[:, :0])
    nothing = built(SoftLabels, robust=True).row_weights(nobody, torch.tensor([-1, -1]))
    assert torch.equal(nothing, torch.ones(2))


def test_location_weights_are_those_of_the_cells():
    """1 outside boxes, the largest of the boxes on a cell inside; levels the maps lack weigh 1."""
    targets, omega = truth(), torch.rand(2, 4, dtype=torch.float64)
    grids = (*GRIDS, Grid(32, 1, 2, 2))
    dense = head(grids=grids)
    loss = built(SoftLabels, robust=True)
    weights = loss.location_weights(step(targets=targets, omega=omega), dense)
    expected = []
    for image in range(2):
        for level, grid in enumerate(grids):
            for y in range(grid.height):
                for x in range(grid.width):
                    on = [
                        omega[level, r].item()
                        for r in range(4)
                        if level < 2
                        and targets.image_index[r] == image
                        and (y, x)
                        in oracles.cells(targets.boxes[r], grid.stride, grid.height, grid.width)
                    ]
                    expected += [max(on, default=1.0)] * grid.anchors
    assert weights.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert built(SoftLabels).location_weights(step(targets=targets), dense) is None


@pytest.mark.parametrize("size", [(2, 3), (5, 6)])
def test_location_weights_where_a_grid_is_cut_or_larger(size):
    targets = Targets(torch.tensor([[0.0, 0, 32, 24]]), torch.tensor([0]), torch.tensor([0]))
    dense = head(grids=(Grid(8, *size, 1),), batch=2)
    loss = built(SoftLabels, robust=True)
    facts = {"targets": targets, "omega": torch.full((2, 1), 0.25)}
    first, second = loss.location_weights(step(**facts), dense).view(2, *size)
    expected = torch.ones(size)
    expected[:3, :4] = 0.25  # what the maps cover
    assert torch.equal(first, expected) and (second == 1).all()


def test_which_rows_count():
    student, teacher = both()
    student = replace(student, valid=torch.arange(32) != 3)
    teacher = replace(teacher, valid=(torch.arange(64) != 40).view(2, 32))
    ground = assigned()
    counts = rows_that_count(built(SoftLabels, levels=[16]), student, teacher, assigned=ground)
    for image in range(2):
        for row in range(32):
            expected = row >= 24 and row != 3 and 32 * image + row != 40
            assert counts[image, row] == (expected and ground[image, row] != -2)
    everything = rows_that_count(built(SoftLabels), student, teacher)
    assert (~everything).nonzero().tolist() == [[0, 3], [1, 3], [1, 8]]


def test_positives_are_counted():
    ground, loss = assigned(), built(SoftLabels)
    counts, scores = torch.ones(2, 32, dtype=torch.bool), torch.full((2, 32), 0.25)
    assert count_positives(loss, counts, ground, scores) == (ground >= 0).sum()
    assert count_positives(loss, counts, None, scores) == 16
    assert count_positives(loss, ~counts, ground, scores) == 1
    assert count_positives(loss, ~counts, None, scores) == 1


def test_unlike_heads_are_refused():
    student, teacher = head(), head(grids=(Grid(8, 3, 4, 2),))
    with pytest.raises(ValueError, match="pair_dense"):
        both_heads(built(SoftLabels), step(dense=(student, teacher)))
    with pytest.raises(ValueError, match=r"Dense.bins of both heads, but got None; do this"):
        both_heads(built(SoftLabels), step(dense=(student, student)), bins="do this")


def two_point(logits, background):
    grid = (Grid(8, 1, logits.shape[1], 1),)
    return Dense(logits, grid, activation="softmax", background=background)


@pytest.mark.parametrize("background", [None, 0, -1])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_two_point_logits_of_a_softmax(background, scale):
    logits = scale * random((2, 5, 4), 3)
    z = two_point(logits, background).binary_logits()
    expected = []
    for row in logits.view(-1, 4):
        for k in range(4):
            rest = sum(math.exp(row[j] - row[k]) for j in range(4) if j != k)
            if background is None or k != background % 4:
                expected.append(-math.log(rest))
    assert z.flatten().tolist() == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(z.sigmoid(), two_point(logits, background).probabilities())


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_two_point_logits_when_sure(columns):
    """At +-100 and with one column alone: finite, and so is what a cross-entropy makes of it."""
    logits = torch.tensor([100.0, -100.0, 0.0])[:columns].view(1, 1, -1).requires_grad_()
    z = two_point(logits, None).binary_logits()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, torch.ones_like(z) / 2)
    (slope,) = torch.autograd.grad(loss, logits)
    assert z.isfinite().all() and slope.isfinite().all()


def test_two_point_gradients():
    logits = random((1, 4, 3), 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: two_point(x, 0).binary_logits(), logits)
