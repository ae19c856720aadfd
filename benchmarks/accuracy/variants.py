"""What the library does not do, to be compared with what it does (question 2).

Other relations, other spaces in which instances are compared, other ways to pick prototypes; made
of the library's own parts. What earns its place here moves into the library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from global_kd import Distiller, GlobalKnowledgeLoss, PrototypeBank, PrototypeGenerator, Targets
from global_kd.functional import pool_boxes
from global_kd.losses.base import Levels
from global_kd.losses.robust_distill import RobustDistillLoss
from global_kd.ops.cosine import cosines, unit_rows

RIDGE = 0.1  # added to the prototypes' Gram matrix, whose diagonal is 1
SHARPNESS = 0.1  # temperature of softened similarities
GRID = 3


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the library.

    `form`: "cosine" (the library's), "projection" (coefficients of the least squares on the
    prototypes of the own class, squared error: the paper's equations 5 and 6), "softened" (softmax
    over the similarities to all prototypes, KL).
    `space`: "pooled" (the library's mean over a box), "grid" (means of 3x3 parts of the box),
    "embedding" (after the shared layers of the RoI head), for prototypes, relation and omega alike.
    `pick`: "pursuit" (the library's), "random" instances, those nearest to the "kmeans" centres,
    or the "means" of the classes, one a class.
    """

    form: str = "cosine"
    space: str = "pooled"
    pick: str = "pursuit"

    def __post_init__(self) -> None:
        for name, known in (
            ("form", ("cosine", "projection", "softened")),
            ("space", ("pooled", "grid", "embedding")),
            ("pick", ("pursuit", "random", "kmeans", "means")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected one of {known}, but got {getattr(self, name)!r}"
                )


class Sparse(Distiller):
    """Distils in every so many steps only: `kd(...)` is no term in the others."""

    steps: Tensor

    def __init__(
        self, student: nn.Module, teacher: nn.Module, loss: GlobalKnowledgeLoss, every: int
    ) -> None:
        super().__init__(student, teacher, loss)
        self.every = every
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Any, targets: Any = None) -> dict[str, Tensor]:
        self.steps += 1
        return super().forward(images, targets) if int(self.steps) % self.every == 0 else {}


