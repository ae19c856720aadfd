"""The heads of Detectron2's detectors: one that speaks of every location, one that speaks of boxes.

Nothing in Detectron2 writes into what these heads put out while it trains (it does in eval mode,
for which taps have records of their own), so what a tap recorded may be read without a copy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..step import Dense, Grid, RegionOutputs
from ..targets import Targets
from .detectron2_batch import instances
from .pixels import fitting


class DenseHead:
    """RetinaNet's or FCOS' head, or that of a region proposal network.

    Args:
        owner: What has ``anchor_generator`` and ``box2box_transform``.
        head: Takes maps, gives class logits ``(B, A * K, H, W)`` and deltas ``(B, A * 4, H, W)``
            of each, and maybe more.
        levels: Names of the maps it takes.
        strides: Of all maps, by name.
        classes: ``K``.
    """

    def __init__(
        self,
        owner: Any,
        head: nn.Module,
        levels: Sequence[str],
        strides: Mapping[str, int],
        classes: int,
    ) -> None:
        self.head, self.generator, self._owner = head, owner.anchor_generator, owner
        self._levels, self._classes = tuple(levels), classes
        self._strides = [float(strides[name]) for name in levels]
        self._order = sorted(range(len(levels)), key=lambda i: self._strides[i])

    def run(self, features: Mapping[str, Tensor], facts: frozenset[str]) -> Dense:
        """The head on maps."""
        maps = self._maps(features)
        return self.read(self.head(maps), self.generator(maps), facts)

    def anchors(self, features: Mapping[str, Tensor]) -> list[Any]:
        """``Boxes`` of each level."""
        anchors: list[Any] = self.generator(self._maps(features))
        return anchors

    def _maps(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        return [fitting(features[name], self.head) for name in self._levels]

    def read(self, outputs: Sequence[Any], anchors: Sequence[Any], facts: frozenset[str]) -> Dense:
        """What the head has put out, with the anchors of its levels."""
        logits, deltas = outputs[0], outputs[1]
        priors = self._sorted([x.tensor for x in anchors], dim=0)
        boxes = None
        if "boxes" in facts:
            rows = self._sorted([by_location(x, 4) for x in deltas])
            boxes = self._decode(rows, priors)
        return Dense(
            self._sorted([by_location(x, self._classes) for x in logits]),
            self.grids(logits),
            boxes=boxes,
            priors=priors if "priors" in facts else None,
        )

    def _decode(self, deltas: Tensor, priors: Tensor) -> Tensor:
        """Boxes ``(B, N, 4)``, in at least float32: half precision would round them to pixels."""
        flat = deltas.flatten(0, 1).to(torch.promote_types(deltas.dtype, torch.float32))
        around = priors.expand(len(deltas), -1, -1).flatten(0, 1)
        boxes: Tensor = self._owner.box2box_transform.apply_deltas(flat, around)
        return boxes.view(deltas.shape)

    def grids(self, logits: Sequence[Tensor]) -> tuple[Grid, ...]:
        """Of class logits as the head puts them out."""
        grids = [
            Grid(stride, x.shape[2], x.shape[3], x.shape[1] // self._classes)
            for stride, x in zip(self._strides, logits, strict=True)
        ]
        return tuple(grids[i] for i in self._order)

    def _sorted(self, levels: Sequence[Tensor], dim: int = 1) -> Tensor:
        """Rows by level as one table, the finest level first."""
        return torch.cat([levels[i] for i in self._order], dim=dim)

    @torch.no_grad()
    def assigned(self, anchors: Sequence[Any], truth: Sequence[Any]) -> Tensor:
        """Index of the ground truth of each location, -1 background, -2 ignored: ``(B, N)``."""
        owner = self._owner
        by_image = _numbered if hasattr(owner, "label_anchors") else _matched_anchors
        box = by_image(owner, anchors, truth)
        return self._sorted(box.split([len(x) for x in anchors], dim=1))


def _numbered(model: Any, anchors: Sequence[Any], truth: Sequence[Any]) -> Tensor:
    """By RetinaNet's or FCOS' own ``label_anchors``."""
    # Instead of its class, each box gets its own number, below the detector's own marks (-1:
    # ignored, num_classes: background), and so the detector itself says which anchor is whose.
    first, numbered = 0, []
    for one in truth:
        number = -2 - first - torch.arange(len(one), device=one.gt_classes.device)
        numbered.append(instances(one, one.gt_boxes, number))
        first += len(one)
    marks = torch.stack(model.label_anchors(list(anchors), numbered)[0])
    return torch.where(marks < -1, -2 - marks, torch.where(marks == -1, -2, -1))


def _matched_anchors(rpn: Any, anchors: Sequence[Any], truth: Sequence[Any]) -> Tensor:
    """By the rule of a proposal network, before it draws its sample."""
    from detectron2.structures import Boxes

    together = Boxes.cat(list(anchors))
    found = []
    by_image = matched([together] * len(truth), truth, rpn.anchor_matcher)
    for one, box in zip(truth, by_image, strict=True):
        if rpn.anchor_boundary_thresh >= 0:
            inside = together.inside_box(one.image_size, rpn.anchor_boundary_thresh)
            box = torch.where(inside, box, -2)
        found.append(box)
    return torch.stack(found)


def matched(boxes: Sequence[Any], truth: Sequence[Any], matcher: Any) -> list[Tensor]:
    """For each image's ``Boxes`` the index of their ground truth, -1 background, -2 ignored."""
    from detectron2.structures import pairwise_iou

    first, found = 0, []
    for own, one in zip(boxes, truth, strict=True):
        index, sign = matcher(pairwise_iou(one.gt_boxes, own))
        found.append(torch.where(sign == 1, index + first, sign.to(index.dtype).clamp(max=0) - 1))
        first += len(one)
    return found


