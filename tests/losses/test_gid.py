"""GID: the instances on which two detectors disagree, and what is learnt from them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import global_kd.functional as F
from global_kd.losses import GID
from global_kd.ops.roi_align import roi_align
from global_kd.step import Grid
from tests.losses import dense_heads
from tests.losses.dense_heads import (
    GRIDS,
    both,
    boxes_of,
    built,
    cast,
    finite,
    leaves,
    maps,
    row_weights,
    truth,
)
from tests.losses.test_tar import overlap
from tests.strategies import random
from tests.watch import Graphs, NoFloat64, NoHostSync

SOFTMAX = {"activation": "softmax", "background": 0}
KINDS = pytest.mark.parametrize(
    "options", [{}, SOFTMAX, {"classes": 1}], ids=["sigmoid", "softmax", "one class"]
)
POINTS = tuple(replace(g, anchors=1) for g in GRIDS)
SIZE = 3
WEIGHTS = {"features": 5e-4, "relation": 40, "classes": 0.1, "boxes": 1}


# --- the instances ------------------------------------------------------------------------------


def chosen(p_s, p_t, boxes_s, boxes_t, k=10, threshold=0.3, counts=None):
    """One prediction after another, and the boxes of all."""
    p_s, p_t = p_s.tolist(), p_t.tolist()
    apart = [max(abs(a - b) for a, b in zip(s, t)) for s, t in zip(p_s, p_t)]
    merged = [
        (b_t if max(t) >= max(s) else b_s)
        for s, t, b_s, b_t in zip(p_s, p_t, boxes_s.tolist(), boxes_t.tolist())
    ]
    kept: list[int] = []
    for i in sorted(range(len(apart)), key=lambda i: -apart[i]):
        if counts is not None and not counts[i]:
            continue
        if len(kept) < k and all(safe_overlap(merged[i], merged[j]) <= threshold for j in kept):
            kept.append(i)
    return kept, merged


def safe_overlap(a, b):
    sides = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return overlap(a, b) if sum(sides) > 0 else 0.0


def predictions(n=60, classes=3, seed=0):
    p_s, p_t = (random((n, classes), seed + i).sigmoid() for i in (1, 2))
    return p_s, p_t, boxes_of((n,), seed + 3), boxes_of((n,), seed + 4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("k", "threshold"), [(10, 0.3), (3, 0.0), (80, 0.6), (80, 1.0)])
def test_the_instances_are_those_of_plain_suppression(seed, k, threshold):
    given = predictions(seed=seed)
    found = F.select_instances(*given, k, threshold=threshold)
    expected, merged = chosen(*given, k, threshold)
    assert found.dtype == torch.int64 and found.tolist() == expected
    torchvision = pytest.importorskip("torchvision")
    scores = (given[1] - given[0]).abs().amax(dim=1)
    nms = torchvision.ops.nms(torch.tensor(merged, dtype=torch.float64), scores, threshold)
    assert found.tolist() == nms[:k].tolist()


def test_few_predictions_and_none():
    p, box = torch.rand(0, 3), torch.rand(0, 4)
    assert F.select_instances(p, p, box, box).tolist() == []
    p_s, p_t, *boxes = predictions(1)
    assert F.select_instances(p_s, p_t, *boxes).tolist() == [0]
    # Two detectors of one mind still have instances: those of the first predictions.
    point = torch.full((4, 4), 5.0)
    assert F.select_instances(*[torch.ones(4, 2)] * 2, point, point, 3).tolist() == [0, 1, 2]


def test_the_order_of_predictions_is_of_no_account():
    given = predictions(seed=4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    found = F.select_instances(*(x[order] for x in given))
    assert order[found].tolist() == F.select_instances(*given).tolist()


def test_what_is_wrong_is_named():
    p_s, p_t, b_s, b_t = predictions(5)
    for argument, value, message in (
        ("student_probs", p_s[:4], r"shape \(5, 3\)"),
        ("student_boxes", b_s[:, :3], r"shape \(5, 4\)"),
        ("teacher_boxes", b_t[:4], r"expected shape"),
        ("k", 0, "> 0"),
        ("threshold", 1.5, r"\[0, 1\]"),
    ):
        good = {"student_probs": p_s, "teacher_probs": p_t} | {
            "student_boxes": b_s,
            "teacher_boxes": b_t,
        }
        with pytest.raises(ValueError, match=message):
            F.select_instances(**good | {argument: value})


# --- what they look like ------------------------------------------------------------------------


def aligned(features, box, stride, size, samples=2):
    """``(C, size, size)`` of one image's map by loops over samples."""
    channels, height, width = features.shape

    def value(y, x):
        y, x = (min(max(v - 0.5, 0.0), n - 1.0) for v, n in ((y, height), (x, width)))
        top, left = int(y), int(x)
        down, right = min(top + 1, height - 1), min(left + 1, width - 1)
        a, b = y - top, x - left
        f = features
        return (1 - a) * ((1 - b) * f[:, top, left] + b * f[:, top, right]) + a * (
            (1 - b) * f[:, down, left] + b * f[:, down, right]
        )

    x1, y1, x2, y2 = (
        min(max(float(v) / stride, 0.0), float(n))
        for v, n in zip(box, (width, height, width, height))
    )
    rows = []
    for i in range(size):
        for j in range(size):
            total = 0.0
            for a in range(samples):
                for b in range(samples):
                    y = y1 + (i + (a + 0.5) / samples) / size * (y2 - y1)
                    x = x1 + (j + (b + 0.5) / samples) / size * (x2 - x1)
                    total = total + value(y, x) / samples**2
            rows.append(total)
    return torch.stack(rows, dim=1).view(channels, size, size)


