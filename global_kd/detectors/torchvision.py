"""torchvision's Faster R-CNN (Mask R-CNN, Keypoint R-CNN), RetinaNet, FCOS and SSD.

torchvision resizes and pads images *inside* the model. Boxes here are in pixels of what comes out
of the student's ``transform``. Labels are torchvision's: 0 is the background in two-stage
detectors and SSD, so ``num_classes`` of the loss counts it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import evaluating, feature_maps
from ..targets import Targets
from .pixels import Pixels, View, fitting
from .protocol import Detections, Look, MapsOnly, Sampled, Seen

_EXAMPLE_SIZE = 256  # two cells of a stride-128 level

_KINDS = {
    "FasterRCNN": "two-stage",
    "RetinaNet": "retinanet",
    "FCOS": "fcos",
    "SSD": "ssd",
}


class TorchvisionDetector(MapsOnly):
    """A torchvision detector.

    Args:
        model: With ``roi_heads`` (two-stage) or ``head.classification_head`` (dense).

    Raises:
        ValueError: A detector of another family.
    """

    divisor = 1

    def __init__(self, model: Any) -> None:
        self.model = model
        self._family = _family(model)
        self.kind: str | None = f"torchvision {self._family}"
        # 0 is the background, but where each class has a sigmoid of its own.
        self.first_label = int(self._family in ("two-stage", "ssd"))
        self.activation = "sigmoid" if self._family in ("retinanet", "fcos") else "softmax"
        self.taps = {"images": "transform", "features": "backbone"}
        self.family = "two-stage" if self._family == "two-stage" else "one-stage"
        self.gives = frozenset({"images", "positives"})
        self.inputs = ("roi",)
        transform = model.transform
        self.pixels: Pixels | None = Pixels(
            tuple(map(float, transform.image_mean)), tuple(map(float, transform.image_std))
        )

    @property
    def num_logits(self) -> int | None:
        if self._family == "two-stage":
            score = getattr(self.model.roi_heads.box_predictor, "cls_score", None)
            return getattr(score, "out_features", None)
        head = self.model.head.classification_head
        return getattr(head, "num_classes", None) or getattr(head, "num_columns", None)

    @property
    def num_classes(self) -> int | None:
        return self.num_logits  # torchvision counts the background

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        if self._family == "two-stage" and facts & {"positives", "proposals"}:
            return {"roi": "roi_heads.box_roi_pool", "logits": "roi_heads.box_predictor"}
        if self._family != "two-stage" and "positives" in facts:
            return {"logits": "head.classification_head", "anchors": "anchor_generator"}
        return {}

    def example(self) -> View:
        like = next(self.model.parameters())
        width, height = self.model.transform.fixed_size or (_EXAMPLE_SIZE, _EXAMPLE_SIZE)
        return View(torch.zeros(1, 3, height, width, dtype=like.dtype, device=like.device))

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
        view = View(transformed.tensors, transformed.image_sizes)
        look = Look(feature_maps(tapped["features"]), view, tapped=tapped)
        sampled = None
        if "roi" in tapped:
            sampled = self._sampled_proposals(tapped["roi"][1], tapped["logits"][0], truth)
        elif "positives" in facts:
            sampled = self._assigned_locations(tapped["anchors"], tapped["logits"], truth, look)
        return Seen(look, _pack(truth), sampled)

    def observe(self, images: Any, targets: Any) -> Seen:
        transformed, truth = self.model.transform(list(images), list(targets))
        return Seen(self.look(View(transformed.tensors, transformed.image_sizes)), _pack(truth))

    def soft_labels(self, look: Look, sampled: Sampled) -> tuple[Tensor, Tensor | None]:
        if self._family == "two-stage":
            heads, features = self.model.roi_heads, look.raw
            if isinstance(features, Tensor):
                features = {"0": features}
            sizes = [tuple(map(int, s)) for s in look.view.sizes or [look.view.size]]
            pooled = heads.box_roi_pool(features, sampled.raw, sizes)
            logits: Tensor = heads.box_predictor(heads.box_head(pooled))[0]
            return logits, None
        mask, shapes = sampled.raw
        logits = self.model.head.classification_head(list(look.maps))
        where, known = _same_locations(shapes, mask.shape[1], look.maps, logits.shape[1])
        image, location = mask.nonzero(as_tuple=True)
        rows = known[location].nonzero()[:, 0]
        return logits[image[rows], where[location[rows]]], rows

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        for needed in ("masks", "keypoints"):  # a teacher may be trained on more than its student
            head = getattr(getattr(self.model, "roi_heads", None), f"{needed[:-1]}_head", None)
            if head is not None and not all(needed in t for t in targets):
                return None
        terms: dict[str, Tensor] = self.model(list(images), list(targets))
        return torch.stack([x.float() for x in terms.values()]).sum()

    def detections(self, view: View) -> list[Detections] | None:
        with torch.no_grad(), evaluating(self.model):
            stand_in = _InNetworkPixels(self.model, view)
            found = type(self.model).forward(stand_in, list(view.images))
        return [Detections(x["boxes"], x["scores"], x["labels"]) for x in found]

    def detach(self) -> None:
        pass

    @torch.no_grad()
    def _sampled_proposals(
        self, proposals: list[Tensor], logits: Tensor, truth: list[dict[str, Tensor]]
    ) -> Sampled:
        """The student's sampled positive proposals, with the labels of their ground truth."""
        matched, labels = self.model.roi_heads.assign_targets_to_proposals(
            proposals, [t["boxes"] for t in truth], [t["labels"] for t in truth]
        )
        positive = [x > 0 for x in labels]
        per_image = [p[m] for p, m in zip(proposals, positive, strict=True)]
        mask = torch.cat(positive)
        image = torch.cat([torch.full_like(x, i) for i, x in enumerate(labels)])
        box = torch.cat([m + f for m, f in zip(matched, _firsts(truth), strict=True)])
        with torch.enable_grad():
            rows = logits[mask]
        targets = Targets(torch.cat(per_image).float(), torch.cat(labels)[mask], image[mask])
        return Sampled(rows, box[mask], targets, per_image)

    def _assigned_locations(
        self, anchors: list[Tensor], logits: Tensor, truth: list[dict[str, Tensor]], look: Look
    ) -> Sampled:
        """The locations ``(B, A)`` that a dense student trains as objects."""
        shapes = [(x.shape[2], x.shape[3]) for x in look.maps]
        if self._family == "ssd":
            matched = _ssd_matches(self.model, truth, anchors)
        else:
            matched = _matches(self.model, self._family, truth, anchors, shapes)
        packed = [
            torch.where(m >= 0, m + first, -1)
            for m, first in zip(matched, _firsts(truth), strict=True)
        ]
        box = torch.stack(packed)
        mask = box >= 0
        return Sampled(logits[mask], box[mask], raw=(mask, shapes))


