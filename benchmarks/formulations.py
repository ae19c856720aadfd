"""What is published, in a few lines of plain torch: what anybody would write from the equations.

Levels are summed, maps and logits are float tensors, nothing is guarded: no autocast, no empty
image, no constant channel, no robust weights. Weights are those of the papers for one-stage
detectors, as in the library. `torch.compile` takes each of them whole.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from global_kd.losses import FGD, MGD
from global_kd.step import Dense

Maps = Sequence[Tensor]


def pkd(student: Maps, teacher: Maps) -> Tensor:
    """Pearson correlation: half the squared error of standardised channels."""
    total = torch.zeros(())
    for s, t in zip(student, teacher, strict=True):
        s, t = (
            (x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6)
            for x in (s, t)
        )
        total = total + functional.mse_loss(s, t) / 2
    return 10 * total


def cwd(student: Maps, teacher: Maps) -> Tensor:
    """Channel-wise: divergence of softmaxes over the cells."""
    total = torch.zeros(())
    for s, t in zip(student, teacher, strict=True):
        q, p = s.flatten(2).log_softmax(2), t.flatten(2).log_softmax(2)
        total = total + (p.exp() * (p - q)).sum() / (s.shape[0] * s.shape[1])
    return 10 * total


def frs(student: Maps, teacher: Maps, heads: tuple[Dense, Dense]) -> tuple[Tensor, Tensor]:
    """Feature richness: errors of features and classes under the teacher's largest score."""
    features, classes = torch.zeros(()), torch.zeros(())
    rows = zip(*(head.split(head.logits) for head in heads), strict=True)
    for s, t, (z_s, z_t) in zip(student, teacher, rows, strict=True):
        p = z_t.sigmoid()
        mask = p.amax(2)
        error = (s - t).square().sum(1).flatten(1)
        entropy = functional.binary_cross_entropy_with_logits(z_s, p, reduction="none").sum(2)
        features = features + (mask * error).sum() / mask.sum()
        classes = classes + (mask * entropy).sum() / mask.sum()
    return 0.005 * features, 0.02 * classes


def fgd(
    loss: FGD, student: Maps, teacher: Maps, boxes: Tensor, image_index: Tensor
) -> tuple[Tensor, ...]:
    """Focal and global: foreground, background, attention, and maps behind context blocks."""
    total = [torch.zeros(()) for _ in range(4)]
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        (where_s, what_s), (where_t, what_t) = attention(s), attention(t)
        inside, area = covered(boxes / loss.strides[level], s)
        foreground = largest(inside / area, image_index, s)
        outside = (foreground == 0).to(s.dtype)
        background = outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
        error = (where_t[:, None] * what_t[:, :, None, None] * (s - t).square()).sum(1)
        apart = (where_s - where_t).abs().sum() + (what_s - what_t).abs().sum()
        seen = context(loss.student_context[level], s) - context(loss.teacher_context[level], t)
        found = (error * foreground).sum(), (error * background).sum(), apart, seen.square().sum()
        total = [a + b / s.shape[0] for a, b in zip(total, found, strict=True)]
    return tuple(w * x for w, x in zip((1e-3, 5e-4, 5e-4, 5e-6), total, strict=True))


def attention(x: Tensor, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    where = (x.abs().mean(1).flatten(1) / temperature).softmax(1) * (height * width)
    what = (x.abs().mean((2, 3)) / temperature).softmax(1) * channels
    return where.view(batch, height, width), what


def covered(boxes: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which cells each box, in cells, touches, `(R, H, W)`, and how many, `(R, 1, 1)`."""
    height, width = like.shape[2:]
    limit = torch.tensor([width, height, width, height], device=boxes.device)
    cells = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1).minimum(limit)
    x1, y1, x2, y2 = cells[:, :, None, None].unbind(1)
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    inside = (x >= x1) & (x < x2) & (y[:, None] >= y1) & (y[:, None] < y2)
    return inside, (x2 - x1) * (y2 - y1)


def largest(of_boxes: Tensor, image_index: Tensor, like: Tensor) -> Tensor:
    """The largest value of an image's boxes on each cell, `(B, H, W)`, 0 without."""
    images = torch.arange(like.shape[0], device=like.device)[:, None]
    return (of_boxes * (image_index == images)[:, :, None, None]).amax(1)


def context(block: Any, x: Tensor) -> Tensor:
    a = block.key(x).flatten(2).softmax(2)
    said = (x.flatten(2) * a).sum(2)
    return x + block.last(block.norm(block.first(said)).relu())[:, :, None, None]


def mgd(loss: MGD, student: Maps, teacher: Maps, masks: Maps) -> Tensor:
    """Masked generation: the teacher's map from what is left of the student's."""
    total = torch.zeros(())
    for s, t, mask, generate in zip(student, teacher, masks, loss.generators, strict=True):
        total = total + (generate(s * mask) - t).square().sum() / s.shape[0]
    return 2e-5 * total


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One level: one minus the cosine, mean over cells."""
    return 1 - functional.cosine_similarity(student, teacher, dim=1).mean()


def defeat(
    student: Maps, teacher: Maps, boxes: Tensor, image_index: Tensor, strides: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Decoupled features, on the maps: objects and background, each box on a level by its size."""
    side = ((boxes[:, 2:] - boxes[:, :2] + 1).prod(1)).sqrt()
    own = (side / 56 + 1e-6).log2().floor().clamp(0, len(strides) - 1)
    foreground, background = torch.zeros(()), torch.zeros(())
    for level, (s, t, stride) in enumerate(zip(student, teacher, strides, strict=True)):
        inside, _ = covered(boxes / stride, s)
        mask = largest((inside & (own == level)[:, None, None]).to(s.dtype), image_index, s)
        error = (s - t).square().sum(1)
        count = 2 * s.shape[1]
        foreground = foreground + (mask * error).sum() / (count * mask.sum()).clamp(min=1)
        mask = 1 - mask
        background = background + (mask * error).sum() / (count * mask.sum()).clamp(min=1)
    return 3 * foreground / len(strides), 12 * background / len(strides)


def soft_labels(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of the softmaxes of some rows, mean over rows and classes."""
    q, p = (student / 2).log_softmax(1), (teacher / 2).log_softmax(1)
    return 5 * 4 * (p.exp() * (p - q)).mean()


def bckd(heads: tuple[Dense, Dense], assigned: Tensor) -> tuple[Tensor, Tensor]:
    """Dense classes as two-point distributions, boxes where these disagree."""
    student, teacher = heads
    s, t = student.logits, teacher.logits.sigmoid()
    apart = (t - s.sigmoid()).abs()
    entropy = functional.binary_cross_entropy_with_logits(s, t, reduction="none")
    positives = (assigned >= 0).sum().clamp(min=1)
    assert student.boxes is not None and teacher.boxes is not None
    overlap = giou(student.boxes, teacher.boxes)
    boxes = (apart.detach().amax(2) * (1 - overlap)).sum() / positives
    return (apart * entropy).sum() / positives, 4 * boxes


def giou(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    around = (high - low).prod(-1)
    return inter / union - (around - union) / around
