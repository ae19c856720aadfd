"""The dense heads of torchvision's detectors, the first stage of two-stage ones among them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import infer_strides
from ..step import Dense, Grid, Hidden
from .pixels import View
from .torchvision_forward import StandIn
from .towers import cut, with_tower

KINDS = {
    "FasterRCNN": "two-stage",
    "RetinaNet": "retinanet",
    "FCOS": "fcos",
    "SSD": "ssd",
}
"""Families by the class of torchvision that stands for each."""


class DenseHead:
    """The head of one detector that speaks of every location.

    Args:
        model: A torchvision detector.
        family: One of the values of :data:`KINDS`; for two-stage detectors the head is that of the
            region proposal network, whose one class is "object".
    """

    def __init__(self, model: Any, family: str) -> None:
        self.model, self.family = model, family
        self.activation = "softmax" if family == "ssd" else "sigmoid"
        self.background = 0 if family == "ssd" else None
        self._anchored = model.rpn if family == "two-stage" else model
        self._strides: tuple[float, ...] | None = None
        if family == "two-stage":  # its head puts out both logits and boxes
            self._taps = {
                "dense logits": ("rpn.head", {"dense", "boxes", "priors"}),
                "anchors": ("rpn.anchor_generator", {"boxes", "priors", "assigned"}),
            }
        else:
            self._taps = {
                "dense logits": (
                    "head.classification_head",
                    {"dense", "boxes", "priors", "positives"},
                ),
                "dense boxes": ("head.regression_head", {"boxes"}),
                "anchors": ("anchor_generator", {"boxes", "priors", "assigned", "positives"}),
            }

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        """Paths of what these facts need."""
        return {name: path for name, (path, needed) in self._taps.items() if facts & needed}

    def grids(self, maps: Sequence[Tensor], view: View, rows: int) -> tuple[Grid, ...]:
        """The levels of the head on these maps of a view; they have so many locations together."""
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        if self.family == "ssd":
            anchors = self.model.anchor_generator.num_anchors_per_location()
        else:  # one head for all levels
            anchors = [rows // sum(height * width for height, width in sizes)] * len(sizes)
        if self._strides is None:  # of the dry pass, whose canvas tells levels of one cell apart
            self._strides = infer_strides(view.size, sizes)
        return tuple(
            Grid(stride, *size, anchors=count)
            for stride, size, count in zip(self._strides, sizes, anchors, strict=True)
        )

    def read(
        self,
        maps: Sequence[Tensor],
        view: View,
        facts: frozenset[str],
        tapped: Mapping[str, Any] | None = None,
    ) -> Dense:
        """What was tapped, or what the head says of the maps."""
        tapped = tapped or {}
        logits, deltas = self._outputs(list(maps), "boxes" in facts, tapped)
        anchors = self._anchors(maps, view, tapped) if facts & {"boxes", "priors"} else None
        boxes = self._decode(deltas, anchors) if "boxes" in facts and anchors is not None else None
        return Dense(
            logits,
            self.grids(maps, view, logits.shape[1]),
            self.activation,
            self.background,
            boxes=boxes,
            priors=anchors if "priors" in facts else None,
        )

    def hidden(self, maps: Sequence[Tensor], after: int) -> Hidden:
        """What the towers hold after some convolutions, before the activation."""
        classes, *other = ([cut(x.conv, after)[0](y) for y in maps] for x in self._heads())
        return Hidden(classes, other[0] if other else classes)

    def tail(self, hidden: Hidden, after: int, view: View, facts: frozenset[str]) -> Dense:
        """The rest of the head on such features."""
        rest = [with_tower(x, "conv", cut(x.conv, after)[1]) for x in self._heads()]
        # Their forward itself: hooks of the whole head are none of this.
        found = {"dense logits": type(rest[0]).forward(rest[0], list(hidden.classes))}
        if len(rest) > 1 and "boxes" in facts:
            found["dense boxes"] = type(rest[1]).forward(rest[1], list(hidden.boxes))
        return self.read(hidden.classes, view, facts, found)

    def _heads(self) -> list[Any]:
        """Those with a tower of their own."""
        if self.family == "two-stage":
            return [self.model.rpn.head]
        return [self.model.head.classification_head, self.model.head.regression_head]

    @torch.no_grad()
    def assigned(
        self,
        anchors: list[Tensor],
        truth: list[dict[str, Tensor]],
        maps: Sequence[Tensor],
    ) -> Tensor:
        """The ground truth that the model's own loss assigns to each location, int64 ``(B, N)``.

        An index among the boxes of the batch, -1 background, -2 ignored.
        """
        if self.family in ("retinanet", "fcos"):
            matched = self._assigned_in_loss(anchors, truth, maps)
        else:
            from torchvision.ops import box_iou

            matcher = self._anchored.proposal_matcher
            similarity = getattr(self._anchored, "box_similarity", box_iou)
            matched = [
                matcher(similarity(t["boxes"], a))
                if len(t["boxes"])
                else torch.full_like(a[:, 0], -1, dtype=torch.int64)
                for t, a in zip(truth, anchors, strict=True)
            ]
        packed = [
            torch.where(m >= 0, m + first, m)
            for m, first in zip(matched, firsts(truth), strict=True)
        ]
        return torch.stack(packed)

    def _outputs(
        self, maps: list[Tensor], boxes: bool, tapped: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Class logits ``(B, N, K)``, and codes of boxes ``(B, N, 4)`` if asked for."""
        if self.family == "two-stage":
            from torchvision.models.detection.rpn import concat_box_prediction_layers

            found = _tapped(tapped, "dense logits", self.model.rpn.head, maps)
            logits, deltas = concat_box_prediction_layers(*found)
            batch = (len(maps[0]), -1)
            return logits.unflatten(0, batch), deltas.unflatten(0, batch)
        head, deltas = self.model.head, None
        logits = _tapped(tapped, "dense logits", head.classification_head, maps)
        if boxes:
            deltas = _tapped(tapped, "dense boxes", head.regression_head, maps)
            if self.family == "fcos":  # its centerness stands beside
                deltas = deltas[0]
        return logits, deltas

    def _anchors(self, maps: Sequence[Tensor], view: View, tapped: Mapping[str, Any]) -> Tensor:
        """The model's own anchors ``(N, 4)``, in at least float32."""
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        anchors: Tensor
        if "anchors" in tapped:
            anchors = tapped["anchors"][0].to(dtype)
            return anchors
        from torchvision.models.detection.image_list import ImageList

        # It looks at shapes, device and dtype only: half precision would round large coordinates.
        cell = torch.zeros(1, 1, 1, 1, dtype=dtype, device=maps[0].device)
        stand_ins = [cell.expand(1, 1, *x.shape[2:]) for x in maps]
        images = ImageList(cell.expand(1, 1, *view.size), [view.size])
        anchors = self._anchored.anchor_generator(images, stand_ins)[0]
        return anchors

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes ``(B, N, 4)`` as the post-processing starts from, in at least float32."""
        deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
        coder = self._anchored.box_coder
        boxes: Tensor
        if self.family == "fcos":
            boxes = coder.decode(deltas, anchors)
        else:
            anchors = anchors.expand_as(deltas).flatten(0, 1)
            boxes = coder.decode_single(deltas.flatten(0, 1), anchors).view_as(deltas)
        return boxes

    def _assigned_in_loss(
        self, anchors: list[Tensor], truth: list[dict[str, Tensor]], maps: Sequence[Tensor]
    ) -> list[Tensor]:
        """What a model assigns inside its own ``compute_loss``."""
        assigner = _Assigner(self.model)
        arguments: list[Any] = [truth, {}, anchors]
        if self.family == "fcos":
            arguments.append([x.shape[2] * x.shape[3] for x in maps])
        type(self.model).compute_loss(assigner, *arguments)
        return assigner.matched


def _tapped(tapped: Mapping[str, Any], name: str, module: nn.Module, maps: list[Tensor]) -> Any:
    """What a module put out in the student's own forward, or what it says of the maps."""
    return tapped[name] if name in tapped else module(maps)


class _Assigner(StandIn):
    """Stands in for a dense detector while its own ``compute_loss`` assigns locations to boxes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        self.head = self

    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matched: list[Tensor]) -> None:
        self.matched = matched


def firsts(truth: list[dict[str, Tensor]]) -> list[int]:
    """Index of the first box of each image among all of the batch."""
    counts = [len(t["boxes"]) for t in truth]
    return [sum(counts[:i]) for i in range(len(counts))]


def family(model: Any) -> str:
    """Which of :data:`KINDS` a model is.

    Raises:
        ValueError: None of them.
    """
    for c in type(model).__mro__:
        if c.__module__.startswith("torchvision") and c.__name__ in KINDS:
            return KINDS[c.__name__]
    raise ValueError(
        "student, teacher: expected torchvision's FasterRCNN, RetinaNet, FCOS or SSD (or a "
        f"subclass), but got {type(model).__name__}; name its pyramid with student_path or "
        "teacher_path"
    )
