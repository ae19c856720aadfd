"""FRS: errors of maps and logits, weighed by the teacher's largest class score."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import global_kd.functional as F
from global_kd import Targets
from global_kd.losses import FRS
from global_kd.step import Dense
from tests.losses.heads import dense, grids, maps
from tests.strategies import random
from tests.watch import NoFloat64, NoHostSync, gradient

SIZES, STRIDES = [(4, 5), (2, 3)], [8, 16]
CHANNELS = {"student_channels": [3, 3], "teacher_channels": [4, 4], "strides": STRIDES}
NORMALIZERS = ("cells", "channels")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow(s, t, zs, zt, normalizer="cells"):
    """The two equations, cell by cell."""
    s, t, zs, zt = (x.detach() for x in (s, t, zs, zt))
    batch, channels, height, width = s.shape
    features = classes = total = 0.0
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                m = max(sigmoid(float(z)) for z in zt[b, :, y, x])
                total += m
                features += m * sum(float(a - c) ** 2 for a, c in zip(s[b, :, y, x], t[b, :, y, x]))
                for a, c in zip(zs[b, :, y, x], zt[b, :, y, x]):
                    p, q = sigmoid(float(c)), sigmoid(float(a))
                    classes -= m * (p * math.log(q) + (1 - p) * math.log(1 - q))
    return features / total / (channels if normalizer == "channels" else 1), classes / total


def example(batch=2, channels=3, columns=6, size=(3, 4), seed=0, dtype=torch.float64):
    maps = [random((batch, channels, *size), seed + i, dtype) for i in range(2)]
    return maps + [2 * random((batch, columns, *size), seed + 2 + i, dtype) for i in range(2)]


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from(NORMALIZERS),
    st.integers(0, 999),
)
def test_equals_the_slow_definition(batch, channels, columns, size, normalizer, seed):
    given = example(batch, channels, columns, size, seed)
    found = F.richness_loss(*given, normalizer=normalizer)
    assert [x.item() for x in found] == pytest.approx(slow(*given, normalizer), rel=1e-9)


def test_gradients_are_the_students_alone():
    given = [x.requires_grad_() for x in example()]
    features, classes = F.richness_loss(*given)
    (features + classes).backward()
    assert given[1].grad is None and given[3].grad is None
    assert given[0].grad.abs().sum() > 0 and given[2].grad.abs().sum() > 0
    for i in range(2):
        assert torch.autograd.gradcheck(
            lambda s, z, i=i: F.richness_loss(s, given[1], z, given[3])[i], (given[0], given[2])
        )


def test_a_full_mask_is_the_mean_of_summed_squares():
    s, t, zs, _ = example()
    features, _ = F.richness_loss(s, t, zs, torch.full_like(zs, 100.0))
    torch.testing.assert_close(features, (s - t).square().sum(1).mean())


def test_by_channels_is_a_weight_over_the_channels():
    """The identity by which one tool's weight 6 is the released weight 6 / C."""
    given = example(channels=5)
    by_cells, by_channels = (F.richness_loss(*given, normalizer=n)[0] for n in NORMALIZERS)
    torch.testing.assert_close(by_channels, by_cells / 5)


@pytest.mark.parametrize("value", [0.0, 100.0, -100.0, 1e4, -1e4])
def test_extreme_logits_and_equal_maps_are_finite(value):
    s, _, zs, zt = (x.float() for x in example())
    s, zs = s.requires_grad_(), torch.full_like(zs, -value).requires_grad_()
    losses = F.richness_loss(s, s.detach().clone(), zs, torch.full_like(zt, value))
    assert losses[0] == 0
    for x in (*losses, *gradient(losses[0] + losses[1], s, zs)):
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_in_float32(dtype):
    given = [x.to(dtype) for x in example(channels=64, size=(16, 16))]
    with NoFloat64(), NoHostSync():
        found = F.richness_loss(*given)
    whole = F.richness_loss(*(x.float() for x in given))
    for a, b in zip(found, whole):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_compiles_whole():
    given = example()
    given[0].requires_grad_()
    compiled = torch.compile(F.richness_loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*given), F.richness_loss(*given)):
        torch.testing.assert_close(a, b)


def test_shapes_are_checked():
    s, t, zs, zt = example()
    with pytest.raises(ValueError, match="adapter"):
        F.richness_loss(s, t[:, :2], zs, zt)
    with pytest.raises(ValueError, match="teacher_logits: expected shape"):
        F.richness_loss(s, t, zs[..., :2], zt[..., :2])
    with pytest.raises(ValueError, match="normalizer"):
        F.richness_loss(s, t, zs, zt, normalizer="boxes")


