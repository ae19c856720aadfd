import pytest
import torch
from torchvision.ops import box_iou

from benchmarks.digits.corruption import OVERLAP
from benchmarks.digits.disturbances import KINDS, Disturbance, disturb
from workshop.digit_scenes import SceneSettings, make_scenes

SCENES = make_scenes("train", SceneSettings(train=60))
NUMBER = len(SCENES.labels)
SCENE_OF = torch.repeat_interleave(torch.arange(60), SCENES.first.diff())


def changed_pixels(images):
    """Bool (N, H, W)."""
    return (images != SCENES.images).any(dim=1)


def test_without_a_disturbance_nothing_changes():
    same, met = disturb(SCENES, Disturbance())
    assert not met.any()
    for name, x in vars(SCENES).items():
        assert torch.equal(getattr(same, name), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_exactly_the_share_is_disturbed(kind, share):
    _, met = disturb(SCENES, Disturbance(**{kind: share}))
    assert met.sum(dim=0).tolist() == [round(share * NUMBER) * (k == kind) for k in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_share_holds_a_smaller_one(kind):
    few, many = (disturb(SCENES, Disturbance(**{kind: x}))[1] for x in (0.1, 0.4))
    assert (few <= many).all()


def test_wrong_labels_are_other_classes():
    disturbed, met = disturb(SCENES, Disturbance(labels=0.3))
    assert torch.equal(disturbed.labels != SCENES.labels, met[:, 0])
    assert disturbed.labels.min() >= 1 and disturbed.labels.max() <= 10
    assert torch.equal(disturbed.images, SCENES.images)
    assert len(set((disturbed.labels - SCENES.labels)[met[:, 0]].remainder(10).tolist())) > 5


def test_loose_boxes_overlap_as_said():
    disturbed, met = disturb(SCENES, Disturbance(boxes=0.5))
    overlap = box_iou(disturbed.boxes, SCENES.boxes).diagonal()
    assert (overlap[~met[:, 1]] == 1).all()
    loose = overlap[met[:, 1]]
    assert (loose >= OVERLAP[0]).all() and (loose <= OVERLAP[1]).all()
    assert disturbed.boxes.min() >= 0 and disturbed.boxes.max() <= 96


@pytest.mark.parametrize("kind", ["blur", "occlusion"])
def test_pixels_change_in_the_boxes_that_were_met_and_nowhere_else(kind):
    disturbed, met = disturb(SCENES, Disturbance(**{kind: 0.3}))
    changed = changed_pixels(disturbed.images)
    allowed = torch.zeros_like(changed)
    for row in met.any(dim=1).nonzero()[:, 0].tolist():
        x1, y1, x2, y2 = SCENES.boxes[row].long().tolist()
        allowed[SCENE_OF[row], y1:y2, x1:x2] = True
        share = changed[SCENE_OF[row], y1:y2, x1:x2].float().mean()
        assert share > 0.2 if kind == "blur" else share > 0.35
    assert changed.any() and not (changed & ~allowed).any()
    assert torch.equal(disturbed.boxes, SCENES.boxes)


def test_the_same_seed_disturbs_the_same():
    how = Disturbance(0.2, 0.2, 0.2, 0.2, seed=3)
    (one, met), (two, again) = disturb(SCENES, how), disturb(SCENES, how)
    assert torch.equal(met, again)
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values()))
    assert not torch.equal(met, disturb(SCENES, Disturbance(0.2, 0.2, 0.2, 0.2, seed=4))[1])


def test_shares_are_between_0_and_1():
    with pytest.raises(ValueError, match=r"blur: expected a share in \[0, 1\], but got 30"):
        Disturbance(blur=30)
