"""Cosine: the direction of the teacher's features, cell by cell."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from global_kd.losses import Cosine
from tests import oracles
from tests.losses import promises
from tests.losses.promises import CHANNELS, SIZES, STRIDES, maps, pyramids
from tests.strategies import random
from tests.watch import NoFloat64, NoHostSync, gradient

make = partial(Cosine, levels=STRIDES, **CHANNELS)


def slow(s, t, weights=None):
    """Cell by cell."""
    s, t = oracles.array(s), oracles.array(t)
    batch, channels, height, width = s.shape
    total = 0.0
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                u, v = s[b, :, y, x], t[b, :, y, x]
                dot = sum(p * q for p, q in zip(u, v))
                lengths = math.sqrt(sum(p * p for p in u)) * math.sqrt(sum(q * q for q in v))
                total += (1 - dot / lengths) * (1 if weights is None else float(weights[b, y, x]))
    return total / (batch * height * width)


def pair(shape=(2, 3, 4, 5), seed=0, dtype=torch.float64):
    return random(shape, seed, dtype), random(shape, seed + 1, dtype)


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.booleans(),
    st.integers(0, 9),
)
def test_equals_the_slow_definition(batch, channels, size, weighted, seed):
    s, t = pair((batch, channels, *size), seed)
    weights = random((batch, *size), 7).abs() if weighted else None
    found = F.cosine_loss(s, t, weights)
    assert found.item() == pytest.approx(slow(s, t, weights), rel=1e-9, abs=1e-12)


def test_a_positive_scale_of_a_cell_changes_nothing():
    s, t = pair()
    scale = random((2, 1, 4, 5), 7).exp()
    torch.testing.assert_close(F.cosine_loss(s * scale, t / scale), F.cosine_loss(s, t))
    assert F.cosine_loss(s, -s).item() == pytest.approx(2)


def test_a_mean_over_cells():
    s, t = pair()
    torch.testing.assert_close(
        F.cosine_loss(torch.cat([s, s.flip(0)]), torch.cat([t, t.flip(0)])), F.cosine_loss(s, t)
    )


def test_gradient():
    s, t = pair((2, 2, 2, 3))
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.cosine_loss(x, t), s)
    t.requires_grad_()
    F.cosine_loss(s, t).backward()
    assert t.grad is None


@pytest.mark.parametrize("value", [0.0, 1e-30, 7.0, -1e30])
def test_any_scale_is_finite(value):
    s, t = pair(dtype=torch.float32)
    s = torch.full_like(s, value).requires_grad_()
    loss = F.cosine_loss(s, t)
    assert loss.isfinite() and gradient(loss, s)[0].isfinite().all()
    assert F.cosine_loss(s, s).abs() < 1e-6


def test_cells_of_zeros_by_hand():
    """Four cells: both speak alike, the teacher is silent, the student is silent, both are."""
    s, t = torch.tensor([2.0, 1, 0, 0]), torch.tensor([1.0, 0, 1, 0])
    s, t = s.view(1, 1, 2, 2).requires_grad_(), t.view(1, 1, 2, 2)
    loss = F.cosine_loss(s, t)
    assert loss == 1 / 4 and (gradient(loss, s)[0] == 0).all()


def test_no_image_is_a_zero_that_back_propagates():
    s, t = pair((0, 2, 3, 3))
    loss = F.cosine_loss(s.requires_grad_(), t)
    assert loss == 0 and gradient(loss, s)[0].shape == s.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(dtype):
    s, t = (300 * x.to(dtype) for x in pair((2, 8, 16, 16)))
    s.requires_grad_()
    with NoFloat64(), NoHostSync():
        loss = F.cosine_loss(s, t)
        loss.backward()
    assert loss.dtype == torch.float32 and s.grad.dtype == dtype
    torch.testing.assert_close(loss, F.cosine_loss(s.float(), t.float()))


def test_compiles_whole():
    s, t = pair()
    compiled = torch.compile(F.cosine_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s.requires_grad_(), t), F.cosine_loss(s, t))


def test_weights_are_checked():
    s, t = pair()
    with pytest.raises(ValueError, match=r"weights: expected shape \(2, 4, 5\)"):
        F.cosine_loss(s, t, torch.ones(2, 1))


# --- the class --------------------------------------------------------------------------------


def test_the_class_sums_the_function_over_levels():
    loss = make(weight=0.5).double()
    student, teacher = pyramids()
    found = loss(student, teacher)
    expected = sum(slow(loss.adapters[i](student[i]), teacher[i]) for i in range(2))
    assert list(found) == ["kd_cosine"]
    assert found["kd_cosine"].item() == pytest.approx(0.5 * expected)


def test_by_default_a_linear_layer_on_the_coarsest_level():
    loss = Cosine(**CHANNELS).double()
    assert loss.strides == (16.0,) and len(loss.adapters) == 1 and loss.weights == {"": 1.0}
    assert loss.adapters[0].kernel_size == (1, 1)
    student, teacher = pyramids()
    expected = slow(loss.adapters[0](student[1]), teacher[1])
    assert loss(student, teacher)["kd_cosine"].item() == pytest.approx(expected)
    assert Cosine(levels=[8], **CHANNELS).strides == (8.0,)
    assert isinstance(
        Cosine(**CHANNELS | {"student_channels": [4, 4]}).adapters[0], torch.nn.Conv2d
    )


def test_robust_weighs_the_cells():
    student, teacher = maps(4, 1), maps(4, 9)
    at = promises.targets()
    omega = torch.tensor([[0.3, 0.8, 0.0, 1.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    loss = make(robust=True, student_channels=[4, 4], adapter="match")
    weights = [promises.cell_weights(omega[i], at, STRIDES[i], SIZES[i]) for i in range(2)]
    expected = sum(slow(s, t, w) for s, t, w in zip(student, teacher, weights))
    found = loss(student, teacher, at, omega=omega)["kd_cosine"]
    assert found.item() == pytest.approx(expected)


def test_promises():
    promises.only_the_student_and_the_loss_learn(make)
    for value in (None, 0.0, 7.0):
        assert promises.equal_maps_are_finite(make, value)["kd_cosine"].abs() < 1e-12
    promises.one_location_is_finite(make)
    promises.halves_are_summed_in_float32(make)
    promises.the_hot_path_is_free(make)
    promises.robust_of_ones_changes_nothing_and_of_zeros_lowers(make, {"kd_cosine"})
    promises.state_resumes_to_the_bit(make)
    promises.the_global_random_state_stays(make)


def test_the_class_compiles_whole():
    promises.compiles_whole(make)
