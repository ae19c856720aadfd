"""How suspicious each labelled instance is, by several rules, and how well a rule finds errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from global_kd import Distiller, Targets
from global_kd.instances import assign_levels, pool_levels
from workshop.detection_data import Batch

# Rules in the order of the table; every one is higher where something seems wrong.
RULES = {
    "omega": "1 − ω, on the level of its size",
    "omega, lowest level": "1 − ω, lowest of the levels",
    "omega, mean level": "1 − ω, mean of the levels",
    "prototype": "teacher: 1 − cosine to the nearest prototype of its class",
    "prototype margin": "teacher: cosine to the nearest prototype of another class − of its own",
    "teacher class": "teacher: −log p(label) at the box",
    "teacher box": "teacher: 1 − best score · IoU",
    "teacher both": "teacher: 1 − best score · IoU of its class",
    "student class": "student: −log p(label) at the box",
    "student box": "student: 1 − best score · IoU",
    "student both": "student: 1 − best score · IoU of its class",
}


@torch.no_grad()
def suspicions(
    kd: Distiller,
    student: Any,
    teacher: Any,
    batches: Iterable[Batch],
    finest_scale: float | None,
) -> dict[str, Tensor]:
    """A value (N,) for every instance of the batches, in their order, by each of the `RULES`.

    `student` and `teacher` are the Faster R-CNNs of `kd`, whose prototypes are taken as they are.
    """
    student.eval()
    teacher.eval()
    parts: dict[str, list[Tensor]] = {rule: [] for rule in RULES}
    for images, targets in batches:
        boxes, omega = kd.weigh(images, targets)
        level = assign_levels(boxes.boxes, kd.loss.rdm.strides, finest_scale)
        own, other = _nearest_prototypes(kd, teacher, images, targets)
        found = {
            "omega": 1 - _on_level(omega, level),
            "omega, lowest level": 1 - omega.amin(dim=0),
            "omega, mean level": 1 - omega.mean(dim=0),
            "prototype": 1 - _on_level(own, level),
            "prototype margin": _on_level(other - own, level),
        }
        for name, model in (("teacher", teacher), ("student", student)):
            found[f"{name} class"] = _class_loss(model, images, targets)
            found[f"{name} box"], found[f"{name} both"] = _misses(model, images, targets)
        for rule, values in found.items():
            parts[rule].append(values)
    return {rule: torch.cat(values) for rule, values in parts.items()}


def _on_level(values: Tensor, level: Tensor) -> Tensor:
    """Of values (L, R), those on each instance's own level (R,)."""
    return values.gather(0, level[None])[0]


def _nearest_prototypes(
    kd: Distiller, teacher: Any, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Cosines (L, R) in the teacher's space to the nearest prototype: of its class, of others."""
    transformed, truth = teacher.transform(list(images), [dict(t) for t in targets])
    boxes = Targets.from_list(truth)
    levels = list(teacher.backbone(transformed.tensors).values())
    rows = nn.functional.normalize(pool_levels(levels, boxes, kd.loss.rdm.strides), dim=-1)
    _, prototypes, classes = kd.loss.bank.flat()
    cosine = rows @ nn.functional.normalize(prototypes, dim=-1).mT
    same = boxes.labels[:, None] == classes[:, None]
    filled = (classes >= 0)[:, None]
    own = cosine.masked_fill(~(same & filled), -1).amax(dim=-1)
    other = cosine.masked_fill(same | ~filled, -1).amax(dim=-1)
    return own, other


def _class_loss(model: Any, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """Cross-entropy (R,) of the given label by the model's own head, at the given box."""
    transformed, truth = model.transform(list(images), [dict(t) for t in targets])
    features = model.backbone(transformed.tensors)
    heads, boxes = model.roi_heads, [t["boxes"] for t in truth]
    pooled = heads.box_roi_pool(features, boxes, transformed.image_sizes)
    logits = heads.box_predictor(heads.box_head(pooled))[0]
    labels = torch.cat([t["labels"] for t in truth])
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def _misses(
    model: Any, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """1 − the best score · IoU of a detection with each box (R,): of any class, of its class."""
    anything: list[Tensor] = []
    same_class: list[Tensor] = []
    for found, target in zip(model(list(images)), targets, strict=True):
        fit = box_iou(target["boxes"], found["boxes"]) * found["scores"]
        own = target["labels"][:, None] == found["labels"]
        for fits, misses in ((fit, anything), (fit * own, same_class)):
            misses.append(1 - nn.functional.pad(fits, (0, 1)).amax(dim=1))  # 0: no detection
    return torch.cat(anything), torch.cat(same_class)


def area_under_roc(suspicion: Tensor, wrong: Tensor) -> float:
    """The chance that a wrong instance is more suspicious than a right one; ties count half.

    `suspicion` (N,) and bool `wrong` (N,), both kinds present.
    """
    _, place, counts = suspicion.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2).double()[place]  # from 1; the mean among equals
    many, few = int(wrong.sum()), int((~wrong).sum())
    return float((rank[wrong].sum() - many * (many + 1) / 2) / (many * few))


def precision_at(suspicion: Tensor, wrong: Tensor, share: float) -> float:
    """How many of the most suspicious `share` of instances are wrong, ties in random order."""
    count = max(1, round(share * len(suspicion)))
    cut = suspicion.topk(count).values[-1]
    above, tied = suspicion > cut, suspicion == cut
    rest = (count - int(above.sum())) * float(wrong[tied].float().mean())
    return (int(wrong[above].sum()) + rest) / count
