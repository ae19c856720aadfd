"""What kd is given is what the student was called with, or an error: one rule in every reader."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss, Targets

from ..test_distiller import BOXES, IMAGES, make
from .detectors import KINDS, detector, scenes


def changed(call):
    """Mistakes with a torchvision batch: what is given in its place, and the word of the error."""
    images, targets = call
    filtered = [{k: v[:1] for k, v in t.items()} for t in targets]
    others, _ = scenes(seed=7)
    shifted = [{**t, "boxes": t["boxes"] + 1} for t in targets]
    relabelled = [{**t, "labels": t["labels"] % 3 + 1} for t in targets]
    return {
        "empty lists": ([], []),
        "no images": (None, targets),
        "no targets for some": (images, targets[:2]),
        "empty targets": (images, []),
        "other order of the images": (images[::-1], targets[::-1]),
        "other order of the targets": (images, [targets[i] for i in (1, 0, 2)]),
        "arguments swapped": (targets, images),
        "another batch": (others, targets),
        "a part of the batch": (images[:2], targets[:2]),
        "an image more": ([*images, images[0]], [*targets, targets[0]]),
        "filtered boxes": (images, filtered),
        "moved boxes": (images, shifted),
        "other labels": (images, relabelled),
        "without boxes": (images, [{} for _ in targets]),
        "packed": (images, Targets.from_list(targets)),
    }


MISTAKES = list(changed(scenes()))


def torchvision_pair(kind="retinanet"):
    torch.manual_seed(0)
    student, teacher = detector(kind, 4).train(), detector(kind, 8)
    return student, Distiller(student, teacher, GlobalKnowledgeLoss(4, total_steps=9))


@pytest.fixture(scope="module")
def retinanet():
    return torchvision_pair()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_torchvision_refuses_what_the_student_was_not_called_with(mistake, retinanet):
    student, kd = retinanet
    call = scenes()
    student(*call)
    with pytest.raises(ValueError, match="^(images|targets)"):
        kd(*changed(call)[mistake])
    student(*call)  # the refused forward is forgotten
    assert kd(*call)


@pytest.mark.parametrize("kind", KINDS)
def test_torchvision_takes_what_is_the_same(kind):
    student, kd = torchvision_pair(kind)
    images, targets = scenes()
    copies = [x.clone() for x in images], [{k: v.clone() for k, v in t.items()} for t in targets]
    richer = [{**t, "image_id": torch.tensor(3)} for t in targets]
    for given in ((images, targets), copies, (tuple(images), richer), (images, None), (images,)):
        student(images, targets)
        assert kd(*given)


def test_arguments_by_name_are_known():
    student, kd = torchvision_pair()
    images, targets = scenes()
    student(targets=targets, images=images)
    assert kd(images, targets)
    student(images=images, targets=targets)
    with pytest.raises(ValueError, match=r"images\[0\]"):
        kd(images[::-1], targets)


def test_boxes_written_after_the_forward_are_refused():
    """Mixing or scaling in place between the two calls."""
    student, kd = torchvision_pair()
    images, targets = scenes()
    student(images, targets)
    targets[0]["boxes"].mul_(0.5)
    with pytest.raises(ValueError, match=r"targets\[0\]\['boxes'\].* written in place"):
        kd(images, targets)


def test_a_student_run_in_two_chunks():
    student, kd = torchvision_pair()
    images, targets = scenes()
    student(images[:1], targets[:1])
    student(images[1:], targets[1:])
    with pytest.raises(ValueError, match="expected"):
        kd(images, targets)
    student, _, kd = make()
    student(IMAGES[:1])
    student(IMAGES[1:])
    with pytest.raises(ValueError, match="expected"):
        kd(IMAGES, BOXES)


def test_a_later_forward_is_not_taken_for_the_batch():
    """Of other sizes, which no comparison of equal shapes would find; in train and in eval mode."""
    student, _, kd = make()
    student(IMAGES)
    student.eval()
    with torch.no_grad():
        student(torch.rand(3, 3, 64, 96))
    with pytest.raises(ValueError, match="images: expected shape"):
        kd(IMAGES, BOXES)
    student.train()
    with torch.no_grad():
        student.eval()(torch.rand(2, 3, 96, 96))
    student.train()
    with pytest.raises(ValueError, match="images: expected shape"):
        kd(IMAGES, BOXES)


def test_own_detectors_take_other_boxes_but_not_of_other_images():
    student, _, kd = make()
    student(IMAGES)
    assert kd(IMAGES, BOXES[::-1])  # the forward was given none
    for wrong in (BOXES[:1], [*BOXES, BOXES[0]]):
        student(IMAGES)
        with pytest.raises(ValueError, match="targets: expected 2"):
            kd(IMAGES, wrong)
    one = torch.tensor([[4.0, 4, 40, 40]])
    for _ in range(2):  # not at the first step alone
        student(IMAGES)
        with pytest.raises(ValueError, match="targets: expected boxes of the 2 images"):
            kd(IMAGES, Targets(one, torch.tensor([1]), torch.tensor([2])))


class Packed(nn.Module):
    """A detector that is given everything in one dictionary."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Conv2d(3, width, 8, stride=8)

    def forward(self, batch):
        return self.body(batch["image"] if isinstance(batch, dict) else batch)


