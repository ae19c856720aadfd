"""Bad input: the error names the argument, says what was expected, and what came.

One row of a table is one mistake. Shapes, dtypes and devices are refused by every function; values
(nan, labels out of range), whose reading would stall an accelerator, by `Targets` and the losses.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import global_kd.functional as F
from global_kd import GlobalKnowledgeLoss, PrototypeGenerator, RobustDistillLoss, Targets


def floats(*shape, device="cpu"):
    return torch.ones(shape, device=device)


def longs(*shape, device="cpu"):
    return torch.zeros(shape, dtype=torch.int64, device=device)


def box_rows(n=3, device="cpu"):
    return torch.tensor([[0.0, 0.0, 8.0, 8.0]] * n, device=device)


# What every function accepts; a case below changes one argument of it.
GOOD = {
    "pool_boxes": {
        "features": floats(2, 3, 4, 4),
        "boxes": box_rows(),
        "image_index": longs(3),
        "stride": 8,
    },
    "density_candidates": {"student": floats(5, 3), "teacher": floats(5, 4)},
    "select_prototypes": {"student": floats(5, 3), "teacher": floats(5, 4)},
    "robust_weights": {
        "student": floats(2, 5, 3),
        "teacher": floats(2, 5, 4),
        "student_prototypes": floats(2, 6, 3),
        "teacher_prototypes": floats(2, 6, 4),
        "prototype_labels": longs(2, 6),
        "labels": longs(5),
    },
    "relation_loss": {
        "student": floats(2, 5, 3),
        "teacher": floats(2, 5, 4),
        "student_prototypes": floats(2, 6, 3),
        "teacher_prototypes": floats(2, 6, 4),
        "weights": floats(2, 5),
        "pairs": torch.ones(2, 5, 6, dtype=torch.bool),
    },
    "imitation_loss": {
        "student": floats(2, 3, 4, 4),
        "teacher": floats(2, 3, 4, 4),
        "boxes": box_rows(),
        "image_index": longs(3),
        "stride": 8,
        "weights": floats(3),
    },
    "logit_loss": {"student": floats(5, 4), "teacher": floats(5, 4), "weights": floats(5)},
}


@pytest.mark.parametrize("name", GOOD)
def test_the_good_input_is_good(name):
    """Otherwise the cases below might fail for another reason."""
    getattr(F, name)(**GOOD[name])


NAN = float("nan")
WRONG = [
    # function, argument, value, error, what the message says came ("": two arguments contradict
    # each other and the message may name either)
    ("pool_boxes", "features", floats(3, 4, 4), ValueError, "(3, 4, 4)"),
    ("pool_boxes", "features", longs(2, 3, 4, 4), TypeError, "torch.int64"),
    ("pool_boxes", "features", [[1.0]], TypeError, "list"),
    ("pool_boxes", "features", floats(2, 3, 4, 4, device="meta"), ValueError, ""),
    ("pool_boxes", "boxes", floats(3, 5), ValueError, "(3, 5)"),
    ("pool_boxes", "boxes", floats(4), ValueError, "(4,)"),
    ("pool_boxes", "boxes", longs(3, 4), TypeError, "torch.int64"),
    ("pool_boxes", "boxes", [[0, 0, 8, 8]], TypeError, "list"),
    ("pool_boxes", "boxes", box_rows(device="meta"), ValueError, "meta"),
    ("pool_boxes", "image_index", longs(2), ValueError, "(2,)"),
    ("pool_boxes", "image_index", longs(3, 1), ValueError, "(3, 1)"),
    ("pool_boxes", "image_index", floats(3), TypeError, "torch.float32"),
    ("pool_boxes", "image_index", longs(3).int(), TypeError, "torch.int32"),
    ("pool_boxes", "image_index", longs(3, device="meta"), ValueError, "meta"),
    ("pool_boxes", "stride", 0, ValueError, "0"),
    ("pool_boxes", "stride", -8, ValueError, "-8"),
    ("pool_boxes", "stride", NAN, ValueError, "nan"),
    ("density_candidates", "student", floats(5), ValueError, "(5,)"),
    ("density_candidates", "student", longs(5, 3), TypeError, "torch.int64"),
    ("density_candidates", "teacher", floats(4, 4), ValueError, "(4, 4)"),
    ("density_candidates", "teacher", floats(5, 4, device="meta"), ValueError, "meta"),
    ("density_candidates", "bandwidth", 0.0, ValueError, "0.0"),
    ("density_candidates", "quantile", 1.0, ValueError, "1.0"),
    ("density_candidates", "quantile", -0.1, ValueError, "-0.1"),
    ("select_prototypes", "student", floats(1, 5, 3), ValueError, ""),
    ("select_prototypes", "teacher", floats(4, 4), ValueError, "(4, 4)"),
    ("select_prototypes", "teacher", longs(5, 4), TypeError, "torch.int64"),
    ("select_prototypes", "teacher", floats(5, 4, device="meta"), ValueError, "meta"),
    ("select_prototypes", "num_prototypes", 0, ValueError, "0"),
    ("select_prototypes", "alpha", -1.0, ValueError, "-1.0"),
    ("select_prototypes", "alpha", NAN, ValueError, "nan"),
    ("select_prototypes", "candidates", longs(2, 2), ValueError, "(2, 2)"),
    ("select_prototypes", "candidates", floats(2), TypeError, "torch.float32"),
    ("select_prototypes", "candidates", torch.tensor([1, 5]), ValueError, "5"),
    ("select_prototypes", "candidates", torch.tensor([-1]), ValueError, "-1"),
    ("robust_weights", "student", longs(2, 5, 3), TypeError, "torch.int64"),
    ("robust_weights", "teacher", floats(2, 4, 4), ValueError, "(2, 4, 4)"),
    ("robust_weights", "teacher", floats(2, 5, 4, device="meta"), ValueError, "meta"),
    ("robust_weights", "student_prototypes", floats(2, 6, 4), ValueError, "(2, 6, 4)"),
    ("robust_weights", "student_prototypes", floats(3, 6, 3), ValueError, ""),
    ("robust_weights", "teacher_prototypes", floats(2, 7, 4), ValueError, "(2, 7, 4)"),
    ("robust_weights", "teacher_prototypes", floats(2, 6, 4, device="meta"), ValueError, "meta"),
    ("robust_weights", "prototype_labels", longs(2, 5), ValueError, "(2, 5)"),
    ("robust_weights", "prototype_labels", floats(2, 6), TypeError, "torch.float32"),
    ("robust_weights", "prototype_labels", longs(2, 6, device="meta"), ValueError, "meta"),
    ("robust_weights", "labels", longs(4), ValueError, "(4,)"),
    ("robust_weights", "labels", floats(5), TypeError, "torch.float32"),
    ("robust_weights", "labels", longs(5, device="meta"), ValueError, "meta"),
    ("relation_loss", "student", floats(2, 5, 4), ValueError, ""),
    ("relation_loss", "teacher", floats(3, 5, 4), ValueError, "(3, 5, 4)"),
    ("relation_loss", "student_prototypes", floats(2, 6, 4), ValueError, "(2, 6, 4)"),
    ("relation_loss", "teacher_prototypes", floats(2, 5, 4), ValueError, "(2, 5, 4)"),
    ("relation_loss", "weights", floats(2, 4), ValueError, "(2, 4)"),
    ("relation_loss", "weights", floats(3, 5), ValueError, "(3, 5)"),
    ("relation_loss", "weights", floats(2, 5, device="meta"), ValueError, "meta"),
    ("relation_loss", "pairs", torch.ones(5, 5, dtype=torch.bool), ValueError, "(5, 5)"),
    ("relation_loss", "pairs", floats(2, 5, 6), TypeError, "torch.float32"),
    ("relation_loss", "beta", 0.0, ValueError, "0.0"),
    ("imitation_loss", "student", floats(2, 5, 4, 4), ValueError, "(2, 5, 4, 4)"),
    ("imitation_loss", "student", floats(2, 3, 4, 5), ValueError, "(2, 3, 4, 5)"),
    ("imitation_loss", "student", floats(3, 4, 4), ValueError, "(3, 4, 4)"),
    ("imitation_loss", "student", longs(2, 3, 4, 4), TypeError, "torch.int64"),
    ("imitation_loss", "teacher", longs(2, 3, 4, 4), TypeError, "torch.int64"),
    ("imitation_loss", "teacher", floats(2, 3, 4, 4, device="meta"), ValueError, "meta"),
    ("imitation_loss", "boxes", floats(3, 3), ValueError, "(3, 3)"),
    ("imitation_loss", "boxes", box_rows(device="meta"), ValueError, "meta"),
    ("imitation_loss", "image_index", longs(4), ValueError, "(4,)"),
    ("imitation_loss", "stride", 0.0, ValueError, "0.0"),
    ("imitation_loss", "weights", floats(2), ValueError, "(2,)"),
    ("imitation_loss", "weights", floats(3, 1), ValueError, "(3, 1)"),
    ("imitation_loss", "weights", floats(3, device="meta"), ValueError, "meta"),
    ("imitation_loss", "foreground", -1.0, ValueError, "-1.0"),
    ("imitation_loss", "background", float("inf"), ValueError, "inf"),
    ("imitation_loss", "normalizer", "sum", ValueError, "'sum'"),
    ("logit_loss", "student", floats(5, 3), ValueError, "(5, 3)"),
    ("logit_loss", "student", floats(4, 4), ValueError, "(4, 4)"),
    ("logit_loss", "student", floats(5), ValueError, "(5,)"),
    ("logit_loss", "teacher", longs(5, 4), TypeError, "torch.int64"),
    ("logit_loss", "teacher", floats(5, 4, device="meta"), ValueError, "meta"),
    ("logit_loss", "weights", floats(4), ValueError, "(4,)"),
    ("logit_loss", "weights", floats(5, 1), ValueError, "(5, 1)"),
    ("logit_loss", "temperature", 0.0, ValueError, "0.0"),
    ("logit_loss", "activation", "relu", ValueError, "'relu'"),
    ("logit_loss", "class_reduction", "max", ValueError, "'max'"),
]


def called(value) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)}{'@meta' if value.device.type == 'meta' else ''}"
    return type(value).__name__ if isinstance(value, list) else repr(value)


@pytest.mark.parametrize(
    ("function", "argument", "value", "error", "came"),
    WRONG,
    ids=[f"{case[0]}-{case[1]}-{called(case[2])}" for case in WRONG],
)
def test_functions(function, argument, value, error, came):
    with pytest.raises(error, match=r"expected .*but got ") as caught:
        getattr(F, function)(**(GOOD[function] | {argument: value}))
    message = str(caught.value)
    assert came in message
    if came:
        assert re.match(rf"{argument}\b", message), message


@pytest.mark.parametrize("function", ["robust_weights", "relation_loss"])
@pytest.mark.parametrize(
    "lead", [pytest.param((3,), id="three levels for two"), pytest.param((2, 2), id="two leads")]
)
def test_prototypes_of_other_levels(function, lead):
    """Both spaces' prototypes fit each other, but not the levels of the rows."""
    other = {
        "student_prototypes": floats(*lead, 6, 3),
        "teacher_prototypes": floats(*lead, 6, 4),
    }
    if function == "robust_weights":
        other["prototype_labels"] = longs(*lead, 6)
    with pytest.raises(ValueError, match=r"prototypes: expected .*but got "):
        getattr(F, function)(**(GOOD[function] | other))


