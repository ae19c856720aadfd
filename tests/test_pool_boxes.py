"""pool_boxes: the mean over the cells of each box, against hand counts and the slow definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from global_kd.ops.dispatch import force
from tests import oracles
from tests.strategies import random, scene, scenes
from tests.watch import Graphs, NoFloat64, NoHostSync, gradient

pytestmark = pytest.mark.usefixtures("every_form")

# A 4 x 4 map at stride 8 whose cell (y, x) holds 10 y + x: the mean tells which cells were read.
GRID = torch.tensor([[10.0 * y + x for x in range(4)] for y in range(4)]).reshape(1, 1, 4, 4)
BY_HAND = [
    pytest.param([0, 0, 32, 32], 16.5, id="the whole canvas"),
    pytest.param([8, 16, 16, 24], 21.0, id="exactly one cell"),
    pytest.param([8, 0, 24, 8], 1.5, id="two cells, edges on the grid: the end cell stays out"),
    pytest.param([8, 0, 24.5, 8], 2.0, id="half a pixel more takes the next column"),
    pytest.param([7.5, 0, 16, 8], 0.5, id="half a pixel less takes the column before"),
    pytest.param([9, 9, 10, 10], 11.0, id="narrower than a cell"),
    pytest.param([12, 12, 12, 12], 11.0, id="a point within a cell"),
    pytest.param([16, 8, 16, 8], 12.0, id="a point on the grid: the cell to its right and below"),
    pytest.param([4, 0, 4, 32], 15.0, id="zero width keeps its full height"),
    pytest.param([-20, 0, 8, 8], 0.0, id="crosses the left border: clipped, never mirrored"),
    pytest.param([24, 24, 90, 90], 33.0, id="crosses the right and bottom border"),
    pytest.param([32, 0, 40, 8], 3.0, id="starts on the right border: the last column"),
    pytest.param([32, 32, 32, 32], 33.0, id="a point in the far corner: the last cell"),
    pytest.param([500, 0, 600, 8], 3.0, id="wholly to the right: the last column"),
    pytest.param([0, 500, 8, 600], 30.0, id="wholly below: the last row"),
    pytest.param([-90, -90, -50, -50], 0.0, id="wholly above and left: the first cell"),
    pytest.param([-100, -100, 500, 500], 16.5, id="larger than the canvas: all cells"),
]


@pytest.mark.parametrize(("box", "mean"), BY_HAND)
def test_by_hand(box, mean):
    pooled = F.pool_boxes(GRID, torch.tensor([box], dtype=torch.float32), torch.tensor([0]), 8)
    assert pooled.tolist() == [[mean]]


@pytest.mark.parametrize(("box", "mean"), BY_HAND)
def test_the_slow_definition_agrees_by_hand(box, mean):
    """The oracle has to earn its trust on the same cases."""
    assert oracles.pool_boxes(GRID, torch.tensor([box]), [0], 8).tolist() == [[mean]]


def test_each_row_reads_its_own_image():
    features = torch.cat([GRID, GRID + 100])
    boxes = torch.tensor([[8.0, 0, 16, 8]] * 3)
    pooled = F.pool_boxes(features, boxes, torch.tensor([1, 0, 1]), 8)
    assert pooled.flatten().tolist() == [101.0, 1.0, 101.0]


@given(scenes())
def test_equals_the_slow_definition(scene):
    pooled = F.pool_boxes(scene.student, scene.boxes, scene.image_index, scene.stride)
    slow = oracles.pool_boxes(scene.student, scene.boxes, scene.image_index, scene.stride)
    assert pooled.dtype == torch.float64
    torch.testing.assert_close(pooled, torch.from_numpy(slow), rtol=1e-10, atol=1e-10)


@given(scenes(dtype=torch.float32))
def test_equals_the_slow_definition_in_float32(scene):
    pooled = F.pool_boxes(scene.student, scene.boxes, scene.image_index, scene.stride)
    slow = oracles.pool_boxes(scene.student, scene.boxes, scene.image_index, scene.stride)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.from_numpy(slow).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """4096 cells of 300: their sum overflows float16 and stalls in bfloat16, their mean is 300."""
    features = torch.full((1, 2, 64, 64), 300.0, dtype=dtype)
    pooled = F.pool_boxes(features, torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([0]), 1)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.full((1, 2), 300.0), rtol=1e-5, atol=0)


def test_float64_boxes_do_not_widen_float32_features():
    """Boxes that come from numpy are float64; the rows keep the width of the features."""
    s = scene(dtype=torch.float32)
    pooled = F.pool_boxes(s.student, s.boxes.double(), s.image_index, s.stride)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, F.pool_boxes(s.student, s.boxes, s.image_index, s.stride))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_large_mean_does_not_drown_the_box(sign):
    """Mean 1000 times the spread, far from the origin: what a running sum over the map loses."""
    features = (sign * 1000 + random((2, 3, 200, 336), 0)).float()
    boxes = torch.tensor(
        [
            [1336.0, 792, 1344, 800],  # two cells by two in the far corner
            [1340.0, 796, 1344, 800],  # the very last cell
            [700.0, 420, 720, 470],
            [0.0, 0, 1344, 800],  # everything
            [0.0, 790, 1344, 800],  # a long thin strip at the bottom
        ]
    )
    images = torch.tensor([1, 1, 0, 1, 0])
    pooled = F.pool_boxes(features, boxes, images, 4)
    exact = torch.from_numpy(oracles.pool_boxes(features, boxes, images, 4))
    assert ((pooled.double() - exact).abs() / exact.abs()).max() < 1e-5


def test_another_image_does_not_leak_in():
    """inf (an overflow) in one image of the batch stays in that image."""
    features = random((2, 2, 6, 6), 0, torch.float32)
    box, image = torch.tensor([[16.0, 16, 32, 32]]), torch.tensor([1])
    clean = F.pool_boxes(features, box, image, 8)
    features[0] = float("inf")
    assert torch.equal(F.pool_boxes(features, box, image, 8), clean)


@pytest.mark.parametrize("column", [0, 60], ids=["before the box", "after the box"])
def test_an_outlier_in_the_same_row_does_not_drown_the_box(column):
    """A cell 10 000 times the spread, as some backbones have, beside a box on the same row."""
    features = random((1, 2, 8, 64), 0, torch.float32)
    features[0, :, 3, column] = 1e4
    box, image = torch.tensor([[20.0, 3, 40, 4]]), torch.tensor([0])
    exact = torch.from_numpy(oracles.pool_boxes(features, box, image, 1)).float()
    torch.testing.assert_close(F.pool_boxes(features, box, image, 1), exact, rtol=0, atol=1e-3)


@given(scenes(min_boxes=1), st.integers(1, 5), st.integers(1, 5))
def test_growing_the_canvas_moves_no_box(scene, right, bottom):
    """Promise 7: padding to the right or at the bottom leaves a box its cells."""
    height, width = scene.size
    limit = torch.tensor([width, height, width, height]) * scene.stride
    boxes = torch.minimum(scene.boxes, limit)
    inside = (boxes[:, :2] < limit[:2]).all(1)
    boxes, images = boxes[inside], scene.image_index[inside]
    grown = torch.nn.functional.pad(scene.student, (0, right, 0, bottom), value=1e6)
    torch.testing.assert_close(
        F.pool_boxes(grown, boxes, images, scene.stride),
        F.pool_boxes(scene.student, boxes, images, scene.stride),
    )


@given(scenes(min_boxes=1), st.randoms(use_true_random=False))
def test_permuting_images_and_rows_permutes_the_answer(scene, shuffle):
    batch, rows = len(scene.student), len(scene.boxes)
    images, order = list(range(batch)), list(range(rows))
    shuffle.shuffle(images)
    shuffle.shuffle(order)
    place = torch.empty(batch, dtype=torch.int64)
    place[images] = torch.arange(batch)  # old image -> new position
    pooled = F.pool_boxes(scene.student, scene.boxes, scene.image_index, scene.stride)
    moved = F.pool_boxes(
        scene.student[images], scene.boxes[order], place[scene.image_index[order]], scene.stride
    )
    torch.testing.assert_close(moved, pooled[order])


def test_no_boxes_give_no_rows_that_back_propagate():
    features = random((2, 3, 4, 4), 0).requires_grad_()
    pooled = F.pool_boxes(features, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 8)
    assert pooled.shape == (0, 3)
    (grad,) = gradient(pooled.sum(), features)
    assert grad.abs().sum() == 0


def test_channels_last_and_sliced_maps():
    """Strides of the memory layout are not the reader's concern."""
    s = scene()
    expected = F.pool_boxes(s.student, s.boxes, s.image_index, s.stride)
    wide = torch.cat([s.student, s.student], 1)[:, : s.student.shape[1]]
    last = s.student.contiguous(memory_format=torch.channels_last)
    for features in (wide, last):
        torch.testing.assert_close(
            F.pool_boxes(features, s.boxes, s.image_index, s.stride), expected
        )


