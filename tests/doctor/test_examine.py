"""kd.check: every mistake is named with the sentence that mends it, and nothing is changed."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss, Targets
from global_kd.detectors import Detections
from tests.small_loss import small_loss

from ..detectors.detectors import detector, scenes
from ..test_distiller import IMAGES, Detector

K = 4


gk = partial(small_loss, K)


def home_made(**options):
    torch.manual_seed(0)
    student, teacher = Detector(4), Detector(9)
    kd = Distiller(student, teacher, gk(**options), example_inputs=(IMAGES,))
    return student, teacher, kd


BOXES = torch.tensor([[4.0, 4, 50, 60], [0, 0, 90, 30], [20, 20, 80, 60], [40, 10, 90, 60]])
LABELS = torch.tensor([1, 0, 1, 2])
IMAGE = torch.tensor([0, 1, 1, 0])
TARGETS = Targets(BOXES, LABELS, IMAGE)


def seen_by_teacher(kd, boxes=BOXES, labels=LABELS):
    """Let the teacher find these objects."""
    kd._pair.teacher.detections = lambda view: [
        Detections(boxes[mine], torch.ones(int(mine.sum())), labels[mine])
        for mine in (IMAGE == torch.arange(2)[:, None])  # noqa: SIM300 - a constant in capitals
    ]


def problems(kd, targets=TARGETS, **options):
    return kd.check(IMAGES, targets, verbose=False, **options).problems


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "fcos"])
def test_the_report_on_torchvision_detectors(kind, capsys):
    torch.manual_seed(0)
    student, teacher = detector(kind, 8), detector(kind, 12)
    kd = Distiller(student, teacher, gk())
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.1)
    report = kd.check(*scenes(), optimizer=optimizer)
    assert capsys.readouterr().out.strip() == str(report).strip()
    assert [x.stride for x in report.levels] == [4, 8, 16]
    assert sum(x.boxes for x in report.levels) == 4
    assert {(x.student_path, x.teacher_path) for x in report.levels} == {("backbone", "backbone")}
    assert report.levels[0].student[1] == next(student.parameters()).shape[0]
    assert set(report.terms) == {
        *("kd_foreground", "kd_background", "kd_relation", "kd_logits"),
        "detection",
    }
    everything = sum(1 for _ in student.backbone.parameters())
    assert report.terms["kd_background"].reached["backbone"] == (everything, everything)
    head = "roi_heads" if kind == "faster_rcnn" else "head"
    assert report.terms["kd_background"].reached[head][0] == 0
    assert report.terms["kd_logits"].reached[head][0] > 0
    assert all(t.gradient > 0 for t in report.terms.values())
    assert any(x.startswith("detection loss: student") for x in report.facts)
    # Two sets of random weights: the teacher cannot be told from a bad one.
    assert not any("optimizer" in x for x in report.problems)


@pytest.mark.parametrize("kind", ["faster_rcnn", "fcos"])
def test_checking_changes_nothing(kind):
    torch.manual_seed(0)
    student, teacher = detector(kind, 8), detector(kind, 12)
    student.backbone.extra = nn.BatchNorm2d(8)  # a buffer, and a module of another mode
    student.backbone.extra.eval()
    teacher.train()
    kd = Distiller(student, teacher, gk())
    models = nn.ModuleList([student, teacher, kd])
    before, random = copy.deepcopy(models.state_dict()), torch.get_rng_state()
    modes = [m.training for m in models.modules()]
    kd.check(*scenes(), verbose=False)
    after = models.state_dict()
    assert after.keys() == before.keys()
    assert all(
        torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else str(v) == str(after[k])
        for k, v in before.items()
    )
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in models.modules()]
    assert all(p.grad is None for p in models.parameters())


def test_batch_norm_of_a_training_student_is_left_alone():
    student, _, kd = home_made()
    calls = student.calls
    student.register_forward_hook(lambda module, *_: setattr(module, "made_by_a_forward", 1.0))
    kd.check(IMAGES, TARGETS, verbose=False)
    assert student.calls == calls  # plain attributes, too, such as a running mean
    assert not hasattr(student, "made_by_a_forward")
    assert torch.equal(student.body.norm.running_mean, torch.zeros(4))
    assert student.body.norm.num_batches_tracked == 0


def test_a_good_set_up_has_no_problem():
    student, _, kd = home_made(standardize=True)
    seen_by_teacher(kd)
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.1)
    report = kd.check(IMAGES, TARGETS, optimizer=optimizer, verbose=False)
    assert report.ok, report.problems
    assert "the teacher finds 4 objects of score >= 0.3 in 2 images" in report.facts
    assert "No problem found." in str(report)
    assert all(t.share is None for t in report.terms.values())


def test_the_loss_of_a_home_made_detector_can_be_given():
    student, _, kd = home_made()

    def loss(model):
        return 100 * sum(x.square().mean() for x in model(IMAGES))

    report = kd.check(IMAGES, TARGETS, detection_loss=loss, verbose=False)
    detection = report.terms["detection"]
    assert detection.reached["head"] == (2, 2)
    for name, term in report.terms.items():
        if name != "detection":
            assert term.share == pytest.approx(term.value / detection.value)


def test_how_hard_terms_pull_is_what_calibrate_measures():
    _, _, kd = home_made(foreground=30.0, background=1e-3)

    def loss(model):  # small beside a constant: values do not tell who pulls
        return sum(x.mean() for x in model(IMAGES)) + 1e4

    report = kd.check(IMAGES, TARGETS, detection_loss=loss, verbose=False)
    shares = kd.calibrate(IMAGES, TARGETS, share={}, detection_loss=loss, verbose=False).shares
    assert report.terms["detection"].pull is None and "share on maps" in str(report)
    for name in report.terms.keys() - {"detection"}:
        assert report.terms[name].pull == pytest.approx(shares[name].measured, rel=1e-5)
    assert shares["kd_foreground"].measured > 10 > report.terms["kd_foreground"].share
    (told,) = (x for x in report.problems if "pulls at the student's maps" in x)
    times = shares["kd_foreground"].measured
    assert told.startswith(f"kd_foreground pulls at the student's maps with {times:.1f} times")
    unknown = kd.check(IMAGES, TARGETS, verbose=False).terms
    assert all(term.pull is None for term in unknown.values())


def test_optimizer_mistakes():
    student, teacher, kd = home_made()
    sgd = torch.optim.SGD
    assert "build it from [*student.parameters(), *kd.parameters()]" in " ".join(
        problems(kd, optimizer=sgd(student.parameters(), lr=0.1))
    )
    assert "holds no parameter of the student" in " ".join(
        problems(kd, optimizer=sgd(kd.parameters(), lr=0.1))
    )
    everybody = [*student.parameters(), *teacher.parameters(), *kd.parameters()]
    assert "parameters of the teacher; weight decay" in " ".join(
        problems(kd, optimizer=sgd(everybody, lr=0.1))
    )
    teacher = copy.deepcopy(student)
    teacher.body = student.body
    kd = Distiller(student, teacher, gk(adapter="identity"), example_inputs=(IMAGES,))
    assert "share 6 parameters" in " ".join(problems(kd))


def test_a_teacher_that_detects_nothing_or_less():
    _, _, kd = home_made()
    kd._pair.teacher.detections = lambda view: (
        [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))] * 2
    )
    assert "the teacher detects nothing on this batch: load its trained weights" in " ".join(
        problems(kd)
    )
    torch.manual_seed(0)
    student = detector("retinanet", 8)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher.head.classification_head.cls_logits.bias.fill_(3.0)
    kd = Distiller(student, teacher, gk())
    report = kd.check(*scenes(), verbose=False)
    assert any("is not below the student's" in x for x in report.problems)
    kd = Distiller(teacher, student, gk())
    report = kd.check(*scenes(), verbose=False)
    assert not any("is not below the student's" in x for x in report.problems)


def test_a_teacher_that_draws_random_numbers_in_eval_mode():
    _, teacher, kd = home_made()
    forward = teacher.body.forward
    teacher.body.forward = lambda x: {
        k: nn.functional.dropout(v, 0.5) for k, v in forward(x).items()
    }
    assert "draws random numbers in eval mode" in " ".join(problems(kd))


def test_sizes_of_terms():
    _, _, kd = home_made(foreground=1e6, background=1e-7)
    found = " ".join(problems(kd, detection_loss=lambda m: sum(x.mean() for x in m(IMAGES)) + 5))
    assert "kd_foreground is" in found and "will drown it" in found
    assert "kd_background is" in found and "hardly be felt" in found
    student, _, kd = home_made()
    for p in student.parameters():
        p.requires_grad_(False)
    assert "puts no gradient on the student" in " ".join(problems(kd))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda b: b / torch.tensor([96, 64, 96, 64]), "look normalised"),
        (lambda b: b * 2.5, "beyond the canvas of 96 x 64"),
        (lambda b: b / 2, "read as pixels of images 0.5 times as large"),
        (
            lambda b: torch.cat([b[:, :2], b[:, 2:] - b[:, :2]], 1).clamp(min=0),
            r"read as xywh \(corner and size\)",
        ),
    ],
)
def test_boxes_in_other_pixels_are_recognised_by_what_the_teacher_finds(wrong, named):
    _, _, kd = home_made()
    teacher_sees = BOXES
    if "xywh" in named:  # boxes that look like xyxy although they are xywh
        teacher_sees = torch.tensor(
            [[20.0, 15, 70, 50], [25, 20, 60, 60], [30, 10, 80, 60], [20, 20, 50, 55]]
        )
    seen_by_teacher(kd, boxes=teacher_sees)
    boxes = wrong(teacher_sees)
    found = " ".join(problems(kd, Targets(boxes, LABELS, IMAGE)))
    assert re.search(named, found), found


@pytest.mark.parametrize(("shift", "word"), [(1, "plus"), (-1, "minus")])
def test_labels_off_by_one(shift, word):
    _, _, kd = home_made()
    seen_by_teacher(kd, labels=LABELS + shift)
    assert f"the teacher's labels are those of the boxes {word} one" in " ".join(problems(kd))
    seen_by_teacher(kd, labels=LABELS + 7)
    assert "the class lists differ" in " ".join(problems(kd))


def test_background_label_and_wrong_number_of_classes():
    torch.manual_seed(0)
    student, teacher = detector("faster_rcnn", 8), detector("faster_rcnn", 12)
    kd = Distiller(student, teacher, gk())
    images, targets = scenes()
    for t in targets:
        t["labels"] = t["labels"] * 0
    found = " ".join(kd.check(images, targets, verbose=False).problems)
    assert "label 0 is the background in this framework: classes start at 1" in found
    kd = Distiller(student, teacher, GlobalKnowledgeLoss(80, total_steps=9))
    found = " ".join(kd.check(*scenes(), verbose=False).problems)
    assert "made for 4 classes, but the loss for 80; pass num_classes=4" in found


def test_a_batch_without_boxes():
    _, _, kd = home_made()
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), IMAGE[:0])
    assert problems(kd, none) == ["the batch has no boxes: check another one"]


def test_a_broken_tap_is_an_error_not_a_row_of_a_table():
    student, _, kd = home_made()
    student.body = copy.deepcopy(student.body)  # copies have no hooks
    with pytest.raises(ValueError, match="never fired"):
        kd.check(IMAGES, TARGETS)


def test_what_a_bad_teacher_detects_says_nothing_of_the_boxes():
    torch.manual_seed(0)
    student, teacher = detector("faster_rcnn", 8), detector("faster_rcnn", 12)
    kd = Distiller(student, teacher, gk())
    with torch.no_grad():
        teacher.roi_heads.box_predictor.cls_score.bias[2] = 9.0  # everything is a 2
    report = kd.check(*scenes(), verbose=False)
    named = " ".join(report.problems)
    assert "is not below the student's" in named
    assert "read as" not in named and "class lists" not in named


def test_a_hundred_detections_find_every_box():
    """Only as many as there may be objects count, best first."""
    _, _, kd = home_made()
    grid = torch.cartesian_prod(*[torch.arange(0.0, 96, 12)] * 2)
    everywhere = torch.cat([grid, grid + 40], dim=1)
    n = len(everywhere)
    kd._pair.teacher.detections = lambda view: (
        [Detections(everywhere, torch.linspace(1, 0.5, n), torch.ones(n, dtype=torch.int64))] * 2
    )
    assert "read as" not in " ".join(problems(kd, Targets(BOXES / 2, LABELS, IMAGE)))


def test_boxes_too_small_for_prototypes():
    _, _, kd = home_made(min_side=70)
    (found,) = [x for x in problems(kd) if "min_side" in x]
    assert found.startswith("none of the batch's 4 boxes is larger than min_side=70 pixels")
    assert not any("min_side" in x for x in problems(home_made(min_side=40)[2]))


def test_classes_too_small_for_prototypes_are_named():
    """Of the two boxes of class 1 and the one of class 2 none is above 55 pixels both ways."""
    _, _, kd = home_made(min_side=55, class_names=["car", "cup", "nut", "egg"])
    boxes = BOXES.clone()
    boxes[1] = torch.tensor([0.0, 0, 90, 60])
    report = kd.check(IMAGES, Targets(boxes, LABELS, IMAGE), verbose=False)
    (told,) = [x for x in report.facts if "min_side" in x]
    assert told.endswith("is no box of cup, nut in this batch")
    _, _, kd = home_made(min_side=25)
    assert not [x for x in kd.check(IMAGES, TARGETS, verbose=False).facts if "min_side" in x]


def test_one_of_several_ranks_looks_alone(monkeypatch):
    """Synchronised batch norm would wait for the others; on a processor it refuses to run."""
    student, teacher = Detector(4), Detector(9)
    student.body.norm = nn.SyncBatchNorm(4)
    kd = Distiller(student, teacher, gk(), example_inputs=(IMAGES,))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert "kd_foreground" in kd.check(IMAGES, TARGETS, verbose=False).terms
    assert student.body.norm.training


def test_switching_everything_off_is_no_mistake():
    _, _, kd = home_made(foreground=0, background=0, relation=0, logits=0)
    assert not problems(kd)


@pytest.mark.parametrize("look", ["check", "calibrate"])
@pytest.mark.parametrize("kind", ["faster_rcnn", "fcos", "home-made"])
def test_a_look_between_the_forward_and_kd_drops_nothing(look, kind):
    """Neither the record nor, with batch norm in the student, its backward."""

    def run(looking):
        torch.manual_seed(0)
        if kind == "home-made":
            (student, _, kd), batch = home_made(), (IMAGES, TARGETS)
            detection_loss = lambda model: sum(x.square().mean() for x in model(IMAGES))  # noqa: E731
            own = student(IMAGES)[0].square().mean()
        else:
            student, batch, detection_loss = detector(kind, 8), scenes(), None
            student.backbone.down[0] = nn.Sequential(
                student.backbone.down[0], nn.BatchNorm2d(student.backbone.out_channels)
            )
            kd = Distiller(student, detector(kind, 12), gk())
            own = sum(student(*batch).values())
        if looking:
            getattr(kd, look)(*batch, detection_loss=detection_loss, verbose=False)
        terms = kd(*batch)
        (own + sum(terms.values())).backward()
        return terms, [p.grad for p in student.parameters()]

    (terms, gradients), (others, same) = run(looking=False), run(looking=True)
    if look == "check":
        assert all(torch.equal(x, others[name]) for name, x in terms.items())
        assert all(a is b or torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert others.keys() == terms.keys()