def test_an_unknown_option_lists_the_known_ones():
    for options, names in (
        ({"activation": "relu"}, ("softmax", "sigmoid")),
        ({"class_reduction": "max"}, ("mean", "sum")),
    ):
        with pytest.raises(ValueError, match=names[0]) as caught:
            F.logit_loss(floats(5, 4), floats(5, 4), **options)
        assert all(name in str(caught.value) for name in names)


# --- values: Targets, and what reads them -----------------------------------------------------

BOX = [0.0, 0.0, 8.0, 8.0]


def targets(**changes):
    good = {
        "boxes": torch.tensor([BOX, BOX]),
        "labels": torch.tensor([0, 1]),
        "image_index": torch.tensor([0, 1]),
    }
    return Targets(**(good | changes))


INF = float("inf")
BAD_TARGETS = [
    ("boxes", torch.tensor([BOX, [0.0, NAN, 8.0, 8.0]]), ValueError, "nan.*row 1"),
    ("boxes", torch.tensor([[0.0, 0.0, INF, 8.0], BOX]), ValueError, "inf.*row 0"),
    ("boxes", torch.tensor([BOX, [9.0, 0.0, 8.0, 8.0]]), ValueError, r"9\.0.*row 1"),
    ("boxes", torch.tensor([[0.0, 9.0, 8.0, 8.0], BOX]), ValueError, r"9\.0.*row 0"),
    ("boxes", floats(2, 5), ValueError, r"\(2, 5\)"),
    ("boxes", floats(4), ValueError, r"\(4,\)"),
    ("boxes", longs(2, 4), TypeError, "int64"),
    ("labels", longs(3), ValueError, r"\(3,\)"),
    ("labels", longs(2, 1), ValueError, r"\(2, 1\)"),
    ("labels", floats(2), TypeError, "float32"),
    ("labels", torch.tensor([0, -1]), ValueError, "-1"),
    ("labels", longs(2, device="meta"), ValueError, "meta"),
    ("image_index", longs(1), ValueError, r"\(1,\)"),
    ("image_index", floats(2), TypeError, "float32"),
    ("image_index", torch.tensor([-2, 0]), ValueError, "-2"),
    ("image_index", longs(2, device="meta"), ValueError, "meta"),
    ("ids", longs(3), ValueError, r"\(3,\)"),
    ("ids", floats(2), TypeError, "float32"),
]


