"""Terms that blow up are told once, in kd itself, and nothing waits for it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss
from global_kd.doctor import Alarm
from global_kd.losses import FGD, PKD

from ..detectors.detectors import detector, scenes
from ..test_distiller import BOXES, IMAGES, Detector


def pair(loss, shrink=1.0):
    torch.manual_seed(0)
    student, teacher = Detector(4), Detector(9)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(shrink)
    return student, Distiller(student, teacher, loss, example_inputs=(IMAGES,))


def step(student, kd, optimizer=None):
    student(IMAGES)
    terms = kd(IMAGES, BOXES)
    if optimizer is not None:
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return terms


@pytest.mark.parametrize("shrink", [0.0, 1e-12, 1e-9, 1e-4])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_teacher_that_hardly_varies_destroys_no_student(shrink, optimizer):
    """A teacher of random weights, whose maps are next to zero."""
    student, kd = pair(GlobalKnowledgeLoss(2, total_steps=99, refresh_every=9), shrink)
    for module in kd._models[1].modules():
        if isinstance(module, nn.BatchNorm2d):  # it would make them large again
            nn.init.constant_(module.weight, shrink)
    made = optimizer([*student.parameters(), *kd.parameters()], lr=0.01)
    values = [sum(step(student, kd, made).values()) for _ in range(12)]
    assert all(x.isfinite() and x <= 2 * 10 + 1 * 10 for x in values)
    assert values[-1] <= values[0]
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in student.parameters())


@pytest.mark.parametrize("loss", [GlobalKnowledgeLoss(2, total_steps=9, refresh_every=3), FGD()])
def test_a_term_that_is_not_finite_is_told_once(loss):
    student, kd = pair(loss)
    with torch.no_grad():
        kd._models[1].body.stem.bias[0] = torch.nan
    with pytest.warns(UserWarning, match=r"kd_\w+ is nan: look for NaN") as told:
        for _ in range(3):
            step(student, kd)
    assert len([x for x in told if " is nan" in str(x.message)]) == 1


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "ssd"])
def test_a_term_far_above_the_detectors_own_loss(kind):
    student, teacher = detector(kind, 4).train(), detector(kind, 8)
    kd = Distiller(student, teacher, PKD(weight=1e5))
    with pytest.warns(UserWarning, match="kd_pkd is .* times the detector's own loss, and will"):
        student(*scenes())
        kd(*scenes())


def test_ordinary_terms_are_not_told_of(recwarn):
    student, teacher = detector("retinanet", 4).train(), detector("retinanet", 8)
    kd = Distiller(student, teacher, GlobalKnowledgeLoss(4, total_steps=9, refresh_every=3))
    for _ in range(3):
        student(*scenes())
        kd(*scenes())
    assert not [x for x in recwarn if "Distiller" in str(x.message)]


def test_a_student_that_has_diverged_is_told_as_such():
    alarm = Alarm()
    with pytest.warns(UserWarning, match="the student has diverged"):
        alarm.hear({"kd_x": torch.tensor(float("nan"))}, torch.tensor(float("inf")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alarm.hear({"kd_x": torch.tensor(float("nan"))}, None)  # once
        quiet = copy.deepcopy(Alarm())
        quiet.hear({"kd_x": torch.tensor(3.0), "kd_y": torch.tensor(0.0)}, None)
        quiet.hear({"kd_x": torch.tensor(3.0)}, torch.tensor(0.0))
        quiet.hear({}, None)
