"""Dense heads cut in two after some of their convolutions, and CrossKD on what lies between."""

import copy

import pytest
import torch
from torch import nn

from global_kd import Distiller
from global_kd.detectors import detector_of
from global_kd.detectors.towers import cut
from global_kd.hooks import evaluating
from global_kd.losses import CrossKD

from .detectors import detector, scenes

CONVOLUTIONS = {"faster_rcnn": 1, "retinanet": 4, "fcos": 4}


def split(reader, model, after):
    """The head's own output, and that of its two parts."""
    with torch.no_grad(), evaluating(model):
        look = reader.look(reader.example())
        facts = frozenset({"boxes"})
        whole = reader.dense(look, facts)
        return whole, reader.tail(reader.hidden(look, after), after, look, facts)


def same(one, other):
    return (
        torch.equal(one.logits, other.logits)
        and torch.equal(one.boxes, other.boxes)
        and one.grids == other.grids
    )


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_both_parts_of_torchvisions_heads_are_the_head(kind):
    torch.manual_seed(0)
    model = detector(kind, 8).eval()
    reader = detector_of(model)
    for after in range(1, CONVOLUTIONS[kind] + 1):
        assert same(*split(reader, model, after)), after
    for after in (0, CONVOLUTIONS[kind] + 1):
        with pytest.raises(ValueError, match=f"after: expected 1 to {CONVOLUTIONS[kind]}"):
            split(reader, model, after)
    assert "split_heads" not in detector_of(detector("ssd", 8)).gives


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml"])
def test_both_parts_of_a_yolos_head_are_the_head(name):
    pytest.importorskip("ultralytics")
    from .cases_ultralytics import model as make

    model = make(name).eval()
    reader = detector_of(model)
    for after in (1, 2):
        assert same(*split(reader, model, after)), after
    with pytest.raises(ValueError, match="after: expected 1 to 2"):
        split(reader, model, 3)


def test_a_tower_is_cut_before_the_activation():
    conv, norm, act = nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), nn.ReLU()
    for tower in (
        nn.Sequential(conv, norm, act, conv, norm, act),
        nn.Sequential(nn.Sequential(conv, norm, act), nn.Sequential(conv, norm, act)),
    ):
        assert [list(x) for x in cut(tower, 1)] == [[conv, norm], [act, conv, norm, act]]
        assert [list(x) for x in cut(tower, 2)] == [[conv, norm, act, conv, norm], [act]]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_crosskd_trains_on_hidden_features(kind):
    torch.manual_seed(0)
    student, teacher = detector(kind, 8), detector(kind, 8)
    teacher.load_state_dict(student.state_dict())
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    kd = Distiller(student, teacher, CrossKD(after=1))
    assert not list(kd.parameters())
    before = copy.deepcopy(teacher.state_dict())
    images, targets = scenes()
    student(images, targets)
    terms = kd(images, targets)
    assert set(terms) == {"kd_crosskd_classes", "kd_crosskd_boxes"}
    sum(terms.values()).backward()
    head = student.rpn.head if kind == "faster_rcnn" else student.head.classification_head
    convolutions = [m for m in head.conv.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions[0].weight.grad.abs().sum() > 0  # on the way to the features
    assert all(m.weight.grad is None for m in convolutions[1:])  # the teacher's take their place
    assert next(student.backbone.parameters()).grad.abs().sum() > 0
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_like_the_student_is_followed_already():
    torch.manual_seed(0)
    student = detector("retinanet", 8)
    kd = Distiller(student, copy.deepcopy(student), CrossKD(after=2))
    student(*scenes())
    terms = kd(*scenes())
    assert all(float(x) < 1e-4 for x in terms.values())


def test_what_does_not_fit_is_said():
    torch.manual_seed(0)
    student, teacher = detector("retinanet", 8), detector("retinanet", 12)
    with pytest.raises(ValueError, match=r"after: expected heads of equal width.* 8 .* 12"):
        Distiller(student, teacher, CrossKD(after=2))
    hooks = [m for m in student.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    with pytest.raises(ValueError, match="CrossKD needs split_heads"):
        Distiller(detector("ssd", 8), detector("ssd", 12), CrossKD(after=1))
    with pytest.raises(ValueError, match="after: expected"):
        CrossKD(after=-1)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_more_convolutions_than_a_head_has_are_refused_when_the_distiller_is_made(kind):
    """Not at the first step; and the loss can still be given to another pair."""
    count = CONVOLUTIONS[kind]
    student, teacher = detector(kind, 8), detector(kind, 8)
    said = rf"losses: CrossKD\(after={count + 1}\) does not fit this pair: the student's head"
    said += rf" \({type(student).__name__}\): after: expected 1 to {count}, the convolutions"
    loss = CrossKD(after=count + 1)
    with pytest.raises(ValueError, match=said):
        Distiller(student, teacher, loss)
    assert not loss.built
    Distiller(student, teacher, CrossKD(after=count))