@pytest.mark.parametrize(
    ("argument", "value", "error", "came"),
    BAD_TARGETS,
    ids=[f"{case[0]}-{called(case[1])}-{i}" for i, case in enumerate(BAD_TARGETS)],
)
def test_targets(argument, value, error, came):
    with pytest.raises(error, match=rf"^{argument}: expected .*but got .*{came}"):
        targets(**{argument: value})


def test_targets_accept_a_normal_day():
    """Outside the image, no area, no boxes at all: none of these is an error."""
    targets(boxes=torch.tensor([[-9.0, -9.0, -5.0, 900.0], [3.0, 3.0, 3.0, 3.0]]))
    assert len(Targets(torch.zeros(0, 4), longs(0), longs(0))) == 0
    assert len(Targets.from_list([])) == 0


def test_an_image_without_boxes_needs_no_ids():
    one = {"boxes": torch.tensor([BOX]), "labels": longs(1), "ids": torch.tensor([5])}
    none = {"boxes": floats(0, 4), "labels": longs(0)}
    assert Targets.from_list([none, one]).ids.tolist() == [5]
    assert Targets.from_list([one, {"boxes": torch.tensor([BOX]), "labels": longs(1)}]).ids is None


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_default_device_has_no_say_in_targets(device):
    """ "meta" stands for "cuda": nothing is made there and copied."""
    one = {"boxes": torch.tensor([BOX, BOX]), "labels": longs(2), "ids": torch.tensor([5, 6])}
    none = {"boxes": floats(0, 4), "labels": longs(0)}
    with torch.device("meta"):
        packed = Targets.from_list([one, none, one], device)
        empty = Targets.from_list([none], device), Targets.from_list([], device)
    assert packed.image_index.tolist() == [0, 0, 2, 2] and packed.ids.tolist() == [5, 6, 5, 6]
    for x in (packed, *empty):
        assert {x.boxes.device.type, x.labels.device.type, x.image_index.device.type} == {"cpu"}