class BoxHead:
    """The second stage: pooled boxes, a head, a predictor; of a cascade the first stage.

    Args:
        heads: ``StandardROIHeads``, ``CascadeROIHeads`` or ``Res5ROIHeads``, or a subclass.
    """

    def __init__(self, heads: Any) -> None:
        self._heads = heads
        # With sigmoids nobody trains the background's column.
        self.foreground_only: bool = getattr(self.predictor, "use_sigmoid_ce", False)
        self.activation = "sigmoid" if self.foreground_only else "softmax"
        self.num_logits: int = self.predictor.cls_score.out_features - self.foreground_only

    @property
    def predictor(self) -> Any:
        """What gives class logits and deltas."""
        return _first_stage(self._heads.box_predictor)

    def run(self, features: Mapping[str, Tensor], boxes: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Class logits and deltas of each image's ``Boxes``, all images together."""
        heads = self._heads
        # Pooled as under autocast, in full precision: half would round the boxes to pixels.
        maps = [promoted(features[name]) for name in heads.in_features]
        if hasattr(heads, "box_pooler"):
            rows = fitting(heads.box_pooler(maps, list(boxes)), self.predictor)
            rows = _first_stage(heads.box_head)(rows)
        else:
            rows = fitting(heads.pooler(maps, list(boxes)), self.predictor)
            rows = heads.res5(rows).mean(dim=(2, 3))
        logits, deltas = self.predictor(rows)
        return logits, deltas

    def run_packed(self, features: Mapping[str, Tensor], boxes: Targets) -> tuple[Tensor, Tensor]:
        """Class logits and deltas of boxes in whatever order."""
        from detectron2.structures import Boxes

        order = boxes.image_index.argsort(stable=True)
        images = len(next(iter(features.values())))
        counts = torch.bincount(boxes.image_index, minlength=images).tolist()
        per_image = [Boxes(x) for x in boxes.boxes[order].split(counts)]
        logits, deltas = self.run(features, per_image)
        back = order.argsort()
        return logits[back], deltas[back]

    def columns(self, logits: Tensor) -> Tensor:
        """The class logits that are trained."""
        return logits[:, :-1] if self.foreground_only else logits

    def read(self, logits: Tensor, deltas: Tensor, boxes: Tensor) -> RegionOutputs:
        """What the predictor has put out for boxes."""
        decoded: Tensor = self.predictor.box2box_transform.apply_deltas(promoted(deltas), boxes)
        background = None if self.foreground_only else logits.shape[1] - 1
        classes = deltas.shape[1] // 4
        return RegionOutputs(
            self.columns(logits), decoded.unflatten(1, (classes, 4)), self.activation, background
        )


def _first_stage(head: Any) -> Any:
    return head[0] if isinstance(head, nn.ModuleList) else head


def by_location(x: Tensor, columns: int) -> Tensor:
    """One level ``(B, A * K, H, W)`` as ``(B, H * W * A, K)``."""
    rows: Tensor = x.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2).flatten(1, 3)
    return rows


def promoted(x: Any) -> Any:
    """Tensors, also within lists and tuples, in at least float32."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(promoted, x))
    return x.to(torch.promote_types(x.dtype, torch.float32)) if isinstance(x, Tensor) else x


@contextmanager
def in_full_precision(model: Any, *heads: nn.Module) -> Iterator[None]:
    """Context in which a model in half precision detects.

    Detectron2 itself cannot: NMS takes boxes and scores of one type, and decoded boxes are float32.
    So the heads put out float32 inside, and boxes are pooled in it.
    """

    def full(module: nn.Module, args: Any, output: Any) -> Any:
        return promoted(output)

    def before(module: nn.Module, args: Any) -> Any:
        return promoted(args)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return fitting(output, model)

    hooks: list[Callable[[], Any]] = [head.register_forward_hook(full).remove for head in heads]
    for module in model.modules():
        if type(module).__name__ == "ROIPooler":
            hooks.append(module.register_forward_pre_hook(before).remove)
            hooks.append(module.register_forward_hook(after).remove)
    try:
        yield
    finally:
        for remove in hooks:
            remove()