# --- the class --------------------------------------------------------------------------------


def facts(seed=0, anchors=2, dtype=torch.float64, **more):
    places = grids(SIZES, STRIDES, anchors)
    pair = tuple(dense(places, seed=seed + i, dtype=dtype, **more) for i in range(2))
    return {"teacher_dense": pair[1], "dense": pair}


def pyramids(dtype=torch.float64):
    return maps(SIZES, 3, seed=5, dtype=dtype), maps(SIZES, 4, seed=9, dtype=dtype)


def as_map(head: Dense, level: int) -> torch.Tensor:
    grid = head.grids[level]
    x = head.split(head.logits)[level]
    return x.reshape(len(x), grid.height, grid.width, -1).movedim(3, 1)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_class_sums_the_function_over_levels(normalizer):
    loss = FRS(features=0.5, classes=0.25, normalizer=normalizer, warmup_steps=0, **CHANNELS)
    loss.double()
    (student, teacher), given = pyramids(), facts()
    terms = loss(student, teacher, **given)
    expected = [0.0, 0.0]
    for i in range(2):
        logits = [as_map(x, i) for x in given["dense"]]
        for k, x in enumerate(slow(loss.adapters[i](student[i]), teacher[i], *logits, normalizer)):
            expected[k] += (0.5, 0.25)[k] * x
    assert [terms["kd_frs_features"].item(), terms["kd_frs_classes"].item()] == pytest.approx(
        expected
    )


def test_published_weights_and_warm_up():
    for family, expected in {"two-stage": [0.002, 0.1], "one-stage": [0.005, 0.02]}.items():
        loss = FRS(family=family, **CHANNELS)
        assert list(loss.weights.values()) == expected
    assert FRS(normalizer="channels", **CHANNELS).weights["features"] == 6
    assert FRS(normalizer="channels", features=2, **CHANNELS).weights["features"] == 2
    assert loss.warmup_steps == 500 and loss.adapters[0].kernel_size == (3, 3)


def test_the_term_of_classes_is_a_wish_until_it_is_weighed():
    assert FRS().needs == {"teacher_dense"} and FRS().wishes == {"dense"}
    assert FRS(classes=0.1).needs == {"teacher_dense", "dense"}
    assert FRS(classes=0).needs == {"teacher_dense"} and not FRS(classes=0).wishes
    (student, teacher), given = pyramids(), facts()
    alone = {"teacher_dense": given["teacher_dense"]}
    assert list(FRS(**CHANNELS).double()(student, teacher, **alone)) == ["kd_frs_features"]
    with pytest.raises(ValueError, match="dense: FRS expected"):
        FRS(classes=0.1, **CHANNELS).double()(student, teacher, **alone)


def test_levels_without_a_head_contribute_nothing():
    student, teacher = pyramids()
    one = dense(grids(SIZES[1:], STRIDES[1:]), seed=3)
    loss = FRS(classes=0, warmup_steps=0, **CHANNELS).double()
    terms = loss(student, teacher, teacher_dense=one)
    alone, _ = F.richness_loss(
        loss.adapters[1](student[1]), teacher[1], as_map(one, 0), as_map(one, 0)
    )
    torch.testing.assert_close(terms["kd_frs_features"], 0.005 * alone)
    terms["kd_frs_features"].backward()
    assert loss.adapters[0].weight.grad.abs().sum() == 0  # there, for DDP
    other = dense(grids([(1, 1)], [32]))
    with pytest.raises(ValueError, match=r"expected a level of stride \[8, 16\], but got \[32\]"):
        loss(student, teacher, teacher_dense=other)
    with pytest.raises(ValueError, match=r"^dense: expected a level of stride \[8, 16\]"):
        FRS(features=0, **CHANNELS)(student, teacher, teacher_dense=other, dense=(other, other))


def test_a_head_of_other_size_is_cut_or_filled():
    """Filled cells have no score: as if the map ended there."""
    student, teacher = pyramids()
    small = dense(grids([(3, 4)], [8]))
    loss = FRS(classes=0, warmup_steps=0, levels=[8], **CHANNELS).double()
    found = loss(student, teacher, teacher_dense=small)["kd_frs_features"]
    s, t = loss.adapters[0](student[0])[:, :, :3, :4], teacher[0][:, :, :3, :4]
    expected, _ = F.richness_loss(s, t, as_map(small, 0), as_map(small, 0))
    torch.testing.assert_close(found, 0.005 * expected)


