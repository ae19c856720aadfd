"""PKD: maps standardised per channel, compared by half their squared difference."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from global_kd.losses import PKD
from global_kd.ops.correlation import standardised
from tests.losses import promises
from tests.losses.promises import CHANNELS, SIZES, STRIDES, maps, pyramids
from tests.strategies import random
from tests.watch import NoFloat64, NoHostSync, gradient

make = partial(PKD, **CHANNELS)


def slow_rows(x, channel):
    values = [float(v) for b in range(len(x)) for row in x[b, channel] for v in row]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return [(v - mean) / (variance**0.5 + 1e-6) for v in values]


def slow(s, t):
    """The equation, channel by channel."""
    squares = [
        (a - b) ** 2
        for c in range(s.shape[1])
        for a, b in zip(slow_rows(s, c), slow_rows(t, c), strict=True)
    ]
    return 0.5 * sum(squares) / len(squares)


def pair(shape=(2, 3, 4, 5), seed=0, dtype=torch.float64):
    return random(shape, seed, dtype), random(shape, seed + 1, dtype)


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(2, 5), st.integers(0, 9)
)
def test_equals_the_slow_definition(batch, channels, height, width, seed):
    s, t = pair((batch, channels, height, width), seed)
    assert F.pkd_loss(s, t).item() == pytest.approx(slow(s, t), rel=1e-9)


@given(st.integers(0, 99))
def test_is_one_minus_the_correlation(seed):
    """Invariant 3."""
    s, t = pair(seed=seed)
    rows = [x.movedim(1, 0).flatten(1) for x in (s, t)]
    r = torch.stack([torch.corrcoef(torch.stack(x))[0, 1] for x in zip(*rows)])
    n = rows[0].shape[1]
    expected = (n - 1) / n * (1 - r).mean()
    torch.testing.assert_close(F.pkd_loss(s, t), expected, rtol=1e-5, atol=0)


def test_any_positive_affine_map_of_a_channel_changes_nothing():
    s, t = pair()
    scale, shift = random((3, 1, 1), 7).exp(), random((3, 1, 1), 8)
    torch.testing.assert_close(
        F.pkd_loss(s * scale + shift, t / scale - shift), F.pkd_loss(s, t), rtol=1e-5, atol=0
    )
    assert F.pkd_loss(s, -s) > 1.5


def test_of_standardised_maps_it_is_half_their_squared_error():
    s, t = (standardised(x) for x in pair())
    torch.testing.assert_close(F.pkd_loss(s, t), (s - t).square().mean() / 2, rtol=1e-5, atol=0)


def test_order_of_images_does_not_matter():
    """Statistics are the batch's, so an image alone is another thing."""
    s, t = pair((3, 2, 3, 3))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(F.pkd_loss(s[order], t[order]), F.pkd_loss(s, t))
    alone = torch.stack([F.pkd_loss(s[i : i + 1], t[i : i + 1]) for i in range(3)]).mean()
    assert (alone - F.pkd_loss(s, t)).abs() > 1e-3


def test_gradient():
    s, t = pair((2, 2, 2, 3))
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.pkd_loss(x, t), s)
    t.requires_grad_()
    F.pkd_loss(s, t).backward()
    assert t.grad is None


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0, -123.4])
def test_a_constant_channel_counts_as_zeros(value):
    _, t = pair((2, 2, 40, 56), dtype=torch.float32)
    s = torch.full_like(t, value).requires_grad_()
    loss = F.pkd_loss(s, t)
    n = t.numel() / 2
    torch.testing.assert_close(loss.item(), 0.5 * (n - 1) / n, rtol=1e-3, atol=0)
    (slope,) = gradient(loss, s)
    assert slope.isfinite().all() and slope.abs().max() < 1
    assert F.pkd_loss(s, torch.full_like(s, 3.0)) < 1e-6


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 2, 1, 1)], ids=["no image", "one location"])
def test_nothing_to_correlate_is_a_zero_that_back_propagates(shape):
    s = random(shape, 0).requires_grad_()
    loss = F.pkd_loss(s, random(shape, 1))
    assert loss == 0 and gradient(loss, s)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(dtype):
    """Values of 300 overflow float16 when squared."""
    s, t = (300 * x.to(dtype) for x in pair((2, 4, 32, 32)))
    s.requires_grad_()
    with NoFloat64(), NoHostSync():
        loss = F.pkd_loss(s, t)
        loss.backward()
    assert loss.dtype == torch.float32 and s.grad.dtype == dtype
    torch.testing.assert_close(loss, F.pkd_loss(s.float(), t.float()))


