"""Detectron2's GeneralizedRCNN (Faster, Mask, Cascade R-CNN; FPN, C4, DC5), RetinaNet and FCOS.

The batch is Detectron2's list of dictionaries, images and ground truth in one: ``student(batch)``,
then ``kd(batch)``. Its boxes are in pixels of the resized images, and padding goes to the right and
bottom, so they are in pixels of the network input. Labels are Detectron2's: foreground only, from
0, so ``num_classes`` of the loss is ``MODEL.ROI_HEADS.NUM_CLASSES`` or
``MODEL.RETINANET.NUM_CLASSES``. The box head of a two-stage detector has one class logit more, the
background, in its *last* column; soft labels are taken over all of them.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import evaluating
from ..targets import Targets
from .pixels import Pixels, View
from .protocol import Detections, Look, MapsOnly, Sampled, Seen

_EXAMPLE_SIZE = 256  # two cells of a stride-128 level

# Where a box head shows the proposals it trains on, and their class logits.
_ROI_TAPS = {
    # Of the cascade's stages the first: it alone sees sampled proposals.
    "CascadeROIHeads": {"proposals": "roi_heads", "logits": "roi_heads.box_predictor.0"},
    "StandardROIHeads": {"pooled": "roi_heads.box_pooler", "logits": "roi_heads.box_predictor"},
    "Res5ROIHeads": {"pooled": "roi_heads.pooler", "logits": "roi_heads.box_predictor"},
}


class Detectron2Detector(MapsOnly):
    """A Detectron2 detector.

    Outside of Detectron2's trainers its models train only ``with EventStorage():``. A detector that
    does not know its ``input_format`` (FCOS) is taken for a BGR one, Detectron2's default; pass
    ``student_pixels`` or ``teacher_pixels`` where that is wrong.

    Args:
        model: A ``GeneralizedRCNN`` or a ``DenseDetector``, or a subclass. Class logits are
            compared between box heads of ROI heads known here, between RetinaNets, and between
            FCOS.

    Raises:
        ValueError: A model of another family.
    """

    first_label = 0

    def __init__(self, model: Any) -> None:
        self.model = model
        classes = _detectron2_classes(model)
        if not {"GeneralizedRCNN", "DenseDetector"} & set(classes):
            raise ValueError(
                "student, teacher: expected Detectron2's GeneralizedRCNN, RetinaNet or FCOS (or a "
                f"subclass), but got {type(model).__name__}; name its pyramid with student_path "
                "or teacher_path"
            )
        self._two_stage = "GeneralizedRCNN" in classes
        self.taps = {"images": "backbone", "features": "backbone"}
        self.family = "two-stage" if self._two_stage else "one-stage"
        self._sampling: dict[str, str] = {}
        self.kind: str | None = None
        self.activation, self._foreground_only = "softmax", False
        self.num_logits: int | None = None
        owner = model.roi_heads if self._two_stage else model
        self.num_classes: int | None = getattr(owner, "num_classes", None)
        if self._two_stage:
            heads = _detectron2_classes(model.roi_heads)
            roi = next((taps for name, taps in _ROI_TAPS.items() if name in heads), None)
            if roi is not None:
                self._sampling = roi
                predictor = _first_stage(model.roi_heads.box_predictor)
                # With sigmoids nobody trains the background's column.
                self._foreground_only = getattr(predictor, "use_sigmoid_ce", False)
                self.activation = "sigmoid" if self._foreground_only else "softmax"
                self.kind = f"detectron2 two-stage {self.activation}"
                self.num_logits = predictor.cls_score.out_features - self._foreground_only
        elif hasattr(model, "label_anchors"):
            self._sampling = {"logits": "head", "anchors": "anchor_generator"}
            self.kind, self.activation = f"detectron2 {classes[0]}", "sigmoid"
            self.num_logits = model.num_classes
        self.inputs = ("images", "pooled")
        if self._sampling:
            self.gives = frozenset({"images", "positives"})
        mean, std = (tuple(x.flatten().tolist()) for x in (model.pixel_mean, model.pixel_std))
        order = getattr(model, "input_format", None) or "BGR"
        self.pixels = Pixels(mean, std, 255, order == "BGR") if order in ("BGR", "RGB") else None
        strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
        self._levels = sorted(strides, key=lambda name: strides[name])

    @property
    def divisor(self) -> int:
        """What the model pads to by itself, but for the fixed square of some backbones."""
        backbone = self.model.backbone
        constraints: dict[str, int] = {**getattr(backbone, "padding_constraints", {})}
        constraints.pop("square_size", None)
        return max(1, int(backbone.size_divisibility), *constraints.values())

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        wanted = {"positives", "proposals"} if self._two_stage else {"positives"}
        return dict(self._sampling) if facts & wanted else {}

    def example(self) -> View:
        channels, like = len(self.model.pixel_mean), self.model.pixel_mean
        return View(like.new_zeros(1, channels, _EXAMPLE_SIZE, _EXAMPLE_SIZE))

    def look(self, view: View) -> Look:
        return self._look(self.model.backbone(view.images), view)

    def _look(self, features: dict[str, Tensor], view: View) -> Look:
        return Look([features[name] for name in self._levels], view, features)

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        truth = _ground_truth(images, targets, tapped["images"][0].device)
        if not self.model.training:
            raise ValueError("student: expected its last forward in train mode, but it is in eval")
        view = View(tapped["images"][0], [tuple(x["image"].shape[-2:]) for x in images])
        packed = _pack(truth)
        sampled = None
        if "pooled" in tapped:
            sampled = self._positive_proposals(tapped["pooled"][1], tapped["logits"][0], truth)
        elif "proposals" in tapped:
            boxes = [x.proposal_boxes for x in tapped["proposals"][0]]
            sampled = self._positive_proposals(boxes, tapped["logits"][0], truth)
        elif "anchors" in tapped and "positives" in facts:
            logits = tapped["logits"][0]
            sampled = self._positive_locations(tapped["anchors"], logits, truth)
        look = replace(self._look(tapped["features"], view), tapped=tapped)
        return Seen(look, packed, sampled)

    def observe(self, images: Any, targets: Any) -> Seen:
        truth = _ground_truth(images, targets, self.model.pixel_mean.device)
        padded = self.model.preprocess_image(images)
        return Seen(self.look(View(padded.tensor, padded.image_sizes)), _pack(truth))

    def soft_labels(self, look: Look, sampled: Sampled) -> tuple[Tensor, Tensor | None]:
        model, features = self.model, look.raw
        if not self._two_stage:
            maps = [features[name] for name in model.head_in_features]
            return self._labels_of_locations(model.head(maps)[0], *sampled.raw)
        heads = model.roi_heads
        maps = [features[name] for name in heads.in_features]
        if hasattr(heads, "box_pooler"):
            rows = _first_stage(heads.box_head)(heads.box_pooler(maps, sampled.raw))
        else:
            rows = heads.res5(heads.pooler(maps, sampled.raw)).mean(dim=(2, 3))
        return self._columns(_first_stage(heads.box_predictor)(rows)[0]), None

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        from detectron2.utils.events import EventStorage, has_event_storage

        with nullcontext() if has_event_storage() else EventStorage():
            terms: dict[str, Tensor] = self.model(images)
        return torch.stack([x.float() for x in terms.values()]).sum()

    @torch.no_grad()
    def detections(self, view: View) -> list[Detections] | None:
        from detectron2.structures import ImageList

        model, x = self.model, view.images
        sizes = [view.size] * len(x) if view.sizes is None else view.sizes
        images = ImageList(x, [(int(h), int(w)) for h, w in sizes])
        with evaluating(model):
            features = model.backbone(x)
            if not self._two_stage:
                maps = [features[name] for name in model.head_in_features]
                found = model.forward_inference(images, maps, model.head(maps))
            elif model.proposal_generator is None:
                return None  # proposals come with its batches
            else:
                proposals, _ = model.proposal_generator(images, features, None)
                found, _ = model.roi_heads(images, features, proposals, None)
        for one in found:  # RetinaNet and FCOS leave this to their postprocessing
            one.pred_boxes.clip(one.image_size)
        found = [one[one.pred_boxes.nonempty()] for one in found]
        return [Detections(x.pred_boxes.tensor, x.scores, x.pred_classes) for x in found]

    def detach(self) -> None:
        pass

    def _columns(self, logits: Tensor) -> Tensor:
        return logits[:, :-1] if self._foreground_only else logits

    def _positive_proposals(
        self, proposals: Sequence[Any], logits: Tensor, truth: Sequence[Any]
    ) -> Sampled:
        """The student's sampled positives, matched with the ground truth once more."""
        from detectron2.structures import pairwise_iou

        first, kept, box, labels, index, masks = 0, [], [], [], [], []
        for i, (boxes, one) in enumerate(zip(proposals, truth, strict=True)):
            quality = pairwise_iou(one.gt_boxes, boxes)
            matched, sign = self.model.roi_heads.proposal_matcher(quality)
            mask = sign == 1
            matched = matched[mask]
            kept.append(boxes[mask])
            masks.append(mask)
            box.append(matched + first)
            labels.append(one.gt_classes[matched])
            index.append(torch.full_like(matched, i))
            first += len(one)
        corners = torch.cat([x.tensor for x in kept]).float()
        found = Targets(corners, torch.cat(labels), torch.cat(index))
        rows = self._columns(logits[torch.cat(masks)])
        return Sampled(rows, torch.cat(box), found, kept)

    def _positive_locations(
        self, anchors: Sequence[Any], logits: Sequence[Tensor], truth: Sequence[Any]
    ) -> Sampled:
        """The anchors that a dense student trains as objects."""
        # Instead of its class, each box gets its own number, below the detector's own marks (-1:
        # ignored, num_classes: background), and so the detector itself says which anchor is whose.
        first, numbered = 0, []
        for one in truth:
            number = -2 - first - torch.arange(len(one), device=one.gt_classes.device)
            numbered.append(_instances(one, one.gt_boxes, number))
            first += len(one)
        marks, _ = self.model.label_anchors(list(anchors), numbered)
        marks = torch.stack(marks)
        mask = marks < -1
        rows = torch.cat([self._by_location(x) for x in logits], dim=1)[mask]
        return Sampled(rows, -2 - marks[mask], raw=(mask, self._grids(logits)))

    def _labels_of_locations(
        self, logits: Sequence[Tensor], mask: Tensor, grids: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, Tensor]:
        """Levels belong together where stride, grid and number of anchors are equal."""
        mine = dict(zip(self._grids(logits), map(self._by_location, logits), strict=True))
        like = logits[0]
        padded, known = [], []
        for grid in grids:
            locations = math.prod(grid[1:])
            absent = like.new_zeros(len(like), locations, self.model.num_classes)
            padded.append(mine.get(grid, absent))
            known.append(mask.new_full((locations,), grid in mine))
        rows = torch.cat(known).expand_as(mask)[mask].nonzero()[:, 0]
        return torch.cat(padded, dim=1)[mask][rows], rows

    def _grids(self, logits: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Stride, height, width and anchors per cell of each level ``(B, A * K, H, W)``."""
        shapes, classes = self.model.backbone.output_shape(), self.model.num_classes
        return [
            (shapes[name].stride, *x.shape[2:], x.shape[1] // classes)
            for name, x in zip(self.model.head_in_features, logits, strict=True)
        ]

    def _by_location(self, logits: Tensor) -> Tensor:
        """One level's logits ``(B, A * K, H, W)`` as ``(B, H * W * A, K)``."""
        classes: int = self.model.num_classes
        rows: Tensor = logits.unflatten(1, (-1, classes)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        return rows


def _detectron2_classes(model: Any) -> list[str]:
    return [c.__name__ for c in type(model).__mro__ if c.__module__.startswith("detectron2.")]


def _first_stage(head: Any) -> Any:
    return head[0] if isinstance(head, nn.ModuleList) else head


def _ground_truth(batch: Any, targets: Any, device: torch.device) -> list[Any]:
    """The ``Instances`` of a batch."""
    if targets is not None:
        raise ValueError(
            "targets: expected None, since Detectron2 puts the ground truth into the batch: "
            f"kd(batch); but got {type(targets).__name__}"
        )
    if not isinstance(batch, (list, tuple)) or not all(isinstance(x, dict) for x in batch):
        raise ValueError(
            "images: expected Detectron2's batch, a list of dictionaries, but got "
            f"{type(batch).__name__}"
        )
    for i, one in enumerate(batch):
        if "instances" not in one or not one["instances"].has("gt_boxes"):
            raise ValueError(
                f"images[{i}]: expected ground truth, 'instances' with gt_boxes and gt_classes, "
                f"but got the keys {sorted(one)}"
            )
    return [
        _instances(x, x.gt_boxes.to(device), x.gt_classes.to(device))  # without masks and the like
        for x in (one["instances"] for one in batch)
    ]


def _instances(like: Any, boxes: Any, classes: Tensor) -> Any:
    return type(like)(like.image_size, gt_boxes=boxes, gt_classes=classes)


def _pack(truth: Sequence[Any]) -> Targets:
    return Targets.from_list(
        [{"boxes": x.gt_boxes.tensor.float(), "labels": x.gt_classes} for x in truth]
    )
