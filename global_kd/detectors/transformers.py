"""Hugging Face transformers' detectors: the families of RT-DETR, LW-DETR, DETR, and YOLOS.

A batch is the mapping that the image processors and collators give: ``pixel_values``, ``labels``
and, where images are padded, ``pixel_mask``; the student is called as ``student(**batch)``, the
distiller as ``kd(batch)``. Labels are ``class_labels``, counted from 0 without a background class.

Soft labels are the scores by which RT-DETR, LW-DETR and their kin choose queries: each cell has
some. There are none of queries: each detector's are a set of their own, and no row of one belongs
to a row of another. A two-stage Deformable DETR scores its cells without telling classes apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hooks import FeatureTap, evaluating, feature_maps, tokens_to_maps
from ..ops.transfer import sent
from ..step import Dense, Queries
from ..targets import Targets
from . import lw_detr, rt_detr
from .given import one_each, refuse_other_format, taken, unpacked
from .pixels import IMAGENET, Pixels, View
from .protocol import Detections, Look, MapsOnly, Sampled, Seen

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
        bare: Whether that module puts out the maps and nothing around them.
        dense: What has scores and a box at every cell, if anything: ``"rt-detr"``, ``"lw-detr"``,
            or, where the configuration says so, ``"two-stage"``.
    """

    features: str = "model.encoder"
    shapes: str | None = None
    activation: str = "sigmoid"
    pixels: Pixels = IMAGENET
    masked: bool = True
    patches: bool = False
    divisor: int = 1
    bare: bool = False
    dense: str | None = None


