"""Overlap of paired boxes: against plain arithmetic, and where areas vanish."""

from __future__ import annotations

import pytest
import torch

from global_kd.ops.boxes import diou, giou, iou, pairwise_iou

ALL = pytest.mark.parametrize("overlap", [iou, giou, diou])


def by_hand(kind, a, b):
    def area(x1, y1, x2, y2):
        return max(x2 - x1, 0.0) * max(y2 - y1, 0.0)

    inter = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - inter
    low, high = [min(p) for p in zip(a[:2], b[:2])], [max(p) for p in zip(a[2:], b[2:])]
    value = inter / union if union else 0.0
    if kind is giou:
        around = area(*low, *high)
        value -= (around - union) / around if around else 0.0
    if kind is diou:
        diagonal = sum((p - q) ** 2 for p, q in zip(low, high))
        centres = sum((a[i] + a[i + 2] - b[i] - b[i + 2]) ** 2 / 4 for i in (0, 1))
        value -= centres / diagonal if diagonal else 0.0
    return value


def boxes(n, seed):
    x = 20 * torch.rand(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], 1)


@ALL
def test_equals_plain_arithmetic(overlap):
    a, b = boxes(50, 1), boxes(50, 2)
    a[0, 2:] = a[0, :2]  # no area
    b[1] = a[1]
    b[2] = a[2] + 100  # apart
    expected = [by_hand(overlap, p, q) for p, q in zip(a.tolist(), b.tolist())]
    assert overlap(a, b).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(overlap(a[:, None], b[None])[3, 4], overlap(a[3], b[4]))


@ALL
def test_smooth_where_boxes_differ(overlap):
    a, b = boxes(8, 3).requires_grad_(), boxes(8, 4).requires_grad_()
    assert torch.autograd.gradcheck(overlap, (a, b))


@ALL
@pytest.mark.parametrize(
    "box",
    [
        pytest.param([3.0, 3, 3, 3], id="a point"),
        pytest.param([1.0, 2, 9, 2], id="a line"),
        pytest.param([5.0, 5, 2, 2], id="inside out"),
        pytest.param([0.0, 0, 4, 4], id="equal"),
    ],
)
def test_finite_where_areas_vanish(overlap, box):
    a = torch.tensor([box, box], requires_grad=True)
    b = torch.tensor([box, [0.0, 0.0, 4.0, 4.0]])
    value = overlap(a, b)
    (slope,) = torch.autograd.grad(value.sum(), a)
    assert value.isfinite().all() and slope.isfinite().all()


@ALL
def test_areas_beyond_half_precision(overlap):
    a, b = torch.tensor([[0.0, 0, 800, 1200]]), torch.tensor([[16.0, 0, 816, 1200]])
    assert overlap(a.half(), b.half()).item() == pytest.approx(overlap(a, b).item(), rel=1e-6)


@pytest.mark.parametrize("counts", [(3, 5), (0, 5), (3, 0)])
def test_all_with_all(counts):
    a, b = boxes(counts[0], 1), boxes(counts[1], 2)
    expected = [[by_hand(iou, p, q) for q in b.tolist()] for p in a.tolist()]
    found = pairwise_iou(a, b)
    assert found.shape == counts
    assert found.tolist() == [pytest.approx(row, rel=1e-12) for row in expected]
