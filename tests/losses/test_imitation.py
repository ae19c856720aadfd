"""imitation_loss: weighted squared error inside boxes, plain squared error outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import global_kd.functional as F
from global_kd.losses.imitation import LARGEST, scale_of, standardized
from global_kd.ops.dispatch import force
from global_kd.ops.imitation import imitation_terms
from tests import oracles
from tests.strategies import Scene, random, scene, scenes
from tests.watch import Graphs, NoFloat64, NoHostSync, gradient

NORMALIZERS = ("weights", "cells")
pytestmark = pytest.mark.usefixtures("every_form")


def imitate(s: Scene, weights="own", student=None, teacher=None, **options):
    return F.imitation_loss(
        s.student if student is None else student,
        s.teacher if teacher is None else teacher,
        s.boxes,
        s.image_index,
        s.stride,
        s.weights if isinstance(weights, str) else weights,
        **options,
    )


def ones(batch=1, channels=2, size=4):
    """d = 1 in every cell and channel: sums count cells."""
    shape = (batch, channels, size, size)
    return torch.zeros(shape), torch.ones(shape)


def by_hand(boxes, weights=None, **options):
    """The terms (factors 1) of d = 1 on one 4 x 4 map of 2 channels at stride 8."""
    fg, bg = F.imitation_loss(
        *ones(),
        torch.tensor(boxes).reshape(-1, 4),
        torch.zeros(len(boxes), dtype=torch.int64),
        8,
        weights if weights is None else torch.tensor(weights),
        **({"foreground": 1.0, "background": 1.0} | options),
    )
    return fg.item(), bg.item()


CELL = [8.0, 8.0, 16.0, 16.0]  # one cell
LEFT, ALL = [0.0, 0.0, 16.0, 32.0], [0.0, 0.0, 32.0, 32.0]  # half of the map, all of it


def test_factors_and_halves_by_hand():
    """d = 1: each term is its factor times C * cells / (2 C cells) = 1/2, whatever the box."""
    assert by_hand([LEFT]) == (0.5, 0.5)
    assert by_hand([CELL]) == (0.5, 0.5)
    assert by_hand([LEFT], foreground=3.0, background=12.0) == (1.5, 6.0)
    fg, bg = F.imitation_loss(*ones(), torch.tensor([LEFT]), torch.tensor([0]), 8)
    assert (fg.item(), bg.item()) == (0.5, 2.0)  # defaults 1 and 4


def test_no_box_and_a_box_over_everything_by_hand():
    """One side is empty: it is 0, the other carries all cells."""
    assert by_hand([]) == (0.0, 0.5)
    assert by_hand([ALL]) == (0.5, 0.0)


def test_weights_by_hand():
    """Left half 0.5, right half 0.25: weighted mean and, by cells, its scale."""
    right = [16.0, 0.0, 32.0, 32.0]
    assert by_hand([LEFT, right], [0.5, 0.25]) == (0.5, 0.0)  # d = 1: the mean is 1 anyhow
    fg, _ = by_hand([LEFT, right], [0.5, 0.25], normalizer="cells")
    assert fg == pytest.approx(0.5 * (0.5 + 0.25) / 2)


def test_overlap_takes_the_largest_weight_by_hand():
    """The cell lies in both boxes; order must not matter."""
    for boxes, weights in (([ALL, CELL], [0.25, 1.0]), ([CELL, ALL], [1.0, 0.25])):
        fg, _ = by_hand(boxes, weights, normalizer="cells")
        assert fg == pytest.approx(0.5 * (15 * 0.25 + 1.0) / 16)
    fg, _ = by_hand([ALL, CELL], [1.0, 0.25], normalizer="cells")
    assert fg == 0.5  # the smaller weight on top hides nothing


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_weight_zero_is_no_background_by_hand(normalizer):
    """An instance that is not trusted is left alone, neither imitated nor called background."""
    student, teacher = ones()
    student[:, :, :, :2] = 100  # a huge error inside the box only
    fg, bg = F.imitation_loss(
        student,
        teacher,
        torch.tensor([LEFT]),
        torch.tensor([0]),
        8,
        torch.tensor([0.0]),
        background=1.0,
        normalizer=normalizer,
    )
    assert (fg.item(), bg.item()) == (0.0, 0.5)


def test_small_sums_divide_by_one_by_hand():
    """2 C sum(W) < 1 must not blow up: one channel, one cell, weight 0.1 gives 0.1 d^2 / 1."""
    student, teacher = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    fg, bg = F.imitation_loss(
        student, teacher, torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([0]), 8, torch.tensor([0.1])
    )
    assert fg.item() == pytest.approx(0.9) and bg.item() == 0


@given(scenes(), st.sampled_from(NORMALIZERS), st.booleans())
def test_equals_the_slow_definition(s, normalizer, weighted):
    weights = s.weights if weighted else None
    options = {"foreground": 0.7, "background": 2.5, "normalizer": normalizer}
    fg, bg = imitate(s, weights, **options)
    assert fg.dtype == bg.dtype == torch.float64 and fg.dim() == bg.dim() == 0
    slow = oracles.imitation_loss(
        s.student, s.teacher, s.boxes, s.image_index, s.stride, weights, **options
    )
    np.testing.assert_allclose([fg.item(), bg.item()], slow, rtol=1e-10, atol=1e-12)


@given(scenes(dtype=torch.float32))
def test_equals_the_slow_definition_in_float32(s):
    fg, bg = imitate(s)
    assert fg.dtype == bg.dtype == torch.float32
    slow = oracles.imitation_loss(s.student, s.teacher, s.boxes, s.image_index, s.stride, s.weights)
    np.testing.assert_allclose([fg.item(), bg.item()], slow, rtol=1e-5, atol=1e-6)


@given(scenes(min_boxes=1))
def test_marks_the_cells_that_pooling_reads(s):
    """One rule: a map that is 1 where the loss sees foreground pools to 1 in every box."""
    zeros = torch.zeros_like(s.student).requires_grad_()
    fg, _ = imitate(s, None, student=zeros, teacher=torch.ones_like(zeros))
    (grad,) = gradient(fg, zeros)
    pooled = F.pool_boxes((grad != 0).double(), s.boxes, s.image_index, s.stride)
    assert (pooled - 1).abs().max() < 1e-12


@given(scenes(), st.sampled_from(NORMALIZERS))
def test_equal_maps_give_zero_and_finite_gradients(s, normalizer):
    """Invariant 1."""
    student = s.teacher.clone().requires_grad_()
    fg, bg = imitate(s, student=student, normalizer=normalizer)
    (grad,) = gradient(fg + bg, student)
    assert fg == 0 and bg == 0 and (grad == 0).all()


@pytest.mark.parametrize("batch", [0, 1, 3], ids=["no image", "one image", "three images"])
def test_no_boxes_give_a_zero_that_back_propagates(batch):
    student = random((batch, 2, 3, 3), 0).requires_grad_()
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    fg, bg = F.imitation_loss(student, random(student.shape, 1), *none, 8, torch.zeros(0))
    assert fg == 0 and torch.isfinite(bg) and (bg > 0) == (batch > 0)
    assert (gradient(fg, student)[0] == 0).all()


@given(scenes(min_boxes=1))
def test_a_common_scale_of_the_weights_cancels_or_counts(s):
    """Invariant 6: "weights" is a weighted mean, "cells" is linear in the weights."""
    boxes = s.weights.clamp(min=0.25) * 4  # far above the floor of the denominator
    scaled = {n: imitate(s, boxes * 3, normalizer=n)[0] for n in NORMALIZERS}
    plain = {n: imitate(s, boxes, normalizer=n)[0] for n in NORMALIZERS}
    torch.testing.assert_close(scaled["weights"], plain["weights"])
    torch.testing.assert_close(scaled["cells"], 3 * plain["cells"])


@given(scenes())
def test_weights_touch_the_foreground_only(s):
    assert imitate(s)[1] == imitate(s, None)[1] == imitate(s, s.weights * 0)[1]


@given(scenes(), st.sampled_from(NORMALIZERS), st.randoms(use_true_random=False))
def test_order_of_images_and_boxes_does_not_matter(s, normalizer, shuffle):
    """Invariant 10."""
    images, order = list(range(len(s.student))), list(range(len(s.boxes)))
    shuffle.shuffle(images)
    shuffle.shuffle(order)
    place = torch.empty(len(images), dtype=torch.int64)
    place[images] = torch.arange(len(images))
    moved = Scene(
        s.student[images],
        s.teacher[images],
        s.boxes[order],
        place[s.image_index[order]],
        s.weights[order],
        s.stride,
    )
    expected = imitate(s, normalizer=normalizer)
    torch.testing.assert_close(imitate(moved, normalizer=normalizer), expected)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_duplicating_the_batch_changes_nothing(normalizer):
    """Invariant 11: means, not sums."""
    s = scene()
    batch = len(s.student)
    twice = Scene(
        torch.cat([s.student] * 2),
        torch.cat([s.teacher] * 2),
        torch.cat([s.boxes] * 2),
        torch.cat([s.image_index, s.image_index + batch]),
        torch.cat([s.weights] * 2),
        s.stride,
    )
    expected = imitate(s, normalizer=normalizer)
    torch.testing.assert_close(imitate(twice, normalizer=normalizer), expected)


@given(scenes(min_boxes=1), st.integers(1, 4), st.integers(1, 4))
def test_growing_the_canvas_moves_no_box(s, right, bottom):
    """Promise 7 / invariant 8: the foreground keeps its cells, padding joins the background."""
    height, width = s.size
    limit = torch.tensor([width, height, width, height]) * s.stride
    s.boxes = torch.minimum(s.boxes, limit)
    inside = (s.boxes[:, :2] < limit[:2]).all(1)
    s.boxes, s.image_index, s.weights = s.boxes[inside], s.image_index[inside], s.weights[inside]
    fg, bg = imitate(s)
    student, teacher = (
        torch.nn.functional.pad(x, (0, right, 0, bottom)) for x in (s.student, s.teacher)
    )
    fg_grown, bg_grown = imitate(s, student=student, teacher=teacher)
    torch.testing.assert_close(fg_grown, fg)
    # Equal padding adds no error, only cells: the sum behind the mean is the same.
    member, _ = oracles.masks(s.student.shape, s.boxes, s.image_index, s.stride)
    channels, outside = s.student.shape[1], (1 - member).sum()
    added = len(s.student) * ((height + bottom) * (width + right) - height * width)
    before, after = max(1, 2 * channels * outside), max(1, 2 * channels * (outside + added))
    torch.testing.assert_close(bg_grown * after, bg * before)


def test_is_the_decoupled_loss_of_defeat():
    """Invariant 16: without weights, on boxes that end on the grid, factors 3 and 12."""
    student, teacher = random((2, 4, 6, 6), 0), random((2, 4, 6, 6), 1)
    boxes = torch.tensor([[8.0, 8, 32, 24], [16.0, 0, 24, 48], [0.0, 0, 8, 8]])
    images = torch.tensor([0, 0, 1])
    mask = torch.zeros(2, 4, 6, 6)
    mask[0, :, 1:3, 1:4] = 1
    mask[0, :, :, 2] = 1
    mask[1, :, 0, 0] = 1
    error = (student - teacher) ** 2
    expected = (
        3 * (mask * error).sum() / (2 * mask.sum()),
        12 * ((1 - mask) * error).sum() / (2 * (1 - mask).sum()),
    )
    for weights in (None, torch.ones(3)):
        terms = F.imitation_loss(
            student, teacher, boxes, images, 8, weights, foreground=3.0, background=12.0
        )
        torch.testing.assert_close(terms, expected)


@settings(max_examples=12)
@given(scenes(max_boxes=3), st.sampled_from(NORMALIZERS))
def test_gradcheck(s, normalizer):
    student = s.student[:, :2, :4, :4].clone().requires_grad_()
    teacher = s.teacher[:, :2, :4, :4]
    assert torch.autograd.gradcheck(
        lambda x: imitate(s, student=x, teacher=teacher, normalizer=normalizer), student
    )


def test_gradient_equals_the_slope_of_the_slow_definition():
    s = scene(batch=2, channels=2, size=(3, 4), count=3)
    s.student.requires_grad_()
    (grad,) = gradient(sum(imitate(s)), s.student)
    where = (s.boxes, s.image_index, s.stride, s.weights)
    slope = oracles.slope(lambda x: sum(oracles.imitation_loss(x, s.teacher, *where)), s.student)
    torch.testing.assert_close(grad, torch.from_numpy(slope), rtol=1e-6, atol=1e-8)


def test_only_the_student_learns():
    """Invariant 14."""
    s = scene()
    for x in (s.student, s.teacher, s.weights, s.boxes):
        x.requires_grad_()
    sum(imitate(s)).backward()
    assert s.student.grad.abs().sum() > 0
    assert s.teacher.grad is None and s.weights.grad is None and s.boxes.grad is None


@pytest.mark.parametrize(
    "value", [pytest.param(0.0, id="zero maps"), pytest.param(7.0, id="constant maps")]
)
def test_constant_maps_are_finite(value):
    s = scene()
    student = torch.full_like(s.student, value).requires_grad_()
    fg, bg = imitate(s, student=student)
    (grad,) = gradient(fg + bg, student)
    assert torch.isfinite(fg) and torch.isfinite(bg) and torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_squared_and_summed_in_float32(dtype):
    """d = 300: its square overflows float16; 16 384 equal terms stall a bfloat16 sum."""
    student = torch.full((1, 4, 64, 64), 300.0, dtype=dtype, requires_grad=True)
    box, image = torch.tensor([[0.0, 0, 64, 32]]), torch.tensor([0])
    fg, bg = F.imitation_loss(student, torch.zeros_like(student), box, image, 1, background=1.0)
    assert fg.dtype == bg.dtype == torch.float32
    assert fg.item() == pytest.approx(45_000) and bg.item() == pytest.approx(45_000)
    (grad,) = gradient(fg, student)
    assert grad.dtype == dtype and torch.isfinite(grad).all()


@pytest.mark.parametrize("maps", [torch.float32, torch.bfloat16])
def test_autocast_keeps_float32(maps):
    s = scene(channels=16, size=(16, 16), dtype=torch.float32)
    student, teacher = s.student.to(maps), s.teacher.to(maps)
    expected = imitate(s, student=student.float(), teacher=teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = imitate(s, student=student, teacher=teacher)
    assert {x.dtype for x in terms} == {torch.float32}
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)


def test_mixed_precision_of_the_two_nets():
    """A bfloat16 student beside a float32 teacher, as when only one of them runs under autocast."""
    s = scene(dtype=torch.float32)
    mixed = imitate(s, student=s.student.bfloat16())
    expected = imitate(s, student=s.student.bfloat16().float())
    assert {x.dtype for x in mixed} == {torch.float32}
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("watch", [NoFloat64, NoHostSync])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_hot_path(normalizer, watch):
    s = scene(dtype=torch.float32)
    s.student.requires_grad_()
    with watch(), force("definition"):  # what an accelerator runs without Triton
        sum(imitate(s, normalizer=normalizer)).backward()


def test_compiles_once_for_every_number_of_boxes():
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(F.imitation_loss, fullgraph=True, backend=graphs, dynamic=True)
    for count in (5, 7, 12, 9, 10):
        s = scene(count=count, seed=count, dtype=torch.float32)
        s.student.requires_grad_()
        arguments = (s.student, s.teacher, s.boxes, s.image_index, s.stride, s.weights)
        terms = compiled(*arguments)
        sum(terms).backward()
        torch.testing.assert_close(terms, F.imitation_loss(*arguments))
    assert graphs.count == 1


def test_compiles_with_boxes_marked_dynamic():
    """The other way to say it: all sizes fixed but the number of boxes."""
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(F.imitation_loss, fullgraph=True, backend=graphs)
    for count in (5, 11, 7):
        s = scene(count=count, dtype=torch.float32)
        for x in (s.boxes, s.image_index, s.weights):
            torch._dynamo.mark_dynamic(x, 0)
        arguments = (s.student, s.teacher, s.boxes, s.image_index, s.stride, s.weights)
        torch.testing.assert_close(compiled(*arguments), F.imitation_loss(*arguments))
    assert graphs.count == 1


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(2, 3, 40, 56), (1, 1, 1, 7), (2, 5, 9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_scale_of_a_map_is_its_variance(shape, offset, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype) + offset
    assert scale_of(x).dtype == torch.promote_types(dtype, torch.float32)
    expected = x.double().var(correction=0)
    torch.testing.assert_close(scale_of(x).double(), expected, rtol=2e-4, atol=0)
    shuffled = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(scale_of(shuffled).double(), expected, rtol=2e-4, atol=0)


def test_the_scale_of_a_map_in_half_precision_copies_no_map():
    teacher = torch.randn(2, 8, 24, 40).bfloat16()
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() == teacher.numel():
                made.append(result.dtype)
            return result

    with Watch():
        standardized(torch.ones(2), teacher)
    assert set(made) <= {torch.bfloat16}  # looks at it, none of them wider


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -123.4])
@pytest.mark.parametrize("shape", [(1, 2, 5, 7), (2, 16, 200, 336)])
def test_a_constant_map_has_scale_one(value, shape):
    """Though its mean is rounded."""
    assert scale_of(torch.full(shape, value)) == 1


@pytest.mark.parametrize("spread", [0.0, 1e-30, 1e-17, 1e-9, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("mean", [0.0, 1.0, -300.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_no_teacher_makes_a_standardised_term_explode(spread, mean, size):
    """Divided by its variance as long as both terms are up to 10, then by a tenth of them."""
    g = torch.Generator().manual_seed(0)
    teacher = mean + spread * torch.randn(2, 3, 8, 8, generator=g)
    terms = (size * torch.tensor([1.0, 0.25])).requires_grad_()
    value = standardized(terms, teacher)
    scale = max(float(scale_of(teacher)), size / LARGEST)
    torch.testing.assert_close(value, terms / scale)
    assert value.amax() <= LARGEST * (1 + 1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), terms)
    torch.testing.assert_close(gradient, torch.full((2,), 1 / scale))


def test_a_zero_error_of_a_constant_teacher_is_zero():
    terms = torch.zeros(2, requires_grad=True)
    value = standardized(terms, torch.zeros(1, 2, 3, 3))
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0] and terms.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["cpu", "definition"])
def test_gradients_in_half_precision_by_hand(form, dtype):
    """Squares of d: slopes 2 d, each with its weight and scale."""
    student = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=dtype).view(1, 1, 2, 2).requires_grad_()
    weight = torch.tensor([[[0.5, 0.0], [0.25, 0.0]]])
    member = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    with force(form):
        terms = imitation_terms(
            student,
            torch.ones_like(student),
            weight,
            member,
            torch.tensor(4.0),
            torch.tensor(8.0),
        )
        (grad,) = gradient(sum(terms), student)
    expected = [[2 * 2 * 4 * 0.5, 2 * -2 * 8 * 1], [2 * -0.5 * 4 * 0.25, 0]]
    assert grad[0, 0].tolist() == expected