def test_where_targets_are_wanted_nothing_is_copied_from_the_processor():
    """All on the device: a table of images made on the processor would make it wait."""
    rows = [
        {"boxes": floats(n, 4, device="meta"), "labels": longs(n, device="meta")} for n in (2, 0, 3)
    ]
    from torch.utils._python_dispatch import TorchDispatchMode

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.add(out.device.type)
            return out

    seen = set()
    with Devices():
        packed = Targets.from_list(rows)
    assert seen == {"meta"} and packed.image_index.shape == (5,)


def test_targets_from_list_name_the_image():
    good = {"boxes": torch.tensor([BOX]), "labels": longs(1)}
    with pytest.raises(ValueError, match=r"targets\[1\].*labels.*but got"):
        Targets.from_list([good, {"boxes": torch.tensor([BOX])}])
    with pytest.raises(ValueError, match=r"targets\[1\].*\(r, 4\).*\(1, 5\)"):
        Targets.from_list([good, {"boxes": floats(1, 5), "labels": longs(1)}])
    with pytest.raises((ValueError, TypeError), match="expected .*but got"):
        Targets.from_list([good, {"boxes": torch.tensor([BOX]), "labels": longs(2)}])


@pytest.mark.parametrize(
    ("first", "second"),
    [(1, 2), (2, 1), (0, 3), (3, 0)],
)
@pytest.mark.parametrize("key", ["labels", "ids"])
def test_lengths_are_those_of_each_image(key, first, second):
    """Together they fit, and a label would move to another picture."""
    rows = []
    for boxes, numbers in ((first, second), (second, first)):
        row = {"boxes": torch.tensor([BOX] * boxes).reshape(-1, 4), "labels": longs(boxes)}
        rows.append(row | {"ids": longs(boxes)} | {key: longs(numbers)})
    with pytest.raises(ValueError, match=rf"targets\[0\]\['{key}'\]: expected shape \({first},\)"):
        Targets.from_list(rows)
    with pytest.raises(ValueError, match=rf"'{key}'\]: expected shape \(1,\).*got \(1, 1\)"):
        one = {"boxes": torch.tensor([BOX]), "labels": longs(1)}
        Targets.from_list([one | {key: longs(1, 1)}])


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("boxes", np.zeros((1, 4)), TypeError, "ndarray; pass torch.as_tensor.*float32"),
        ("boxes", [BOX], TypeError, "list; pass torch.as_tensor.*float32"),
        ("boxes", None, TypeError, "NoneType; pass torch.as_tensor"),
        ("boxes", longs(1, 4), TypeError, r"int64; pass boxes.float\(\)"),
        ("labels", np.zeros(1, dtype=int), TypeError, "ndarray; pass torch.as_tensor.*int64"),
        ("labels", [0], TypeError, "list; pass torch.as_tensor.*int64"),
        ("labels", None, TypeError, "NoneType; pass torch.as_tensor"),
        ("labels", floats(1), TypeError, "float32; pass .to"),
        ("labels", torch.tensor([True]), TypeError, "bool; pass .to"),
        ("ids", [0], TypeError, "list; pass torch.as_tensor.*int64"),
        ("ids", np.zeros(1), TypeError, "ndarray; pass torch.as_tensor"),
    ],
)
def test_what_is_no_tensor_is_named_with_its_image(key, value, error, message):
    one = {"boxes": torch.tensor([BOX]), "labels": longs(1)}
    with pytest.raises(error, match=rf"targets\[1\]\['{key}'\]: expected .*but got .*{message}"):
        Targets.from_list([one, one | {key: value}])