def test_alignment_equals_the_slow_definition():
    features = random((2, 3, 5, 7), 1)
    boxes = boxes_of((2, 6), 3)  # of 2 to 30 pixels, some across the border
    boxes[0, 0], boxes[1, 1] = torch.tensor([9.0, 9, 9, 9]), torch.tensor([-50.0, -50, 500, 500])
    boxes[1, 2] = torch.tensor([300.0, 300, 400, 400])
    found = roi_align(features, boxes, 8, 3)
    for b in range(2):
        for i in range(6):
            expected = aligned(features[b], boxes[b, i], 8, 3)
            torch.testing.assert_close(found[b, i], expected, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: roi_align(x, boxes, 8, 2), features[..., :4].clone().requires_grad_()
    )


def test_alignment_is_that_of_torchvision_inside_of_the_map():
    torchvision = pytest.importorskip("torchvision")
    features = random((2, 3, 9, 11), 1, torch.float32)
    corner = 4 + 30 * torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0))
    side = 4 + 25 * torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(1))
    boxes = torch.cat([corner, corner + side], dim=2)
    expected = torchvision.ops.roi_align(features, list(boxes), 10, 1 / 8, 2, aligned=True)
    torch.testing.assert_close(roi_align(features, boxes, 8, 10).flatten(0, 1), expected)


def test_alignment_without_boxes():
    features = random((2, 3, 4, 4), 1).requires_grad_()
    none = roi_align(features, torch.zeros(2, 0, 4), 8, 3)
    assert none.shape == (2, 0, 3, 3, 3)
    assert torch.autograd.grad(none.sum(), features)[0].eq(0).all()


# --- the terms ----------------------------------------------------------------------------------


def level_of(box, strides):
    side = math.sqrt((box[2] - box[0] + 1) * (box[3] - box[1] + 1)) / (14 * strides[0])
    octave = math.floor(math.log2(side + 1e-6))
    return sum(octave >= math.log2(s / strides[0]) for s in strides[1:])


def places(dense):
    """Of each location its centre in pixels."""
    found = []
    for g in dense.grids:
        for y in range(g.height):
            for x in range(g.width):
                found += [((x + 0.5) * g.stride, (y + 0.5) * g.stride)] * g.anchors
    return found


