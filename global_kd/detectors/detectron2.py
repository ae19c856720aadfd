"""Detectron2's GeneralizedRCNN (Faster, Mask, Cascade R-CNN; FPN, C4, DC5), RetinaNet and FCOS.

The batch is Detectron2's list of dictionaries, images and ground truth in one: ``student(batch)``,
then ``kd(batch)``. Its boxes are in pixels of the resized images, and padding goes to the right and
bottom, so they are in pixels of the network input. Labels are Detectron2's: foreground only, from
0, so ``num_classes`` of the loss is ``MODEL.ROI_HEADS.NUM_CLASSES`` or
``MODEL.RETINANET.NUM_CLASSES``. The box head of a two-stage detector has one class logit more, the
background, in its *last* column; soft labels are taken over all of them.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import evaluating
from ..step import Dense, RegionOutputs
from ..targets import Targets
from .detectron2_batch import ground_truth, image_list, is_batch, pack, tensors_of
from .detectron2_heads import BoxHead, DenseHead, in_full_precision, matched
from .given import taken, unpacked
from .locations import beside
from .pixels import Pixels, View, fitting
from .protocol import Detections, Look, MapsOnly, Sampled, Seen

_EXAMPLE_SIZE = 256  # two cells of a stride-128 level

# Where a box head shows the proposals it trains on, and what it says of them.
_ROI_TAPS = {
    # Of the cascade's stages the first: it alone sees sampled proposals.
    "CascadeROIHeads": {"proposals": "roi_heads", "predictions": "roi_heads.box_predictor.0"},
    "StandardROIHeads": {
        "pooled": "roi_heads.box_pooler",
        "predictions": "roi_heads.box_predictor",
    },
    "Res5ROIHeads": {"pooled": "roi_heads.pooler", "predictions": "roi_heads.box_predictor"},
}
_DENSE = frozenset({"dense", "boxes", "priors", "assigned", "teacher_head"})


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
        self.inputs = ("images", "pooled")
        self.family = "two-stage" if self._two_stage else "one-stage"
        self.kind: str | None = None
        self.activation = "softmax"
        self.num_logits: int | None = None
        owner = model.roi_heads if self._two_stage else model
        self.num_classes: int | None = getattr(owner, "num_classes", None)
        strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
        self._levels = sorted(strides, key=lambda name: strides[name])
        self._sampling: dict[str, str] = {}
        self._box_head: BoxHead | None = None
        self._dense_head: DenseHead | None = None
        self._dense_taps: dict[str, str] = {}
        if self._two_stage:
            heads, rpn = _detectron2_classes(model.roi_heads), model.proposal_generator
            roi = next((taps for name, taps in _ROI_TAPS.items() if name in heads), None)
            if roi is not None:
                self._sampling, self._box_head = roi, BoxHead(model.roi_heads)
                self.activation = self._box_head.activation
                self.kind = f"detectron2 two-stage {self.activation}"
                self.num_logits = self._box_head.num_logits
                self.gives |= {"positives", "regions"}
            if _finds_upright_boxes(rpn):
                self._dense_head = DenseHead(rpn, rpn.rpn_head, rpn.in_features, strides, 1)
                self._dense_taps = {
                    "head": "proposal_generator.rpn_head",
                    "anchors": "proposal_generator.anchor_generator",
                }
                self.gives |= _DENSE
        elif hasattr(model, "label_anchors"):
            levels, number = model.head_in_features, model.num_classes
            self._dense_head = DenseHead(model, model.head, levels, strides, number)
            self._dense_taps = {"head": "head", "anchors": "anchor_generator"}
            self.kind, self.activation = f"detectron2 {classes[0]}", "sigmoid"
            self.num_logits = model.num_classes
            self.gives |= _DENSE | {"positives"}
        mean, std = (tuple(x.flatten().tolist()) for x in (model.pixel_mean, model.pixel_std))
        order = getattr(model, "input_format", None) or "BGR"
        self.pixels = Pixels(mean, std, 255, order == "BGR") if order in ("BGR", "RGB") else None

    @property
    def divisor(self) -> int:
        """What the model pads to by itself, but for the fixed square of some backbones."""
        backbone = self.model.backbone
        constraints: dict[str, int] = {**getattr(backbone, "padding_constraints", {})}
        constraints.pop("square_size", None)
        return max(1, int(backbone.size_divisibility), *constraints.values())

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        taps: dict[str, str] = {}
        if facts & {"dense", "boxes", "priors"} or (not self._two_stage and "positives" in facts):
            taps |= self._dense_taps
        elif "assigned" in facts and self._dense_taps:
            taps["anchors"] = self._dense_taps["anchors"]
        if facts & {"positives", "proposals", "regions"}:
            taps |= self._sampling
        return taps

    def example(self) -> View:
        channels, like = len(self.model.pixel_mean), self.model.pixel_mean
        return View(like.new_zeros(1, channels, _EXAMPLE_SIZE, _EXAMPLE_SIZE))

    def look(self, view: View) -> Look:
        return self._look(self.model.backbone(fitting(view.images, self.model)), view)

    def _look(self, features: dict[str, Tensor], view: View) -> Look:
        return Look([features[name] for name in self._levels], view, features)

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        truth = ground_truth(images, targets, tapped["images"][0].device)
        if not self.model.training:
            raise ValueError("student: expected its last forward in train mode, but it is in eval")
        view = View(tapped["images"][0], [tuple(x["image"].shape[-2:]) for x in images])
        look = replace(self._look(tapped["features"], view), tapped=tapped)
        seen = Seen(look, pack(truth))
        if self._sampling and facts & {"positives", "proposals", "regions"}:
            seen = self._with_proposals(seen, truth, facts)
        dense = self._dense_head
        located = not self._two_stage and "positives" in facts
        if dense is not None and (located or "assigned" in facts):
            assigned = dense.assigned(self._anchors(look), truth)
            if located:
                seen = replace(seen, sampled=self._positive_locations(look, assigned))
            if "assigned" in facts:
                seen = replace(seen, assigned=assigned)
        return seen

    def parts(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        batch = taken(("batched_inputs",), args, kwargs)["batched_inputs"]
        return {"images": [tensors_of(x) for x in batch]} if is_batch(batch) else {}

    def see(self, images: Any) -> View:
        padded = self.model.preprocess_image(images)
        return View(padded.tensor, padded.image_sizes)

    def observe(self, images: Any, targets: Any) -> Seen:
        truth = ground_truth(images, targets, self.model.pixel_mean.device)
        return Seen(self.look(self.see(images)), pack(truth))

    def soft_labels(self, look: Look, sampled: Sampled) -> tuple[Tensor, Tensor | None]:
        if self._box_head is not None:
            logits, _ = self._box_head.run(look.raw, sampled.raw)
            return self._box_head.columns(logits), None
        image, location, grids = sampled.raw
        dense = self.dense(look)
        location, rows = beside(grids, dense.grids, image, location)
        return dense.logits[image if rows is None else image[rows], location], rows

    def dense(self, look: Look, facts: frozenset[str] = frozenset()) -> Dense:
        if self._dense_head is None:
            raise self._without("dense")
        if look.tapped is None or "head" not in look.tapped:
            return self._dense_head.run(look.raw, facts)
        return self._dense_head.read(look.tapped["head"], self._anchors(look), facts)

    def head(
        self, maps: Sequence[Tensor], look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        if self._dense_head is None:
            raise self._without("teacher_head")
        return self._dense_head.run(dict(zip(self._levels, maps, strict=True)), facts)

    def regions(self, look: Look, boxes: Targets) -> RegionOutputs:
        if self._box_head is None:
            raise self._without("regions")
        tapped = look.tapped or {}
        if tapped.get("trained on") is boxes.boxes:
            logits, deltas = tapped["predictions"]
        else:
            logits, deltas = self._box_head.run_packed(look.raw, boxes)
        return self._box_head.read(logits, deltas, boxes.boxes)

    @torch.no_grad()
    def proposals(self, look: Look) -> Targets:
        if self._dense_head is None or not self._two_stage:
            raise self._without("teacher_regions")
        rpn = self.model.proposal_generator
        with evaluating(rpn), in_full_precision(self.model, self._dense_head.head):
            found, _ = rpn(image_list(look.view), look.raw, None)
        boxes = [x.proposal_boxes.tensor for x in found]
        labels = [x.new_zeros(len(x), dtype=torch.int64) for x in boxes]
        return Targets.from_list(
            [{"boxes": x, "labels": y} for x, y in zip(boxes, labels, strict=True)]
        )

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        from detectron2.utils.events import EventStorage, has_event_storage

        with nullcontext() if has_event_storage() else EventStorage():
            terms: dict[str, Tensor] = self.model(images)
        return torch.stack([x.float() for x in terms.values()]).sum()

    def losses_of(self, view: View, truth: Targets) -> Tensor | None:
        from detectron2.structures import Boxes, Instances
        from detectron2.utils.events import EventStorage, has_event_storage

        images = image_list(View(fitting(view.images, self.model), view.sizes))
        batch: list[dict[str, Any]] = []
        for one, size in zip(unpacked(truth, len(view.images)), images.image_sizes, strict=True):
            boxes = Boxes(one["boxes"])
            instances = Instances(size, gt_boxes=boxes, gt_classes=one["labels"])
            batch.append({"image": view.images[len(batch)], "instances": instances})
        self.model.preprocess_image = lambda _: images  # they are preprocessed
        try:
            with nullcontext() if has_event_storage() else EventStorage():
                terms: dict[str, Tensor] = self.model(batch)
        finally:
            del self.model.preprocess_image
        return torch.stack([x.float() for x in terms.values()]).sum()

    @torch.no_grad()
    def detections(self, view: View) -> list[Detections] | None:
        model, images = self.model, image_list(view)
        with evaluating(model), in_full_precision(model, *self._outputs()):
            features = model.backbone(fitting(view.images, model))
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

    def _outputs(self) -> list[nn.Module]:
        """The modules whose outputs are decoded and filtered."""
        if not self._two_stage:
            return [self.model.head]
        predictor = getattr(self.model.roi_heads, "box_predictor", None)
        stages = list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]
        heads = [getattr(self.model.proposal_generator, "rpn_head", None), *stages]
        return [head for head in heads if head is not None]

    def _anchors(self, look: Look) -> Sequence[Any]:
        assert self._dense_head is not None
        if look.tapped is not None and "anchors" in look.tapped:
            anchors: Sequence[Any] = look.tapped["anchors"]
            return anchors
        return self._dense_head.anchors(look.raw)

    @torch.no_grad()
    def _with_proposals(self, seen: Seen, truth: Sequence[Any], facts: frozenset[str]) -> Seen:
        """The student's sampled proposals, matched with the ground truth once more."""
        assert seen.look.tapped is not None and self._box_head is not None
        tapped, packed = seen.look.tapped, seen.truth
        if "pooled" in tapped:
            boxes = tapped["pooled"][1]
        else:
            boxes = [x.proposal_boxes for x in tapped["proposals"][0]]
        by_image = matched(boxes, truth, self.model.roi_heads.proposal_matcher)
        box = torch.cat(by_image)
        corners = torch.cat([x.tensor for x in boxes]).float()
        none = packed.labels.new_zeros(1)  # the last row stands for the background
        labels = torch.cat([packed.labels, none])[box.clamp(min=-1)]
        image = torch.cat([torch.full_like(x, i) for i, x in enumerate(by_image)])
        found = Targets(corners, labels, image)
        if "regions" in facts:
            look = replace(seen.look, tapped={**tapped, "trained on": corners})
            seen = replace(seen, look=look, proposals=(found, box))
        if facts & {"positives", "proposals"}:
            # The one wait of a step for the device: how many there are in each image.
            counts = torch.stack([(x >= 0).sum() for x in by_image]).tolist()
            order = (box >= 0).to(torch.uint8).argsort(descending=True, stable=True)
            rows = order[: sum(counts)]
            logits = None
            if "positives" in facts:
                with torch.enable_grad():
                    logits = self._box_head.columns(tapped["predictions"][0][rows])
            per_image = torch.cat([x.tensor for x in boxes])[rows].split(counts)
            kept = [type(x)(part) for x, part in zip(boxes, per_image, strict=True)]
            positive = Targets(corners[rows], labels[rows], image[rows])
            seen = replace(seen, sampled=Sampled(logits, box[rows], positive, kept))
        return seen

    def _positive_locations(self, look: Look, assigned: Tensor) -> Sampled:
        """The locations that a dense student trains as objects."""
        dense, rows = self.dense(look), (assigned >= 0).nonzero(as_tuple=True)
        return Sampled(dense.logits[rows], assigned[rows], raw=(*rows, dense.grids))


def _detectron2_classes(model: Any) -> list[str]:
    return [c.__name__ for c in type(model).__mro__ if c.__module__.startswith("detectron2.")]


def _finds_upright_boxes(rpn: Any) -> bool:
    """Whether a proposal generator is a proposal network, and not one of rotated boxes."""
    return hasattr(rpn, "rpn_head") and getattr(rpn.anchor_generator, "box_dim", 4) == 4
