"""DETRDistill: maps are imitated where the teacher's good queries look."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from global_kd import Targets
from global_kd.losses import DETRDistill
from global_kd.losses.detrdistill import query_scores
from global_kd.step import Queries
from tests import oracles
from tests.losses import promises
from tests.losses.promises import CHANNELS, pyramids
from tests.strategies import random
from tests.watch import NoFloat64, NoHostSync, gradient

make = partial(DETRDistill, **CHANNELS)


def slow(s, t, queries, scores):
    """The equations, cell by cell and query by query."""
    s, t, queries, scores = (oracles.array(x) for x in (s, t, queries, scores))
    batch, channels, height, width = s.shape
    total = 0.0
    for b in range(batch):
        mask = {}
        for y in range(height):
            for x in range(width):
                cell = oracles.unit(t[b, :, y, x])
                likeness = sum(
                    score * float(oracles.unit(q) @ cell) for q, score in zip(queries[b], scores[b])
                )
                mask[y, x] = max(0.01, likeness)
        largest = max(mask.values())
        for (y, x), m in mask.items():
            m = m / largest if largest > 0.01 else m
            total += sum((m * (t[b, c, y, x] - s[b, c, y, x])) ** 2 for c in range(channels))
    return total / s.size


def example(batch=2, channels=3, size=(3, 4), count=5, seed=0, dtype=torch.float64):
    s, t = (random((batch, channels, *size), seed + i, dtype) for i in range(2))
    return (
        s,
        t,
        random((batch, count, channels), seed + 2, dtype),
        random((batch, count), seed + 3, dtype).abs(),
    )


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 5),
    st.integers(0, 9),
)
def test_equals_the_slow_definition(batch, channels, size, count, seed):
    given = example(batch, channels, size, count, seed)
    assert F.query_guided_loss(*given).item() == pytest.approx(slow(*given), rel=1e-9)


def test_gradient():
    s, t, queries, scores = (x.requires_grad_() for x in example(size=(2, 3)))
    assert torch.autograd.gradcheck(lambda x: F.query_guided_loss(x, t, queries, scores), s)
    F.query_guided_loss(s, t, queries, scores).backward()
    assert s.grad.abs().sum() > 0 and t.grad is queries.grad is scores.grad is None


def test_a_common_factor_of_the_scores_or_of_a_query_changes_nothing():
    """Where all is above the floor of 0.01, which does not scale: maps and queries above 0."""
    s, t, queries, scores = (x.abs() for x in example())
    scaled = F.query_guided_loss(s, t, queries * random((2, 5, 1), 9).exp(), scores * 3)
    torch.testing.assert_close(scaled, F.query_guided_loss(s, t, queries, scores))


def test_without_an_object_almost_nothing_is_imitated():
    s, t, queries, scores = example()
    found = F.query_guided_loss(s, t, queries, scores * 0)
    torch.testing.assert_close(found, 1e-4 * (s - t).square().mean())


@pytest.mark.parametrize("value", [0.0, 7.0, -1e4])
def test_zero_and_constant_maps_are_finite(value):
    s, t, queries, scores = example(dtype=torch.float32)
    s.requires_grad_()
    for teacher in (torch.full_like(t, value), s.detach().clone()):
        loss = F.query_guided_loss(s, teacher, queries * 0, scores)
        assert loss.isfinite() and gradient(loss, s)[0].isfinite().all()
    assert loss == 0


def test_no_image_is_a_zero_that_back_propagates():
    s, *given = example(batch=0)
    loss = F.query_guided_loss(s.requires_grad_(), *given)
    assert loss == 0 and gradient(loss, s)[0].shape == s.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(dtype):
    given = [(30 * x).to(dtype) for x in example(channels=8, size=(12, 12))]
    given[0].requires_grad_()
    with NoFloat64(), NoHostSync():
        loss = F.query_guided_loss(*given)
        loss.backward()
    assert loss.dtype == torch.float32 and given[0].grad.isfinite().all()
    torch.testing.assert_close(loss, F.query_guided_loss(*(x.float() for x in given)))


def test_compiles_whole():
    given = example()
    compiled = torch.compile(F.query_guided_loss, fullgraph=True, backend="aot_eager")
    expected = F.query_guided_loss(*given)
    given[0].requires_grad_()
    torch.testing.assert_close(compiled(*given), expected)


def test_arguments_are_checked():
    s, t, queries, scores = example()
    with pytest.raises(ValueError, match="queries: expected .*decoder reads"):
        F.query_guided_loss(s, t, queries[..., :2], scores)
    with pytest.raises(ValueError, match="scores: expected shape"):
        F.query_guided_loss(s, t, queries, scores[:, :2])


# --- scores -----------------------------------------------------------------------------------


def decoded(count=4, classes=3, seed=0, dtype=torch.float64, activation="sigmoid"):
    """Near the boxes of :func:`promises.targets`, one far away."""
    near = torch.tensor([[4.0, 1, 22, 28], [9, 5, 33, 24], [30, 10, 60, 58], [200, 200, 210, 210]])
    boxes = near[:count].expand(2, -1, -1).to(dtype)
    return Queries(
        random((2, count, 4), seed + 1, dtype),
        3 * random((2, count, classes), seed + 2, dtype),
        boxes,
        activation,
    )


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


def slow_scores(queries, at, weights=None):
    out = torch.zeros(queries.logits.shape[:2], dtype=torch.float64)
    for b in range(len(out)):
        for n, z in enumerate(queries.logits[b].tolist()):
            if queries.activation == "sigmoid":
                score = max(1 / (1 + math.exp(-v)) for v in z)
            else:
                score = max(math.exp(v) for v in z[:-1]) / sum(math.exp(v) for v in z)
            overlaps = [0.0]
            for r, box in enumerate(at.boxes.tolist()):
                if at.image_index[r] == b:
                    w = 1.0 if weights is None else float(weights[r])
                    overlaps.append(w * iou(queries.boxes[b, n].tolist(), box))
            out[b, n] = score * max(overlaps)
    return out


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_equal_their_slow_definition(activation, weighted):
    queries, at = decoded(activation=activation), promises.targets()
    weights = torch.tensor([0.3, 0.8, 0.5, 1.0], dtype=torch.float64) if weighted else None
    found = query_scores(queries, at, weights)
    assert (found[:, :3].amax(1) > 0).all() and (found[:, 3] == 0).all()
    torch.testing.assert_close(found, slow_scores(queries, at, weights))


def test_an_image_or_a_batch_without_boxes_scores_nothing():
    queries, at = decoded(), promises.targets()
    first = Targets(at.boxes[:2], at.labels[:2], at.image_index[:2])
    assert (query_scores(queries, first)[1] == 0).all()
    assert (query_scores(queries, promises.nobody()) == 0).all()


# --- the class --------------------------------------------------------------------------------


def facts(dtype=torch.float64, **more):
    return {"targets": promises.targets(dtype), "queries": decoded(dtype=dtype, **more)}


@pytest.mark.parametrize("robust", [False, True])
def test_the_class_sums_the_function_over_levels(robust):
    loss = make(weight=0.5, robust=robust).double()
    (student, teacher), given = pyramids(), facts()
    omega = torch.tensor([[0.3, 0.8, 0.0, 1.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    expected = 0.0
    for i in range(2):
        s = loss.adapters[i](student[i])
        scores = slow_scores(given["queries"], given["targets"], omega[i] if robust else None)
        expected += slow(s, teacher[i], given["queries"].embeddings, scores)
    found = loss(student, teacher, **given, **({"omega": omega} if robust else {}))
    assert list(found) == ["kd_detrdistill"]
    assert found["kd_detrdistill"].item() == pytest.approx(0.5 * expected)


def test_queries_are_needed():
    with pytest.raises(ValueError, match="queries: DETRDistill expected the teacher's decoder"):
        make().double()(*pyramids(), promises.targets())


def test_promises():
    given = facts()
    promises.only_the_student_and_the_loss_learn(make, **given)
    for value in (None, 0.0, 7.0):
        assert promises.equal_maps_are_finite(make, value, **given)["kd_detrdistill"] == 0
    one = decoded()
    one = Queries(one.embeddings[:1], one.logits[:1], one.boxes[:1])
    promises.one_location_is_finite(make, targets=promises.nobody(), queries=one)
    given = facts(torch.float32)
    promises.halves_are_summed_in_float32(make, **given)
    promises.the_hot_path_is_free(make, **given)
    promises.robust_of_ones_changes_nothing_and_of_zeros_lowers(
        make, {"kd_detrdistill"}, queries=decoded()
    )
    promises.state_resumes_to_the_bit(make, **given)
    promises.the_global_random_state_stays(make, **given)


def test_the_class_compiles_whole():
    promises.compiles_whole(make, **facts(torch.float32))
