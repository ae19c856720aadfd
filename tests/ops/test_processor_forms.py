"""The processor's forms of the neighbours' ops: the numbers of the definition, in little memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from global_kd.ops import pieces
from global_kd.ops.attention import attended_errors, attended_mean, strengths
from global_kd.ops.correlation import standardised_error
from global_kd.ops.dispatch import force
from global_kd.ops.entropy import binary_entropies
from global_kd.ops.precision import accumulate
from global_kd.ops.shares import share_divergence
from tests.ops.test_dispatch import SHAPE, Largest
from tests.strategies import random


def attended(s, t):
    what = strengths(t.detach())[1] + 0.5
    where, strength, squares, error = attended_errors(s, t, what, what - 1)
    return where.square().sum() + strength.square().sum() + (squares * where.detach()).sum() + error


def attended_means(s, t):
    key = accumulate(t.detach()).sum(dim=(0, 2, 3)) / 10
    return attended_mean(accumulate(s), key, key.new_ones(1)).square().sum()


OPS = {
    "shares": lambda s, t: share_divergence(s, t, 1.0),
    "shares of a temperature": lambda s, t: share_divergence(s, t, 0.7),
    "correlation": standardised_error,
    "attention": attended,
    "attention without a shift": lambda s, t: attended_errors(s, t, strengths(t)[1])[2].sum(),
    "mean under attention": attended_means,
    "entropy": lambda s, t: (binary_entropies(s, t) * (s.detach()[..., 0].sin() + 1)).sum(),
}
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def both_forms(op, student, teacher):
    """Value and gradient of the processor's form, and of the definition."""
    found = []
    for form in ("cpu", "definition"):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        with force(form):
            value = op(s, t)
            (0.3 * value).backward()
        assert t.grad is None
        found.append((value.detach(), s.grad))
    return found


@ops
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)]),
    seed=st.integers(0, 1000),
    chunk=st.sampled_from((1, 40, 1 << 19)),  # a row at a time, some, all
    scale=st.sampled_from((1e-3, 1.0, 30.0)),
)
def test_the_form_says_what_the_definition_says(op, shape, seed, chunk, scale):
    maps = scale * random(shape, seed), scale * random(shape, seed + 1) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CHUNK", chunk)
        mine, defined = both_forms(op, *maps)
    torch.testing.assert_close(mine, defined, rtol=1e-8, atol=1e-9)


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_every_dtype(op, dtype):
    """Halves are left to the definition, as are maps that do not lie row by row."""
    maps = [random((2, 4, 9, 11), i, dtype) for i in range(2)]
    mine, defined = both_forms(op, *maps)
    assert mine[1].dtype == dtype and mine[0].dtype == torch.float32
    torch.testing.assert_close(mine, defined, rtol=2e-4, atol=1e-6)
    last = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    torch.testing.assert_close(both_forms(op, *last)[0], defined, rtol=2e-4, atol=1e-6)


@ops
@pytest.mark.parametrize("student", [0.0, 7.0, 1e4, None])
@pytest.mark.parametrize("teacher", [0.0, -3.0, None])
def test_of_zero_and_constant_maps(op, student, teacher):
    maps = [random((2, 3, 5, 7), i, torch.float32) for i in range(2)]
    for x, value in zip(maps, (student, teacher)):
        if value is not None:
            x[:, 1:] = value  # beside a channel that is not
    mine, exact = both_forms(op, *maps)[0], both_forms(op, *(x.double() for x in maps))[1]
    assert mine[1].isfinite().all()
    if op is attended_means and student == 1e4:
        return  # a softmax of logits that large is not exact in float32, in any form
    for a, b in zip(mine, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


@ops
def test_equal_maps_differ_by_nothing(op):
    x = random((1, 3, 40, 50), 0, torch.float32)
    for value, gradient in both_forms(op, x, x):
        if op not in (attended, attended_means):
            assert (value == 0 or op is OPS["entropy"]) and gradient.abs().max() < 1e-6


@ops
def test_far_from_zero_nothing_is_lost(op):
    """A mean a thousand times the spread."""
    maps = [random((1, 2, 30, 40), i) + 1000 for i in range(2)]
    exact = both_forms(op, *maps)[1]
    mine = both_forms(op, *(x.float() for x in maps))[0]
    for a, b in zip(mine, exact):
        assert (a - b).abs().max() <= 2e-3 * b.abs().max()


@ops
def test_an_empty_map_is_a_zero_that_back_propagates(op):
    means = op in (attended, attended_means)  # which nothing has
    for shape in ((0, 3, 4, 4),) if means else ((0, 3, 4, 4), (1, 0, 4, 4), (1, 3, 0, 4)):
        for value, gradient in both_forms(op, torch.zeros(shape), torch.zeros(shape)):
            assert value == 0 and gradient.shape == shape


@ops
def test_a_gradient_asked_for_twice_is_the_same(op):
    student, teacher = random(SHAPE, 0).requires_grad_(), random(SHAPE, 1)
    value = op(student, teacher)
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    kept = first.clone()
    (tripled,) = torch.autograd.grad(3 * value, student)
    torch.testing.assert_close(second, kept)
    torch.testing.assert_close(tripled, 3 * kept)
    assert torch.equal(first, kept)  # handed out, it is nobody else's


@ops
def test_nothing_of_the_maps_size_is_made_but_the_gradient(op, monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK", 1 << 14)  # three buffers are little beside a map
    student, teacher = random(SHAPE, 0).float().requires_grad_(), random(SHAPE, 1).float()
    with Largest(student.numel() // 2) as seen:
        op(student, teacher).backward()
    assert seen.count == 1
    with torch.no_grad(), Largest(student.numel() // 2) as seen:
        op(student, teacher)
    assert seen.count == 0


@ops
def test_under_autocast_it_is_as_exact(op):
    maps = [random((1, 4, 9, 11), i, torch.float32) for i in range(2)]
    plain = both_forms(op, *maps)[1]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(both_forms(op, *maps)[0], plain, rtol=1e-4, atol=1e-6)


@ops
def test_a_compiler_gets_the_definition_whole(op):
    torch._dynamo.reset()
    student, teacher = random((1, 3, 8, 9), 0).requires_grad_(), random((1, 3, 8, 9), 1)
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    with force("definition"):
        expected = op(student, teacher)
    torch.testing.assert_close(compiled(student, teacher), expected)


def test_what_is_not_a_map_learns_alike():
    found = []
    for form in ("cpu", "definition"):
        s, key, shift = random((2, 3, 4, 5), 0), random((3,), 1), random((2, 3), 2)
        bias = torch.ones(1, dtype=torch.float64)
        leaves = [x.requires_grad_() for x in (s, key, bias, shift)]
        with force(form):
            mean = attended_mean(s, key, bias)
            error = attended_errors(s, random((2, 3, 4, 5), 4), mean.detach(), shift)[3]
            found.append(torch.autograd.grad(mean.square().sum() + error, leaves))
    torch.testing.assert_close(*found)