# The top-down path of the hybrid encoder adds maps upsampled by 2: no odd sizes.
_HYBRID = _Family(pixels=Pixels(), masked=False, divisor=32, dense="rt-detr")
_PROJECTED = _Family(features="model.backbone.projector", bare=True, dense="lw-detr")
_ONE_LEVEL = _Family(shapes="model.input_projection")
_SOFTMAX = _Family(shapes="model.input_projection", activation="softmax")
_FAMILIES = {
    "rt_detr": _HYBRID,
    "rt_detr_v2": _HYBRID,
    "d_fine": _HYBRID,
    "deimv2": _HYBRID,
    "lw_detr": _PROJECTED,
    "rf_detr": _PROJECTED,
    "deformable_detr": _Family(shapes="model.input_proj", dense="two-stage"),
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

    first_label = 0
    inputs: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model, self._family = model, _family(model)
        self.activation = self._family.activation
        self.num_classes: int | None = model.config.num_labels
        self.num_logits: int | None = None
        self.pixels: Pixels | None = self._family.pixels
        backbone = getattr(model.config, "backbone_config", None)
        if getattr(backbone, "model_type", None) == "dinov3_vit":
            self.pixels = IMAGENET  # what that backbone was made with
        self.family = "query"
        self.gives = self.gives | {"queries"}
        self.kind: str | None = None
        self._cells: rt_detr.EncoderHead | lw_detr.ProposalHead | None = None
        if self._family.dense == "rt-detr":
            self.kind = rt_detr.KIND
            self._cells = rt_detr.EncoderHead(model.model, "model", self._projected, every_box=True)
        elif self._family.dense == "lw-detr":
            self.kind, self._cells = lw_detr.KIND, lw_detr.ProposalHead(model.model, "model")
        elif self._family.dense == "two-stage" and model.config.two_stage:
            self._cells = lw_detr.TwoStageHead(model.model, "model")
        if self.kind is not None:
            self.gives, self.num_logits = self.gives | rt_detr.GIVES, self.num_classes
        elif self._cells is not None:  # whose scores are not those of classes
            self.gives = self.gives | (rt_detr.GIVES - {"positives"})
        self.taps = {"features": self._family.features}
        if (path := self._family.shapes) is not None:
            shapes = model.get_submodule(path)
            several = [f".{i}" for i in range(len(shapes))] if hasattr(shapes, "__len__") else [""]
            self.taps |= {f"shape{i}": path + part for i, part in enumerate(several)}
        # What is left of an image beside whole patches is cut off, not padded.
        self.divisor = model.config.patch_size if self._family.patches else self._family.divisor
        if backbone is not None and self._family.dense == "lw-detr":  # whole windows of patches
            windows = getattr(backbone, "num_windows_side", None) or backbone.num_windows
            self.divisor = backbone.patch_size * windows
        self._tap = FeatureTap(model, self.taps)

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        return {} if self._cells is None else self._cells.taps_for(facts)

    def example(self) -> View:
        convolutions = (m for m in self.model.modules() if isinstance(m, torch.nn.Conv2d))
        like, channels = next(self.model.parameters()), next(convolutions).in_channels
        return View(like.new_zeros(1, channels, _EXAMPLE_SIZE, _EXAMPLE_SIZE))

    def look(self, view: View) -> Look:
        return Look(self._maps(self._tap.run(**self._taken(view)), view), view)

    def _taken(self, view: View) -> dict[str, Tensor]:
        """What the model is called with."""
        inside = view.inside() if self._family.masked else None
        mask = {} if inside is None else {"pixel_mask": inside}
        return {"pixel_values": view.images.to(self.model.dtype)} | mask

    def _maps(self, tapped: dict[str, Any], view: View) -> list[Tensor]:
        features = tapped["features"]
        if self._family.patches:
            shape = view.size[0] // self.divisor, view.size[1] // self.divisor
            return tokens_to_maps(features[:, 1 : -self.model.config.num_detection_tokens], [shape])
        if self._family.bare:
            return feature_maps(features)
        if self._family.shapes is None:
            return feature_maps(features[0])
        like = (x for name, x in tapped.items() if name.startswith("shape"))
        return tokens_to_maps(features[0], [(x.shape[2], x.shape[3]) for x in like])

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        view = _view(images)
        look = Look(self._maps(tapped, view), view, tapped=tapped)
        truth, sampled = _truth(images, view, look.maps[0].device), None
        if self._cells is not None and "positives" in facts:
            sampled = rt_detr.sample(self.dense(look, frozenset({"boxes"})), truth)
        return Seen(look, truth, sampled)

    def parts(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        given = taken(("pixel_values", "pixel_mask"), args, kwargs)
        if not isinstance(given["pixel_values"], Tensor):
            return {}
        if (labels := kwargs.get("labels")) is not None:
            labels = [
                {key: x[key] for key in ("class_labels", "boxes") if key in x} for x in labels
            ]
        return {**given, "labels": labels}

    def as_call(self, images: Any, targets: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        return ((), images) if isinstance(images, Mapping) else ((), {})

    def see(self, images: Any) -> View:
        return View(images) if isinstance(images, Tensor) else _view(images)

    def observe(self, images: Any, targets: Any) -> Seen:
        look = self.look(self.see(images))
        return Seen(look, _truth(images, look.view, look.maps[0].device))

    def soft_labels(self, look: Look, sampled: Sampled) -> tuple[Tensor, Tensor | None]:
        return rt_detr.soft_labels(self.dense(look), sampled)

    def dense(self, look: Look, facts: frozenset[str] = frozenset()) -> Dense:
        if self._cells is None:
            raise self._without("dense")
        return self._cells.dense(look.maps, look.view, facts, look.tapped)

    def head(
        self, maps: Sequence[Tensor], look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        if self._cells is None:
            raise self._without("teacher_head")
        return self._cells.dense(maps, look.view, facts)

    def _projected(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The levels that the decoder attends to: some have more than the encoder."""
        projections = self.model.model.decoder_input_proj
        further = [maps[-1]] * (len(projections) - len(maps))
        return [f(x) for f, x in zip(projections, [*maps, *further], strict=True)]

    def queries(self, look: Look) -> Queries:
        """The last decoder layer, from the model's whole forward on the view.

        Boxes of families that mask padding out are relative to the image without it, as in the
        published models' training; those of the others to the canvas.
        """
        view = look.view
        with evaluating(self.model):
            output = self.model(**self._taken(view))
        embeddings = output.last_hidden_state[:, -output.logits.shape[1] :]  # YOLOS': all tokens
        boxes = _corners(output.pred_boxes.to(torch.promote_types(self.model.dtype, torch.float32)))
        seen = view if self._family.masked else View(view.images)
        sizes = seen.extents().to(boxes.dtype)
        boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None]
        sides = getattr(output, "intermediate_predicted_corners", None)
        bins = sides[:, -1].unflatten(2, (4, -1)) if isinstance(sides, Tensor) else None
        return Queries(embeddings, output.logits, boxes, self.activation, bins)

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        loss: Tensor = self.model(**images).loss
        return loss

    def losses_of(self, view: View, truth: Targets) -> Tensor | None:
        sizes = [view.size] * len(view.images) if view.sizes is None else view.sizes
        labels = []
        for one, (height, width) in zip(unpacked(truth, len(view.images)), sizes, strict=True):
            low, high = one["boxes"].chunk(2, dim=1)
            boxes = torch.cat([(low + high) / 2, high - low], dim=1)
            whole = boxes.new_tensor([float(width), float(height)]).repeat(2)
            labels.append({"class_labels": one["labels"], "boxes": boxes / whole})
        if not self._family.masked:  # relative to the canvas
            for one, (height, width) in zip(labels, sizes, strict=True):
                inside = one["boxes"].new_tensor([float(width), float(height)]).repeat(2)
                canvas = one["boxes"].new_tensor(view.size[::-1]).repeat(2)
                one["boxes"] = one["boxes"] * inside / canvas
        loss: Tensor = self.model(**self._taken(view), labels=labels).loss
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
    one_each(labels, len(view.images), "labels")
    for i, x in enumerate(labels):
        _check_entry(i, x)
    # Written where they are to be: a copy from the processor would make an accelerator wait.
    image_index = torch.cat(
        [
            torch.full((len(x["boxes"]),), i, dtype=torch.int64, device=device)
            for i, x in enumerate(labels)
        ]
    )
    boxes = _corners(sent(torch.cat([x["boxes"] for x in labels]), device).to(torch.float32))
    if all("size" in x for x in labels):
        sizes = sent(torch.stack([torch.as_tensor(x["size"]) for x in labels]), device)
    else:
        sizes = View(view.images).extents().expand(len(labels), 2)
    # Of an image without objects they may be of any dtype.
    classes = sent(torch.cat([x["class_labels"].to(torch.int64) for x in labels]), device)
    return Targets(boxes * sizes.flip(1).repeat(1, 2)[image_index], classes, image_index)


def _check_entry(i: int, entry: Mapping[str, Any]) -> None:
    """One image's labels: each on its own, or classes would move to the boxes of another image."""
    boxes: Any = entry.get("boxes")
    classes: Any = entry.get("class_labels")
    if not isinstance(boxes, Tensor) or not isinstance(classes, Tensor):
        raise ValueError(
            f"labels[{i}]: expected tensors 'class_labels' (r,) and 'boxes' (r, 4), centre and "
            f"size, but got { {k: type(x).__name__ for k, x in entry.items()} }; a processor of "
            "transformers makes them of COCO's annotations"
        )
    refuse_other_format(f"labels[{i}]['boxes']", boxes, "CXCYWH")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or classes.shape != boxes.shape[:1]:
        raise ValueError(
            f"labels[{i}]: expected 'boxes' (r, 4) and 'class_labels' (r,), one for each box, but "
            f"got {tuple(boxes.shape)} and {tuple(classes.shape)}"
        )
    if len(classes) and (classes.is_floating_point() or classes.dtype == torch.bool):
        raise TypeError(
            f"labels[{i}]['class_labels']: expected an int64 tensor, but got {classes.dtype}; pass "
            ".to(torch.int64) if these are whole numbers"
        )


def _corners(boxes: Tensor) -> Tensor:
    """``(..., 4)`` from centre, width and height to two corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)
