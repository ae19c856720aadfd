"""The yardstick: what the paper's released code computes, in the way it computes it.

Our own expression of that formulation, as the definition reads.

The pursuit: the residuals of all instances are kept as rows, and on every pick the residuals that
each candidate would leave are formed, squared and summed. Time and memory are O(Q N C) a pick. The
released code runs it in float16 on a GPU; here it takes the type and the device of its input.

The RDM step: loops over levels, images and boxes; see the note above it. The tests use it as a
second oracle.
"""

import copy
from collections.abc import Sequence
from math import ceil, floor, log2, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize

from global_kd import PrototypeBank, Targets


def pursuit(
    student: Tensor,
    teacher: Tensor,
    num_prototypes: int,
    *,
    candidates: Tensor,
    alpha: float = 10.0,
    unique: bool = False,
) -> Tensor:
    """Picks among `candidates` (Q,), in order; rows are student (N, Cs) and teacher (N, Ct).

    `unique=False` is what was released; `unique=True` bars a row once it is picked.
    """
    residual_s, residual_t = normalize(student, dim=1), normalize(teacher, dim=1)
    atoms_s, atoms_t = residual_s[candidates], residual_t[candidates]
    barred = torch.zeros(len(candidates), dtype=torch.bool, device=student.device)
    picks = []
    for _ in range(num_prototypes):
        a, b = atoms_s @ residual_s.T, atoms_t @ residual_t.T  # (Q, N)
        shared = alpha * (a + b)
        w_s, w_t = (shared + a) / (1 + 2 * alpha), (shared + b) / (1 + 2 * alpha)
        left_s = residual_s[None] - w_s[:, :, None] * atoms_s[:, None, :]  # (Q, N, Cs)
        error = left_s.square().sum(dim=(1, 2))
        del left_s
        left_t = residual_t[None] - w_t[:, :, None] * atoms_t[:, None, :]  # (Q, N, Ct)
        error += left_t.square().sum(dim=(1, 2))
        del left_t
        error += alpha * (w_s - w_t).square().sum(dim=1)
        pick = int(error.masked_fill(barred, torch.inf).argmin())
        picks.append(pick)
        barred[pick] = unique
        residual_s = residual_s - torch.outer(w_s[pick], atoms_s[pick])
        residual_t = residual_t - torch.outer(w_t[pick], atoms_t[pick])
    return candidates[torch.tensor(picks, device=candidates.device)]


def density_candidates(
    student: Tensor, teacher: Tensor, *, bandwidth: float = 0.1, quantile: float = 0.4
) -> Tensor:
    """Rows whose density is strictly above the quantile in both spaces, as released."""
    keep = torch.ones(len(student), dtype=torch.bool, device=student.device)
    for rows in (student, teacher):
        unit = normalize(rows, dim=1)
        density = (-(((1 - unit @ unit.T) / bandwidth) ** 2)).exp().sum(dim=1)
        keep &= density > density.sort().values[int(quantile * len(rows))]
    return keep.nonzero()[:, 0]


# --- the RDM step -----------------------------------------------------------------------------
#
# What is computed is the library's definition: boxes are clipped and cover whole cells, pooling
# and masks agree on them, the largest weight wins, a class without prototypes is trusted, the
# levels' relations are averaged. How it is computed is the released way: Python loops over levels,
# images and boxes that read each box from the device, a crop and an adaptive pooling for each box
# and level, cosines of one instance at a time, float64 masks repeated over the channels, one term
# after another. As released, a cell whose weight is exactly 0 counts as background.

Prototypes = list[tuple[Tensor, Tensor, list[int]]]  # a level: student's, teacher's, class starts


def concatenate(bank: PrototypeBank) -> Prototypes:
    """The prototypes of each level in the order of classes, made once an epoch."""
    levels = []
    for student, teacher, valid in zip(bank.student, bank.teacher, bank.valid, strict=True):
        starts = [0, *valid.sum(dim=1).cumsum(dim=0).tolist()]
        levels.append((student[valid], teacher[valid], starts))
    return levels


