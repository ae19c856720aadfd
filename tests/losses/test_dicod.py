"""DICOD: a classifier of crops teaches the classes and the boxes of a detector."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from global_kd import Targets
from global_kd.losses import DICOD
from global_kd.losses.dicod import _class_rows
from global_kd.ops.crop_boxes import crop_boxes
from global_kd.step import Dense, Grid, Positives
from tests.losses.heads import regions
from tests.strategies import random
from tests.watch import NoFloat64, NoHostSync, gradient

CHANNELS = {"student_channels": [3], "teacher_channels": [4], "strides": [8]}
BOXES = [[4.0, 4, 20, 30], [10, 2, 41, 29], [-3, 8, 12, 20]]
INDEX, LABELS = [0, 1, 1], [1, 3, 2]


def sampled(image, box, height, width):
    """One crop by torch's own affine grid; the equation's matrix, in pixels of the image."""
    x1, y1, x2, y2 = box.unbind()
    h, w = image.shape[-2:]
    zero = torch.zeros((), dtype=box.dtype)
    matrix = [(x2 - x1) / w, zero, (x1 + x2) / w - 1, zero, (y2 - y1) / h, (y1 + y2) / h - 1]
    grid = functional.affine_grid(
        torch.stack(matrix).view(1, 2, 3), (1, len(image), height, width), align_corners=False
    )
    return functional.grid_sample(
        image[None], grid, padding_mode="border", align_corners=False, mode="bilinear"
    )[0]


@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(0, 999),
)
def test_crops_equal_torchs_own(batch, count, canvas, size, seed):
    images = random((batch, 2, *canvas), seed)
    index = torch.arange(count) % batch
    corner = 6 * random((count, 2), seed + 1)
    boxes = torch.cat([corner, corner + 5 * random((count, 2), seed + 2).abs()], 1).requires_grad_()
    found = crop_boxes(images, boxes, index, size)
    assert found.shape == (count, 2, *size)
    up = random(found.shape, seed + 3)
    if count:
        expected = torch.stack([sampled(images[b], x, *size) for b, x in zip(index, boxes)])
        torch.testing.assert_close(found, expected)
        slopes = [torch.autograd.grad((x * up).sum(), boxes)[0] for x in (found, expected)]
        torch.testing.assert_close(*slopes)
    else:
        found.sum().backward()


def test_crops_of_whole_images_halves_and_compiled():
    images = random((2, 3, 6, 8), 0, torch.float32)
    whole = torch.tensor([[0.0, 0, 8, 6]]).expand(2, 4)
    torch.testing.assert_close(crop_boxes(images, whole, torch.arange(2), (6, 8)), images)
    boxes = torch.tensor([[1.5, 1, 6, 5.5], [-3, -3, 20, 20]])
    given = boxes, torch.arange(2), (4, 4)
    with NoFloat64(), NoHostSync():
        half = crop_boxes(images.half(), *given)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, crop_boxes(images.half().float(), *given))
    compiled = torch.compile(crop_boxes, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, *given), crop_boxes(images, *given))


def test_crops_of_boxes_that_make_no_sense_are_finite():
    images = random((1, 3, 6, 8), 0, torch.float32)
    wild = [[math.nan, 0, 1, 1], [1e30, 0, 2e30, 1], [5, 5, 5, 5], [4, 4, 1, 1]]
    boxes = torch.tensor(wild).requires_grad_()
    crops = crop_boxes(images, boxes, torch.zeros(4, dtype=torch.int64), (3, 3))
    (slope,) = gradient(crops.square().sum(), boxes)
    assert crops.isfinite().all() and slope[1:].isfinite().all()


# --- classes ------------------------------------------------------------------------------------


def softmax(row, T):
    total = sum(math.exp(v / T) for v in row)
    return [math.exp(v / T) / total for v in row]


def slow_rows(student, teacher, columns, T, activation, flip=None):
    rows = []
    for i, (z, t) in enumerate(zip(student.tolist(), teacher.tolist())):
        if activation == "softmax":
            q, p = softmax(z, T), softmax(t, T)
            rows.append(T**2 * sum(a * math.log(a / q[c]) for a, c in zip(p, columns)))
            continue
        total = 0.0
        for k, c in enumerate(columns):
            p, q = (1 / (1 + math.exp(-v / T)) for v in (t[k], z[c]))
            if flip is not None and flip[i] == k:  # the paper's equation for the true label
                p, q = 1 - p, 1 - q
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        rows.append(T**2 * total / len(columns))
    return rows


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("columns, width", [(None, 3), (range(1, 4), 4), ((2, 0, 5), 7)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_equal_the_slow_definition(activation, columns, width, temperature):
    student, teacher = 2 * random((5, width), 1), 2 * random((5, 3), 2)
    index = None if columns is None else torch.tensor(tuple(columns))
    found = _class_rows(student, teacher, index, temperature, activation)
    places = range(3) if columns is None else columns
    flips = (None,) if activation == "softmax" else (None, [0, 1, 2, 0, 1])  # a flip is no change
    for flip in flips:
        expected = slow_rows(student, teacher, places, temperature, activation, flip)
        assert found.tolist() == pytest.approx(expected, rel=1e-9)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: _class_rows(z, teacher, index, temperature, activation).sum(), student
    )


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_rows_are_finite_where_logits_are_saturated(activation):
    student = torch.tensor([[100.0, -100, 0, 1e4], [0, 0, 0, 0]]).requires_grad_()
    teacher = torch.tensor([[-100.0, 100, -1e4], [1e4, -1e4, 0]]).requires_grad_()
    rows = _class_rows(student, teacher, torch.tensor([0, 1, 3]), 2.0, activation)
    assert rows.isfinite().all() and gradient(rows.sum(), student)[0].isfinite().all()
    same = _class_rows(student, student, None, 2.0, activation)
    assert same.eq(0).all()


# --- the class ----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Three classes, a first convolution, and a count of what it was shown."""

    def __init__(self, classes=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
            self.head = nn.Linear(4, classes)
        self.shown: list[int] = []

    def forward(self, x):
        self.shown.append(len(x))
        return 5 * self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def classifier():
    return Classifier().double()


def targets(ids=None, count=3):
    boxes = torch.tensor(BOXES[:count], dtype=torch.float64).reshape(-1, 4)
    index, labels = (torch.tensor(x[:count], dtype=torch.int64) for x in (INDEX, LABELS))
    return Targets(boxes, labels, index, None if ids is None else torch.tensor(ids))


MAPS = [random((2, 3, 4, 6), 1)], [random((2, 4, 4, 6), 2)]
IMAGES = random((2, 3, 32, 48), 3)
POSITIVE = [0, 0, 2, 1, 2]


def positives(box=POSITIVE, width=4, seed=0):
    logits = 2 * random((len(box), width), seed)
    return Positives(
        torch.tensor(box, dtype=torch.int64), student=logits, teacher=torch.zeros_like(logits)
    )


def facts(box=POSITIVE, **more):
    return {"images": IMAGES, "positives": positives(box), **more}


OPTIONS = {"columns": range(1, 4), "activation": "softmax", "size": 16} | CHANNELS


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("robust", [False, True])
def test_the_term_of_classes(activation, robust):
    model = classifier()
    options = OPTIONS | {"activation": activation, "location": 0, "robust": robust}
    loss = DICOD(model, classes=0.5, **options)
    given, truth = facts(), targets()
    given["positives"].student.requires_grad_()
    omega = torch.tensor([[0.2, 0.7, 0.4]], dtype=torch.float64)
    term = loss(*MAPS, truth, **given, **({"omega": omega} if robust else {}))["kd_dicod_classes"]
    crops = [sampled(IMAGES[b], x, 16, 16) for b, x in zip(truth.image_index, truth.boxes)]
    teacher = copy.deepcopy(model).eval()(torch.stack(crops))[POSITIVE]
    student = given["positives"].student.detach()
    rows = slow_rows(student, teacher, range(1, 4), 2.0, activation)
    weights = [omega[0, k].item() if robust else 1.0 for k in POSITIVE]
    expected = 0.5 * sum(w * x for w, x in zip(weights, rows)) / len(rows)
    assert term.item() == pytest.approx(expected, rel=1e-9)
    term.backward()
    assert given["positives"].student.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def slow_location(boxes, box, truth, stem, size=16):
    total = 0.0
    for x, k in zip(boxes, box):
        image = IMAGES[int(truth.image_index[k])]
        pair = [sampled(image, v, size, size)[None] for v in (x, truth.boxes[k])]
        total += (
            (functional.avg_pool2d(pair[0], 4) - functional.avg_pool2d(pair[1], 4)).abs().mean()
        )
        if stem is not None:
            a, b = (functional.avg_pool2d(stem(v), 8) for v in pair)
            total += (a - b).abs().mean()
    return total / len(box)


@pytest.mark.parametrize("pixels_only", [False, True])
def test_the_term_of_location_from_regions(pixels_only):
    truth, model = targets(), classifier()
    found = regions(truth, [0, -1, 1, 2, -2, 2])
    found.student.boxes.requires_grad_()
    options = OPTIONS | {"classes": 0} | ({"stem": None} if pixels_only else {})
    term = DICOD(model, location=2.0, **options)(*MAPS, truth, images=IMAGES, regions=found)
    rows, box = [0, 2, 3, 5], [0, 1, 2, 2]
    boxes = torch.stack([found.student.boxes[i, LABELS[k] - 1] for i, k in zip(rows, box)])
    expected = 2 * slow_location(boxes, box, truth, None if pixels_only else model.conv)
    torch.testing.assert_close(term, {"kd_dicod_location": expected})
    slopes = [gradient(x, found.student.boxes)[0] for x in (*term.values(), expected)]
    torch.testing.assert_close(*slopes)
    assert slopes[0].abs().sum() > 0 and slopes[0][[1, 4]].eq(0).all()


def test_the_term_of_location_from_a_dense_head():
    """Of the shared locations where there are two heads, of the student's own else."""
    truth, model = targets(), classifier()
    assigned = torch.full((2, 24), -1)
    assigned[0, [3, 7]], assigned[1, 5], assigned[1, 9] = 0, 1, -2
    boxes = (torch.tensor(BOXES).double()[assigned.clamp(min=0)] + random((2, 24, 4), 5)).detach()
    boxes.requires_grad_()
    head = Dense(torch.zeros(2, 24, 3), (Grid(8, 4, 6),), boxes=boxes)
    loss = DICOD(model, classes=0, location=1, **OPTIONS)
    expected = slow_location([boxes[0, 3], boxes[0, 7], boxes[1, 5]], [0, 0, 1], truth, model.conv)
    for where in ({"dense": (head, head)}, {"student_dense": head}):
        term = loss(*MAPS, truth, images=IMAGES, assigned=assigned, **where)["kd_dicod_location"]
        torch.testing.assert_close(term, expected)
    (slope,) = gradient(term, boxes)
    assert slope.abs().sum(2).nonzero().tolist() == [[0, 3], [0, 7], [1, 5]]


def test_a_box_on_its_ground_truth_is_where_it_should_be():
    truth = targets()
    found = regions(truth, [0, 1])
    found.student.boxes.copy_(truth.boxes[:2, None].expand(2, 3, 4))
    found.student.boxes.requires_grad_()
    loss = DICOD(classifier(), classes=0, **OPTIONS)
    term = loss(*MAPS, truth, images=IMAGES, regions=found)["kd_dicod_location"]
    assert term == 0 and gradient(term, found.student.boxes)[0].isfinite().all()


def test_steps_along_the_gradient_find_the_object():
    """On a smooth image a shifted box moves back."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    images = (x / 48 + (y / 32) ** 2).expand(2, 3, 32, 48).contiguous()
    truth = Targets(torch.tensor([[8.0, 8, 24, 24]]), torch.tensor([1]), torch.tensor([0]))
    found = regions(truth, [0], dtype=torch.float32)
    loss = DICOD(Classifier(), classes=0, location=1, **OPTIONS)
    box = torch.tensor([11.0, 6, 28, 21]).requires_grad_()
    values = []
    for _ in range(60):
        object.__setattr__(found.student, "boxes", box.view(1, 1, 4))
        term = loss(*[[x.float() for x in m] for m in MAPS], truth, images=images, regions=found)
        values.append(term["kd_dicod_location"].item())
        (slope,) = gradient(term["kd_dicod_location"], box)
        box = (box - 20 * slope).detach().requires_grad_()
    assert min(values) < 0.3 * values[0]


def test_few_crops_are_drawn_evenly():
    truth = targets()
    found = regions(truth, [0, -1, 1, 2, 0, 1, 2])
    loss = DICOD(classifier(), classes=0, location=1, max_crops=3, **OPTIONS)
    found.student.boxes.requires_grad_()
    term = loss(*MAPS, truth, images=IMAGES, regions=found)["kd_dicod_location"]
    (slope,) = gradient(term, found.student.boxes)
    assert slope.abs().sum((1, 2)).nonzero().flatten().tolist() == [0, 3, 5]


def test_the_classifier_sees_each_object_once():
    model = classifier()
    loss = DICOD(model, location=0, **OPTIONS)
    first = loss(*MAPS, targets([5, 9, 7]), **facts())
    assert model.shown == [3]
    again = loss(*MAPS, targets([5, 9, 7]), **facts())
    assert model.shown == [3] and again["kd_dicod_classes"].item() == pytest.approx(
        first["kd_dicod_classes"].item(), rel=1e-6
    )
    loss(*MAPS, targets([9, 11, 5]), **facts())
    assert model.shown == [3, 1]
    loss(*MAPS, targets(), **facts())  # without ids nothing is kept
    off = DICOD(model, location=0, cache=False, **OPTIONS)
    off(*MAPS, targets([5, 9, 7]), **facts())
    off(*MAPS, targets([5, 9, 7]), **facts())
    assert model.shown == [3, 1, 3, 3, 3]


def test_the_classifier_stays_outside():
    """No child, no parameter, no key; frozen, in eval mode whatever .train() says."""
    model = classifier().train()
    state = copy.deepcopy(model.state_dict())
    loss = DICOD(model, **OPTIONS).train()
    found = regions(targets(), [0, 1])
    loss(*MAPS, targets(), **facts(), regions=found)
    assert list(loss.children()) == [loss.adapters] and not list(loss.parameters())
    assert list(loss.state_dict()) == ["_extra_state"]
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    copied = DICOD(model, **OPTIONS)
    copied.load_state_dict(loss.state_dict())
    a, b = (x(*MAPS, targets(), **facts(), regions=found) for x in (loss, copied))
    assert a == b and copied.step == loss.step == 2


def test_normal_emptiness():
    loss = DICOD(classifier(), **OPTIONS)
    for box, count in (([], 3), ([], 0)):
        given = facts(box)
        found = regions(targets(count=count), [-1, -2])
        inputs = given["positives"].student.requires_grad_(), found.student.boxes.requires_grad_()
        terms = loss(*MAPS, targets(count=count), regions=found, **given)
        assert all(x == 0 for x in terms.values()) and len(terms) == 2
        assert all(g.eq(0).all() for g in gradient(sum(terms.values()), *inputs))


def test_preprocessing_and_types():
    """Float32 images and a half-precision student before a classifier of its own normalisation."""
    model = Classifier()
    seen = []
    loss = DICOD(model, preprocess=lambda x: seen.append(x) or (x - 3) / 2, **OPTIONS)
    logits = positives().student
    half = Positives(torch.tensor(POSITIVE), student=logits.half(), teacher=logits.half())
    truth = Targets(targets().boxes.float(), targets().labels, targets().image_index)
    found = regions(truth, [0, 1], dtype=torch.float32)
    maps = [[x.float() for x in m] for m in MAPS]
    with NoFloat64():
        terms = loss(*maps, truth, images=IMAGES.float().half(), positives=half, regions=found)
    assert all(x.dtype == torch.float32 and x.isfinite() for x in terms.values())
    assert len(seen) == 3  # the classifier, and the stem on truth and boxes
    plain = DICOD(model, **OPTIONS)(
        *maps, truth, images=(IMAGES.float() - 3) / 2, positives=half, regions=found
    )
    torch.testing.assert_close(
        terms["kd_dicod_classes"], plain["kd_dicod_classes"], rtol=1e-2, atol=1e-3
    )


def test_what_it_asks_for_and_refuses():
    model = classifier()
    assert DICOD(model).needs == {"targets", "images", "positives"}
    assert DICOD(model).wishes == {"regions", "boxes", "assigned"}
    assert DICOD(model, classes=0).needs == {"targets", "images"}
    assert not DICOD(model, location=0).wishes
    assert DICOD(model, **CHANNELS).weights == {"classes": 0.4, "location": 0.15}
    assert DICOD(model, family="two-stage", **CHANNELS)._activation == "softmax"
    assert DICOD(model, **CHANNELS)._activation == "sigmoid"
    with pytest.raises(ValueError, match="regions: DICOD expected the boxes of the student's pos"):
        DICOD(model, **(OPTIONS | {"location": 0.15}))(*MAPS, targets(), **facts())
    # By default the term of location is left out where no detector tells the boxes.
    assert list(DICOD(model, **OPTIONS)(*MAPS, targets(), **facts())) == ["kd_dicod_classes"]
    with pytest.raises(ValueError, match=r"columns: .* 3 classes, but got 4; pass columns=range"):
        DICOD(model, **(OPTIONS | {"columns": None, "location": 0}))(*MAPS, targets(), **facts())
    with pytest.raises(TypeError, match="classifier: expected a module, but got str"):
        DICOD("resnet50")
    with pytest.raises(ValueError, match="stem: expected a classifier with a Conv2d"):
        DICOD(nn.Flatten())
    for option in ({"temperature": 0}, {"activation": "relu"}, {"stem": "last"}, {"size": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            DICOD(model, **option)
