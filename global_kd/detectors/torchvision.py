"""torchvision's Faster R-CNN (Mask R-CNN, Keypoint R-CNN), RetinaNet, FCOS and SSD.

torchvision resizes and pads images *inside* the model. Boxes here are in pixels of what comes out
of the student's ``transform``. Labels are torchvision's: 0 is the background in two-stage
detectors and SSD, so ``num_classes`` of the loss counts it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import evaluating, feature_maps
from ..step import Dense, Hidden, RegionOutputs
from ..targets import Targets
from .given import one_each, refuse_other_format, taken, unpacked
from .locations import beside
from .pixels import Pixels, View, fitting
from .protocol import Detections, Look, MapsOnly, Sampled, Seen
from .torchvision_dense import DenseHead, family, firsts
from .torchvision_forward import detect, own_losses, sizes_of

_EXAMPLE_SIZE = 256  # two cells of a stride-128 level


class TorchvisionDetector(MapsOnly):
    """A torchvision detector.

    The dense head of a two-stage detector is its region proposal network: one logit, "object".

    Args:
        model: With ``roi_heads`` (two-stage) or ``head.classification_head`` (dense).

    Raises:
        ValueError: A detector of another family.
    """

    divisor = 1

    def __init__(self, model: Any) -> None:
        self.model = model
        kind = family(model)
        self._two_stage = kind == "two-stage"
        self._dense = DenseHead(model, kind)
        self.kind: str | None = f"torchvision {kind}"
        # 0 is the background, but where each class has a sigmoid of its own.
        self.first_label = int(kind in ("two-stage", "ssd"))
        self.activation = "softmax" if self._two_stage else self._dense.activation
        self.taps = {"images": "transform", "features": "backbone"}
        self.inputs = ("roi",)
        self.family = "two-stage" if self._two_stage else "one-stage"
        gives = ["images", "positives", "dense", "boxes", "priors", "assigned", "teacher_head"]
        if kind != "ssd":  # predicts from the maps themselves
            gives.append("split_heads")
        self.gives = frozenset([*gives, "regions"] if self._two_stage else gives)
        transform = model.transform
        self.pixels: Pixels | None = Pixels(
            tuple(map(float, transform.image_mean)), tuple(map(float, transform.image_std))
        )

    @property
    def num_logits(self) -> int | None:
        if self._two_stage:
            score = getattr(self.model.roi_heads.box_predictor, "cls_score", None)
            return getattr(score, "out_features", None)
        head = self.model.head.classification_head
        return getattr(head, "num_classes", None) or getattr(head, "num_columns", None)

    @property
    def num_classes(self) -> int | None:
        return self.num_logits  # torchvision counts the background

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        taps = self._dense.taps_for(facts)
        if self._two_stage and facts & {"positives", "proposals", "regions"}:
            taps |= {"roi": "roi_heads.box_roi_pool", "regions": "roi_heads.box_predictor"}
        return taps

    def example(self) -> View:
        like = next(self.model.parameters())
        width, height = self.model.transform.fixed_size or (_EXAMPLE_SIZE, _EXAMPLE_SIZE)
        convs = (m for m in self.model.backbone.modules() if isinstance(m, nn.Conv2d))
        first = next(convs, None)
        channels = 3 if first is None else first.in_channels  # the mean may be one for all of them
        return View(torch.zeros(1, channels, height, width, dtype=like.dtype, device=like.device))

    def look(self, view: View) -> Look:
        features = self.model.backbone(fitting(view.images, self.model))
        return Look(feature_maps(features), view, features)

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        transformed, truth = tapped["images"]
        if truth is None:
            raise ValueError(
                "targets: expected the student's last forward to have had targets, in train mode"
            )
        one_each(truth, len(transformed.image_sizes))
        view, features = View(transformed.tensors, transformed.image_sizes), tapped["features"]
        maps = feature_maps(features)
        sampled = assigned = proposals = None
        if "assigned" in facts or ("positives" in facts and not self._two_stage):
            assigned = self._dense.assigned(tapped["anchors"], truth, maps)
        if self._two_stage and facts & {"positives", "proposals", "regions"}:
            drawn, box = self._drawn_proposals(tapped["roi"][1], truth)
            if facts & {"positives", "proposals"}:
                sampled = _objects(tapped["regions"][0], drawn, box, tapped["roi"][1])
            proposals = (drawn, box) if "regions" in facts else None
            tapped = {**tapped, "drawn": drawn}  # the boxes that "regions" speaks of
        elif "positives" in facts and assigned is not None:
            # The one wait of a step for the device: how many positives there are.
            rows = (assigned >= 0).nonzero(as_tuple=True)
            raw = (*rows, self._dense.grids(maps, view, assigned.shape[1]))
            sampled = Sampled(tapped["dense logits"][rows], assigned[rows], raw=raw)
        look = Look(maps, view, features, tapped)
        assigned = assigned if "assigned" in facts else None
        return Seen(look, _pack(truth), sampled, assigned, proposals)

    def parts(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        images, targets = taken(("images", "targets"), args, kwargs).values()
        if images is None or isinstance(images, Mapping):
            raise ValueError(
                "images: expected the images that the student was called with, a list of tensors "
                f"(C, H, W), but got {type(images).__name__}"
            )
        if targets is not None:
            if not isinstance(targets, (list, tuple)):
                raise ValueError(
                    "targets: expected the targets that the student was called with, a list of one "
                    f"dictionary per image, but got {type(targets).__name__}"
                )
            targets = [_truth_in(i, x) for i, x in enumerate(targets)]
        return {"images": list(images), "targets": targets}

    def see(self, images: Any) -> View:
        transformed, _ = self.model.transform(list(images))
        return View(transformed.tensors, transformed.image_sizes)

    def observe(self, images: Any, targets: Any) -> Seen:
        one_each(targets, len(images))
        for i, target in enumerate(targets):
            _truth_in(i, target)
        transformed, truth = self.model.transform(list(images), list(targets))
        return Seen(self.look(View(transformed.tensors, transformed.image_sizes)), _pack(truth))

    def soft_labels(self, look: Look, sampled: Sampled) -> tuple[Tensor, Tensor | None]:
        if self._two_stage:
            return self._second_stage(look, sampled.raw)[0], None
        image, location, grids = sampled.raw
        theirs = self.dense(look)
        location, rows = beside(grids, theirs.grids, image, location)
        return theirs.logits[image if rows is None else image[rows], location], rows

    def dense(self, look: Look, facts: frozenset[str] = frozenset()) -> Dense:
        return self._dense.read(look.maps, look.view, facts, look.tapped)

    def head(
        self, maps: Sequence[Tensor], look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        return self._dense.read([fitting(x, self.model) for x in maps], look.view, facts)

    def hidden(self, look: Look, after: int) -> Hidden:
        return self._dense.hidden([fitting(x, self.model) for x in look.maps], after)

    def tail(
        self, hidden: Hidden, after: int, look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        return self._dense.tail(hidden, after, look.view, facts)

    def regions(self, look: Look, boxes: Targets) -> RegionOutputs:
        if not self._two_stage:
            return super().regions(look, boxes)
        if look.tapped is not None and look.tapped.get("drawn") is boxes:
            logits, deltas = look.tapped["regions"]
        else:
            order = boxes.image_index.argsort(stable=True)
            counts = boxes.image_index.bincount(minlength=len(look.maps[0])).tolist()
            back = order.argsort()
            sorted_boxes = boxes.boxes[order].split(counts)
            logits, deltas = (x[back] for x in self._second_stage(look, sorted_boxes))
        # Decoded in at least float32: in half precision large coordinates are whole pixels.
        deltas = deltas.to(torch.promote_types(deltas.dtype, boxes.boxes.dtype))
        decoded = self.model.roi_heads.box_coder.decode_single(deltas, boxes.boxes)
        return RegionOutputs(logits, decoded.unflatten(1, (-1, 4))[:, 1:])

    @torch.no_grad()
    def proposals(self, look: Look) -> Targets:
        if not self._two_stage:
            return super().proposals(look)
        dense, rpn = self.dense(look, frozenset({"boxes"})), self.model.rpn
        with evaluating(rpn):
            # As in its own forward, but in at least float32, which suppression needs on CPUs.
            per_image, _ = rpn.filter_proposals(
                dense.boxes,
                dense.logits.to(torch.promote_types(dense.logits.dtype, torch.float32)),
                sizes_of(look.view),
                [grid.rows for grid in dense.grids],
            )
        boxes, image = torch.cat(per_image), _image_index(per_image)
        return Targets(boxes, torch.zeros_like(image), image)

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        for needed in ("masks", "keypoints"):  # a teacher may be trained on more than its student
            head = getattr(getattr(self.model, "roi_heads", None), f"{needed[:-1]}_head", None)
            if head is not None and not all(needed in t for t in targets):
                return None
        terms: dict[str, Tensor] = self.model(list(images), list(targets))
        return torch.stack([x.float() for x in terms.values()]).sum()

    def losses_of(self, view: View, truth: Targets) -> Tensor | None:
        heads = getattr(self.model, "roi_heads", None)
        if any(getattr(heads, f"{x}_head", None) is not None for x in ("mask", "keypoint")):
            return None
        return own_losses(self.model, view, unpacked(truth, len(view.images)))

    def detections(self, view: View) -> list[Detections] | None:
        found = detect(self.model, view)
        return [Detections(x["boxes"], x["scores"], x["labels"]) for x in found]

    def detach(self) -> None:
        pass

    def _second_stage(self, look: Look, per_image: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits and codes of boxes for the boxes of each image."""
        heads, features = self.model.roi_heads, look.raw
        if isinstance(features, Tensor):
            features = {"0": features}
        # Pooling takes one dtype, and boxes lose too much in half precision.
        own = look.maps[0].dtype
        wide = torch.promote_types(own, torch.float32)
        features = {name: x.to(wide) for name, x in features.items()}
        boxes = [x.to(wide) for x in per_image]
        pooled = heads.box_roi_pool(features, boxes, sizes_of(look.view))
        outputs: tuple[Tensor, Tensor] = heads.box_predictor(heads.box_head(pooled.to(own)))
        return outputs

    @torch.no_grad()
    def _drawn_proposals(
        self, proposals: list[Tensor], truth: list[dict[str, Tensor]]
    ) -> tuple[Targets, Tensor]:
        """All proposals that the student's second stage trains on, and the ground truth of each."""
        matched, labels = self.model.roi_heads.assign_targets_to_proposals(
            proposals,
            [t["boxes"].to(p.dtype) for t, p in zip(truth, proposals, strict=True)],
            [t["labels"] for t in truth],
        )
        box = torch.cat([m + f for m, f in zip(matched, firsts(truth), strict=True)])
        label = torch.cat(labels)  # 0 background; the sampler draws none that is ignored
        drawn = Targets(torch.cat(proposals).float(), label, _image_index(proposals))
        return drawn, torch.where(label > 0, box, -1)


