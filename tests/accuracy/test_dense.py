"""FCOS on the pyramid of a student."""

import dataclasses

import pytest
import torch

from benchmarks.accuracy.declaration import Data, Pictures, Trial, declared
from benchmarks.accuracy.dense import Dense
from benchmarks.accuracy.perform import build
from benchmarks.accuracy.real import Real
from workshop.small_detectors import SIZES


def test_an_fcos_on_the_pyramid_of_a_size():
    model = build(Trial(student=Dense(SIZES["small-student"])))
    maps = model.backbone(torch.rand(1, 3, 96, 64))
    assert [tuple(x.shape[1:]) for x in maps.values()] == [(64, 24, 16), (64, 12, 8), (64, 6, 4)]
    scores = model.head(list(maps.values()))["cls_logits"]
    assert scores.shape == (1, 24 * 16 + 12 * 8 + 6 * 4, 11)  # ten digits and the background


@pytest.mark.parametrize("source", (Data(), Pictures("bccd")))
def test_pictures_are_seen_in_their_size(source):
    for student in (Dense(SIZES["small-student"]), SIZES["small-student"]):
        transform = build(Trial(source, student)).transform
        assert (*transform.min_size, transform.max_size) == (source.side, source.side)


def test_larger_boxes_are_learned_on_coarser_levels(monkeypatch):
    model = Dense(SIZES["small-student"]).detector(3, 160)
    seen = []

    def matched(targets, head_outputs, anchors, matched_idxs):
        seen.append([bool((x >= 0).any()) for x in matched_idxs[0].split([1600, 400, 100])])
        return {}

    monkeypatch.setattr(model.head, "compute_loss", matched)
    for side in (20.0, 80.0, 140.0):  # the farthest side is 4 to 8 times a stride away
        box = torch.tensor([[10.0, 10.0, 10 + side, 10 + side]])
        model([torch.rand(3, 160, 160)], [{"boxes": box, "labels": torch.tensor([1])}])
    assert seen == [[True, False, False], [False, True, False], [False, False, True]]


def test_towers_have_the_convolutions_that_are_declared():
    for number in (1, 3):
        model = Dense(SIZES["small-student"], number).detector(4, 160)
        for tower in (model.head.classification_head, model.head.regression_head):
            assert sum(isinstance(x, torch.nn.Conv2d) for x in tower.conv) == number
    assert declared(Dense(SIZES["small-student"], 3))["convolutions"] == 3


def test_it_learns_one_picture():
    """So assignment by size, towers and pyramid go together: from random weights to its boxes."""
    torch.manual_seed(0)
    model = Dense(SIZES["small-student"]).detector(3, 96)
    image = torch.zeros(3, 96, 96)
    boxes = torch.tensor([[8.0, 8.0, 24.0, 24.0], [40.0, 36.0, 90.0, 86.0]])  # of two levels
    for (x1, y1, x2, y2), shade in zip(boxes.int().tolist(), (1.0, 0.5)):
        image[:, y1:y2, x1:x2] = shade
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        sum(model([image] * 2, [target] * 2).values()).backward()
        optimizer.step()
    found = model.eval()([image])[0]
    best = [found["boxes"][found["labels"] == n][:1] for n in (1, 2)]
    assert (torch.cat(best) - boxes).abs().max() < 8


def test_student_and_teacher_of_a_question_are_both_dense():
    tables = Real("bccd").question_8()
    assert [table.name for table in tables] == ["bccd-q8-dense", "bccd-q8-dense-methods"]
    for trial in (arm.trial for table in tables for arm in table.arms):
        assert trial.student == Dense(SIZES["small-student"])
        assert trial.teacher is None or trial.teacher.student == Dense(SIZES["small-teacher"])
    longer = tables[0].arms[-1].trial  # about equal time: a step with a teacher takes 1.55 times
    assert longer == dataclasses.replace(tables[0].arms[0].trial, iterations=450)
