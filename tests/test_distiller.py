"""The Distiller on detectors of no framework: two modules, boxes in pixels of the images."""

import warnings

import pytest
import torch
from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss, Pixels, Targets
from global_kd.prototypes.passes import batch_arguments
from tests.small_loss import small_loss

from .detectors.detectors import detector, scenes


class Detector(nn.Module):
    """A home-made detector: a pyramid at strides 8 and 16 and one dense head."""

    def __init__(self, width):
        super().__init__()
        self.body = Body(width)
        self.head = nn.Conv2d(width, 7, 1)
        self.calls = 0

    def forward(self, images):
        levels = self.body(images)
        self.calls += 1
        return [self.head(x) for x in levels.values()]


class Body(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, stride=8)
        self.norm = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, width, 2, stride=2)

    def forward(self, x):
        fine = self.norm(self.stem(x))
        return {"fine": fine, "coarse": self.down(fine.relu())}


IMAGES = torch.rand(2, 3, 64, 96)
BOXES = [
    {"boxes": torch.tensor([[4.0, 4, 50, 60]]), "labels": torch.tensor([1])},
    {"boxes": torch.tensor([[0.0, 0, 90, 30], [20, 20, 80, 70]]), "labels": torch.tensor([0, 1])},
]


def make(**options):
    student, teacher = Detector(4), Detector(9)
    loss = GlobalKnowledgeLoss(2, total_steps=10, refresh_every=2, relation=5)
    kd = Distiller(student, teacher, loss, example_inputs=(IMAGES,), **options)
    return student, teacher, kd


@pytest.mark.parametrize("paths", [{}, {"student_path": "body", "teacher_path": "body"}])
def test_home_made_detectors_train_with_or_without_naming_the_module(paths):
    student, teacher, kd = make(**paths)
    running = student.body.norm.running_mean.clone()
    assert torch.equal(running, torch.zeros(4))  # the dry pass left batch norm alone
    assert kd.loss.rdm.strides == (8, 16)
    for _ in range(3):
        student(IMAGES)
        terms = kd(IMAGES, BOXES)
    assert set(terms) == {"kd_foreground", "kd_background", "kd_relation"}
    sum(terms.values()).backward()
    assert student.body.stem.weight.grad.abs().sum() > 0
    assert teacher.calls <= 1  # one look for pyramids at most; the head was never needed
    targets, omega = kd.weigh(IMAGES, BOXES)
    assert omega.shape == (2, 3) and len(targets) == 3


def test_packed_targets_and_lists_mean_the_same():
    student, _, kd = make()
    student(IMAGES)
    a = kd(IMAGES, BOXES)
    student(IMAGES)
    kd.loss.step = 0
    b = kd(IMAGES, Targets.from_list(BOXES))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_wrapped_student_is_seen_through():
    student, teacher = Detector(4), Detector(9)
    loss = GlobalKnowledgeLoss(2, total_steps=10)
    kd = Distiller(nn.DataParallel(student), teacher, loss, example_inputs=(IMAGES,))
    student(IMAGES)
    assert kd(IMAGES, BOXES)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_student_compiled_after_attaching(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    student, _, kd = make()
    student.eval()  # so that batch norm computes the same twice
    student(IMAGES)
    expected = kd(IMAGES, BOXES)
    kd.loss.step = 0
    compiled = torch.compile(student, backend=backend)
    compiled(IMAGES)
    for name, value in kd(IMAGES, BOXES).items():
        torch.testing.assert_close(value, expected[name])


def test_state_dict_holds_the_loss_alone():
    student, teacher, kd = make()
    # Beside it the shares that are held (kd.calibrate).
    assert {k.split(".")[0] for k in kd.state_dict()} == {"losses", "_extra_state"}
    assert not {id(p) for p in kd.parameters()} & {
        id(p) for m in (student, teacher) for p in m.parameters()
    }
    assert [n for n, _ in kd.named_children()] == ["losses"]


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="nearest: .*body"):
        make(student_path="bdy", teacher_path="body")
    plain = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8))
    with pytest.raises(ValueError, match="student_path: no module of Sequential puts out"):
        Distiller(plain, Detector(4), GlobalKnowledgeLoss(2), example_inputs=(IMAGES,))
    with pytest.raises(ValueError, match="pass example_inputs"):
        Distiller(Detector(4), Detector(9), GlobalKnowledgeLoss(2))
    with pytest.raises(ValueError, match="pass example_inputs"):
        Distiller(
            Detector(4),
            Detector(9),
            GlobalKnowledgeLoss(2),
            student_path="body",
            teacher_path="body",
        )
    with pytest.raises(ValueError, match="expected the student's device cpu, but got meta"):
        Distiller(
            Detector(4), Detector(9).to("meta"), GlobalKnowledgeLoss(2), example_inputs=(IMAGES,)
        )
    student, _, kd = make()
    student(IMAGES)
    with pytest.raises(ValueError, match=r"targets\[0\]: expected the keys 'boxes' and 'labels'"):
        kd(IMAGES, [{"bbox": BOXES[0]["boxes"]}, BOXES[1]])