@pytest.mark.parametrize(
    "value",
    [None, {"boxes": floats(1, 4), "labels": longs(1)}, floats(1, 4), np.zeros((1, 4)), "targets"],
    ids=called,
)
def test_what_is_no_list_of_dictionaries(value):
    with pytest.raises(TypeError, match=r"targets: expected a list of one dictionary per image"):
        Targets.from_list(value)
    with pytest.raises(TypeError, match=r"targets\[0\]: expected a dictionary"):
        Targets.from_list([floats(1, 4) if isinstance(value, dict) else value])


@pytest.mark.parametrize(
    "boxes",
    [torch.zeros(0, 4).double(), longs(0, 4), torch.tensor([]), torch.zeros(0, 4).half()],
    ids=called,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_without_boxes_decides_no_dtype(boxes, dtype):
    none = {"boxes": boxes, "labels": torch.tensor([])}
    one = {"boxes": torch.tensor([[0.25, 0, 2049.125, 8]], dtype=dtype), "labels": longs(1)}
    for rows in ([none, one], [one, none]):
        packed = Targets.from_list(rows)
        assert packed.boxes.dtype == dtype and torch.equal(packed.boxes, one["boxes"])
        assert packed.labels.dtype == torch.int64
    assert Targets.from_list([none]).boxes.shape == (0, 4)


class Said(torch.Tensor):
    """As torchvision's ``tv_tensors.BoundingBoxes``, as far as is looked at."""

    format, canvas_size = "XYXY", (32, 32)


def said(values, kind, size=(32, 32)):
    boxes = torch.tensor(values).as_subclass(Said)
    boxes.format, boxes.canvas_size = kind, size
    return boxes


CORNERS = [[2.0, 4.0, 10.0, 20.0], [0.0, 0.0, 6.0, 2.0]]
SAID = [
    ("XYXY", CORNERS),
    ("XYWH", [[2.0, 4.0, 8.0, 16.0], [0.0, 0.0, 6.0, 2.0]]),
    ("CXCYWH", [[6.0, 12.0, 8.0, 16.0], [3.0, 1.0, 6.0, 2.0]]),
]


@pytest.mark.parametrize(("kind", "values"), SAID)
@pytest.mark.parametrize("real", [False, True], ids=["alike", "torchvision"])
def test_boxes_that_say_what_they_are(kind, values, real):
    if real:
        tv = pytest.importorskip("torchvision.tv_tensors")
        boxes = tv.BoundingBoxes(torch.tensor(values), format=kind, canvas_size=(32, 32))
    else:
        boxes = said(values, kind)
    packed = Targets.from_list([{"boxes": boxes, "labels": longs(2)}])
    direct = Targets(boxes, longs(2), longs(2))
    for x in (packed.boxes, direct.boxes):
        assert type(x) is torch.Tensor and x.tolist() == CORNERS
    empty = {"boxes": boxes[:0] if real else said(values, kind)[:0], "labels": longs(0)}
    assert Targets.from_list([empty]).boxes.shape == (0, 4)


def test_boxes_of_another_canvas_or_turned_ones_are_refused():
    one = {"boxes": said(CORNERS, "XYXY", (64, 32)), "labels": longs(2)}
    assert len(Targets.from_list([one], canvas=(64, 64))) == 2  # images are padded after it
    with pytest.raises(ValueError, match=r"canvas of the images, \(32, 48\), but got .*\(64, 32\)"):
        Targets.from_list([one], canvas=(32, 48))
    with pytest.raises(ValueError, match=r"expected the format XYXY.*but got XYXYXYXY"):
        Targets.from_list([{"boxes": said([[0.0] * 8], "XYXYXYXY"), "labels": longs(1)}])


def test_labels_outside_the_classes():
    generator = PrototypeGenerator(num_classes=3)
    wrong = targets(labels=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"^labels: expected .* 3, but got 3"):
        generator.add(floats(1, 2, 4), floats(1, 2, 5), wrong)
    with pytest.raises(ValueError, match=r"^labels: expected .* 3, but got 3"):
        knowledge()([floats(2, 4, 2, 2)], [floats(2, 4, 2, 2)], wrong)


def test_rows_that_do_not_fit_the_generator():
    generator = PrototypeGenerator(num_classes=3)
    with pytest.raises(ValueError, match=r"^student: expected .*2.*but got \(1, 3, 4\)"):
        generator.add(floats(1, 3, 4), floats(1, 3, 5), targets())
    generator.add(floats(1, 2, 4), floats(1, 2, 5), targets())
    with pytest.raises(ValueError, match=r"^teacher: expected .*5.*but got .*6"):
        generator.add(floats(1, 2, 4), floats(1, 2, 6), targets())


def knowledge(channels=4):
    return GlobalKnowledgeLoss(
        3,
        student_channels=[channels],
        teacher_channels=[4],
        strides=[8],
        total_steps=10,
    )


def test_image_index_beyond_the_batch():
    with pytest.raises(ValueError, match=r"^image_index: expected .* 2, but got 2"):
        targets(image_index=torch.tensor([0, 2])).validate(num_images=2)
    with pytest.raises(ValueError, match=r"^image_index: expected .* 2, but got 5"):
        knowledge()(
            [floats(2, 4, 2, 2)],
            [floats(2, 4, 2, 2)],
            targets(image_index=torch.tensor([0, 5])),
        )


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        pytest.param(
            [floats(2, 4, 2, 2)] * 2,
            [floats(2, 4, 2, 2)],
            r"student: expected 1 level.*got 2",
            id="one level too many",
        ),
        pytest.param(
            [floats(2, 4, 2, 2)],
            [],
            r"teacher: expected 1 level.*got 0",
            id="no teacher level",
        ),
        pytest.param(
            [floats(2, 4, 2, 2)],
            [floats(2, 4, 2, 3)],
            r"level 0.*\(2, 4, 2, 2\).*\(2, 4, 2, 3\)",
            id="sizes that differ",
        ),
        pytest.param(
            [floats(2, 4, 2, 2)],
            [floats(3, 4, 2, 2)],
            r"level 0.*\(2, 4, 2, 2\).*\(3, 4, 2, 2\)",
            id="batches that differ",
        ),
    ],
)
def test_levels_that_do_not_pair(student, teacher, message):
    for loss in (knowledge(), RobustDistillLoss([8.0])):
        arguments = [student, teacher, targets()]
        if isinstance(loss, RobustDistillLoss):
            arguments.append(knowledge().bank)
        with pytest.raises(ValueError, match=message):
            loss(*arguments)


def test_channels_that_do_not_fit():
    """Without an adapter the student's maps must have the teacher's channels."""
    rdm, bank = RobustDistillLoss([8.0]), knowledge().bank
    with pytest.raises(ValueError, match=r"expected .*4.*but got .*5"):
        rdm(
            [floats(2, 4, 2, 2)],
            [floats(2, 4, 2, 2)],
            targets(),
            bank,
            adapted=[floats(2, 5, 2, 2)],
        )


def test_unknown_options_of_the_losses():
    for options in (
        {"normalizer": "sum"},
        {"levels": "some"},
    ):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=rf"^{name}: expected .*but got '{value}'"):
            RobustDistillLoss([8.0], **options)
    with pytest.raises(ValueError, match=r"^adapter: expected .*but got 'mlp'"):
        GlobalKnowledgeLoss(
            3, student_channels=[4], teacher_channels=[4], strides=[8], adapter="mlp"
        )
