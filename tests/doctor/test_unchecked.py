"""Detectors of one's own: what the doctor finds in them, and what it says it cannot tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from global_kd import Distiller, GlobalKnowledgeLoss, Pixels, Schedule, Targets
from global_kd.detectors import View
from global_kd.detectors.torchvision_forward import own_losses
from global_kd.doctor.batch import pixel_problems
from tests.small_loss import small_loss

from ..detectors.detectors import detector, scenes
from ..test_distiller import IMAGES, Detector
from .test_examine import BOXES, IMAGE, LABELS, TARGETS, home_made


def found_objects(model, labels=LABELS):
    """What a good teacher finds."""
    return [
        {
            "boxes": BOXES[i == IMAGE],
            "scores": torch.rand(2) / 2 + 0.5,
            "labels": labels[i == IMAGE],
        }
        for i in range(2)
    ]


def own_loss(model, images=IMAGES):
    return 100 * sum(x.square().mean() for x in model(images))


def good(kd, teacher):
    """A teacher whose loss is small."""
    with torch.no_grad():
        teacher.head.weight.mul_(1e-3), teacher.head.bias.zero_()
    return {"detection_loss": own_loss, "detections": found_objects}


def look(kd, targets=TARGETS, images=IMAGES, **options):
    return kd.check(images, targets, verbose=False, **options)


def says(report, what):
    assert any(what in x for x in report.problems), report.problems


def test_with_all_that_can_be_given_little_is_left_unchecked():
    student, teacher, kd = home_made(standardize=True)
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.1)
    report = look(kd, optimizer=optimizer, **good(kd, teacher))
    assert not any("teacher" in x for x in report.problems), report.problems
    assert [x.split()[1] for x in report.unchecked] == ["both", "num_classes=4"]
    assert "Not checked:\n? whether both detectors" in str(report)


def test_a_bare_check_says_what_it_cannot_tell():
    _, _, kd = home_made(standardize=True)
    report = look(kd)
    text = " ".join(report.unchecked)
    for word in (
        "optimizer=",
        "detection_loss=",
        "detections=",
        "student_pixels=",
        "num_classes=4",
    ):
        assert word in text, word
    assert "Not checked:" in str(report)


def test_an_untrained_teacher_is_found_by_its_loss():
    _, _, kd = home_made()
    for of_teacher in (0.95, 1.0, 3.0):

        def loss(model, factor=of_teacher, student=kd._models[0]):
            return own_loss(model) * 0 + (1.0 if model is student else factor)

        says(look(kd, detection_loss=loss), "is not below the student's")


def test_a_detection_loss_that_fails_on_the_teacher_is_told():
    _, _, kd = home_made()

    def loss(model):
        if model is kd._models[1]:
            raise AttributeError("no criterion")
        return own_loss(model)

    assert "it fails with AttributeError: no criterion" in " ".join(
        look(kd, detection_loss=loss).unchecked
    )


@pytest.mark.parametrize(
    "wrong, what",
    [
        (lambda b, x: (torch.cat([b[:, :2], b[:, 2:] - b[:, :2]], dim=1), x), "xywh"),
        (lambda b, x: (b * 2 ** (-3 / 4), x), "pixels of images"),
        (lambda b, x: (b, x + 1), "labels are those of the boxes minus"),
        (lambda b, x: (b, torch.tensor([3, 3, 0, 0])), "names"),
    ],
)
def test_wrong_boxes_and_labels_are_found_by_the_detections(wrong, what):
    _, teacher, kd = home_made()
    boxes, labels = wrong(BOXES, LABELS)
    targets = Targets(boxes, labels, IMAGE)
    report = look(kd, targets, **good(kd, teacher))
    says(report, what)


def test_a_teacher_that_finds_nothing_is_told_and_wrong_forms_are_refused():
    _, _, kd = home_made()
    none = [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}]
    says(look(kd, detections=lambda model: none * 2), "detects nothing")
    with pytest.raises(ValueError, match="detections: expected a function of the teacher that"):
        look(kd, detections=lambda model: [BOXES, BOXES])
    with pytest.raises(ValueError, match="for each of the 2 images, but got 1"):
        look(kd, detections=lambda model: none)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detection_loss": torch.ones(())}, "detection_loss: .*, but got Tensor; write lambda"),
        ({"detection_loss": lambda m: {"a": own_loss(m)}}, r"gave a dictionary; .*\.values\(\)"),
        ({"detection_loss": lambda m: m(IMAGES)}, "gave list; sum its parts up"),
        ({"detection_loss": lambda m: float(own_loss(m))}, "gave float"),
        ({"detection_loss": lambda m: m(IMAGES)[0]}, r"gave \(2, 7, 8, 12\)"),
        ({"optimizer": [torch.optim.SGD(Detector(4).parameters())]}, "optimizer: .* but got list"),
        (
            {
                "optimizer": torch.optim.lr_scheduler.StepLR(
                    torch.optim.SGD(Detector(4).parameters()), 1
                )
            },
            "but got StepLR; pass its .optimizer",
        ),
    ],
)
def test_what_is_no_loss_and_no_optimizer_is_told(options, message):
    _, _, kd = home_made()
    with pytest.raises(TypeError, match=message):
        look(kd, **options)


@pytest.mark.parametrize("kind", ["home-made", "retinanet", "bytes"])
def test_images_of_0_to_255_are_told(kind):
    if kind == "retinanet":
        kd = Distiller(detector(kind, 4), detector(kind, 8), small_loss(4))
        images, targets = scenes()
        report = kd.check([255 * x for x in images], targets, verbose=False)
    else:
        _, _, kd = home_made()
        report = look(kd, images=255 * IMAGES)
    says(report, "these look like bytes; divide them by 255")


@pytest.mark.parametrize(
    "images, pixels, told",
    [
        (IMAGES, None, False),
        (IMAGES * 255, None, True),
        (IMAGES * 255, Pixels(scale=255), False),
        (IMAGES, Pixels(scale=255), True),
        ((IMAGES - 0.45) / 0.22, Pixels(mean=(0.45,) * 3, std=(0.22,) * 3), False),
        ((IMAGES - 0.45) / 0.22, None, False),  # normalised by somebody
        (torch.zeros(1, 3, 8, 8), None, False),
        (torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8), None, True),
        ([IMAGES], None, False),
    ],
)
def test_ranges_of_images(images, pixels, told):
    assert bool(list(pixel_problems(images, pixels))) == told


@pytest.mark.parametrize("classes, told", [(1000, True), (4, False), (80, False), (365, True)])
def test_more_classes_than_the_labels_could_mean(classes, told):
    torch.manual_seed(0)
    loss = GlobalKnowledgeLoss(classes, total_steps=20, refresh_every=2, min_side=4)
    kd = Distiller(Detector(4), Detector(9), loss, example_inputs=(IMAGES,))
    assert any("go up to 2 only" in x for x in look(kd).problems) == told


@pytest.mark.parametrize("every, told", [(30, True), (20, True), (5, False), (None, False)])
@pytest.mark.filterwarnings("ignore:refresh_every")
def test_a_refresh_that_never_comes(every, told):
    _, _, kd = home_made(refresh_every=every)
    assert any("refresh_every" in x for x in look(kd).problems) == told
    kd.refresh([(IMAGES, TARGETS)], progress=False)
    assert not any("refresh_every" in x for x in look(kd).problems)


@pytest.mark.parametrize(
    ("stop", "told"), [(0.2, True), (0.25, True), (0.3, False), (1.0, False)], ids=str
)
def test_a_refresh_after_all_schedules_is_told(stop, told):
    _, _, kd = home_made(refresh_every=5, schedule=Schedule("linear", stop=stop))
    assert kd.loss.total_steps == 20
    assert any("the schedules of all terms have ended" in x for x in look(kd).problems) == told
    kd.refresh([(IMAGES, TARGETS)], progress=False)
    assert not any("schedules of all" in x for x in look(kd).problems)


def test_the_default_interval_is_no_mistake_in_short_runs(recwarn):
    GlobalKnowledgeLoss(3, total_steps=9)
    assert not [x for x in recwarn if "refresh_every" in str(x.message)]
    with pytest.warns(UserWarning, match="refresh_every: expected less than total_steps=9"):
        GlobalKnowledgeLoss(3, total_steps=9, refresh_every=9)


class Deep(nn.Module):
    """Strides 4 to 64."""

    def __init__(self, width, first, levels):
        super().__init__()
        self.stem = nn.Conv2d(3, width, first, stride=first)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 2, stride=2) for _ in range(levels - 1))

    def forward(self, x):
        maps = [self.stem(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        return maps


@pytest.mark.parametrize("first, levels, problem", [(32, 2, True), (8, 3, False), (4, 5, False)])
def test_most_levels_without_a_partner_are_a_problem_and_named(first, levels, problem):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 128, 128)
    student = nn.Sequential(Deep(4, 4, 5))
    teacher = nn.Sequential(Deep(6, first, levels))
    paths = {"student_path": "0", "teacher_path": "0", "example_inputs": (images,)}
    kd = Distiller(student, teacher, small_loss(4), **paths)
    report = look(kd, images=images)
    named = (
        "only 2 of the student's 5 levels are distilled (without a partner of about equal stride"
    )
    assert any(x.startswith(named) and "4, 8, 16" in x for x in report.problems) == problem
    assert any("unused" in x for x in report.facts) == (first == 8)


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "fcos", "ssd"])
def test_the_teacher_is_looked_at_as_in_training(kind):
    """Other statistics of pixels, another size inside, half precision: its own loss is known."""
    torch.manual_seed(0)
    student = detector(kind, 8)
    options = {} if kind == "ssd" else {"min_size": 32, "max_size": 400}
    teacher = detector(kind, 12, image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 1.0, 2.0], **options)
    same = detector(kind, 12)
    same.load_state_dict(teacher.state_dict())
    kd = Distiller(student, teacher, small_loss(4))
    report = kd.check(*scenes(), verbose=False)
    (fact,) = [x for x in report.facts if x.startswith("detection loss: student")]
    # The same numbers from a teacher that is shown the student's view by hand.
    images, targets = student.transform(*scenes())
    view = images.tensors
    mean, std = (
        torch.tensor(getattr(student.transform, x))[:, None, None]
        for x in ("image_mean", "image_std")
    )
    rgb = [(x * std + mean)[:, :h, :w] for x, (h, w) in zip(view, images.image_sizes)]
    if kind != "ssd":
        same.transform = student.transform
        same.transform = type(student.transform)(64, 96, [0.1, 0.2, 0.3], [1.0, 1.0, 2.0])
    else:
        same.transform.image_mean, same.transform.image_std = [0.1, 0.2, 0.3], [1.0, 1.0, 2.0]
    same.train()
    torch.manual_seed(0)
    assert kind == "faster_rcnn" or float(fact.split()[-1]) == pytest.approx(
        float(sum(same(rgb, targets).values())), rel=5e-3
    )


class MyDropPath(nn.Module):
    """As transformers' and timm's: of no class that torch knows."""

    def forward(self, x):
        return x * 100 if self.training else x


@pytest.mark.parametrize("noise", ["Dropout2d", "StochasticDepth", "MyDropPath"])
def test_a_teacher_is_asked_for_its_loss_without_chance(noise):
    kinds = {"Dropout2d": lambda: nn.Dropout2d(0.9), "MyDropPath": MyDropPath}
    kinds["StochasticDepth"] = lambda: StochasticDepth(0.9, "batch")
    torch.manual_seed(0)
    student, teacher = Detector(4), Detector(9)
    teacher.body.down = nn.Sequential(teacher.body.down, kinds[noise]())
    kd = Distiller(student, teacher, small_loss(4), example_inputs=(IMAGES,))
    report = look(kd, detection_loss=own_loss)
    (fact,) = [x for x in report.facts if x.startswith("detection loss: student")]
    with torch.no_grad():
        expected = own_loss(teacher.eval())
    assert float(fact.split()[-1]) == pytest.approx(expected.item(), rel=1e-3)


def test_a_teacher_of_twice_the_scale_is_asked_about_boxes_of_its_own_view():
    torch.manual_seed(0)
    student, teacher = detector("retinanet"), detector("retinanet")
    kd = Distiller(student, teacher, small_loss(4), teacher_scale=2)
    report = kd.check(*scenes(), verbose=False)
    (fact,) = [x for x in report.facts if x.startswith("detection loss: student")]
    images, targets = student.transform(*scenes())
    view = kd._pair.look(View(images.tensors, images.image_sizes)).view
    assert view.size == tuple(2 * side for side in images.tensors.shape[-2:])
    twice = [{**t, "boxes": 2 * t["boxes"]} for t in targets]
    expected = own_losses(teacher.train(), view, twice)
    assert float(fact.split()[-1]) == pytest.approx(expected.item(), rel=1e-3)
