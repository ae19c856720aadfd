"""torchvision's Faster R-CNN (Mask R-CNN), RetinaNet and FCOS, on any backbone with FPN.

torchvision resizes and pads images *inside* the model. Everything here is in pixels of what comes
out of the student's ``transform``, which is what both networks see.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distiller import Step
from ..hooks import feature_maps
from ..targets import Targets

_PROBE_SIZE = 256  # two cells of a stride-128 level


class TorchvisionPair:
    """Two torchvision detectors; soft labels where both are of the same kind.

    Args:
        student: With ``roi_heads`` (two-stage) or ``head.classification_head`` (dense).
        teacher: Likewise.
        boxes: ``"proposals"`` or ``"ground_truth"``, for a two-stage student.
    """

    def __init__(self, student: Any, teacher: Any, boxes: str) -> None:
        self.student, self.teacher, self.boxes = student, teacher, boxes
        kinds = [_kind(model) for model in (student, teacher)]
        self.same_kind = kinds[0] == kinds[1]
        self.two_stage = kinds[0] == "two-stage"
        self.activation = "softmax" if self.two_stage else "sigmoid"
        self.taps = {"images": "transform", "features": "backbone"}
        self.inputs: tuple[str, ...] = ()
        if self.two_stage:
            self.taps |= {"roi": "roi_heads.box_roi_pool", "logits": "roi_heads.box_predictor"}
            self.inputs = ("roi",)
        else:
            self.taps |= {"logits": "head.classification_head", "anchors": "anchor_generator"}

    def probe(self) -> tuple[Sequence[Tensor], Sequence[Tensor], tuple[int, int]]:
        like = next(self.student.parameters())
        image = torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE, dtype=like.dtype, device=like.device)
        maps = [feature_maps(m.backbone(image)) for m in (self.student, self.teacher)]
        return maps[0], maps[1], (_PROBE_SIZE, _PROBE_SIZE)

    def step(self, tapped: dict[str, Any], images: Any, targets: Any, logits: bool) -> Step:
        transformed, ground_truth = tapped["images"]
        if ground_truth is None:
            raise ValueError(
                "targets: expected the student's last forward to have had targets, in train mode"
            )
        truth = _pack(ground_truth)
        with torch.no_grad():
            features = self._teacher_features(transformed)
        student, teacher = feature_maps(tapped["features"]), feature_maps(features)
        soft = logits and self._can_share_logits()
        if self.two_stage:
            positives = _Positives(self.student, tapped["roi"][1], ground_truth)
            proposed = self.boxes == "proposals"
            return Step(
                student,
                teacher,
                positives.targets if proposed else truth,
                truth if proposed else None,
                tapped["logits"][0][positives.mask] if soft else None,
                self._teacher_roi_logits(features, positives, transformed) if soft else None,
                (positives.order if proposed else positives.box) if soft else None,
            )
        if not soft:
            return Step(student, teacher, truth)
        box = _matched_boxes(self.student, ground_truth, tapped["anchors"], student)
        positive = box >= 0
        return Step(
            student,
            teacher,
            truth,
            student_logits=tapped["logits"][positive],
            teacher_logits=self._teacher_dense_logits(teacher)[positive],
            logit_box=box[positive],
        )

    def observe(self, images: Any, targets: Any) -> Step:
        transformed, ground_truth = self.student.transform(list(images), list(targets))
        return Step(
            feature_maps(self.student.backbone(transformed.tensors)),
            feature_maps(self._teacher_features(transformed)),
            _pack(ground_truth),
        )

    def _teacher_features(self, images: Any) -> Any:
        features = self.teacher.backbone(self._as_teacher_sees(images))
        return {"0": features} if isinstance(features, Tensor) else features

    def _as_teacher_sees(self, images: Any) -> Tensor:
        """The student's images in the teacher's normalisation, padding left at zero."""
        s, t = self.student.transform, self.teacher.transform
        x: Tensor = images.tensors
        if list(s.image_mean) == list(t.image_mean) and list(s.image_std) == list(t.image_std):
            return x

        def column(values: Sequence[float]) -> Tensor:
            return x.new_tensor(values)[:, None, None]

        scaled = x * column(s.image_std) + column(s.image_mean) - column(t.image_mean)
        sizes = torch.tensor(images.image_sizes, device=x.device)
        inside_y = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]
        inside_x = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]
        return scaled / column(t.image_std) * (inside_y[:, None, :, None] & inside_x[:, None, None])

    def _can_share_logits(self) -> bool:
        if not self.same_kind:
            return False
        mine, theirs = (_num_classes(m) for m in (self.student, self.teacher))
        if mine is not None and theirs is not None and mine != theirs:
            raise ValueError(
                f"teacher: expected {mine} class logits like the student's, but got {theirs}; soft "
                "labels need the same classes, or switch them off with logits=0"
            )
        return True

    @torch.no_grad()
    def _teacher_roi_logits(self, features: Any, positives: "_Positives", images: Any) -> Tensor:
        heads = self.teacher.roi_heads
        pooled = heads.box_roi_pool(features, positives.per_image, images.image_sizes)
        logits: Tensor = heads.box_predictor(heads.box_head(pooled))[0]
        return logits

    @torch.no_grad()
    def _teacher_dense_logits(self, features: list[Tensor]) -> Tensor:
        logits: Tensor = self.teacher.head.classification_head(features)
        return logits


class _Positives:
    """The student's sampled positive proposals, with the labels of their ground truth.

    Attributes:
        mask: bool over all sampled proposals of the batch, in the order of the head's rows.
        per_image: Positive boxes of each image.
        targets: The same, packed.
        order: ``0 .. N - 1``, each positive's index in ``targets``.
        box: Index of each positive's ground-truth box in the packed ground truth.
    """

    def __init__(self, student: Any, proposals: list[Tensor], truth: list[dict[str, Any]]) -> None:
        with torch.no_grad():
            matched, labels = student.roi_heads.assign_targets_to_proposals(
                proposals, [t["boxes"] for t in truth], [t["labels"] for t in truth]
            )
            positive = [x > 0 for x in labels]
            counts = [len(t["boxes"]) for t in truth]
            first = [sum(counts[:i]) for i in range(len(counts))]
            self.mask = torch.cat(positive)
            self.per_image = [p[m] for p, m in zip(proposals, positive, strict=True)]
            image = [torch.full_like(x, i) for i, x in enumerate(labels)]
            self.targets = Targets(
                torch.cat(self.per_image).float(),
                torch.cat(labels)[self.mask],
                torch.cat(image)[self.mask],
            )
            self.order = torch.arange(len(self.targets), device=self.mask.device)
            box = torch.cat([m + f for m, f in zip(matched, first, strict=True)])
            self.box = box[self.mask]


class _Assigner:
    """Stands in for a dense detector while its own ``compute_loss`` assigns locations to boxes."""

    def __init__(self, detector: nn.Module) -> None:
        self._detector = detector
        self.head = self

    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matched: list[Tensor]) -> None:
        self.matched = matched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._detector, name)


@torch.no_grad()
def _matched_boxes(
    student: Any, truth: list[dict[str, Any]], anchors: list[Tensor], maps: list[Tensor]
) -> Tensor:
    """Packed ground-truth index of every location ``(B, A)``; negative where it has none."""
    assigner = _Assigner(student)
    arguments = [truth, {}, anchors]
    if _kind(student) == "fcos":
        cells = [x.shape[2] * x.shape[3] for x in maps]
        per_cell = len(anchors[0]) // sum(cells)
        arguments.append([c * per_cell for c in cells])
    type(student).compute_loss(assigner, *arguments)
    first, packed = 0, []
    for matched, target in zip(assigner.matched, truth, strict=True):
        packed.append(torch.where(matched >= 0, matched + first, -1))
        first += len(target["boxes"])
    return torch.stack(packed)


def _kind(model: Any) -> str:
    """``"two-stage"``, ``"retinanet"`` or ``"fcos"``."""
    for c in type(model).__mro__:
        kind = {"FasterRCNN": "two-stage", "RetinaNet": "retinanet", "FCOS": "fcos"}.get(c.__name__)
        if kind is not None and c.__module__.startswith("torchvision"):
            return kind
    raise ValueError(
        "student, teacher: expected torchvision's FasterRCNN, RetinaNet or FCOS (or a subclass), "
        f"but got {type(model).__name__}; name its pyramid with student_path and teacher_path"
    )


def _num_classes(model: Any) -> int | None:
    if hasattr(model, "roi_heads"):
        score = getattr(model.roi_heads.box_predictor, "cls_score", None)
        return getattr(score, "out_features", None)
    return getattr(model.head.classification_head, "num_classes", None)


def _pack(ground_truth: list[dict[str, Tensor]]) -> Targets:
    return Targets.from_list([{**t, "boxes": t["boxes"].float()} for t in ground_truth])
