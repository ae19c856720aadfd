"""The inputs: two pyramids, boxes, prototypes and logits of a batch."""

from dataclasses import dataclass
from math import ceil, log

import torch
from torch import Tensor

from global_kd import PrototypeBank, Targets

STRIDES = (4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class Size:
    """Of one step; the default is that of COCO: P2 to P6 of a padded batch."""

    height: int = 800
    width: int = 1344
    batch: int = 2
    channels: int = 256
    boxes: int = 32  # an image
    classes: int = 80
    slots: int = 10  # prototypes a class and level
    rows: int = 128  # of logits, an image
    dtype: torch.dtype = torch.float32

    def words(self) -> str:
        return (
            f"P2 to P6 of {self.batch} x {self.height} x {self.width}, C = {self.channels}, "
            f"{self.boxes} boxes an image, {self.classes} classes x {self.slots} prototypes, "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


QUICK = Size(height=96, width=128, channels=16, boxes=4, classes=5, slots=3, rows=8)


@dataclass
class Scene:
    student: list[Tensor]  # leaves that want a gradient
    teacher: list[Tensor]
    targets: Targets
    bank: PrototypeBank
    student_logits: Tensor  # likewise
    teacher_logits: Tensor
    logit_box: Tensor
    strides: tuple[float, ...] = STRIDES

    def inputs(self) -> dict[str, object]:
        """Arguments of `RobustDistillLoss` and of its released twin, but for the bank."""
        return {
            "student": self.student,
            "teacher": self.teacher,
            "targets": self.targets,
            "student_logits": self.student_logits,
            "teacher_logits": self.teacher_logits,
            "logit_box": self.logit_box,
        }

    def leaves(self) -> list[Tensor]:
        return [*self.student, self.student_logits]


def make_scene(size: Size, device: torch.device, seed: int = 0) -> Scene:
    """The same on every device, but for the rounding of a narrower type."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    middle_s, middle_t = normal(size.channels), normal(size.channels)  # maps share a direction

    def maps(middle: Tensor) -> list[Tensor]:
        made = []
        for stride in STRIDES:
            shape = ceil(size.height / stride), ceil(size.width / stride)
            x = normal(size.batch, size.channels, *shape).add_(middle[:, None, None])
            made.append(x.to(device, size.dtype))
        return made

    student = [x.requires_grad_() for x in maps(middle_s)]
    teacher = maps(middle_t)
    bank = PrototypeBank(len(STRIDES), size.classes, size.slots, size.channels, size.channels)
    bank.student.copy_(normal(*bank.student.shape) + middle_s)
    bank.teacher.copy_(normal(*bank.teacher.shape) + middle_t)
    bank.valid.fill_(True)
    count = size.batch * size.boxes
    targets = Targets(
        boxes_like_coco(count, size.height, size.width, g),
        torch.randint(size.classes, (count,), generator=g),
        torch.arange(size.batch).repeat_interleave(size.boxes),
    )
    rows = size.batch * size.rows
    mine, theirs = normal(rows, size.classes + 1), normal(rows, size.classes + 1)
    box = torch.randint(max(1, count), (rows,), generator=g)
    return Scene(
        student,
        teacher,
        targets.to(device),
        bank.to(device),
        mine.to(device, size.dtype).requires_grad_(),
        theirs.to(device, size.dtype),
        box.to(device),
    )


def boxes_like_coco(count: int, height: int, width: int, g: torch.Generator) -> Tensor:
    """Sides from 16 px to four fifths of the image, evenly in their logarithm, as in COCO."""
    low, high = log(16.0), log(0.8 * min(height, width))
    side = torch.exp(low + (high - low) * torch.rand(count, generator=g))
    aspect = torch.exp(log(2.0) * (torch.rand(count, generator=g) - 0.5))
    w, h = (side * aspect).clamp(max=width), (side / aspect).clamp(max=height)
    x = (width - w) * torch.rand(count, generator=g)
    y = (height - h) * torch.rand(count, generator=g)
    return torch.stack([x, y, x + w, y + h], dim=1)