def smooth_l1(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def members(dense, i, box):
    """Whether location ``i`` belongs to an instance's box."""
    if dense.priors is not None and any(g.anchors > 1 for g in dense.grids):
        return safe_overlap(dense.priors[i].tolist(), box) >= 0.5
    if dense.priors is None:
        x, y = places(dense)[i]
    else:
        a = dense.priors[i].tolist()
        x, y = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def definition(
    student, teacher, features, *, k=10, threshold=0.3, weights=None, counts=None, size=SIZE
):
    """The four weighted terms, and the square form of the first, by loops."""
    probs = [x.probabilities() for x in (student, teacher)]
    strides = [g.stride for g in student.grids]
    steps = [g.stride for g in student.grids for _ in range(g.rows)]
    rows, omegas, response = [], [], []
    for b in range(len(student.logits)):
        at = None if counts is None else counts[b].tolist()
        inputs = *(p[b] for p in probs), student.boxes[b].detach(), teacher.boxes[b].detach()
        picks, merged = chosen(*inputs, k, threshold, at)
        for i in picks:
            level = level_of(merged[i], strides)
            rows.append(
                [aligned(m[level][b], merged[i], strides[level], size).flatten() for m in features]
            )
            omegas.append(1.0 if weights is None else weights[b, i].item())
        for i in range(student.logits.shape[1]):
            if at is not None and not at[i]:
                continue
            if any(i == j or members(student, i, merged[j]) for j in picks):
                response.append((b, i))
    n = max(len(rows), 1)
    gaps = [(s - t).norm().item() for s, t in rows]
    found = {
        "features": sum(w * g for w, g in zip(omegas, gaps)) / n,
        "square": sum(w * g * g for w, g in zip(omegas, gaps)) / n / size**2,
    }
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    apart = [{p: (rows[p[0]][m] - rows[p[1]][m]).norm().item() for p in pairs} for m in (0, 1)]
    means = [sum(d.values()) / max(len(pairs), 1) or 1 for d in apart]
    found["relation"] = sum(
        omegas[i] * omegas[j] * smooth_l1(apart[0][i, j] / means[0] - apart[1][i, j] / means[1])
        for i, j in pairs
    ) / max(len(pairs), 1)
    classes = boxes = 0.0
    for b, i in response:
        weight = 1.0 if weights is None else weights[b, i].item()
        for s, t in zip(probs[0][b, i].tolist(), probs[1][b, i].tolist()):
            classes += weight * (-t * math.log(s) - (1 - t) * math.log(1 - s))
        gap = (student.boxes[b, i] - teacher.boxes[b, i]).abs().sum().item()
        boxes += weight * gap / steps[i]
    found["classes"], found["boxes"] = (x / max(len(response), 1) for x in (classes, boxes))
    return {name: WEIGHTS.get(name, 1) * x for name, x in found.items()}


def plain(**options):
    """Rows of few cells: the slow definition is slow."""
    return built(GID, adapter="identity", **{"size": SIZE} | options)


def values(terms):
    return [terms[f"kd_gid_{name}"].item() for name in WEIGHTS]


def check(terms, expected, rel=1e-9):
    assert values(terms) == pytest.approx([expected[name] for name in WEIGHTS], rel=rel, abs=1e-12)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("places", ["anchors", "points", "cells"])
@KINDS
def test_equals_the_definition(seed, places, options):
    grids = GRIDS if places == "anchors" else POINTS
    student, teacher = both(seed, grids=grids, **options)
    if places == "cells":
        student = replace(student, priors=None)
    features = maps(seed), maps(seed + 5)
    terms = plain()(*features, dense=(student, teacher))
    check(terms, definition(student, teacher, features))
    finite(terms, *features[0], student.logits, student.boxes)


def test_rows_have_ten_cells_a_side():
    student, teacher = both()
    features = maps(), maps(5)
    terms = built(GID, adapter="identity", k=2)(*features, dense=(student, teacher))
    check(terms, definition(student, teacher, features, k=2, size=10))


def test_options():
    student, teacher = both(4)
    features = maps(2), maps(7)
    terms = plain(k=4, threshold=0.1, distance="square", features=1)(
        *features, dense=(student, teacher)
    )
    expected = definition(student, teacher, features, k=4, threshold=0.1)
    check(terms, expected | {"features": expected["square"]})
    fewer = plain(features=0, relation=0)(*features, dense=(student, teacher))
    assert sorted(fewer) == ["kd_gid_boxes", "kd_gid_classes"]
    assert not built(GID, features=0, relation=0).adapters
    assert GID(classes=0, boxes=0).wishes == frozenset() and GID().wishes == {"priors"}


def test_all_locations_without_suppression_imitate_on_every_box():
    """With K = N and no suppression it is imitation on the box of every prediction."""
    student, teacher = both(1)
    n = student.logits.shape[1]
    features = maps(1), maps(6)
    loss = plain(k=n, threshold=1.0, distance="square", features=1, relation=0)
    found = loss(*features, dense=(student, teacher))["kd_gid_features"]
    errors = []
    for b in range(2):
        probs = (x.probabilities()[b] for x in (student, teacher))
        _, merged = chosen(*probs, student.boxes[b], teacher.boxes[b])
        for box in merged:
            level = level_of(box, (8, 16))
            s, t = (aligned(m[level][b], box, (8, 16)[level], SIZE) for m in features)
            errors.append((s - t).square().sum().item() / SIZE**2)
    assert found.item() == pytest.approx(sum(errors) / len(errors), rel=1e-9)


def test_smooth():
    """Where the choice holds still, as it does but for jumps."""
    student, teacher = both(2)
    features, other = maps(2), maps(7)

    def on_maps(*given):
        return sum(plain(classes=0, boxes=0)(given, other, dense=(student, teacher)).values())

    def on_heads(logits, boxes):
        moved = replace(student, logits=logits, boxes=boxes)
        loss = plain(features=0, relation=0)
        return sum(loss(features, other, dense=(moved, teacher)).values())

    assert torch.autograd.gradcheck(on_maps, features)
    assert torch.autograd.gradcheck(on_heads, (student.logits, student.boxes), fast_mode=True)


def test_identical_detectors_and_maps():
    """Nothing to learn but the entropy of the scores, whose gradient is 0; all finite."""
    student, _ = both()
    one = maps()
    terms = plain()(one, [x.detach() for x in one], dense=(student, student))
    assert terms["kd_gid_features"] == terms["kd_gid_relation"] == terms["kd_gid_boxes"] == 0
    slope = torch.autograd.grad(terms["kd_gid_classes"], student.logits, retain_graph=True)[0]
    assert slope.abs().max() < 1e-12
    finite(terms, *one, student.logits, student.boxes)


def test_images_and_their_order():
    """A pair may lie on two images; their order is of no account."""
    student, teacher = both(3)
    features = maps(3), maps(8)
    terms = plain()(*features, dense=(student, teacher))
    turned = [[x.flip(0) for x in side] for side in features]
    heads = [replace(x, logits=x.logits.flip(0), boxes=x.boxes.flip(0)) for x in (student, teacher)]
    assert values(plain()(*turned, dense=tuple(heads))) == pytest.approx(values(terms))


def test_relations_do_not_see_a_common_scale():
    student, teacher = both(3)
    features, other = maps(3), maps(8)
    found = plain(features=0, classes=0, boxes=0)
    first = found(features, other, dense=(student, teacher))["kd_gid_relation"]
    scaled = found([3 * x for x in features], other, dense=(student, teacher))["kd_gid_relation"]
    assert scaled.item() == pytest.approx(first.item())


def test_the_teacher_and_the_choice_get_no_gradient():
    student, teacher = both()
    one, other = maps(), maps(3)
    total = sum(built(GID).double()(one, other, dense=(student, teacher)).values())
    slopes = torch.autograd.grad(total, [*leaves(teacher), *other], allow_unused=True)
    assert all(x is None for x in slopes)
    terms = plain(classes=0, boxes=0)(one, other, dense=(student, teacher))
    slopes = torch.autograd.grad(sum(terms.values()), leaves(student), allow_unused=True)
    assert all(x is None for x in slopes)


@KINDS
def test_invalid_rows_do_not_count_whatever_stands_there(options):
    student, teacher = both(**options)
    valid = torch.arange(32) % 3 != 0
    broken = replace(
        student,
        valid=valid,
        logits=torch.where(valid[:, None], student.logits, -math.inf),
        boxes=torch.where(valid[:, None], student.boxes, math.inf),
    )
    features = maps(), maps(3)
    terms = plain()(*features, dense=(broken, teacher))
    counts = valid.expand(2, -1)
    check(terms, definition(student, teacher, features, counts=counts))
    finite(terms, *features[0], student.logits, student.boxes)


def test_no_valid_row_is_a_zero_that_back_propagates():
    student, teacher = both()
    student = replace(student, valid=torch.zeros(32, dtype=torch.bool))
    features = maps(), maps(3)
    terms = plain()(*features, dense=(student, teacher))
    assert values(terms) == [0, 0, 0, 0]
    finite(terms, *features[0], student.logits)


def test_levels():
    """Predictions of other levels are not picked; boxes are looked at on the chosen level."""
    student, teacher = both(1)
    features = maps(1), maps(6)
    loss = plain(levels=[16])
    terms = loss(*features, dense=(student, teacher))
    head = [
        replace(
            x,
            logits=x.logits[:, 24:],
            boxes=x.boxes[:, 24:],
            priors=x.priors[24:],
            grids=GRIDS[1:],
        )
        for x in (student, teacher)
    ]
    check(terms, definition(*head, [x[1:] for x in features]))


def test_channels_may_differ_from_level_to_level():
    student, teacher = both()
    features = [
        [random((2, c, g.height, g.width), c) for c, g in zip((3, 5), GRIDS)] for _ in range(2)
    ]
    loss = GID(student_channels=[3, 5], teacher_channels=[3, 5], strides=[8, 16])
    terms = loss.double()(*features, dense=(student, teacher))
    finite(terms, *loss.parameters())


def test_robust():
    student, teacher = both()
    features, targets = (maps(), maps(3)), truth()
    omega = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = plain(robust=True)
    facts = {"dense": (student, teacher)}
    ones = loss(*features, targets, omega=torch.ones_like(omega), **facts)
    assert values(ones) == pytest.approx(values(plain()(*features, targets, **facts)), rel=1e-6)
    terms = loss(*features, targets, omega=omega, **facts)
    weights = row_weights(loss, targets, omega, student)
    check(terms, definition(student, teacher, features, weights=weights), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e3])
