"""FGD: objects, surroundings, attention and the relation of all cells."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import global_kd.functional as F
from global_kd.losses import FGD
from global_kd.losses.fgd import GlobalContext
from global_kd.ops.dispatch import force
from tests import oracles
from tests.losses import promises
from tests.losses.promises import CHANNELS, STRIDES, pyramids
from tests.strategies import random, scene, scenes
from tests.watch import Graphs, NoFloat64, NoHostSync, gradient

make = partial(FGD, **CHANNELS)
PARTS = ("foreground", "background", "attention", "relation")
NAMES = [f"kd_fgd_{part}" for part in PARTS]


def softmax(values, temperature=1.0):
    powers = [math.exp(v / temperature) for v in values]
    return [len(values) * p / sum(powers) for p in powers]


def attention(x, temperature):
    """Of one image ``(C, H, W)``: cell -> value, channel -> value."""
    channels, height, width = x.shape
    cells = [(y, c) for y in range(height) for c in range(width)]
    where = [sum(abs(x[k, y, c]) for k in range(channels)) / channels for y, c in cells]
    what = [abs(x[k]).sum() / (height * width) for k in range(channels)]
    return dict(zip(cells, softmax(where, temperature))), softmax(what, temperature)


def slow(s, t, boxes, image_index, stride, weights=None, temperature=0.5):
    """The three equations, image by image, cell by cell, in the order of the paper."""
    s, t = oracles.array(s), oracles.array(t)
    batch, channels, height, width = s.shape
    fg = bg = att = 0.0
    for b in range(batch):
        where_t, what_t = attention(t[b], temperature)
        where_s, what_s = attention(s[b], temperature)
        mask, inside = dict.fromkeys(where_t, 0.0), set()
        for r, image in enumerate(oracles.indices(image_index)):
            if image == b:
                covered = oracles.cells(boxes[r], stride, height, width)
                share = (1.0 if weights is None else float(weights[r])) / len(covered)
                for cell in covered:
                    mask[cell] = max(mask[cell], share)
                    inside.add(cell)
        outside = len(where_t) - len(inside)
        for (y, x), a in where_t.items():
            error = sum(
                a * what_t[c] * (s[b, c, y, x] - t[b, c, y, x]) ** 2 for c in range(channels)
            )
            fg += mask[y, x] * error / batch
            if (y, x) not in inside:
                bg += error / outside / batch
            att += abs(a - where_s[y, x]) / batch
        att += sum(abs(x - y) for x, y in zip(what_t, what_s)) / batch
    return fg, bg, att


def focal(s, weights="own", student=None, **options):
    return F.fgd_loss(
        s.student if student is None else student,
        s.teacher,
        s.boxes,
        s.image_index,
        s.stride,
        s.weights if isinstance(weights, str) else weights,
        **options,
    )


@pytest.mark.usefixtures("every_form")
@given(scenes())
def test_equals_the_slow_definition(s):
    for weights in (None, s.weights):
        found = [x.item() for x in focal(s, weights, temperature=0.7)]
        where = s.boxes, s.image_index, s.stride
        expected = slow(s.student, s.teacher, *where, weights, 0.7)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_gradient_equals_the_slope_of_the_slow_definition():
    s = scene(channels=2, size=(3, 4), count=3)
    s.student.requires_grad_()
    (found,) = gradient(sum(focal(s)), s.student)
    where = s.boxes, s.image_index, s.stride, s.weights
    slope = oracles.slope(lambda x: sum(slow(x, s.teacher, *where)), s.student)
    torch.testing.assert_close(found, torch.from_numpy(slope), rtol=1e-5, atol=1e-7)


@settings(max_examples=8)
@given(scenes(max_boxes=3))
def test_gradcheck(s):
    """Absolute values have corners; random maps are not on them."""
    student = s.student[:, :2, :3, :3].clone()
    s.teacher = s.teacher[:, :2, :3, :3]
    assert torch.autograd.gradcheck(lambda x: focal(s, student=x)[:2], student.requires_grad_())


def test_the_smallest_box_wins_and_a_box_of_any_size_sums_to_one_by_hand():
    """d = 1, attention 1: foreground = channels * sum of M."""
    student, teacher = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)

    def by_hand(*boxes):
        at = torch.tensor(boxes), torch.zeros(len(boxes), dtype=torch.int64)
        return [x.item() for x in F.fgd_loss(student, teacher, *at, 8)]

    cell, left = [8.0, 8.0, 16.0, 16.0], [0.0, 0.0, 16.0, 32.0]
    assert by_hand(cell) == pytest.approx([2, 2, 0])
    assert by_hand(left) == pytest.approx([2, 2, 0])
    assert by_hand(left, cell) == by_hand(cell, left) == pytest.approx([2 * (7 / 8 + 1), 2, 0])
    assert by_hand([0.0, 0, 32, 32]) == pytest.approx([2, 0, 0])  # no background is left


def test_without_boxes_all_is_background():
    s = scene(count=0)
    s.student.requires_grad_()
    fg, bg, att = focal(s)
    assert fg == 0 and (gradient(fg, s.student)[0] == 0).all()
    expected = slow(s.student, s.teacher, s.boxes, s.image_index, s.stride)
    assert (bg.item(), att.item()) == pytest.approx(expected[1:])


def test_a_box_without_weight_is_no_background():
    s = scene()
    plain, none = focal(s, None), focal(s, s.weights * 0)
    assert none[0] == 0 and none[1] == plain[1] and none[2] == plain[2]


@given(scenes(min_boxes=1))
def test_growing_the_canvas_moves_no_box(s):
    """Promise 7: the released masks are stretched there. Attention sees the whole map: left out."""
    height, width = s.size
    limit = torch.tensor([width, height, width, height]) * s.stride
    s.boxes = torch.minimum(s.boxes, limit)
    inside = (s.boxes[:, :2] < limit[:2]).all(1)
    s.boxes, s.image_index, s.weights = s.boxes[inside], s.image_index[inside], s.weights[inside]
    flat = torch.ones_like(s.teacher)

    def marked(size):
        zeros = torch.zeros(*flat.shape[:2], *size, dtype=flat.dtype).requires_grad_()
        at = s.boxes, s.image_index, s.stride
        fg, _, _ = F.fgd_loss(zeros, torch.ones_like(zeros), *at)
        return -gradient(fg, zeros)[0] / 2

    grown = marked((height + 2, width + 3))
    torch.testing.assert_close(grown[:, :, :height, :width], marked((height, width)))
    assert (grown[:, :, height:] == 0).all() and (grown[..., width:] == 0).all()


@given(scenes())
def test_order_of_images_and_boxes_does_not_matter(s):
    expected = focal(s)
    s.student, s.teacher = s.student.flip(0), s.teacher.flip(0)
    s.image_index = (len(s.student) - 1 - s.image_index).flip(0)
    s.boxes, s.weights = s.boxes.flip(0), s.weights.flip(0)
    torch.testing.assert_close(focal(s), expected)


@pytest.mark.parametrize("value", [0.0, 7.0, -100.0, 1e4])
def test_constant_and_equal_maps_are_finite(value):
    s = scene(dtype=torch.float32)
    for student in (torch.full_like(s.student, value), s.teacher.clone()):
        student.requires_grad_()
        loss = sum(focal(s, student=student))
        assert loss.isfinite() and gradient(loss, student)[0].isfinite().all()
    assert loss == 0


def test_only_the_student_learns():
    s = scene()
    for x in (s.student, s.teacher, s.weights, s.boxes):
        x.requires_grad_()
    sum(focal(s)).backward()
    assert s.student.grad.abs().sum() > 0
    assert s.teacher.grad is None and s.weights.grad is None and s.boxes.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(dtype):
    s = scene(channels=8, size=(24, 24), dtype=torch.float32)
    s.student, s.teacher = (20 * s.student).to(dtype), (20 * s.teacher).to(dtype)
    found = focal(s)
    s.student, s.teacher = s.student.float(), s.teacher.float()
    assert all(x.dtype == torch.float32 for x in found)
    torch.testing.assert_close(found, focal(s))


@pytest.mark.parametrize("watch", [NoFloat64, NoHostSync])
def test_hot_path(watch):
    s = scene(dtype=torch.float32)
    s.student.requires_grad_()
    with watch(), force("definition"):
        sum(focal(s)).backward()


def test_compiles_once_for_every_number_of_boxes():
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(F.fgd_loss, fullgraph=True, backend=graphs, dynamic=True)
    for count in (5, 7, 12):
        s = scene(count=count, seed=count, dtype=torch.float32)
        arguments = (s.student, s.teacher, s.boxes, s.image_index, s.stride, s.weights)
        torch.testing.assert_close(compiled(*arguments), F.fgd_loss(*arguments))
    assert graphs.count == 1


def test_arguments_are_checked():
    s = scene()
    with pytest.raises(ValueError, match="temperature"):
        focal(s, temperature=0)
    with pytest.raises(ValueError, match="weights: expected 4 entries"):
        focal(s, s.weights[:2])
    with pytest.raises(ValueError, match="temperature"):
        FGD(temperature=-1)


# --- the class --------------------------------------------------------------------------------


def disturbed(loss, seed=0):
    """As after some training: blocks that begin as the identity say something."""
    for i, p in enumerate(loss.parameters()):
        p.data.copy_(random(p.shape, seed + i) / 2)
    return loss


@torch.no_grad()
def slow_context(block, x):
    """One image ``(C, H, W)``: keys, the context of all cells, two layers, added to each cell."""
    channels, height, width = x.shape
    key = block.key.weight.flatten().tolist()
    cells = [x[:, y, c] for y in range(height) for c in range(width)]
    logits = [sum(k * float(v) for k, v in zip(key, cell)) for cell in cells]
    shares = [v / len(cells) for v in softmax(logits)]
    context = sum(a * cell for a, cell in zip(shares, cells))
    hidden = block.first.weight @ context + block.first.bias
    centred = hidden - hidden.mean()
    hidden = centred / (centred.square().mean() + block.norm.eps).sqrt()
    hidden = (hidden * block.norm.weight + block.norm.bias).clamp(min=0)
    return x + (block.last.weight @ hidden + block.last.bias)[:, None, None]


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_the_context_block_equals_its_slow_definition(channels):
    block = disturbed(GlobalContext(channels).double(), 3)
    x = random((2, channels, 3, 4), 1)
    expected = torch.stack([slow_context(block, image) for image in x])
    torch.testing.assert_close(x + block(x)[:, :, None, None], expected)


def test_at_the_start_the_relation_is_a_plain_sum_of_squares():
    loss = make(relation=1.0, foreground=0, background=0, attention=0).double()
    student, teacher = pyramids()
    found = loss(student, teacher, promises.targets())
    d = [loss.adapters[i](student[i]) - teacher[i] for i in range(2)]
    expected = sum(x.square().sum() for x in d) / 2
    assert list(found) == ["kd_fgd_relation"]
    torch.testing.assert_close(found["kd_fgd_relation"], expected)


def test_the_class_sums_the_function_over_levels():
    weights = dict(zip(PARTS, (0.5, 0.25, 2.0, 0.125)))
    loss = disturbed(make(robust=True, temperature=0.7, **weights).double())
    student, teacher = pyramids()
    at = promises.targets()
    omega = torch.tensor([[0.3, 0.8, 0.0, 1.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    found = loss(student, teacher, at, omega=omega)
    expected = np.zeros(4)
    for i in range(2):
        s, t = loss.adapters[i](student[i]).detach(), teacher[i]
        expected[:3] += slow(s, t, at.boxes, at.image_index, STRIDES[i], omega[i], 0.7)
        for b in range(2):
            d = slow_context(loss.student_context[i], s[b])
            d = d - slow_context(loss.teacher_context[i], t[b])
            expected[3] += float(d.square().sum()) / 2
    assert list(found) == NAMES
    np.testing.assert_allclose(
        [x.item() for x in found.values()], expected * list(weights.values()), rtol=1e-8
    )


def test_the_teachers_block_learns_but_not_the_teacher():
    loss = disturbed(make(relation=1.0).double())
    student, teacher = pyramids()
    for x in teacher:
        x.requires_grad_()
    loss(student, teacher, promises.targets())["kd_fgd_relation"].backward()
    assert all(x.grad is None for x in teacher)
    assert all(p.grad.abs().sum() > 0 for p in loss.teacher_context[0].last.parameters())


def test_published_weights():
    assert [*make(family="two-stage").weights.values()] == [5e-5, 2.5e-5, 5e-5, 5e-7]
    for family in ("one-stage", "query"):
        assert [*make(family=family).weights.values()] == [1e-3, 5e-4, 5e-4, 5e-6]


def test_promises():
    facts = {"targets": promises.targets()}
    promises.only_the_student_and_the_loss_learn(make, **facts)
    for value in (None, 0.0, 7.0):
        terms = promises.equal_maps_are_finite(make, value, **facts)
        assert all(x == 0 for x in terms.values())
    promises.one_location_is_finite(make, targets=promises.nobody())
    facts = {"targets": promises.targets(torch.float32)}
    promises.halves_are_summed_in_float32(make, **facts)
    promises.the_hot_path_is_free(make, **facts)
    promises.robust_of_ones_changes_nothing_and_of_zeros_lowers(make, {NAMES[0]})
    promises.state_resumes_to_the_bit(make, **facts)
    promises.the_global_random_state_stays(make, **facts)


def test_no_boxes_in_the_batch():
    terms = make().double()(*pyramids(), promises.nobody())
    assert terms["kd_fgd_foreground"] == 0 and terms["kd_fgd_foreground"].requires_grad
    assert terms["kd_fgd_background"] > 0


def test_the_class_compiles_whole():
    promises.compiles_whole(make, targets=promises.targets(torch.float32))
