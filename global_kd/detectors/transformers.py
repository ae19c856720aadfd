"""Hugging Face transformers' RT-DETR, D-FINE, Deformable DETR, DETR and YOLOS families.

A batch is the mapping that the image processors and collators give: ``pixel_values``, ``labels``
and, where images are padded, ``pixel_mask``; the student is called as ``student(**batch)``, the
distiller as ``kd(batch)``. Labels are ``class_labels``, counted from 0 without a background class.

There are no soft labels: each detector's queries are a set of their own, and no row of one
belongs to a row of another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hooks import FeatureTap, evaluating, feature_maps, tokens_to_maps
from ..targets import Targets
from .pixels import IMAGENET, Pixels, View
from .protocol import Detections, Look, MapsOnly, Seen

_EXAMPLE_SIZE = 256  # two cells of a stride-128 level


@dataclass(frozen=True)
class _Family:
    """Where detectors of one build keep their features, and what they take.

    Attributes:
        features: Module that puts out the maps, or the tokens.
        shapes: Module, or list of modules, that put out maps of the shape that the tokens have.
        activation: Of the class logits; with softmax the last class is "no object".
        pixels: What the image processor of the published models makes. It is not a part of the
            model.
        masked: Whether padding is masked out.
        patches: Whether the tokens are a ViT's: class token, patches, detection tokens.
        divisor: Of the height and width that it takes.
    """

    features: str = "model.encoder"
    shapes: str | None = None
    activation: str = "sigmoid"
    pixels: Pixels = IMAGENET
    masked: bool = True
    patches: bool = False
    divisor: int = 1


# The top-down path of the hybrid encoder adds maps upsampled by 2: no odd sizes.
_HYBRID = _Family(pixels=Pixels(), masked=False, divisor=32)
_ONE_LEVEL = _Family(shapes="model.input_projection")
_SOFTMAX = _Family(shapes="model.input_projection", activation="softmax")
_FAMILIES = {
    "rt_detr": _HYBRID,
    "rt_detr_v2": _HYBRID,
    "d_fine": _HYBRID,
    "deformable_detr": _Family(shapes="model.input_proj"),
    "detr": _SOFTMAX,
    "table-transformer": _SOFTMAX,
    "conditional_detr": _ONE_LEVEL,
    "dab-detr": _ONE_LEVEL,
    "yolos": _Family(features="vit.layernorm", activation="softmax", masked=False, patches=True),
}


class TransformersDetector(MapsOnly):
    """An object detector of transformers, such as ``AutoModelForObjectDetection`` makes.

    Args:
        model: A ``...ForObjectDetection``.

    Raises:
        ValueError: A model of another type.
    """

    kind: str | None = None
    num_logits: int | None = None
    first_label = 0
    inputs: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model, self._family = model, _family(model)
        self.activation = self._family.activation
        self.num_classes: int | None = model.config.num_labels
        self.pixels: Pixels | None = self._family.pixels
        self.family = "query"
        self.taps = {"features": self._family.features}
        if (path := self._family.shapes) is not None:
            shapes = model.get_submodule(path)
            several = [f".{i}" for i in range(len(shapes))] if hasattr(shapes, "__len__") else [""]
            self.taps |= {f"shape{i}": path + part for i, part in enumerate(several)}
        # What is left of an image beside whole patches is cut off, not padded.
        self.divisor = model.config.patch_size if self._family.patches else self._family.divisor
        self._tap = FeatureTap(model, self.taps)

    def example(self) -> View:
        like = next(self.model.parameters())
        return View(like.new_zeros(1, 3, _EXAMPLE_SIZE, _EXAMPLE_SIZE))

    def look(self, view: View) -> Look:
        inside = view.inside() if self._family.masked else None
        mask = {} if inside is None else {"pixel_mask": inside}
        tapped = self._tap.run(view.images.to(self.model.dtype), **mask)
        return Look(self._maps(tapped, view), view)

    def _maps(self, tapped: dict[str, Any], view: View) -> list[Tensor]:
        features = tapped["features"]
        if self._family.patches:
            shape = view.size[0] // self.divisor, view.size[1] // self.divisor
            return tokens_to_maps(features[:, 1 : -self.model.config.num_detection_tokens], [shape])
        if self._family.shapes is None:
            return feature_maps(features[0])
        like = (x for name, x in tapped.items() if name != "features")
        return tokens_to_maps(features[0], [(x.shape[2], x.shape[3]) for x in like])

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        view = _view(images)
        look = Look(self._maps(tapped, view), view)
        return Seen(look, _truth(images, view, look.maps[0].device))

    def observe(self, images: Any, targets: Any) -> Seen:
        look = self.look(_view(images))
        return Seen(look, _truth(images, look.view, look.maps[0].device))

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        loss: Tensor = self.model(**images).loss
        return loss

    def detections(self, view: View) -> list[Detections] | None:
        # One by one without padding: whether boxes are relative to the image or to the padded
        # canvas depends on the version of transformers that a model was trained with.
        sizes = [view.size] * len(view.images) if view.sizes is None else view.sizes
        found = []
        with torch.no_grad(), evaluating(self.model):
            for image, size in zip(view.images, sizes, strict=True):
                height, width = (-(-int(side) // self.divisor) * self.divisor for side in size)
                image = image[:, :height, :width].to(self.model.dtype)
                output = self.model(image[None])
                scores = output.logits[0].float()
                if self.activation == "softmax":
                    scores, labels = scores.softmax(dim=1)[:, :-1].max(dim=1)
                    scores, query = scores.sort(descending=True)
                    labels = labels[query]
                else:
                    scores, row = scores.sigmoid().flatten().topk(len(scores))
                    classes = output.logits.shape[2]
                    query, labels = row // classes, row % classes
                boxes = _corners(output.pred_boxes[0, query].float())
                canvas = boxes.new_tensor(image.shape[-2:]).flip(0).repeat(2)
                found.append(Detections(boxes * canvas, scores, labels))
        return found

    def detach(self) -> None:
        self._tap.remove()


def _family(model: Any) -> _Family:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    paths = [] if family is None else [family.features, *filter(None, [family.shapes])]
    modules = dict(model.named_modules())
    if family is None or any(path not in modules for path in paths):
        raise ValueError(
            f"model: expected a ...ForObjectDetection of {', '.join(_FAMILIES)}, but got "
            f"{type(model).__name__} of model_type {kind!r}; for any other, name the module that "
            "puts out its feature maps with teacher_path, or with student_path and example_inputs"
        )
    return family


def _view(batch: Any) -> View:
    if not isinstance(batch, Mapping) or "pixel_values" not in batch:
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            "images: expected the batch that the student was called with, a mapping with "
            f"'pixel_values' and 'labels', as in kd(batch), but got {got}"
        )
    sizes, mask = None, batch.get("pixel_mask")
    if mask is not None:
        sizes = torch.stack([mask[:, :, 0].sum(dim=1), mask[:, 0].sum(dim=1)], dim=1)
    return View(batch["pixel_values"], sizes)


def _truth(batch: Mapping[str, Any], view: View, device: torch.device) -> Targets:
    """The labels of a batch with boxes in pixels of the view.

    Boxes are normalised by ``size`` of their labels: the processors set it to the resized image
    and, together with the boxes, to the padded canvas. Labels padded by a collator that leaves both
    alone (transformers 4) are thus read rightly, too. Without ``size``: the canvas.
    """
    labels = batch.get("labels")
    if not labels:
        raise ValueError(
            "labels: expected one mapping per image with 'class_labels' and 'boxes' in the batch "
            f"beside {sorted(batch)}, as the student's training forward takes them, but got "
            f"{labels!r}"
        )
    counts = torch.tensor([len(x["boxes"]) for x in labels])
    image_index = torch.arange(len(labels)).repeat_interleave(counts).to(device)
    boxes = _corners(torch.cat([x["boxes"] for x in labels]).to(device, torch.float32))
    if all("size" in x for x in labels):
        sizes = torch.stack([torch.as_tensor(x["size"]) for x in labels]).to(device)
    else:
        sizes = torch.tensor([view.size] * len(labels)).to(device)
    classes = torch.cat([x["class_labels"] for x in labels]).to(device)
    return Targets(boxes * sizes.flip(1).repeat(1, 2)[image_index], classes, image_index)


def _corners(boxes: Tensor) -> Tensor:
    """``(r, 4)`` from centre, width and height to two corners."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], dim=1)