@given(scenes(max_boxes=3))
def test_gradcheck(scene):
    features = scene.student[:, :2, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f: F.pool_boxes(f, scene.boxes, scene.image_index, scene.stride), features
    )


def test_gradient_by_hand():
    """Every cell of a box of n cells gets 1/n; overlapping boxes add."""
    features = torch.zeros(1, 1, 3, 3, requires_grad=True)
    boxes = torch.tensor([[0.0, 0, 16, 8], [8.0, 0, 16, 16]])
    (grad,) = gradient(F.pool_boxes(features, boxes, torch.tensor([0, 0]), 8).sum(), features)
    assert grad[0, 0].tolist() == [[0.5, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]


def test_autocast_keeps_float32():
    s = scene(dtype=torch.float32)
    expected = F.pool_boxes(s.student, s.boxes, s.image_index, s.stride)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = F.pool_boxes(s.student, s.boxes, s.image_index, s.stride)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_float64_on_the_way(dtype):
    s = scene(dtype=torch.float32)
    features = s.student.to(dtype).requires_grad_()
    with NoFloat64():
        F.pool_boxes(features, s.boxes, s.image_index, s.stride).sum().backward()
    assert features.grad.dtype == dtype


def test_no_host_synchronisation():
    s = scene(dtype=torch.float32)
    with NoHostSync(), force("definition"):  # what an accelerator runs without Triton
        F.pool_boxes(s.student.requires_grad_(), s.boxes, s.image_index, s.stride).sum().backward()


def test_compiles_once_for_every_number_of_boxes():
    torch._dynamo.reset()
    graphs = Graphs()
    pool = torch.compile(F.pool_boxes, fullgraph=True, backend=graphs, dynamic=True)
    for count in (5, 7, 12, 9, 10):  # equal to no other size, or the compiler ties the two
        s = scene(count=count, seed=count, dtype=torch.float32)
        features = s.student.requires_grad_()
        pooled = pool(features, s.boxes, s.image_index, s.stride)
        pooled.sum().backward()
        expected = F.pool_boxes(s.student, s.boxes, s.image_index, s.stride)
        torch.testing.assert_close(pooled, expected)
    assert graphs.count == 1


def test_backward_of_overlapping_boxes_is_deterministic_on_several_threads():
    """Many boxes share columns; their gradients must add up in the same order every time."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 64, 48, 64, generator=generator, requires_grad=True)
    corner = torch.rand(300, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 150 * torch.rand(300, 2, generator=generator)], dim=1)
    image_index = torch.randint(0, 2, (300,), generator=generator)
    upstream = torch.randn(300, 64, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = set()
        for _ in range(8):
            pooled = F.pool_boxes(features, boxes, image_index, 4)
            (gradient,) = torch.autograd.grad(pooled, features, upstream)
            gradients.add(gradient.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(gradients) == 1