def test_levels_choose_both_terms():
    (student, teacher), given = pyramids(), facts()
    whole = FRS(levels=[16], warmup_steps=0, **CHANNELS).double()(student, teacher, **given)
    logits = [as_map(x, 1) for x in given["dense"]]
    _, classes = F.richness_loss(student[1], student[1], *logits)
    torch.testing.assert_close(whole["kd_frs_classes"], 0.02 * classes)


def test_softmax_heads_mask_without_the_background():
    """Cross-entropy of distributions; the background is a class to follow, but no score."""
    (student, teacher), given = pyramids(), facts(activation="softmax", background=0, anchors=1)
    terms = FRS(warmup_steps=0, classes=1, **CHANNELS).double()(student, teacher, **given)
    expected = 0.0
    for i in range(2):
        zs, zt = (as_map(x, i).movedim(1, 3) for x in given["dense"])
        mask = zt.softmax(-1)[..., 1:].amax(-1)
        rows = -(zt.softmax(-1) * zs.softmax(-1).log()).sum(-1)
        expected += (mask * rows).sum() / mask.sum()
    torch.testing.assert_close(terms["kd_frs_classes"], expected)


def test_places_that_stand_for_nothing():
    """RT-DETR's invalid cells hold anything: neither scored nor compared."""
    (student, teacher), given = pyramids(), facts(anchors=2)
    valid = torch.ones(52, dtype=torch.bool)
    valid[[0, 1, 7, 24, 50]] = False  # a cell's two anchors, and one of others'
    kept = []
    for value in (0.0, 3e4):
        pair = []
        for x in given["dense"]:
            logits = torch.where(valid[:, None], x.logits, value)
            pair.append(Dense(logits, x.grids, valid=valid))
        loss = FRS(warmup_steps=0, **CHANNELS).double()
        kept.append(loss(student, teacher, dense=tuple(pair), teacher_dense=pair[1]))
    assert kept[0] == kept[1]
    none = [Dense(x.logits, x.grids, valid=torch.zeros_like(valid)) for x in given["dense"]]
    empty = loss(student, teacher, dense=tuple(none), teacher_dense=none[1])
    assert all(x == 0 and x.requires_grad == (n == "kd_frs_features") for n, x in empty.items())


def test_robust_weights_of_one_change_nothing_and_lower_ones_lower_it():
    (student, teacher), given = pyramids(), facts()
    targets = Targets(
        torch.tensor([[3.0, 2, 20, 30], [16, 16, 40, 32]]),
        torch.tensor([0, 1]),
        torch.tensor([0, 1]),
    )
    plain, robust = (FRS(robust=r, warmup_steps=0, **CHANNELS).double() for r in (False, True))
    expected = plain(student, teacher, **given)
    one = robust(student, teacher, targets, omega=torch.ones(2, 2).double(), **given)
    torch.testing.assert_close(one, expected)
    zero = robust(student, teacher, targets, omega=torch.zeros(2, 2).double(), **given)
    # By hand: the cells of the boxes leave the numerator, not the mask's sum.
    expected_features = 0.0
    for i, stride in enumerate(STRIDES):
        mask = as_map(given["dense"][1], i).amax(1).sigmoid()
        outside = torch.ones_like(mask)
        for box, b in zip(targets.boxes.tolist(), (0, 1)):
            x1, y1 = (int(v // stride) for v in box[:2])
            x2, y2 = (math.ceil(v / stride) for v in box[2:])
            outside[b, y1:y2, x1:x2] = 0
        d = (robust.adapters[i](student[i]) - teacher[i]).square().sum(1)
        expected_features += 0.005 * (mask * outside * d).sum() / mask.sum()
    torch.testing.assert_close(zero["kd_frs_features"], expected_features)
    assert 0 < zero["kd_frs_classes"] < expected["kd_frs_classes"]


def test_state_resumes_to_the_bit():
    (student, teacher), given = pyramids(torch.float32), facts(dtype=torch.float32)
    loss = FRS(seed=3, **CHANNELS)
    for _ in range(3):
        loss(student, teacher, **given)
    copy = FRS(**CHANNELS)
    copy.load_state_dict(loss.state_dict())
    a, b = loss(student, teacher, **given), copy(student, teacher, **given)
    assert a == b and a["kd_frs_features"] > 0 and copy.step == 4
