"""How large the objects are that a network sees, and the thresholds that follow from it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .detection_data import DetectionSet


def boxes_at_input(
    split: DetectionSet, model: nn.Module, images: int = 200
) -> tuple[Tensor, Tensor]:
    """Widths and heights (n, 2) of a split's boxes in pixels of a detector's input; labels (n,).

    From `images` pictures, evenly spread over the split; the detector is one of torchvision's.
    """
    resize: Any = model.transform
    shortest, longest = resize.min_size[-1], resize.max_size
    sizes, labels = [torch.zeros(0, 2)], [torch.zeros(0, dtype=torch.int64)]
    for index in range(0, len(split), max(1, len(split) // images)):
        image, target = split[index]
        sides = sorted(image.shape[-2:])
        boxes = target["boxes"]
        sizes.append((boxes[:, 2:] - boxes[:, :2]) * min(shortest / sides[0], longest / sides[1]))
        labels.append(target["labels"])
    return torch.cat(sizes), torch.cat(labels)


@torch.no_grad()
def finest_stride(model: nn.Module) -> float:
    """Pixels per cell of a torchvision detector's finest map."""
    training, backbone = model.training, cast(nn.Module, model.eval().backbone)
    maps = backbone(next(model.parameters()).new_zeros(1, 3, 256, 256))
    model.train(training)
    return 256 / max(x.shape[-1] for x in maps.values())


def thresholds(sizes: Tensor, labels: Tensor, stride: float) -> tuple[float, float]:
    """`min_side` and `finest_scale` of `GlobalKnowledgeLoss`, in whole pixels.

    Nine of ten boxes, and half of each class, have sides long enough to become prototypes; what
    has 30 px, the paper's threshold, always may. Six of ten boxes lie on the finest level (of
    `stride`), as far as its boxes are 8 to 28 cells long: as it is with digit scenes.
    """
    if len(sizes) == 0:
        return 30.0, 14 * stride
    shortest = sizes.amin(dim=1)
    middles = [shortest[labels == label].quantile(0.5) for label in labels.unique()]
    side = min(30.0, float(shortest.quantile(0.1)), *map(float, middles))
    length = float(sizes.prod(dim=1).sqrt().quantile(0.6)) / 2
    return max(1.0, round(side)), round(min(max(length, 4 * stride), 14 * stride))


def described(sizes: Tensor, min_side: float, finest_scale: float) -> str:
    """What was found and chosen, for people."""
    if len(sizes) == 0:
        return "No boxes were found in the training pictures."
    low, middle, high = sizes.prod(dim=1).sqrt().quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    text = (
        f"At the student's input boxes are {low:.0f} to {high:.0f} px long, {middle:.0f} in the "
        f"middle: no prototypes below {min_side:g} px (min_side), and up to {2 * finest_scale:g} "
        f"px on the finest level (finest_scale {finest_scale:g})."
    )
    if middle < 16:
        text += " That is small; a larger input (--side, for the small detectors) finds more."
    return text