class _StandIn:
    """Everything of a detector but what a subclass replaces."""

    def __init__(self, detector: nn.Module) -> None:
        self._detector = detector

    def __getattr__(self, name: str) -> Any:
        return getattr(self._detector, name)


class _Assigner(_StandIn):
    """Stands in for a dense detector while its own ``compute_loss`` assigns locations to boxes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        self.head = self

    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matched: list[Tensor]) -> None:
        self.matched = matched


class _InNetworkPixels(_StandIn):
    """Stands in for a detector whose images are transformed already."""

    def __init__(self, detector: nn.Module, view: View) -> None:
        super().__init__(detector)
        self.transform, self._view = self, view

    def __call__(self, images: Any, targets: Any) -> Any:
        from torchvision.models.detection.image_list import ImageList

        x, sizes = self._view.images, self._view.sizes
        sizes = [self._view.size] * len(x) if sizes is None else sizes
        return ImageList(x, [(int(h), int(w)) for h, w in sizes]), targets

    def postprocess(self, found: Any, *sizes: Any) -> Any:
        return found


@torch.no_grad()
def _matches(
    student: Any,
    family: str,
    truth: list[dict[str, Tensor]],
    anchors: list[Tensor],
    shapes: list[tuple[int, int]],
) -> list[Tensor]:
    """Ground-truth index of every location of each image; negative where it has none."""
    assigner = _Assigner(student)
    arguments: list[Any] = [truth, {}, anchors]
    if family == "fcos":
        cells = [h * w for h, w in shapes]
        per_cell = len(anchors[0]) // sum(cells)
        arguments.append([c * per_cell for c in cells])
    type(student).compute_loss(assigner, *arguments)
    return assigner.matched


@torch.no_grad()
def _ssd_matches(
    student: Any, truth: list[dict[str, Tensor]], anchors: list[Tensor]
) -> list[Tensor]:
    from torchvision.ops import box_iou

    return [
        student.proposal_matcher(box_iou(t["boxes"], a))
        if len(t["boxes"])
        else a.new_full((len(a),), -1, dtype=torch.int64)
        for t, a in zip(truth, anchors, strict=True)
    ]


def _same_locations(
    shapes: list[tuple[int, int]], count: int, maps: Any, teacher_count: int
) -> tuple[Tensor, Tensor]:
    """For each of a student's locations the teacher's index, and whether there is one.

    Levels belong together where their grids are equal; detectors that put unlike numbers of
    anchors on a cell share no location.
    """
    device = maps[0].device
    theirs = [(x.shape[2], x.shape[3]) for x in maps]
    per_cell = count / sum(h * w for h, w in shapes)
    if per_cell.is_integer() and per_cell == teacher_count / sum(h * w for h, w in theirs):
        lengths = [int(h * w * per_cell) for h, w in theirs]
        firsts = {shape: sum(lengths[:j]) for j, shape in enumerate(theirs)}
        where = [
            torch.arange(int(h * w * per_cell), device=device) + firsts.get((h, w), -count - 1)
            for h, w in shapes
        ]
        packed = torch.cat(where)
        return packed.clamp(min=0), packed >= 0
    same = shapes == theirs and count == teacher_count  # SSD: anchors differ between levels
    locations = torch.arange(count, device=device)
    return locations.clamp(max=teacher_count - 1), torch.full_like(
        locations, same, dtype=torch.bool
    )


def _firsts(truth: list[dict[str, Tensor]]) -> list[int]:
    """Index of the first box of each image among all of the batch."""
    counts = [len(t["boxes"]) for t in truth]
    return [sum(counts[:i]) for i in range(len(counts))]


def _family(model: Any) -> str:
    for c in type(model).__mro__:
        if c.__module__.startswith("torchvision") and c.__name__ in _KINDS:
            return _KINDS[c.__name__]
    raise ValueError(
        "student, teacher: expected torchvision's FasterRCNN, RetinaNet, FCOS or SSD (or a "
        f"subclass), but got {type(model).__name__}; name its pyramid with student_path or "
        "teacher_path"
    )


def _pack(truth: list[dict[str, Tensor]]) -> Targets:
    return Targets.from_list([{**t, "boxes": t["boxes"].float()} for t in truth])
