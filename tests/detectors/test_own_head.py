"""Methods on heads, for a detector of no framework: a path and a function that reads it."""

import pytest
import torch
from torch import nn

from global_kd import Distiller
from global_kd.losses import FGFI, FRS, PKD
from global_kd.step import Dense, Grid

IMAGES = torch.rand(2, 3, 64, 96)
BOXES = [
    {"boxes": torch.tensor([[4.0, 4, 50, 60]]), "labels": torch.tensor([1])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


class Neck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, stride=8)
        self.down = nn.Conv2d(width, width, 2, stride=2)

    def forward(self, x):
        fine = self.stem(x)
        return [fine, self.down(fine.relu())]


class Head(nn.Module):
    """Three classes and four sides a cell; it overwrites the list that it is given."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, 7, 1)

    def forward(self, levels):
        for i, x in enumerate(levels):
            levels[i] = self.conv(x)
        return levels


class Detector(nn.Module):
    def __init__(self, width, wrapped=False):
        super().__init__()
        self.neck, self.head, self.wrapped = Neck(width), Head(width), wrapped

    def forward(self, images):
        levels = self.neck(images)
        return self.head({"a": levels}["a"])


def read(output, size):
    grids, logits, priors = [], [], []
    for x, stride in zip(output, (8, 16)):
        _, _, height, width = x.shape
        grids.append(Grid(stride, height, width))
        logits.append(x[:, :3].flatten(2).transpose(1, 2))
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        corner = torch.stack([x, y], dim=-1).flatten(0, 1) * float(stride)
        priors.append(torch.cat([corner, corner + stride], dim=1))
    assert size == (64, 96)
    return Dense(torch.cat(logits, dim=1), tuple(grids), priors=torch.cat(priors))


def make(losses, **options):
    torch.manual_seed(0)
    student, teacher = Detector(4), Detector(9)
    heads = {"student_dense": ("head", read), "teacher_dense": ("head", read)}
    kd = Distiller(student, teacher, losses, example_inputs=(IMAGES,), **heads, **options)
    return student, teacher, kd


@pytest.mark.parametrize("paths", [{}, {"student_path": "neck", "teacher_path": "neck"}])
def test_methods_on_heads_train(paths):
    student, teacher, kd = make([FRS(warmup_steps=0), FGFI(), PKD()], **paths)
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.01)
    for _ in range(3):
        own = sum(x.square().mean() for x in student(IMAGES))
        terms = kd(IMAGES, BOXES)
        assert set(terms) == {"kd_frs_features", "kd_frs_classes", "kd_fgfi", "kd_pkd"}
        optimizer.zero_grad()
        (own + sum(terms.values())).backward()
        assert student.head.conv.weight.grad.abs().sum() > 0
        optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(loss.strides == (8, 16) for loss in kd.losses.values())


def test_the_facts_are_the_heads_own_outputs():
    student, teacher, kd = make(FRS(warmup_steps=0))
    seen = []
    kd.loss.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    outputs = [x.clone() for x in student(IMAGES)]
    kd(IMAGES, BOXES)
    mine, theirs = seen[0]["dense"]
    torch.testing.assert_close(mine.logits, read(outputs, (64, 96)).logits)
    assert mine.logits.requires_grad and not theirs.logits.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(theirs.logits, read(teacher(IMAGES), (64, 96)).logits)


def test_the_head_runs_on_other_maps():
    _, teacher, kd = make(PKD())
    reader = kd._pair.teacher
    assert {"dense", "priors", "teacher_head"} <= reader.gives and "boxes" not in reader.gives
    with torch.no_grad():
        look = reader.look(reader.example())
    maps = [x.clone().requires_grad_() for x in look.maps]
    again = reader.head(maps, look)
    torch.testing.assert_close(again.logits, reader.dense(look).logits)
    again.logits.sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in maps)


@pytest.mark.parametrize(
    ("dense", "error", "message"),
    [
        ("head", TypeError, r"student_dense: expected a pair .* but got 'head'"),
        (("head", "read"), TypeError, "student_dense: expected a pair"),
        (("heads", read), ValueError, "expected the name of a module .* nearest: head"),
        (("head", lambda output, size: output), TypeError, "gives a global_kd.step.Dense"),
    ],
)
def test_what_does_not_fit_is_named(dense, error, message):
    with pytest.raises(error, match=message):
        Distiller(Detector(4), Detector(9), PKD(), example_inputs=(IMAGES,), student_dense=dense)
