"""FBKD: lengths of differences under attention, of attention, and of non-local relations."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from global_kd.losses import FBKD
from global_kd.losses.fbkd import NonLocal
from tests import oracles
from tests.losses import promises
from tests.losses.promises import CHANNELS, SIZES, STRIDES, maps, pyramids
from tests.losses.test_fgd import attention
from tests.strategies import random
from tests.watch import NoFloat64, NoHostSync, gradient

make = partial(FBKD, **CHANNELS)
PARTS = ("features", "channels", "cells", "relation")
NAMES = [f"kd_fbkd_{part}" for part in PARTS]


def slow_squares(s, t, weights=None, temperature=0.5, channels=True):
    """What stands under the root, of each image."""
    s, t = oracles.array(s), oracles.array(t)
    found = []
    for b in range(len(s)):
        where_s, what_s = attention(s[b], temperature)
        where_t, what_t = attention(t[b], temperature)
        total = 0.0
        for (y, x), a in where_s.items():
            for c in range(s.shape[1]):
                mask = (a + where_t[y, x]) / 2
                mask *= (what_s[c] + what_t[c]) / 2 if channels else 1
                mask *= 1 if weights is None else float(weights[b, y, x])
                total += mask * (s[b, c, y, x] - t[b, c, y, x]) ** 2
        found.append(total)
    return found


def slow(*arguments):
    return math.sqrt(sum(slow_squares(*arguments)))


def pair(shape=(2, 3, 4, 5), seed=0, dtype=torch.float64):
    return random(shape, seed, dtype), random(shape, seed + 1, dtype)


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from((0.1, 0.5)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_equals_the_slow_definition(batch, channels, size, temperature, mask, weighted, seed):
    s, t = pair((batch, channels, *size), seed)
    weights = random((batch, *size), 7).abs() if weighted else None
    found = F.attention_guided_loss(s, t, weights, temperature=temperature, channels=mask)
    assert found.item() == pytest.approx(slow(s, t, weights, temperature, mask), rel=1e-9)


@pytest.mark.parametrize("channels", [True, False])
def test_gradient_takes_the_masks_as_given(channels):
    s, t = pair((2, 2, 3, 3))
    s.requires_grad_()
    (found,) = gradient(F.attention_guided_loss(s, t, channels=channels), s)
    base = s.detach().clone()

    def of(x):
        """The slow definition with the masks of where it stands."""
        total = 0.0
        for b in range(2):
            (ws, cs), (wt, ct) = (attention(oracles.array(v[b]), 0.5) for v in (base, t))
            for (y, k), a in ws.items():
                for c in range(2):
                    mask = (a + wt[y, k]) / 2 * ((cs[c] + ct[c]) / 2 if channels else 1)
                    total += mask * float(x[b, c, y, k] - t[b, c, y, k]) ** 2
        return math.sqrt(total)

    slope = oracles.slope(lambda x: of(torch.as_tensor(x)), base)
    torch.testing.assert_close(found, torch.from_numpy(slope), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [None, 0.0, 7.0, -1e4])
def test_equal_maps_have_a_zero_with_a_zero_gradient(value):
    """The released root has a gradient of NaN there."""
    s, _ = pair(dtype=torch.float32)
    s = (s if value is None else torch.full_like(s, value)).requires_grad_()
    loss = F.attention_guided_loss(s, s.detach().clone())
    assert loss == 0 and (gradient(loss, s)[0] == 0).all()


def test_no_image_is_a_zero_that_back_propagates():
    s, t = pair((0, 2, 3, 3))
    loss = F.attention_guided_loss(s.requires_grad_(), t)
    assert loss == 0 and gradient(loss, s)[0].shape == s.shape


def test_grows_with_the_root_of_the_batch():
    s, t = pair()
    found = F.attention_guided_loss(torch.cat([s, s]), torch.cat([t, t]))
    torch.testing.assert_close(found, math.sqrt(2) * F.attention_guided_loss(s, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(dtype):
    s, t = (300 * x.to(dtype) for x in pair((2, 4, 24, 24)))
    s.requires_grad_()
    with NoFloat64(), NoHostSync():
        loss = F.attention_guided_loss(s, t)
        loss.backward()
    assert loss.dtype == torch.float32 and s.grad.isfinite().all()
    torch.testing.assert_close(loss, F.attention_guided_loss(s.float(), t.float()))


def test_only_the_student_learns():
    s, t = (x.requires_grad_() for x in pair())
    weights = torch.ones(2, 4, 5, dtype=torch.float64, requires_grad=True)
    F.attention_guided_loss(s, t, weights).backward()
    assert s.grad.abs().sum() > 0 and t.grad is None and weights.grad is None


def test_compiles_whole():
    s, t = pair()
    compiled = torch.compile(F.attention_guided_loss, fullgraph=True, backend="aot_eager")
    expected = F.attention_guided_loss(s, t)
    torch.testing.assert_close(compiled(s.requires_grad_(), t), expected)


def test_arguments_are_checked():
    s, t = pair()
    with pytest.raises(ValueError, match="temperature"):
        F.attention_guided_loss(s, t, temperature=0)
    with pytest.raises(ValueError, match=r"weights: expected shape \(2, 4, 5\)"):
        F.attention_guided_loss(s, t, torch.ones(2, 4))
    with pytest.raises(ValueError, match="temperature"):
        FBKD(temperature=0)


# --- the non-local block ------------------------------------------------------------------------


def disturbed(module, seed=0):
    """As after some training: what begins at 0 says something."""
    for i, p in enumerate(module.parameters()):
        p.data.copy_(random(p.shape, seed + i) / 2)
    return module


@torch.no_grad()
def slow_non_local(block, x):
    """Affinities of every cell to every pooled one, then the sum; statistics of the batch."""

    def conv(f, image):
        flat = f.weight[:, :, 0, 0] @ image.flatten(1)
        return (flat + f.bias[:, None]).view(-1, *image.shape[1:])

    said = []
    for image in x:
        pooled = []
        for f in (block.key, block.value):
            whole, p = conv(f, image), block.pool
            height, width = whole.shape[1:]
            cells = [
                whole[:, y : y + p, c : c + p].flatten(1).amax(1)
                for y in range(0, height, p)
                for c in range(0, width, p)
            ]
            pooled.append(torch.stack(cells, 1))
        key, value = pooled
        query = conv(block.query, image).flatten(1)
        affinity = query.T @ key / key.shape[1]  # (HW, N)
        said.append(conv(block.out, (affinity @ value.T).T.reshape(-1, *image.shape[1:])))
    said = torch.stack(said)
    rows = said.movedim(1, 0).flatten(1)
    mean, variance = rows.mean(1), rows.var(1, correction=0)
    norm = block.norm
    scale = (norm.weight / (variance + norm.eps).sqrt())[:, None, None]
    return x + (said - mean[:, None, None]) * scale + norm.bias[:, None, None]


@pytest.mark.parametrize("size, pool", [((4, 6), 2), ((5, 7), 4), ((3, 3), 8)])
def test_the_block_equals_its_slow_definition(size, pool):
    block = disturbed(NonLocal(3, 5, pool).double(), 3)
    x = random((2, 3, *size), 1)
    torch.testing.assert_close(block(x), slow_non_local(block, x))


def test_the_block_begins_as_the_identity_and_learns():
    block, x = NonLocal(3, 5, 2).double(), random((2, 3, 4, 4), 0)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.norm.weight.grad.abs().sum() > 0


# --- the class --------------------------------------------------------------------------------


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("family", ["two-stage", "one-stage"])
def test_the_class_sums_lengths_over_levels(family, per_image):
    weights = dict(zip(PARTS, (0.5, 0.25, 2.0, 0.125)))
    loss = make(robust=True, per_image=per_image, family=family, **weights).double()
    disturbed(loss)
    at, (student, teacher) = promises.targets(), pyramids()
    omega = torch.tensor([[0.3, 0.8, 0.0, 1.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    expected = np.zeros(4)
    for i, (s, t) in enumerate(zip(student, teacher)):
        w = promises.cell_weights(omega[i], at, STRIDES[i], SIZES[i])
        options = (0.5, False) if family == "two-stage" else (0.1, True)
        squares = [slow_squares(loss.adapters[i](s), t, w, *options)]
        with torch.no_grad():
            linear, conv = loss.channel_adapters[i], loss.cell_adapters[i]
            d = t.mean((2, 3)) - s.mean((2, 3)) @ linear.weight.T - linear.bias
            squares.append(d.square().sum(1).tolist())
            d = t.mean(1, keepdim=True) - conv(s.mean(1, keepdim=True))
            squares.append((d.square() * w[:, None]).sum((1, 2, 3)).tolist())
            mine = loss.relation_adapters[i](slow_non_local(loss.student_relation[i], s))
            d = slow_non_local(loss.teacher_relation[i], t) - mine
            squares.append((d.square() * w[:, None]).sum((1, 2, 3)).tolist())
        for k, x in enumerate(squares):
            expected[k] += np.sqrt(x).mean() if per_image else np.sqrt(np.sum(x))
    found = loss(student, teacher, at, omega=omega)
    assert list(found) == NAMES
    np.testing.assert_allclose(
        [x.item() for x in found.values()], expected * list(weights.values()), rtol=1e-8
    )


def test_published_settings():
    two, one, query = (make(family=f) for f in ("two-stage", "one-stage", "query"))
    assert [*two.weights.values()] == [7e-5, 4e-3, 4e-3, 7e-5]
    assert [*one.weights.values()] == [4.2e-4, 2.4e-2, 2.4e-2, 4.2e-4]
    assert query.weights == one.weights
    assert (two.temperature, two.channel_mask) == (0.5, False)
    assert (one.temperature, one.channel_mask) == (0.1, True)
    many = FBKD(student_channels=[2] * 4, teacher_channels=[2] * 4, strides=[4, 8, 16, 32])
    assert [(b.query.out_channels, b.pool) for b in many.student_relation] == [
        (64, 8),
        (64, 4),
        (128, 2),
        (128, 2),
    ]
    assert isinstance(make(student_channels=[4, 4]).adapters[0], torch.nn.Conv2d)


def test_terms_without_weight_are_left_out():
    student, teacher = maps(3, dtype=torch.float32), maps(4, dtype=torch.float32)
    assert list(make(features=0, relation=0)(student, teacher)) == NAMES[1:3]


def test_promises():
    promises.only_the_student_and_the_loss_learn(make)
    for value in (None, 0.0, 7.0):
        promises.equal_maps_are_finite(make, value)
    promises.one_location_is_finite(make)
    promises.halves_are_summed_in_float32(make)
    promises.the_hot_path_is_free(make)
    lowered = {name for name in NAMES if name != "kd_fbkd_channels"}
    promises.robust_of_ones_changes_nothing_and_of_zeros_lowers(make, lowered)
    promises.state_resumes_to_the_bit(make)
    promises.the_global_random_state_stays(make)


def test_an_identity_has_zeros_with_zero_gradients():
    """Invariant 1, for every root of the class: adapters that change nothing, equal maps."""
    loss = make(student_channels=[4, 4], adapter="match").double()
    for i in range(2):
        loss.channel_adapters[i].weight.data.copy_(torch.eye(4))
        loss.relation_adapters[i].weight.data.copy_(torch.eye(4)[:, :, None, None])
        loss.cell_adapters[i].weight.data.zero_()[..., 1, 1] = 1
        for f in (loss.channel_adapters[i], loss.relation_adapters[i], loss.cell_adapters[i]):
            f.bias.data.zero_()
    teacher = maps(4)
    student = [x.clone().requires_grad_() for x in teacher]
    terms = loss(student, teacher)
    promises.total(terms).backward()
    assert all(x == 0 for x in terms.values())
    assert all((x.grad == 0).all() for x in student)
    assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_the_class_compiles_whole():
    promises.compiles_whole(make)
