"""What a pair of detectors must bring to be put through the compatibility checks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scene:
    """An image and its objects, before any framework touched them.

    Attributes:
        image: Float ``(3, h, w)``, RGB in [0, 1].
        boxes: Float ``(r, 4)`` xyxy in pixels of ``image``.
        labels: int64 ``(r,)`` in ``[0, num_classes)``.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Case:
    """A student and a teacher, and how a user of their framework feeds the student.

    Attributes:
        name: Row of the table, "student <- teacher" families and backbones.
        needs: Packages that must be importable.
        student: Makes it, random weights, no download.
        teacher: Likewise.
        num_classes: What the user passes to ``GlobalKnowledgeLoss``.
        batch: From scenes, as the framework's own data pipeline does (resizing, padding,
            normalising), to the arguments of the student's forward and of ``kd(*arguments)``.
        step: The student's training forward as the user writes it: the sum of its own losses.
        options: For the ``Distiller``.
        lr: Of Adam, at which this student fits four images in a dozen steps.
    """

    name: str
    needs: tuple[str, ...]
    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    num_classes: int
    batch: Callable[[list[Scene]], tuple[Any, ...]]
    step: Callable[[nn.Module, tuple[Any, ...]], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3


def scenes(
    sizes=((96, 128), (128, 96), (128, 128), (100, 120)), num_classes: int = 3, seed: int = 0
) -> list[Scene]:
    """Noise with two bright rectangles each; the last image without any."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i, (h, w) in enumerate(sizes):
        image = torch.rand(3, h, w, generator=g) * 0.4
        count = 0 if i == len(sizes) - 1 and i > 0 else 2
        corner = torch.rand(count, 2, generator=g) * torch.tensor([w, h]) * 0.4
        extent = torch.tensor([w, h]) * (0.3 + 0.2 * torch.rand(count, 2, generator=g))
        boxes = torch.cat([corner, corner + extent], dim=1).round()
        for x1, y1, x2, y2 in boxes.int().tolist():
            image[:, y1:y2, x1:x2] += 0.5
        made.append(Scene(image, boxes, torch.randint(0, num_classes, (count,), generator=g)))
    return made


def calibrated(make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """A detector whose batch norm has seen its own activations, as that of a trained one has.

    Under their initial statistics random weights double the activations with every block.
    """
    torch.manual_seed(0)
    model = make(*arguments)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return model
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = None  # a plain mean
    model.train()
    with torch.no_grad():
        for seed in range(2):
            g = torch.Generator().manual_seed(seed)
            model.backbone(torch.randn(2, 3, 128, 128, generator=g))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model
