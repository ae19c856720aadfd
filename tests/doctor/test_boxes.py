"""The doctor's doubts about boxes, on detections that are written down."""

import pytest
import torch

from global_kd import Targets
from global_kd.detectors import Detections
from global_kd.doctor.boxes import doubts
from global_kd.doctor.teacher import Findings

BOXES = torch.tensor([[10.0, 20.0, 50.0, 60.0], [100.0, 30.0, 180.0, 110.0]])
TRUTH = Targets(BOXES, torch.tensor([1, 2]), torch.tensor([0, 0]))


def detected(scale):
    """The boxes themselves, in pixels of a view of `scale` times the side."""
    return [Detections(BOXES * scale, torch.tensor([0.9, 0.8]), TRUTH.labels)]


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_teacher_of_another_scale_finds_what_is_there(scale):
    assert list(doubts(TRUTH, detected(scale), scale, (200, 200))) == []


def test_boxes_of_a_larger_image_are_told():
    (told,) = doubts(TRUTH, detected(2.0), 1.0, (200, 200))
    assert "100% of them read as pixels of images 0.5 times as large" in told


def test_a_teacher_who_finds_few_is_no_problem_where_its_loss_says_that_it_knows_them():
    """A young dense head gives low scores to what it finds."""
    elsewhere = [Detections(BOXES + 60, torch.tensor([0.9, 0.8]), TRUTH.labels)]
    (told,) = doubts(TRUTH, elsewhere, 1.0, (200, 200))
    assert told.startswith("the teacher finds 0% of the batch's boxes")
    assert list(doubts(TRUTH, elsewhere, 1.0, (200, 200), fits=True)) == []
    # What is read wrongly is told all the same.
    assert list(doubts(TRUTH, detected(2.0), 1.0, (200, 200), fits=True))
    for own, theirs, fits in ((2.0, 0.7, True), (1.0, 0.7, False), (None, 0.7, False)):
        assert Findings(None, own, theirs, [], 1.0, []).fits is fits
