"""Overlap of boxes, xyxy: of pairs, by broadcasting ``(..., 4)`` with ``(..., 4)``, or of all.

In at least float32: the area of a box of a few hundred pixels overflows half precision. Sides
below 0 count as 0, and where nothing is covered the quotients are 0, with gradients of 0.
"""

import torch
from torch import Tensor

from .precision import accumulate


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union ``(...)``, in [0, 1]; 0 where neither box has an area."""
    inter, union, _, _ = _overlap(a, b)
    return _ratio(inter, union)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU ``(N, M)`` of each of ``(N, 4)`` with each of ``(M, 4)``."""
    return iou(a[:, None], b[None])


def giou(a: Tensor, b: Tensor) -> Tensor:
    """IoU less the part of the enclosing box that neither covers, in (-1, 1].

    Rezatofighi et al., CVPR 2019.
    """
    inter, union, low, high = _overlap(a, b)
    around = (high - low).prod(dim=-1)
    return _ratio(inter, union) - _ratio(around - union, around)


def diou(a: Tensor, b: Tensor) -> Tensor:
    """IoU less the squared distance of the centres over the squared diagonal of both.

    Zheng et al., AAAI 2020.
    """
    inter, union, low, high = _overlap(a, b)
    a, b = accumulate(a), accumulate(b)
    between = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(dim=-1) / 4
    return _ratio(inter, union) - _ratio(between, (high - low).square().sum(dim=-1))


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Areas of intersection and union; corners of the box around both."""
    a, b = accumulate(a), accumulate(b)
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inter = sides.clamp(min=0).prod(dim=-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(dim=-1) for x in (a, b)]
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:]).maximum(low)
    return inter, areas[0] + areas[1] - inter, low, high


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where the whole is 0, with a finite gradient."""
    there = whole > 0
    return torch.where(there, part, 0) / torch.where(there, whole, 1)
