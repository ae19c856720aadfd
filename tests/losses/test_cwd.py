"""CWD: the divergence of channels' distributions over cells."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from global_kd.losses import CWD
from global_kd.ops.correlation import standardised
from tests.losses import promises
from tests.losses.promises import CHANNELS, SIZES, STRIDES, maps, pyramids
from tests.strategies import random
from tests.watch import NoFloat64, NoHostSync, gradient

make = partial(CWD, **CHANNELS)


def softmax(plane, temperature):
    values = [math.exp(float(v) / temperature) for row in plane for v in row]
    return [v / sum(values) for v in values]


def slow(s, t, temperature=1.0):
    """The equation, channel by channel."""
    batch, channels = s.shape[:2]
    found = 0.0
    for b in range(batch):
        for c in range(channels):
            p, q = softmax(t[b, c], temperature), softmax(s[b, c], temperature)
            found += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return temperature**2 * found / (batch * channels)


def pair(shape=(2, 3, 4, 5), seed=0, dtype=torch.float64):
    return random(shape, seed, dtype), random(shape, seed + 1, dtype)


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from((0.5, 1.0, 4.0)),
    st.integers(0, 9),
)
def test_equals_the_slow_definition(batch, channels, size, temperature, seed):
    s, t = pair((batch, channels, *size), seed)
    found = F.cwd_loss(s, t, temperature=temperature)
    assert found.item() == pytest.approx(slow(s, t, temperature), rel=1e-9, abs=1e-12)


def test_a_constant_added_to_a_channel_of_an_image_changes_nothing():
    """Invariant 4."""
    s, t = pair()
    shift = random((2, 3, 1, 1), 7)
    torch.testing.assert_close(F.cwd_loss(s + shift, t - shift), F.cwd_loss(s, t))


def test_a_mean_over_images_and_channels():
    """Invariants 10 and 11: their order and number do not matter."""
    s, t = pair()
    order = torch.tensor([1, 0])
    torch.testing.assert_close(F.cwd_loss(s[order], t[order]), F.cwd_loss(s, t))
    twice = [torch.cat([torch.cat([x, x]), torch.cat([x, x])], dim=1) for x in (s, t)]
    torch.testing.assert_close(F.cwd_loss(*twice), F.cwd_loss(s, t))


def test_gradient():
    s, t = pair((2, 2, 2, 3))
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.cwd_loss(x, t, temperature=2.0), s)
    t.requires_grad_()
    F.cwd_loss(s, t).backward()
    assert t.grad is None


@pytest.mark.parametrize("value", [0.0, 100.0, -1e4])
def test_saturated_and_constant_maps_are_finite(value):
    s, t = pair(dtype=torch.float32)
    s, t = torch.full_like(s, value), t.clone()
    s[..., 0, 0] *= -1
    t[..., 1, 1] = value
    s.requires_grad_()
    loss = F.cwd_loss(s, t)
    assert loss.isfinite() and gradient(loss, s)[0].isfinite().all()


def test_no_image_is_a_zero_that_back_propagates():
    s, t = pair((0, 2, 3, 3))
    loss = F.cwd_loss(s.requires_grad_(), t)
    assert loss == 0 and gradient(loss, s)[0].shape == s.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(dtype):
    """A softmax over 16 384 cells has shares that float16 cannot hold."""
    s, t = pair((1, 2, 128, 128), dtype=dtype)
    s.requires_grad_()
    with NoFloat64(), NoHostSync():
        loss = F.cwd_loss(s, t)
        loss.backward()
    assert loss.dtype == torch.float32 and s.grad.dtype == dtype
    torch.testing.assert_close(loss, F.cwd_loss(s.float(), t.float()))


def test_compiles_whole():
    s, t = pair()
    compiled = torch.compile(F.cwd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s.requires_grad_(), t), F.cwd_loss(s, t))


def test_arguments_are_checked():
    s, t = pair()
    with pytest.raises(ValueError, match="temperature: expected a number > 0"):
        F.cwd_loss(s, t, temperature=0)
    with pytest.raises(ValueError, match="temperature"):
        CWD(temperature=-1)
    with pytest.raises(ValueError, match="adapter"):
        F.cwd_loss(s[:, :2], t)


# --- the class --------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [False, True])
def test_the_class_sums_the_function_over_levels(standardize):
    loss = make(weight=0.5, temperature=2.0, standardize=standardize).double()
    student, teacher = pyramids()
    found = loss(student, teacher)
    expected = 0.0
    for i in range(2):
        s, t = loss.adapters[i](student[i]).detach(), teacher[i]
        s, t = (standardised(s), standardised(t)) if standardize else (s, t)
        expected += slow(s, t, 2.0)
    assert list(found) == ["kd_cwd"]
    assert found["kd_cwd"].item() == pytest.approx(0.5 * expected)


def test_published_weights():
    for family in (None, "two-stage", "one-stage", "query"):
        assert make(family=family).weights == {"": 10.0}


def test_robust_weighs_the_cells_and_no_cell_pays_back():
    """Each cell's share p log(p / q) - p + q is >= 0; their sum is the divergence."""
    student, teacher = maps(4, 1), maps(4, 9)
    at = promises.targets()
    omega = torch.tensor([[0.3, 0.8, 0.0, 1.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    loss = make(weight=1.0, robust=True, student_channels=[4, 4])
    expected = 0.0
    for i, (s, t) in enumerate(zip(student, teacher)):
        w = promises.cell_weights(omega[i], at, STRIDES[i], SIZES[i]).flatten(1)
        for b in range(2):
            for c in range(4):
                p, q = softmax(t[b, c], 1.0), softmax(s[b, c], 1.0)
                for x, y, v in zip(p, q, w[b].tolist(), strict=True):
                    share = x * math.log(x / y) - x + y
                    assert share >= 0
                    expected += v * share / 8
    found = loss(student, teacher, at, omega=omega)["kd_cwd"]
    assert found.item() == pytest.approx(expected)


def test_promises():
    promises.only_the_student_and_the_loss_learn(make)
    for value in (None, 0.0, 7.0):
        assert promises.equal_maps_are_finite(make, value)["kd_cwd"] == 0
    promises.one_location_is_finite(make)
    promises.halves_are_summed_in_float32(make)
    promises.the_hot_path_is_free(make)
    promises.robust_of_ones_changes_nothing_and_of_zeros_lowers(make, {"kd_cwd"})
    promises.state_resumes_to_the_bit(make)
    promises.the_global_random_state_stays(make)


def test_the_class_compiles_whole():
    promises.compiles_whole(make)
