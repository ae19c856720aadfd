"""What every method on maps must keep, called by the tests of each with its own class.

``make(**options)`` gives a loss for the pyramids below; ``facts`` is what it needs beside maps.
"""

from __future__ import annotations

import copy
import io

import torch

from global_kd import Targets
from tests.strategies import random
from tests.watch import Graphs, NoFloat64, NoHostSync

SIZES, STRIDES = [(5, 7), (3, 4)], [8.0, 16.0]
CHANNELS = {"student_channels": [3, 3], "teacher_channels": [4, 4], "strides": STRIDES}


def maps(channels, seed=0, dtype=torch.float64, sizes=SIZES, batch=2):
    return [random((batch, channels, *size), seed + i, dtype) for i, size in enumerate(sizes)]


def pyramids(dtype=torch.float64, seed=0):
    return maps(3, seed + 10, dtype), maps(4, seed + 20, dtype)


def targets(dtype=torch.float64):
    """Two boxes that overlap, one over the border, one of no size."""
    boxes = [[3.0, 2, 20, 30], [10, 6, 30, 20], [33, 12, 90, 60], [17, 9, 17, 9]]
    return Targets(
        torch.tensor(boxes, dtype=dtype), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    )


def nobody(dtype=torch.float64):
    none = torch.zeros(0, dtype=torch.int64)
    return Targets(torch.zeros(0, 4, dtype=dtype), none, none)


def cell_weights(omega, at, stride, size, batch=2):
    """1 outside boxes, the largest weight of the covering ones inside; by plain loops."""
    from tests import oracles

    weights = torch.ones(batch, *size, dtype=torch.float64)
    inside = torch.zeros(batch, *size, dtype=torch.bool)
    for box, b, w in zip(at.boxes, at.image_index.tolist(), omega.tolist()):
        for y, x in oracles.cells(box, stride, *size):
            weights[b, y, x] = max(float(weights[b, y, x]), w) if inside[b, y, x] else w
            inside[b, y, x] = True
    return weights


def total(terms):
    return torch.stack([x for x in terms.values()]).sum()


def only_the_student_and_the_loss_learn(make, **facts):
    loss = make().double()
    student, teacher = pyramids()
    for x in (*student, *teacher):
        x.requires_grad_()
    total(loss(student, teacher, **facts)).backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in student)
    assert any(x.grad.abs().sum() > 0 for x in student)
    for name, p in loss.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


def equal_maps_are_finite(make, value=None, **facts):
    """``value``: of constant maps; ``None``: random ones. The terms."""
    loss = make(student_channels=[4, 4], adapter="match").double()
    _, teacher = pyramids()
    if value is not None:
        teacher = [torch.full_like(x, value) for x in teacher]
    student = [x.clone().requires_grad_() for x in teacher]
    terms = loss(student, teacher, **facts)
    total(terms).backward()
    assert all(x.isfinite() for x in terms.values())
    assert all(x.grad is None or x.grad.isfinite().all() for x in student)
    return terms


def one_location_is_finite(make, **facts):
    loss = make().double()
    student = [random((1, 3, 1, 1), i).requires_grad_() for i in range(2)]
    terms = loss(student, [random((1, 4, 1, 1), 5 + i) for i in range(2)], **facts)
    total(terms).backward()
    assert all(x.isfinite() for x in terms.values())
    assert all(x.grad.isfinite().all() for x in student)


def halves_are_summed_in_float32(make, tolerance=0.02, **facts):
    """Of maps in half precision the terms are those of the same values in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        rounded = [[x.to(dtype) for x in side] for side in pyramids(torch.float32)]
        for x in rounded[0]:
            x.requires_grad_()
        loss = make()
        whole = copy.deepcopy(loss)(*([x.float() for x in side] for side in rounded), **facts)
        with NoFloat64():
            terms = loss(*rounded, **facts)
            total(terms).backward()
        for name, x in terms.items():
            assert x.dtype == torch.float32
            torch.testing.assert_close(x, whole[name], rtol=tolerance, atol=1e-6)
        assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in rounded[0])
    with torch.autocast("cpu", torch.bfloat16):
        terms = make()(*rounded, **facts)
    assert all(x.dtype == torch.float32 and x.isfinite() for x in terms.values())


def the_hot_path_is_free(make, watches=(NoFloat64, NoHostSync), **facts):
    from global_kd.ops.dispatch import force

    loss = make()
    student, teacher = pyramids(torch.float32)
    student = [x.requires_grad_() for x in student]
    for watch in watches:
        with watch(), force("definition"):
            total(loss(student, teacher, **facts)).backward()


def compiles_whole(make, **facts):
    torch._dynamo.reset()
    graphs = Graphs()
    loss = make()
    student, teacher = pyramids(torch.float32)
    expected = copy.deepcopy(loss)(student, teacher, **facts)
    loss.compile(fullgraph=True, backend=graphs)
    torch.testing.assert_close(loss(student, teacher, **facts), expected)
    assert graphs.count == 1


def robust_of_ones_changes_nothing_and_of_zeros_lowers(make, lowered, **facts):
    student, teacher = pyramids()
    facts = {"targets": targets()} | facts
    robust = make(robust=True).double()
    expected = make().double()(student, teacher, **facts)
    rows = len(facts["targets"])
    one = robust(student, teacher, omega=torch.ones(2, rows, dtype=torch.float64), **facts)
    torch.testing.assert_close(one, expected)
    zero = robust(student, teacher, omega=torch.zeros(2, rows, dtype=torch.float64), **facts)
    for name, x in zero.items():
        assert (x < 0.999 * expected[name]) == (name in lowered), name


def state_resumes_to_the_bit(make, **facts):
    """Saved after two steps and loaded elsewhere, the third is the third."""

    def step(loss, optimizer, seed):
        student, teacher = pyramids(torch.float32, seed)
        terms = loss(student, teacher, **facts)
        if optimizer is not None:
            total(terms).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: x.detach() for name, x in terms.items()}

    def optimizer(loss):
        return torch.optim.SGD(loss.parameters(), lr=1e-4) if [*loss.parameters()] else None

    def options(seed):
        return {"warmup_steps": 5, "total_steps": 9, "seed": seed}

    straight = make(**options(3))
    with_straight = optimizer(straight)
    for seed in range(2):
        step(straight, with_straight, 100 * seed)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = make(**options(3))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.step == 2
    for seed in range(2, 4):
        a = step(straight, with_straight, 100 * seed)
        b = step(resumed, optimizer(resumed), 100 * seed)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def the_global_random_state_stays(make, **facts):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loss = make()
    loss(*pyramids(torch.float32), **facts)
    assert torch.equal(torch.get_rng_state(), before)