class OtherLoss(GlobalKnowledgeLoss):
    """The whole method with a variant in it.

    Args:
        num_classes: As in the library.
        variant: What differs.
        models: Student and teacher, Faster R-CNNs of torchvision.
        **options: As in the library; prototypes come from the training stream.
    """

    def __init__(
        self,
        num_classes: int,
        variant: Variant,
        models: tuple[Any, Any],
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        if variant.space != "pooled" and self.refresh_every is None:
            raise ValueError(
                "refresh_every: expected a number; `refresh` pools boxes as it always did"
            )
        self.variant = variant
        self._models = models  # in a tuple, so that they are no submodules
        ours = self.generator
        self.generator = OtherPrototypes(
            variant.pick,
            num_classes,
            ours.num_prototypes,
            alpha=ours.alpha,
            min_side=ours.min_side,
            max_instances=ours.max_instances,
            seed=ours.seed,
            distributed=ours.distributed,
        )

    def make(self, levels: Levels) -> None:
        """Like the library's, with rows as wide as the space asks for."""
        super().make(levels)
        theirs = self.rdm
        self.rdm = OtherRelation(
            self.variant.form,
            theirs.strides,
            **(self._rdm_options | {"label_options": theirs.label_options}),
        )
        self.rdm.weights = self.weights
        if self.variant.space == "grid":
            widths = [GRID**2 * max(x) for x in (levels.student_channels, levels.teacher_channels)]
        elif self.variant.space == "embedding":
            widths = [m.roi_heads.box_head.fc7.out_features for m in self._models]
        else:
            return
        self.bank = PrototypeBank(
            len(theirs.strides),
            self.generator.num_classes,
            self.generator.num_prototypes,
            *widths,
            strides=theirs.strides,
        )

    def _rows(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Targets,
        instances: Targets | None,
    ) -> tuple[Tensor, Tensor]:
        if self.variant.space == "pooled":
            return super()._rows(student, teacher, targets, instances)
        with torch.no_grad():
            if self.training:
                seen = targets if instances is None else instances
                self.generator.add(self._look(0, student, seen), self._look(1, teacher, seen), seen)
            theirs = self._look(1, teacher, targets)
        with torch.set_grad_enabled(self.rdm.relation > 0 and torch.is_grad_enabled()):
            return self._look(0, student, targets), theirs

    def _look(self, which: int, maps: Sequence[Tensor], targets: Targets) -> Tensor:
        """Rows ``(L, R, C)`` of boxes in the space of the variant."""
        if self.variant.space == "grid":
            return grid_rows(maps, targets, self.rdm.strides)
        row = embedding(self._models[which], maps, targets, self.rdm.strides)
        return row.expand(len(maps), *row.shape)  # the head takes the level that it wants


def grid_rows(maps: Sequence[Tensor], targets: Targets, strides: Sequence[float]) -> Tensor:
    """``(L, R, 9 C)``: the means over 3x3 equal parts of each box, one after the other."""
    low, size = targets.boxes[:, :2], targets.boxes[:, 2:] - targets.boxes[:, :2]
    # Dividing last leaves edges that are whole pixels whole: no part reaches into another's cells.
    corners = [low + size * k / GRID for k in range(GRID + 1)]
    parts = [
        torch.stack(
            [corners[i][:, 0], corners[j][:, 1], corners[i + 1][:, 0], corners[j + 1][:, 1]], dim=1
        )
        for j in range(GRID)
        for i in range(GRID)
    ]
    return torch.stack(
        [
            torch.cat([pool_boxes(x, part, targets.image_index, s) for part in parts], dim=1)
            for x, s in zip(maps, strides, strict=True)
        ]
    )


def embedding(
    model: Any, maps: Sequence[Tensor], targets: Targets, strides: Sequence[float]
) -> Tensor:
    """``(R, D)``: each box after the shared layers of torchvision's RoI head."""
    heads, number = model.roi_heads, len(maps[0])
    order = targets.image_index.argsort(stable=True)
    counts = torch.bincount(targets.image_index, minlength=number).tolist()
    boxes = list(targets.boxes[order].split(counts))
    size = tuple(int(n * strides[0]) for n in maps[0].shape[-2:])
    named = {str(i): x for i, x in enumerate(maps)}
    rows = heads.box_head(heads.box_roi_pool(named, boxes, [size] * number))
    return torch.empty_like(rows).index_copy(0, order, rows)


class OtherRelation(RobustDistillLoss):
    """The library's terms with another relation among them."""

    def __init__(self, form: str, strides: Sequence[float], **options: Any) -> None:
        super().__init__(strides, **options)
        self.form = form

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Targets,
        bank: PrototypeBank,
        *,
        rows: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        found: Any = super().forward(student, teacher, targets, bank, rows=rows, **options)
        terms, omega = found  # the whole method asks for the weights
        if self.relation and self.form != "cosine":
            assert rows is not None
            weights = omega if "relation" in self.robust else torch.ones_like(omega)
            form = projection_loss if self.form == "projection" else softened_loss
            terms["kd_relation"] = self.relation * form(*rows, bank, targets.labels, weights)
        return found


def coefficients(rows: Tensor, prototypes: Tensor, valid: Tensor) -> Tensor:
    """Of unit rows (L, R, C) on unit prototypes (L, R, M, C) by least squares with a ridge.

    0 at slots that are not `valid` (L, R, M).
    """
    g = unit_rows(prototypes) * valid[..., None]
    gram = g @ g.transpose(-1, -2) + RIDGE * torch.eye(g.shape[-2], device=g.device)
    along = (g @ unit_rows(rows)[..., None])[..., 0]
    return torch.linalg.solve(gram, along)


def projection_loss(
    student: Tensor, teacher: Tensor, bank: PrototypeBank, labels: Tensor, weights: Tensor
) -> Tensor:
    """Half the weighted squared difference of the coefficients, mean over levels and instances."""
    valid = bank.valid[:, labels]
    s = coefficients(student, bank.student[:, labels], valid)
    t = coefficients(teacher, bank.teacher[:, labels], valid)
    gaps = weights * (s - t).square().sum(dim=-1)
    return gaps.sum() / (2 * max(1, gaps.numel()))


def softened_loss(
    student: Tensor, teacher: Tensor, bank: PrototypeBank, labels: Tensor, weights: Tensor
) -> Tensor:
    """KL of the softmax over all prototypes, weighted, mean over levels and instances."""
    g_s, g_t, classes = bank.flat()
    empty = (classes < 0)[:, None]
    logs = [
        functional.log_softmax((cosines(x, g) / SHARPNESS).masked_fill(empty, -1e4), dim=-1)
        for x, g in ((student, g_s), (teacher, g_t))
    ]
    gaps = (logs[1].exp() * (logs[1] - logs[0])).masked_fill(empty, 0).sum(dim=-1)
    return (weights * gaps).sum() / max(1, gaps.numel())


class OtherPrototypes(PrototypeGenerator):
    """The library's sample of instances; prototypes picked from it in another way."""

    def __init__(self, pick: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pick = pick

    def _pursue(self, rows: Any) -> PrototypeBank:
        if self.pick == "pursuit":
            return super()._pursue(rows)
        _, levels, channels = rows.student.shape
        bank = PrototypeBank(
            levels, self.num_classes, self.num_prototypes, channels, rows.teacher.shape[2]
        )
        for label in rows.labels.unique().tolist():
            mine = rows.take((rows.labels == label).nonzero()[:, 0])
            for level in range(levels):
                s, t = mine.student[:, level], mine.teacher[:, level]
                if self.pick == "means":
                    s, t = (unit_rows(x).mean(dim=0, keepdim=True) for x in (s, t))
                else:
                    number = min(self.num_prototypes, len(s))
                    seed = hash((self.seed, self.turn, label, level)) % 2**31
                    choose = random_picks if self.pick == "random" else kmeans_picks
                    chosen = choose(s, t, number, seed)
                    s, t = s[chosen], t[chosen]
                bank.student[level, label, : len(s)] = s
                bank.teacher[level, label, : len(t)] = t
                bank.valid[level, label, : len(s)] = True
        return bank


def random_picks(student: Tensor, teacher: Tensor, number: int, seed: int) -> Tensor:
    """Any of the instances."""
    return torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))[:number]


def kmeans_picks(student: Tensor, teacher: Tensor, number: int, seed: int) -> Tensor:
    """The instances nearest to the centres of k-means over unit rows of both spaces."""
    from sklearn.cluster import KMeans

    both = torch.cat([unit_rows(student), unit_rows(teacher)], dim=1)
    found = KMeans(number, n_init=1, random_state=seed).fit(both.numpy())
    centres = torch.from_numpy(found.cluster_centers_).to(both)
    return torch.cdist(centres, both).argmin(dim=1).unique()
