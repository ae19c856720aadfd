"""MGD: the teacher's map from the student's, of which cells are left out."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from global_kd.losses import MGD
from global_kd.step import Step
from tests.losses import promises
from tests.losses.promises import CHANNELS, SIZES, STRIDES, maps, pyramids
from tests.strategies import random

make = partial(MGD, **CHANNELS)


def conv3x3(x, weight, bias):
    """By plain loops, one image ``(C, H, W)``."""
    channels, height, width = x.shape
    out = torch.zeros(len(weight), height, width, dtype=x.dtype)
    for o in range(len(weight)):
        for y in range(height):
            for xx in range(width):
                total = float(bias[o])
                for c in range(channels):
                    for i in (-1, 0, 1):
                        for j in (-1, 0, 1):
                            if 0 <= y + i < height and 0 <= xx + j < width:
                                total += float(x[c, y + i, xx + j] * weight[o, c, i + 1, j + 1])
                out[o, y, xx] = total
    return out


@torch.no_grad()
def slow(loss, student, teacher, weights=None):
    """The equation, cell by cell, with the masks that the loss drew."""
    found = 0.0
    for level, t in enumerate(teacher):
        first, _, second = loss.generators[level]
        for b in range(len(t)):
            kept = loss.adapters[level](student[level][b : b + 1])[0] * loss._masks[level][b]
            hidden = conv3x3(kept, first.weight, first.bias).clamp(min=0)
            d = (conv3x3(hidden, second.weight, second.bias) - t[b]).square()
            found += float(d.sum() if weights is None else (d * weights[level][b]).sum())
    return found / len(teacher[0])


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_slow_definition(seed):
    loss = make(weight=0.5, seed=seed).double()
    student, teacher = pyramids(seed=seed)
    found = loss(student, teacher)
    assert list(found) == ["kd_mgd"]
    assert found["kd_mgd"].item() == pytest.approx(0.5 * slow(loss, student, teacher))


def test_robust_weighs_the_squares_of_the_cells():
    at, (student, teacher) = promises.targets(), pyramids()
    omega = torch.tensor([[0.3, 0.8, 0.0, 1.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    loss = make(weight=1.0, robust=True).double()
    found = loss(student, teacher, at, omega=omega)["kd_mgd"]
    weights = [promises.cell_weights(omega[i], at, STRIDES[i], SIZES[i]) for i in range(2)]
    assert found.item() == pytest.approx(slow(loss, student, teacher, weights))


def test_published_weights_by_family():
    two, one, query = (make(family=f) for f in ("two-stage", "one-stage", "query"))
    assert (two.weights[""], two.masked) == (5e-7, 0.45)
    assert (one.weights[""], one.masked) == (query.weights[""], query.masked) == (2e-5, 0.65)
    assert make(masked=0.2, family="two-stage").masked == 0.2
    assert [p.shape for p in make(student_channels=[4, 4]).generators[0].parameters()] == [
        (4, 4, 3, 3),
        (4,),
    ] * 2


@pytest.mark.parametrize("masked", [-0.1, 1.0, float("nan")])
def test_a_probability_is_expected(masked):
    with pytest.raises(ValueError, match=r"masked: expected a probability in \[0, 1\)"):
        MGD(masked=masked)


# --- masks ------------------------------------------------------------------------------------


def drawn(loss, sizes=((40, 50), (20, 25)), batch=2):
    student = maps(3, sizes=sizes, batch=batch, dtype=torch.float32)
    return loss.draw_masks(Step(student, student, tuple(STRIDES)))


def test_cells_are_left_out_with_the_given_probability_for_all_channels():
    masks = drawn(make(masked=0.3))
    assert [m.shape for m in masks] == [(2, 1, 40, 50), (2, 1, 20, 25)]
    assert all(m.dtype == torch.bool for m in masks)
    kept = torch.cat([m.flatten() for m in masks]).double().mean()
    assert abs(kept - 0.7) < 4 * (0.3 * 0.7 / 5000) ** 0.5
    assert not torch.equal(masks[0][0], masks[0][1])  # each image has its own
    assert all(m.all() for m in drawn(make(masked=0.0)))


def test_masks_are_fresh_at_each_step_and_follow_from_seed_and_step():
    loss = make(masked=0.5)
    seen = [drawn(loss)[0]]
    for _ in range(2):
        loss(*pyramids(torch.float32))
        seen.append(drawn(loss)[0])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    # Steps and seeds must not shift into each other: (seed 0, step 1) is not (seed 1, step 0).
    other = make(masked=0.5, seed=1)
    assert not torch.equal(drawn(other)[0], seen[0]) and not torch.equal(drawn(other)[0], seen[1])
    again = make(masked=0.5)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(drawn(again)[0], seen[2])


def test_ranks_draw_unlike_masks(monkeypatch):
    import global_kd.losses.mgd as module

    alone = drawn(make(masked=0.5))[0]
    monkeypatch.setattr(module.Ranks, "__init__", lambda self: setattr(self, "rank", 1))
    assert not torch.equal(drawn(make(masked=0.5))[0], alone)


def test_evaluation_takes_no_step():
    loss = make().eval()
    student, teacher = pyramids(torch.float32)
    assert loss(student, teacher) == loss(student, teacher) and loss.step == 0


def test_a_masked_cell_gets_no_gradient():
    loss = make(masked=0.5, student_channels=[4, 4]).double()
    student, teacher = pyramids()
    student = [x.clone().requires_grad_() for x in teacher]
    loss(student, teacher)["kd_mgd"].backward()
    for x, mask in zip(student, loss._masks):
        assert torch.equal((x.grad != 0).any(1, keepdim=True), mask)


# --- promises ---------------------------------------------------------------------------------


def test_gradient():
    loss = make(weight=1.0, student_channels=[2, 2], teacher_channels=[2, 2]).double().eval()
    teacher = maps(2, 5, sizes=[(3, 3), (2, 2)], batch=1)
    student = [random(x.shape, i).requires_grad_() for i, x in enumerate(teacher)]
    assert torch.autograd.gradcheck(lambda *s: loss(list(s), teacher)["kd_mgd"], student)


def test_generators_differ_from_level_to_level_and_follow_from_the_seed():
    loss = make()
    assert not torch.equal(loss.generators[0][0].weight, loss.generators[1][0].weight)
    assert not torch.equal(loss.generators[0][0].weight, make(seed=1).generators[0][0].weight)
    assert torch.equal(loss.generators[0][0].weight, make().generators[0][0].weight)


def test_promises():
    promises.only_the_student_and_the_loss_learn(make)
    for value in (None, 0.0, 7.0):
        promises.equal_maps_are_finite(make, value)
    promises.one_location_is_finite(make)
    promises.halves_are_summed_in_float32(partial(make, weight=1.0))
    promises.the_hot_path_is_free(make)
    promises.robust_of_ones_changes_nothing_and_of_zeros_lowers(make, {"kd_mgd"})
    promises.state_resumes_to_the_bit(partial(make, weight=1.0))
    promises.the_global_random_state_stays(make)


def test_a_copy_is_another_loss():
    loss = make(weight=1.0)
    loss(*pyramids(torch.float32))
    twin = copy.deepcopy(loss)
    a, b = loss(*pyramids(torch.float32)), twin(*pyramids(torch.float32))
    assert torch.equal(a["kd_mgd"], b["kd_mgd"])


def test_the_class_compiles_whole():
    promises.compiles_whole(make)


def test_compiled_once_for_all_steps():
    """Masks are drawn outside, so that the count of steps is no constant of the program."""
    torch._dynamo.reset()
    graphs = promises.Graphs()
    loss = make()
    loss.compile(fullgraph=True, backend=graphs)
    seen = {loss(*pyramids(torch.float32))["kd_mgd"].item() for _ in range(4)}
    assert graphs.count == 1 and len(seen) == 4