@pytest.mark.parametrize("value", [None, 0.0, 7.0])
@KINDS
def test_finite(scale, value, options):
    """Saturated and equal predictions, constant maps: finite, with finite gradients."""
    student, teacher = both(scale=scale, dtype=torch.float32, **options)
    one, other = (maps(i, dtype=torch.float32) for i in (0, 3))
    if value is not None:
        one = [torch.full_like(x, value).requires_grad_() for x in one]
        other = [torch.full_like(x, value) for x in one]
    for adapter in ("identity", "conv3x3"):
        loss = built(GID, adapter=adapter)
        terms = loss(one, other, dense=(student, teacher))
        finite(terms, *one, student.logits, student.boxes)


def test_one_location_and_boxes_without_size():
    grids = (Grid(8, 1, 1, 1),)
    student, teacher = both(grids=grids)
    student = replace(student, boxes=torch.full_like(student.boxes, 300.0).requires_grad_())
    features = maps(grids=grids), maps(3, grids=grids)
    for batch in (2, 1):
        heads = [
            replace(x, logits=x.logits[:batch], boxes=x.boxes[:batch]) for x in (student, teacher)
        ]
        given = [[x[:batch] for x in side] for side in features]
        terms = plain(grids=grids)(*given, dense=tuple(heads))
        finite(terms, *features[0], student.logits)
    assert terms["kd_gid_relation"] == 0  # one instance has no relation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    student, teacher = (cast(x, dtype) for x in both(dtype=torch.float32))
    features = [[x.detach().to(dtype) for x in maps(i)] for i in (0, 3)]
    with NoFloat64():
        terms = plain()(*features, dense=(student, teacher))
    wide = cast(student, torch.float64), cast(teacher, torch.float64)
    exact = plain()(*([x.double() for x in y] for y in features), dense=wide)
    assert all(x.dtype == torch.float32 for x in terms.values())
    assert values(terms) == pytest.approx(values(exact), rel=1e-4)
    with torch.autocast("cpu", dtype):
        mixed = built(GID)(*features, dense=(student, teacher))
    finite(mixed, student.logits, student.boxes)