def test_compiles_whole():
    s, t = pair()
    compiled = torch.compile(F.pkd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s.requires_grad_(), t), F.pkd_loss(s, t))


# --- the class --------------------------------------------------------------------------------


def test_the_class_sums_the_function_over_levels():
    loss = make(weight=0.5).double()
    student, teacher = pyramids()
    found = loss(student, teacher)
    expected = sum(slow(loss.adapters[i](student[i]).detach(), teacher[i]) for i in range(2))
    assert list(found) == ["kd_pkd"]
    assert found["kd_pkd"].item() == pytest.approx(0.5 * expected)


def test_published_weights_and_no_adapter_where_channels_agree():
    assert make(family="two-stage").weights == {"": 6.0}
    assert make(family="one-stage").weights == make(family="query").weights == {"": 10.0}
    assert not [*make(student_channels=[4, 4]).parameters()]


def test_robust_weighs_the_squares_of_the_cells():
    student, teacher = maps(4, 1), maps(4, 9)
    at = promises.targets()
    omega = torch.tensor([[0.3, 0.8, 0.0, 1.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    loss = make(weight=1.0, robust=True, student_channels=[4, 4])
    expected = 0.0
    for i, (s, t) in enumerate(zip(student, teacher)):
        w = promises.cell_weights(omega[i], at, STRIDES[i], SIZES[i])
        d = (standardised(s) - standardised(t)).square()
        expected += (w[:, None] * d).mean() / 2
    torch.testing.assert_close(loss(student, teacher, at, omega=omega)["kd_pkd"], expected)


def test_promises():
    promises.only_the_student_and_the_loss_learn(make)
    for value in (None, 0.0, 7.0):
        assert promises.equal_maps_are_finite(make, value)["kd_pkd"] == 0
    promises.one_location_is_finite(make)
    promises.halves_are_summed_in_float32(make)
    promises.the_hot_path_is_free(make)
    promises.robust_of_ones_changes_nothing_and_of_zeros_lowers(make, {"kd_pkd"})
    promises.state_resumes_to_the_bit(make)
    promises.the_global_random_state_stays(make)


def test_the_class_compiles_whole():
    promises.compiles_whole(make)


WORK = """
import os, sys, torch, torch.distributed as dist
from global_kd.losses import PKD
from tests.losses.promises import CHANNELS, pyramids
dist.init_process_group("gloo")
rank = dist.get_rank()
loss = PKD(share_statistics=True, **CHANNELS).double()
student, teacher = ([x[rank : rank + 1] for x in side] for side in pyramids())
student = [x.requires_grad_() for x in student]
loss(student, teacher)["kd_pkd"].backward()
own = [x.grad / 2 for x in student]  # the job's loss is the mean of the ranks'
torch.save([own, [p.grad for p in loss.parameters()]], sys.argv[1] + str(rank))
alone = loss.eval()(student, teacher)["kd_pkd"]  # no rank waits for another here
torch.save(alone.detach(), sys.argv[1] + f"alone{rank}")
dist.barrier()
os._exit(0)
"""


def test_shared_statistics_train_ranks_as_one(tmp_path):
    root = Path(__file__).parents[2]
    script = tmp_path / "work.py"
    script.write_text(WORK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *launch, f"{tmp_path}/"],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = make().double()
    student, teacher = pyramids()
    student = [x.requires_grad_() for x in student]
    one(student, teacher)["kd_pkd"].backward()
    for rank in range(2):
        own, parameters = torch.load(tmp_path / str(rank))
        for x, expected in zip(own, student):
            torch.testing.assert_close(x, expected.grad[rank : rank + 1])
        for x, p in zip(parameters, one.parameters()):
            torch.testing.assert_close(x, p.grad)
        mine = [[x[rank : rank + 1] for x in side] for side in (student, teacher)]
        torch.testing.assert_close(torch.load(tmp_path / f"alone{rank}"), one(*mine)["kd_pkd"])
