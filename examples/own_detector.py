"""Distil a detector of one's own: python examples/own_detector.py

The detector below belongs to no framework: a backbone, a neck with two maps, and a head that says
in every cell which class has its centre there. What the library asks of it is a module that puts
out the maps, and boxes in pixels. docs/own_detector.md takes the same way step by step.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from global_kd import Distiller, GlobalKnowledgeLoss, Targets
from global_kd.losses import PKD

CLASSES = 3  # red, green and blue rectangles


class Body(nn.Module):
    """Images (B, 3, H, W) to maps at strides 8 and 16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, width), _block(width, width), _block(width, width))
        self.coarse = _block(width, width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stem(images)
        return fine, self.coarse(fine)


def _block(before: int, after: int) -> nn.Module:
    conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


class MyDetector(nn.Module):
    """Maps to logits (B, CLASSES, h, w), one map a level: objects longer than 32 px on the second.

    A real one predicts the sides of boxes, too; for distillation that changes nothing.
    """

    strides = (8, 16)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = Body(width)
        self.classify = nn.Conv2d(width, CLASSES, 3, padding=1)
        nn.init.constant_(self.classify.bias, -3.0)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.classify(x) for x in self.body(images)]

    def loss(self, images: Tensor, targets: Targets) -> Tensor:
        """Of all cells, those with the centre of an object being the positives."""
        total = images.new_zeros(())
        long = (targets.boxes[:, 2:] - targets.boxes[:, :2]).amax(dim=1) > 32
        for level, logits in enumerate(self(images)):
            mine = long if level else ~long
            x, y = ((targets.boxes[mine, :2] + targets.boxes[mine, 2:]) / 2).T / self.strides[level]
            wanted = torch.zeros_like(logits)
            wanted[targets.image_index[mine], targets.labels[mine], y.long(), x.long()] = 1
            total = total + F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        return total / max(1, len(targets.boxes))


def batch(seed: int) -> tuple[Tensor, Targets]:
    """Eight images with two rectangles each; yours come from a loader."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(8, 3, 96, 96, generator=random) * 0.7
    corners = torch.randint(0, 48, (16, 2), generator=random)
    boxes = torch.cat([corners, corners + torch.randint(12, 48, (16, 2), generator=random)], dim=1)
    labels = torch.randint(0, CLASSES, (16,), generator=random)
    index = torch.arange(16) // 2
    rows = zip(boxes.tolist(), labels.tolist(), index.tolist(), strict=True)
    for (x1, y1, x2, y2), label, image in rows:
        images[image, label, y1:y2, x1:x2] += 0.3
    return images, Targets(boxes.float(), labels, index)


def train(detector: MyDetector, steps: int, kd: Distiller | None = None) -> None:
    """Your own loop, with two lines more."""
    parameters = [*detector.parameters(), *(() if kd is None else kd.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    detector.train()
    for step in range(steps):
        images, targets = batch(step)
        loss = detector.loss(images, targets)
        if kd is not None:
            loss = loss + sum(kd(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(detector: MyDetector) -> float:
    """The detection loss on images that nobody trained on; a real study takes AP."""
    detector.eval()
    return sum(float(detector.loss(*batch(10**6 + seed))) for seed in range(10)) / 10


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """A teacher, a student alone, and the same student with the teacher."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args(arguments).steps
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher, alone = MyDetector(32), MyDetector(4)
    student = copy.deepcopy(alone)
    train(teacher, 2 * steps)
    train(alone, steps)

    images, targets = batch(0)
    refresh = max(1, steps // 10)
    kd = Distiller(
        student,
        teacher,
        [GlobalKnowledgeLoss(CLASSES, total_steps=steps, refresh_every=refresh, min_side=8), PKD()],
        student_path="body",
        teacher_path="body",
        example_inputs=(images,),
    )

    def detection_loss(model: Any) -> Tensor:
        loss: Tensor = model.loss(images, targets)
        return loss

    # Published weights were made for other detectors: here each term gets a share of the pull.
    kd.calibrate(images, targets, share=0.1, detection_loss=detection_loss)
    train(student, steps, kd)

    losses = {
        "teacher": evaluate(teacher),
        "student": evaluate(alone),
        "student + gk + pkd": evaluate(student),
    }
    print("\nDetection loss on pictures that none of them trained on:")
    for name, loss in losses.items():
        print(f"{name:20}{loss:6.3f}")
    return losses


if __name__ == "__main__":
    main()