def test_one_graph_and_no_wait():
    student, teacher = both(dtype=torch.float32)
    loss = built(GID, k=3)  # a longer loop only takes longer to trace
    features = maps(dtype=torch.float32), maps(3, dtype=torch.float32)
    with NoHostSync():
        given = loss(*features, dense=(student, teacher))
        sum(given.values()).backward()
    graphs = Graphs()
    loss.compile(fullgraph=True, backend=graphs)
    again = loss(*features, dense=(student, teacher))
    assert values(again) == pytest.approx(values(given), rel=1e-6)
    assert graphs.count == 1


def test_it_needs_heads_with_boxes_and_no_ground_truth():
    assert GID().needs == {"dense", "boxes"}
    features = maps(), maps(3)
    with pytest.raises(ValueError, match="dense: GID expected"):
        plain()(*features)
    student, teacher = both()
    with pytest.raises(ValueError, match=r"Dense.boxes.*no instances"):
        plain()(*features, dense=(replace(student, boxes=None), teacher))
    for options in ({"k": 0}, {"size": 0}, {"threshold": 2}, {"overlap": -1}, {"distance": "l1"}):
        with pytest.raises(ValueError, match="expected"):
            GID(**options)


def test_it_resumes():
    features = maps(channels=5, dtype=torch.float32), maps(dtype=torch.float32)
    facts = {"dense": both(dtype=torch.float32)}
    loss, again = built(GID, student=5), built(GID, student=5, seed=1)
    loss(*features, **facts)
    loss.calibrate({"relation": 0.5})
    again.load_state_dict(loss.state_dict())
    assert again.step == 1
    assert values(again(*features, **facts)) == values(loss(*features, **facts))


def test_the_heads_of_these_tests_have_boxes_over_the_border():
    boxes = both()[0].boxes
    height, width = dense_heads.CANVAS
    assert (boxes < 0).any() and (boxes[..., 2] > width).any() and (boxes[..., 3] > height).any()