@pytest.mark.parametrize("resumed", [False, True])
def test_adapters_outside_of_the_optimizer_are_told_once(resumed):
    """Loading a checkpoint is no update."""
    student, _, kd = make()
    if resumed:
        kd.load_state_dict(make()[2].state_dict())
    kd.loss.refresh_every, kd.loss.total_steps = None, 100
    with pytest.warns(UserWarning, match="adapters were not updated in") as told:
        for _ in range(74):
            student(IMAGES)
            kd(IMAGES, BOXES)
    assert len(told) == 1


def test_adapters_in_the_optimizer_are_not_complained_about(recwarn):
    student, _, kd = make()
    kd.loss.total_steps = 100
    optimizer = torch.optim.SGD(kd.parameters(), lr=1e-3)
    for _ in range(74):
        student(IMAGES)
        optimizer.zero_grad()
        sum(kd(IMAGES, BOXES).values()).backward()
        optimizer.step()
    assert not [x for x in recwarn if "not updated" in str(x.message)]


def of_adam(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-3, **options)


@pytest.mark.parametrize(
    ("case", "every", "told"),
    [
        ("fused", 1, None),
        ("plain", 70, None),
        ("frozen adapters", 1, None),
        ("none", 1, "adapters"),
    ],
)
def test_what_moves_or_is_meant_to_stay_is_not_complained_about(case, every, told):
    """Fused optimizers write past the version counter; 70 backwards may make one step."""
    student, _, kd = make()
    kd.loss.total_steps = 100
    optimizer = of_adam([*student.parameters(), *kd.parameters()], fused=case == "fused")
    if case == "frozen adapters":
        kd.requires_grad_(False)
        report = kd.check(IMAGES, BOXES, optimizer=of_adam(student.parameters()), verbose=False)
        assert not any("optimizer" in x for x in report.problems)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for call in range(74):
            student(IMAGES)
            sum(kd(IMAGES, BOXES).values()).backward()
            if case == "none":
                optimizer.zero_grad()
            elif (call + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()
    found = [str(x.message) for x in said if "not updated" in str(x.message)]
    assert [x.split()[2] for x in found] == ([told] if told else [])


def test_soft_labels_alone_need_heads_that_share_them():
    student, teacher = Detector(4), Detector(9)
    loss = GlobalKnowledgeLoss(2, foreground=0, background=0, logits=5)
    kd = Distiller(student, teacher, loss, example_inputs=(IMAGES,))
    student(IMAGES)
    with pytest.warns(UserWarning, match="nothing is distilled"):
        assert kd(IMAGES, BOXES) == {}
    assert any("nothing is distilled" in x for x in kd.check(IMAGES, BOXES, verbose=False).problems)


def test_a_teacher_in_half_precision():
    student, teacher = Detector(4), Detector(9).bfloat16()
    loss = GlobalKnowledgeLoss(2, total_steps=10)
    kd = Distiller(student, teacher, loss, example_inputs=(IMAGES,))
    student(IMAGES)
    assert all(x.dtype == torch.float32 and x.isfinite() for x in kd(IMAGES, BOXES).values())


class OfBytes(Detector):
    """Takes images as they were loaded."""

    def forward(self, images):
        assert images.dtype == torch.uint8
        return super().forward(images.float() / 255)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("path", [None, "body"])
def test_a_student_of_bytes_shows_its_teacher_numbers(path, half):
    """The terms are those of a student of floats, in training and in the doctor."""
    given = (255 * IMAGES).to(torch.uint8)
    found = []
    for kind, images, scale in ((Detector, given.float() / 255, 1), (OfBytes, given, 255)):
        torch.manual_seed(0)
        student, teacher = kind(4), Detector(9)
        teacher = teacher.half() if half else teacher
        kd = Distiller(
            student,
            teacher,
            GlobalKnowledgeLoss(2, total_steps=10),
            example_inputs=(images,),
            teacher_path=path,
            student_pixels=Pixels(scale=scale),
            teacher_pixels=Pixels(),
        )
        report = kd.check(images, BOXES, verbose=False)
        student(images)
        terms = {name: x.item() for name, x in kd(images, BOXES).items()}
        found.append((terms, {name: x.value for name, x in report.terms.items()}))
    assert found[0][1] == pytest.approx(found[0][0])  # the terms of the step to come
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert found[1][1] == pytest.approx(found[0][0], rel=1e-3)


def test_a_teacher_that_takes_no_bytes_is_told_what_to_say():
    images = (255 * IMAGES).to(torch.uint8)
    with pytest.raises(ValueError, match=r"^teacher: .* student's torch.uint8 images.*scale=255"):
        Distiller(OfBytes(4), Detector(9), small_loss(2), example_inputs=(images,))


def test_a_dictionary_is_told_in_the_doctor_as_in_training():
    student, _, kd = make()
    for ask in (kd, lambda *x: kd.check(*x, verbose=False)):
        student(IMAGES)
        with pytest.raises(TypeError, match=r"images: expected a batch .B, C, H, W.*dictionary"):
            ask({"image": IMAGES}, BOXES)


class Fed(nn.Module):
    """A neck that is fed a pyramid by two stages and puts out one map."""

    def __init__(self, width):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, width, 8, 8), nn.Conv2d(width, width, 2, 2)])
        self.neck = Neck(width)

    def forward(self, images):
        fine = self.stages[0](images)
        return self.neck([fine, self.stages[1](fine)])


