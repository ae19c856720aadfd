"""The paper's protocol, pass after pass: the frozen teacher looks at every image once."""

import warnings

import pytest
import torch
from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss

BATCHES, BOXES = 6, 5


def detector(width):
    return nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.Conv2d(width, 5, 1))


def batch(number, ids=True, boxes=BOXES):
    g = torch.Generator().manual_seed(number)
    corner = 20 * torch.rand(boxes, 2, generator=g)
    target = {
        "boxes": torch.cat([corner, corner + 9 + 25 * torch.rand(boxes, 2, generator=g)], dim=1),
        "labels": torch.randint(0, 3, (boxes,), generator=g),
    }
    if ids:
        target["ids"] = torch.arange(boxes) + 100 * number
    return torch.rand(1, 3, 64, 64, generator=g), [target]


def distiller(**options):
    torch.manual_seed(0)
    student, teacher = detector(4), detector(8)
    loss = GlobalKnowledgeLoss(
        3, **({"num_prototypes": 3, "min_side": 12, "max_instances": 6, "total_steps": 9} | options)
    )
    paths = {"student_path": "0", "teacher_path": "0", "example_inputs": (batch(0)[0],)}
    kd = Distiller(student, teacher, loss, **paths)
    looks = []
    teacher[0].register_forward_pre_hook(lambda *_: looks.append(1))
    return kd, student, teacher, looks


def move(student, seed=5):
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


@pytest.mark.parametrize("most", [4, 800], ids=["a sample that is full", "room for all"])
def test_the_next_passes_give_the_same_prototypes_without_the_teacher(most):
    loader = [batch(n) for n in range(BATCHES)] + [batch(9, boxes=0)]
    kd, student, _, looks = distiller(max_instances=most)
    kd.refresh(loader, progress=False)
    assert len(looks) == len(loader)
    for seed in (5, 6):  # the student moves on
        move(student, seed)
        before = len(looks)
        kd.refresh(loader, progress=False)
        assert len(looks) == before + 1  # the first batch, to compare
        fresh, other, _, _ = distiller(max_instances=most)
        other.load_state_dict(student.state_dict())
        fresh.refresh(loader, progress=False)
        assert same(kd.loss.bank, fresh.loss.bank)
    assert kd.loss.bank.valid.any()


def test_a_stream_between_two_passes_changes_nothing():
    loader = [batch(n) for n in range(BATCHES)]
    (kd, student, _, looks), (fresh, *_) = distiller(refresh_every=2), distiller()
    kd.refresh(loader, progress=False)
    for n in range(5):
        student(loader[n][0])
        kd(*loader[n])
    before = len(looks)
    kd.refresh(loader, progress=False)
    fresh.refresh(loader, progress=False)
    assert len(looks) == before + 1 and same(kd.loss.bank, fresh.loss.bank)


def test_a_loader_that_augments_is_noticed():
    loader = [batch(n) for n in range(BATCHES)]
    mirrored = [(images.flip(3), targets) for images, targets in loader]
    (kd, _, _, looks), (fresh, *_) = distiller(), distiller()
    kd.refresh(loader, progress=False)
    with pytest.warns(UserWarning, match="sees the first batch otherwise"):
        kd.refresh(mirrored, progress=False)
    assert len(looks) == 2 * BATCHES
    fresh.refresh(mirrored, progress=False)
    assert same(kd.loss.bank, fresh.loss.bank)


def test_another_teacher_looks_at_everything():
    loader = [batch(n) for n in range(BATCHES)]
    kd, _, teacher, looks = distiller()
    kd.refresh(loader, progress=False)
    move(teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.refresh(loader, progress=False)
    assert len(looks) == 2 * BATCHES


def test_new_instances_are_looked_at_and_those_that_are_gone_are_gone():
    first, second = ([batch(n) for n in numbers] for numbers in (range(4), range(1, 6)))
    (kd, _, _, looks), (fresh, *_) = distiller(max_instances=800), distiller(max_instances=800)
    kd.refresh(first, progress=False)
    kd.refresh(second, progress=False)
    assert len(looks) == 4 + 1 + 2  # the batch to compare, and two new ones
    fresh.refresh(second, progress=False)
    assert same(kd.loss.bank, fresh.loss.bank)


def test_without_ids_the_teacher_always_looks():
    loader = [batch(n, ids=False) for n in range(BATCHES)]
    kd, _, _, looks = distiller()
    for passes in (1, 2):
        kd.refresh(loader, progress=False)
        assert len(looks) == passes * BATCHES