def _truth_in(i: int, target: Any) -> Any:
    if not isinstance(target, Mapping):
        return target
    refuse_other_format(f"targets[{i}]['boxes']", target.get("boxes"), "XYXY")
    return {key: target[key] for key in ("boxes", "labels") if key in target}


def _pack(truth: list[dict[str, Tensor]]) -> Targets:
    return Targets.from_list([{**t, "boxes": t["boxes"].float()} for t in truth])


def _objects(logits: Tensor, drawn: Targets, box: Tensor, per_image: list[Tensor]) -> Sampled:
    """Those of the proposals that the student trains as objects."""
    mask = box >= 0
    # The one wait of a step for the device: how many there are in each image.
    counts = torch.stack([m.sum() for m in mask.split([len(p) for p in per_image])]).tolist()
    rows = mask.to(torch.uint8).argsort(descending=True, stable=True)[: sum(counts)]
    targets = Targets(drawn.boxes[rows], drawn.labels[rows], drawn.image_index[rows])
    raw = torch.cat(per_image)[rows].split(counts)
    return Sampled(logits[rows], box[rows], targets, raw)


def _image_index(per_image: list[Tensor]) -> Tensor:
    """Of the rows of all images, int64."""
    return torch.cat(
        [torch.full_like(x[:, 0], i, dtype=torch.int64) for i, x in enumerate(per_image)]
    )