def cells(box: Tensor, stride: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Half-open columns and rows of one box; the host waits for the four numbers."""
    x1, y1, x2, y2 = (v / stride for v in box.cpu().tolist())
    left, top = min(floor(clip(x1, width)), width - 1), min(floor(clip(y1, height)), height - 1)
    return left, top, max(ceil(clip(x2, width)), left + 1), max(ceil(clip(y2, height)), top + 1)


def clip(value: float, size: int) -> float:
    return min(max(value, 0.0), float(size))


def level_of(box: Tensor, strides: Sequence[float]) -> int:
    """The level on which a box is imitated."""
    x1, y1, x2, y2 = box.cpu().tolist()
    side = sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
    return min(max(floor(log2(side / (14 * strides[0]) + 1e-6)), 0), len(strides) - 1)


def by_image(image_index: Tensor, batch: int) -> list[list[int]]:
    """The rows of each image's boxes."""
    return [(image_index == image).nonzero()[:, 0].tolist() for image in range(batch)]


def pool_boxes(features: Tensor, boxes: Tensor, image_index: Tensor, stride: float) -> list[Tensor]:
    """One crop and one pooling for each box."""
    batch, channels, height, width = features.shape
    pooled = [features.new_zeros(channels)] * len(boxes)
    for image, rows in enumerate(by_image(image_index, batch)):
        for r in rows:
            x1, y1, x2, y2 = cells(boxes[r], stride, height, width)
            crop = features[image][:, y1:y2, x1:x2]
            pooled[r] = functional.adaptive_avg_pool2d(crop, 1).flatten()
    return pooled


def robust_weights(
    student: list[Tensor], teacher: list[Tensor], labels: Tensor, prototypes: Prototypes, level: int
) -> list[Tensor]:
    """One weight after another; the graph of the student's cosines is made and thrown away."""
    g_s, g_t, starts = prototypes[level]
    weights = []
    for row_s, row_t, label in zip(student, teacher, labels, strict=True):
        own = slice(starts[int(label)], starts[int(label) + 1])
        if own.start == own.stop:
            weights.append(row_s.new_ones(()))
            continue
        best_s = functional.cosine_similarity(row_s[None], g_s[own], dim=1).max()
        best_t = functional.cosine_similarity(row_t[None], g_t[own], dim=1).max()
        weights.append((1 - (best_s - best_t).abs()).clamp(0, 1).detach())
    return weights


def relation(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[Tensor],
    prototypes: Prototypes,
    level: int,
) -> Tensor:
    """Of one level: cosines of one instance at a time to all prototypes."""
    g_s, g_t, _ = prototypes[level]
    if not student or not len(g_s):
        return g_s.new_zeros(())
    q_s, q_t = [], []
    for row_s, row_t, weight in zip(student, teacher, weights, strict=True):
        q_s.append(weight * functional.cosine_similarity(row_s[None], g_s, dim=1))
        q_t.append(weight * functional.cosine_similarity(row_t[None], g_t, dim=1))
    return functional.smooth_l1_loss(torch.stack(q_s), torch.stack(q_t))


def mask(
    shape: Sequence[int],
    boxes: Tensor,
    image_index: Tensor,
    stride: float,
    weights: Sequence[Tensor],
    present: Sequence[bool],
) -> Tensor:
    """float64 `(B, H, W)`, painted box by box."""
    batch, _, height, width = shape
    painted = torch.zeros(batch, height, width, dtype=torch.float64, device=boxes.device)
    for image, rows in enumerate(by_image(image_index, batch)):
        for r in rows:
            if not present[r]:
                continue
            x1, y1, x2, y2 = cells(boxes[r], stride, height, width)
            painted[image, y1:y2, x1:x2] = painted[image, y1:y2, x1:x2].maximum(weights[r].double())
    return painted


def imitation(student: Tensor, teacher: Tensor, painted: Tensor) -> tuple[Tensor, Tensor]:
    """Foreground and background of one level under masks of the maps' own size, in float64."""
    channels = student.shape[1]
    outside = copy.deepcopy(painted)
    outside[painted > 0] = 0
    outside[painted <= 0] = 1
    inside = painted.unsqueeze(1).repeat(1, channels, 1, 1)
    outside = outside.unsqueeze(1).repeat(1, channels, 1, 1)
    # `max` of a number and a tensor makes the host wait, as released.
    count_in: Any = max(1.0, 2 * inside.sum())  # type: ignore[type-var]
    count_out: Any = max(1.0, 2 * outside.sum())  # type: ignore[type-var]
    foreground = (inside * (student - teacher) ** 2).sum() / count_in
    background = (outside * (student - teacher) ** 2).sum() / count_out
    return foreground, background


def soft_labels(
    student: Tensor, teacher: Tensor, weights: Sequence[Tensor], temperature: float = 2.0
) -> Tensor:
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, dim=1),
        functional.softmax(teacher / temperature, dim=1),
        reduction="none",
    )
    return (torch.stack(list(weights)) * divergence.mean(dim=1) * temperature**2).mean()


def robust_distill(
    strides: Sequence[float],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    targets: Targets,
    prototypes: Prototypes,
    *,
    adapted: Sequence[Tensor] | None = None,
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    logit_box: Tensor | None = None,
    factors: tuple[float, float, float, float] = (1.0, 4.0, 25.0, 1.0),
) -> dict[str, Tensor]:
    """The terms of `RobustDistillLoss` with the paper's options, for the same arguments.

    `factors` are those of foreground, background, relation and logits.
    """
    boxes, image_index = targets.boxes, targets.image_index
    level_of_box = [level_of(box, strides) for box in boxes]
    weights, rows = [], []
    for level, stride in enumerate(strides):
        pooled_s = pool_boxes(student[level], boxes, image_index, stride)
        pooled_t = pool_boxes(teacher[level].detach(), boxes, image_index, stride)
        rows.append((pooled_s, pooled_t))
        weights.append(robust_weights(pooled_s, pooled_t, targets.labels, prototypes, level))
    inside, outside = [], []
    for level, (s, t) in enumerate(zip(adapted or student, teacher, strict=True)):
        present = [own == level for own in level_of_box]
        painted = mask(s.shape, boxes, image_index, strides[level], weights[level], present)
        foreground, background = imitation(s, t.detach(), painted)
        inside.append(foreground)
        outside.append(background)
    terms = {
        "kd_foreground": factors[0] * torch.stack(inside).mean(),
        "kd_background": factors[1] * torch.stack(outside).mean(),
    }
    related = [
        relation(s, t, weights[level], prototypes, level) for level, (s, t) in enumerate(rows)
    ]
    terms["kd_relation"] = factors[2] * torch.stack(related).mean()
    if student_logits is not None and teacher_logits is not None and logit_box is not None:
        chosen = [weights[level_of_box[box]][box] for box in logit_box.tolist()]
        terms["kd_logits"] = factors[3] * soft_labels(
            student_logits, teacher_logits.detach(), chosen
        )
    return terms