class Neck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Conv2d(width, width + 1, 1)

    def forward(self, levels):
        return self.mix(levels[0])


class Head(Neck):
    def forward(self, levels):
        return super().forward(levels).mean(dim=(2, 3))


@pytest.mark.parametrize(("kind", "widths", "path"), [(Neck, [5], "neck"), (Head, [4, 4], "into")])
def test_a_named_module_is_read_at_its_output_if_that_is_maps(kind, widths, path):
    models = [Fed(4), Fed(9)]
    for model, width in zip(models, (4, 9), strict=True):
        model.neck = kind(width)
    paths = {"student_path": "neck", "teacher_path": "neck"}
    loss = GlobalKnowledgeLoss(2, total_steps=10)
    kd = Distiller(*models, loss, example_inputs=(IMAGES,), **paths)
    report = kd.check(IMAGES, BOXES, verbose=False)
    assert [x.student[1] for x in report.levels] == widths
    assert report.levels[0].student_path.split()[0] == path


def test_batches_of_a_loader_go_to_the_models_device():
    batch = ([torch.rand(3, 4, 4)], [{"boxes": torch.rand(1, 4), "name": "a"}])
    (image,), (target,) = batch_arguments(batch, torch.device("meta"))
    assert image.device.type == target["boxes"].device.type == "meta" and target["name"] == "a"
    packed = Targets.from_list(BOXES)
    assert batch_arguments((IMAGES, packed), torch.device("meta"))[1].labels.device.type == "meta"


@pytest.mark.parametrize("kind", ["home-made", "retinanet", "faster_rcnn"])
def test_a_student_whose_parameters_are_all_frozen_is_told_at_the_first_step(kind):
    """The adapters give the terms a graph, so torch itself complains no more."""
    if kind == "home-made":
        student, _, kd = make()
        batch, call = (IMAGES, BOXES), (IMAGES,)
        kd.loss.refresh_every = None
    else:
        student, batch = detector(kind, 4).train(), scenes()
        kd, call = Distiller(student, detector(kind, 8), small_loss(4)), batch
    student.requires_grad_(False)
    with pytest.warns(UserWarning, match="no parameter of the student requires a grad") as told:
        for _ in range(3):
            student(*call)
            kd(*batch)
    assert len([x for x in told if "no parameter" in str(x.message)]) == 1


def test_a_student_that_is_in_no_optimizer_is_told():
    student, _, kd = make()
    kd.loss.refresh_every, kd.loss.total_steps = None, 100
    optimizer = torch.optim.SGD(kd.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="no parameter of the student changed in 64"):
        for _ in range(66):
            student(IMAGES)
            optimizer.zero_grad()
            sum(kd(IMAGES, BOXES).values()).backward()
            optimizer.step()


def test_frozen_layers_of_a_student_that_learns_are_nothing_to_tell():
    student, _, kd = make()
    student.body.stem.requires_grad_(False)
    kd.loss.refresh_every, kd.loss.total_steps = None, 100
    learning = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*learning, *kd.parameters()], lr=0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(66):
            student(IMAGES)
            optimizer.zero_grad()
            sum(kd(IMAGES, BOXES).values()).backward()
            optimizer.step()