def test_own_detectors_that_take_a_dictionary():
    student, teacher = Packed(4), Packed(8)
    kd = Distiller(
        student,
        teacher,
        GlobalKnowledgeLoss(2),
        student_path="body",
        teacher_path="body",
        example_inputs=(IMAGES,),
    )
    batch = {"image": IMAGES, "meta": SimpleNamespace(name="x")}
    student(batch)
    assert kd(IMAGES, BOXES)
    student(batch)
    with pytest.raises(ValueError, match="images: expected shape"):
        kd(IMAGES[:1], BOXES[:1])


def test_refresh_wants_an_entry_for_each_image():
    _, kd = torchvision_pair()
    images, targets = scenes()
    for wrong in (targets[:2], [*targets, targets[0]]):
        with pytest.raises(ValueError, match="targets: expected 3 entries"):
            kd.refresh([(images, wrong)], progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_copy_of_another_dtype_is_compared_up_to_the_cast(dtype):
    """A student that was given half precision; its batch as it was, and another one."""
    student, _, kd = make()
    student.to(dtype)
    student(IMAGES.to(dtype))
    assert kd(IMAGES, BOXES)
    for wrong in (IMAGES.flip(0), IMAGES + 0.1, (IMAGES * 255).byte()):
        student(IMAGES.to(dtype))
        with pytest.raises(ValueError, match="images: expected what the student's last forward"):
            kd(wrong, BOXES)
    student, kd = torchvision_pair()
    images, targets = scenes()
    student(images, targets)
    assert kd([x.double() for x in images], targets)
    student(images, targets)
    with pytest.raises(ValueError, match=r"images\[0\]: expected what"):
        kd([x.double() + 1e-3 for x in images], targets)


@pytest.mark.parametrize("format", ["XYWH", "CXCYWH"])
def test_boxes_that_say_another_format_than_torchvision_takes_them_for(format):
    """The detector does not ask: it would train on other boxes, and so would the distiller."""
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    student, kd = torchvision_pair()
    images, targets = scenes()

    def told(kind):
        return [
            t | {"boxes": tv_tensors.BoundingBoxes(t["boxes"], format=kind, canvas_size=(90, 90))}
            for t in targets
        ]

    student(images, told("XYXY"))
    assert kd(images, told("XYXY"))
    student(images, told(format))
    with pytest.raises(ValueError, match=rf"targets\[0\]\['boxes'\]: .* XYXY, .* got {format};"):
        kd(images, told(format))
    with pytest.raises(ValueError, match=rf"expected boxes in the format XYXY, .* got {format};"):
        kd.refresh([(images, told(format))], progress=False)
