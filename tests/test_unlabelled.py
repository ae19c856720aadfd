"""kd.distil: both detectors on images without ground truth."""

import copy

import pytest
import torch

from global_kd import Distiller
from global_kd.losses import PKD

from .detectors.detectors import KINDS, detector, scenes
from .small_loss import small_loss
from .test_distiller import BOXES, IMAGES, Detector


@pytest.mark.parametrize("kind", KINDS)
def test_the_terms_are_those_of_a_labelled_step(kind):
    torch.manual_seed(0)
    student, teacher = detector(kind, 8), detector(kind, 12)
    kd = Distiller(student, teacher, PKD())
    images, targets = scenes()
    student(images, targets)
    expected = kd(images, targets)
    found = kd.distil(images)
    torch.testing.assert_close(found, expected)
    found["kd_pkd"].backward()
    assert student.backbone.stem.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert kd.loss.step == 2


def test_a_home_made_student_learns_from_images_alone():
    torch.manual_seed(0)
    student, teacher = Detector(4), Detector(9)
    kd = Distiller(student, teacher, PKD(), example_inputs=(IMAGES,))
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.1)
    before = copy.deepcopy(student.body.stem.weight)
    values = []
    for _ in range(20):
        loss = sum(kd.distil(IMAGES).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.7 * values[0]
    assert not torch.equal(before, student.body.stem.weight)
    student(IMAGES)  # labelled and unlabelled steps take turns
    assert kd(IMAGES, BOXES)


def test_a_loss_that_needs_ground_truth_says_so():
    student = detector("fcos")
    kd = Distiller(student, detector("fcos"), [PKD(), small_loss(4)])
    with pytest.raises(ValueError, match="but GlobalKnowledgeLoss needs targets; make a Distiller"):
        kd.distil(scenes()[0])


def test_a_frozen_student_and_a_term_that_is_not_finite_are_told():
    student, teacher = detector("fcos"), detector("fcos")
    student.requires_grad_(False)
    with pytest.warns(UserWarning, match="no parameter of the student requires a gradient"):
        Distiller(student, teacher, PKD()).distil(scenes()[0])
    teacher.backbone.stem.weight.data.fill_(torch.inf)
    with pytest.warns(UserWarning, match="kd_pkd is nan: look for NaN"):
        Distiller(detector("fcos"), teacher, PKD()).distil(scenes()[0])
