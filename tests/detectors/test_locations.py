"""Rows of one head beside those of another, and the cells that stand for a box, by brute force."""

import pytest
import torch

from global_kd import Targets
from global_kd.detectors import rt_detr
from global_kd.detectors.locations import beside, cells_of, rows_of
from global_kd.step import Dense, Grid


def places(grids):
    """Stride, row and column of each location."""
    return [(g.stride, y, x) for g in grids for y in range(g.height) for x in range(g.width)]


def test_rows_and_cells_are_in_one_order():
    grids = (Grid(8, 3, 2), Grid(16, 1, 2))
    maps = [torch.zeros(1, 3, g.height, g.width) for g in grids]
    for x, g in zip(maps, grids):
        for row in range(g.height):
            for column in range(g.width):
                x[0, :, row, column] = torch.tensor([g.stride, row, column])
    assert rows_of(maps)[0].tolist() == [[float(v) for v in place] for place in places(grids)]
    expected = [[x * s, y * s, (x + 1) * s, (y + 1) * s] for s, y, x in places(grids)]
    assert cells_of(grids, maps[0].half()).tolist() == expected
    assert cells_of(grids, maps[0].half()).dtype == torch.float32


@pytest.mark.parametrize(
    "student, teacher, all_known",
    [
        ([(8, 4, 5), (16, 2, 3)], [(8, 4, 5), (16, 2, 3)], True),
        ([(8, 4, 5), (16, 2, 3)], [(8, 8, 6), (16, 4, 3), (32, 2, 2)], True),  # padded, a P6 more
        ([(4, 4, 6), (8, 2, 3)], [(8, 2, 3), (16, 1, 2)], False),  # only the student has P2
        ([(8, 4, 5), (16, 2, 3)], [(8, 4, 4), (16, 2, 2)], False),
    ],
)
def test_rows_belong_together_by_stride_and_cell(student, teacher, all_known):
    student, teacher = (tuple(Grid(*x) for x in side) for side in (student, teacher))
    mine, theirs = places(student), places(teacher)
    location = torch.arange(len(mine)).flip(0)
    found, rows = beside(student, teacher, torch.zeros_like(location), location)
    assert (rows is None) == all_known
    kept = location if rows is None else location[rows]
    assert kept.tolist() == [i for i in location.tolist() if mine[i] in theirs]
    assert [theirs[j] for j in found.tolist()] == [mine[i] for i in kept.tolist()]


def test_rows_that_stand_for_nothing_in_the_teacher_are_left_out():
    student, teacher = (Grid(8, 2, 2),), (Grid(8, 2, 3),)
    valid = torch.tensor([False, True, True, True, True, True])
    location = torch.tensor([0, 3, 0, 1])
    found, rows = beside(student, teacher, torch.zeros_like(location), location, valid)
    assert (found.tolist(), rows.tolist()) == ([4, 1], [1, 3])


def test_heads_without_a_common_stride_are_named():
    index = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"no level of equal stride: .*\[8\], the teacher's \[16\]"
    ):
        beside((Grid(8, 1, 1),), (Grid(16, 1, 1),), index, index)


def dense_of(grids, images=2, classes=3):
    """Boxes around their own cells, some cells standing for nothing."""
    g = torch.Generator().manual_seed(0)
    count = sum(grid.rows for grid in grids)
    cells = cells_of(grids, torch.zeros(1, dtype=torch.float64))
    boxes = cells + 8 * torch.randn(images, count, 4, generator=g, dtype=torch.float64)
    boxes = torch.cat([boxes[..., :2], torch.maximum(boxes[..., :2] + 1, boxes[..., 2:])], dim=2)
    logits = torch.randn(images, count, classes, generator=g, dtype=torch.float64)
    valid = torch.rand(count, generator=g) < 0.8
    return Dense(logits.requires_grad_(), grids, boxes=boxes.requires_grad_(), valid=valid)


def iou(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(0, width) * max(0, height)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return shared / (sum(areas) - shared)


def test_the_cells_that_stand_for_a_box_are_those_that_fit_it_best():
    grids = (Grid(8, 8, 10), Grid(16, 4, 5))
    dense = dense_of(grids)
    boxes = [[3.0, 5, 40, 44], [20, 20, 70, 60], [9, 9, 25, 17], [13, 13, 14, 14]]
    index = [1, 0, 1, 0]
    truth = Targets(torch.tensor(boxes), torch.zeros(4, dtype=torch.int64), torch.tensor(index))
    sampled = rt_detr.sample(dense, truth)
    image, location, told = sampled.raw
    assert told == grids
    assert sampled.box.tolist() == [r for r in range(4) for _ in range(9)]
    assert image.tolist() == [i for i in index for _ in range(9)]
    assert torch.equal(sampled.logits, dense.logits[image, location])
    centres = [((x + 0.5) * s, (y + 0.5) * s) for s, y, x in places(grids)]
    for r, (box, i) in enumerate(zip(boxes, index)):
        chosen = location.view(4, 9)[r].tolist()
        fit = {
            n: iou(box, dense.boxes[i, n].tolist())
            for n, (x, y) in enumerate(centres)
            if dense.valid[n] and box[0] < x < box[2] and box[1] < y < box[3]
        }
        best = sorted(fit, key=lambda n: -fit[n])[:9]
        if not best:  # between the centres of cells: the nearest
            middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            away = {
                n: (x - middle[0]) ** 2 + (y - middle[1]) ** 2
                for n, (x, y) in enumerate(centres)
                if dense.valid[n]
            }
            best = [min(away, key=away.get)]
        assert chosen == best + best[:1] * (9 - len(best))
    lengths = [len(set(x)) for x in location.view(4, 9).tolist()]
    assert lengths[0] == lengths[1] == 9
    assert 1 < lengths[2] < 9
    assert lengths[3] == 1


def test_without_boxes_there_are_no_cells_and_a_zero_goes_back():
    dense = dense_of((Grid(8, 2, 3),))
    nothing = torch.zeros(0, dtype=torch.int64)
    sampled = rt_detr.sample(dense, Targets(torch.zeros(0, 4), nothing, nothing))
    assert sampled.logits.shape == (0, 3)
    assert len(sampled.box) == 0
    sampled.logits.sum().backward()
    assert torch.equal(dense.logits.grad, torch.zeros_like(dense.logits))
    assert dense.boxes.grad is None


def test_a_grid_of_fewer_cells_than_nine_is_enough():
    dense = dense_of((Grid(32, 2, 2),))
    box, zero = torch.tensor([[0.0, 0, 64, 64]]), torch.zeros(1, dtype=torch.int64)
    sampled = rt_detr.sample(dense, Targets(box, zero, zero))
    assert set(sampled.raw[1].tolist()) == set(dense.valid.nonzero()[:, 0].tolist())
