"""Ultralytics' detection models: YOLOv3 to v12 and YOLO26, YOLO-World, YOLOE and RT-DETR.

The student is the ``DetectionModel`` itself (or a subclass for segmentation or poses), not the
``YOLO(...)`` around it, and it is called with the whole batch: ``student(batch)``, then
``kd(batch)``. A batch is Ultralytics' dictionary: ``img (B, 3, H, W)``, RGB in [0, 1] or bytes as
the data loader yields them, ``cls (R, 1)``, ``bboxes (R, 4)`` as normalised centre and size, and
``batch_idx (R,)``. Boxes are in pixels of ``img``, letterbox and mosaic included. Labels count from
0; there is no background class.

The maps are those that the last module takes. They are read from the layers that make them, since
heads of several versions write into the list that they are given. The dense head is the branch that
is trained on many points a box; in the students' role it is read from its convolutions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..hooks import FeatureTap, evaluating, tensors_in
from ..ops.transfer import numbers, sent
from ..step import Dense, Hidden, Queries
from ..targets import Targets
from . import rt_detr
from .given import refuse_other_format, taken
from .locations import beside
from .pixels import Pixels, View, fitting
from .protocol import Detections, Look, MapsOnly, Sampled, Seen
from .ultralytics_head import YoloHead, arguments

_EXAMPLE_SIZE = 256  # four cells of a stride-64 level
_KEYS = ("img", "cls", "bboxes", "batch_idx")
_MIN_SCORE, _MAX_IOU = 0.05, 0.7


class UltralyticsDetector(MapsOnly):
    """An Ultralytics detection model.

    Soft labels compare the class logits of anchor points that the student's own criterion assigns
    to a box; with a one-to-one head they are those of the one-to-many branch. RT-DETR's are those
    of its encoder, in the cells that fit a box best (:func:`global_kd.detectors.rt_detr.sample`).
    YOLO-World and YOLOE teach the texts that are set; as students, whose texts may be others in
    each batch, they have none.

    Args:
        model: With a ``Detect`` head or a subclass of it, or RT-DETR's decoder.

    Raises:
        ValueError: ``YOLO(...)`` instead of its model, or a model of another task.
    """

    activation = "sigmoid"
    first_label = 0
    inputs: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        head, family = _head(model)
        self.model, self._head, self._family = model, head, family
        last = len(model.model) - 1
        self._levels = {f"level {i}": f"model.{j % last}" for i, j in enumerate(head.f)}
        self.family = "query" if family == "rtdetr" else "one-stage"
        self.taps = dict(self._levels)
        self.kind: str | None = None
        self._yolo: YoloHead | None = None
        self._encoder: rt_detr.EncoderHead | None = None
        path = f"model.{last}"
        if family == "rtdetr":
            self.kind, self.gives = rt_detr.KIND, self.gives | rt_detr.GIVES | {"queries"}
            self._encoder = rt_detr.EncoderHead(head, path, self._projected, every_box=False)
        elif getattr(head, "cv3", None) is not None and not hasattr(head, "lrpc"):
            self.kind = "ultralytics"
            self._yolo = YoloHead(head, path, texts=family == "text")
            self.gives = self.gives | self._yolo.gives
        self.pixels: Pixels | None = Pixels(pad=114 / 255)
        self.divisor = max(32, int(model.stride.max()))
        taps = self._levels | ({"text": path} if family == "text" else {})
        self._tap = FeatureTap(model, taps, inputs=taps.keys() - self._levels.keys())
        self._criterion: Any = None

    @property
    def num_logits(self) -> int | None:
        return int(self._head.nc)

    @property
    def num_classes(self) -> int | None:
        return self.num_logits

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        head = self._encoder or self._yolo
        return {} if head is None else head.taps_for(facts)

    def example(self) -> View:
        convolutions = (m for m in self.model.modules() if isinstance(m, torch.nn.Conv2d))
        like = next(self.model.parameters())
        size = (1, next(convolutions).in_channels, _EXAMPLE_SIZE, _EXAMPLE_SIZE)
        return View(torch.zeros(size, dtype=like.dtype, device=like.device))

    def look(self, view: View) -> Look:
        tapped = self._tap.run(self._fitting(view.images))
        text = [x for x in tensors_in(tapped.get("text")) if x.dim() == 3]
        return self._look(tapped, view, text[-1] if text else None)

    def _look(self, tapped: dict[str, Any], view: View, text: Tensor | None = None) -> Look:
        return Look([tapped[name] for name in self._levels], view, text)

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        batch = self._batch(images)
        look, truth = self._look(tapped, View(batch["img"])), _truth(batch)
        look = replace(look, tapped=tapped)
        sampled = assigned = None
        if self._encoder is not None and "positives" in facts:
            sampled = rt_detr.sample(self.dense(look, frozenset({"boxes"})), truth)
        elif self._yolo is not None and facts & {"positives", "assigned"}:
            criterion = getattr(self.model, "criterion", None) or self._criterion
            assigned = self._yolo.assigned(criterion, tapped["head"], batch, truth, look.maps)
        if assigned is not None and "positives" in facts and self._family != "text":
            image, location = (assigned >= 0).nonzero(as_tuple=True)
            dense, box = self.dense(look), assigned[image, location]
            sampled = Sampled(
                dense.logits[image, location], box, raw=(image, location, dense.grids)
            )
        self._criterion = None
        return Seen(look, truth, sampled, assigned if "assigned" in facts else None)

    def parts(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        batch = taken(("x",), args, kwargs)["x"]
        if isinstance(batch, Tensor):  # of a loop that computes the loss outside of the model
            return {"img": batch}
        return {key: batch.get(key) for key in _KEYS} if isinstance(batch, Mapping) else {}

    def as_call(self, images: Any, targets: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        whole = isinstance(images, Mapping) and all(key in images for key in _KEYS)
        return ((images,) if whole else ()), {}

    def see(self, images: Any) -> View:
        if isinstance(images, Mapping):
            images = images["img"]
        device = next(self.model.parameters()).device
        return View(self._fitting(images.to(device)))

    def observe(self, images: Any, targets: Any) -> Seen:
        batch = self._batch(images)
        return Seen(self.look(View(batch["img"])), _truth(batch))

    def soft_labels(self, look: Look, sampled: Sampled) -> tuple[Tensor, Tensor | None]:
        theirs = self.dense(look)
        if self._encoder is not None:
            return rt_detr.soft_labels(theirs, sampled)
        image, location, grids = sampled.raw
        location, rows = beside(grids, theirs.grids, image, location)
        return theirs.logits[image if rows is None else image[rows], location], rows

    def dense(self, look: Look, facts: frozenset[str] = frozenset()) -> Dense:
        return self._dense(look.maps, look, facts, look.tapped)

    def head(
        self, maps: Sequence[Tensor], look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        return self._dense(maps, look, facts, None)

    def hidden(self, look: Look, after: int) -> Hidden:
        if self._yolo is None:
            return super().hidden(look, after)
        return self._yolo.hidden(look.maps, after)

    def tail(
        self, hidden: Hidden, after: int, look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        if self._yolo is None:
            return super().tail(hidden, after, look, facts)
        return self._yolo.tail(hidden, after, facts, look.raw)

    def queries(self, look: Look) -> Queries:
        """The decoder layer that is used, from RT-DETR's head on the maps."""
        if self._encoder is None:
            return super().queries(look)
        layer = {"embeddings": f"decoder.layers.{self._head.decoder.eval_idx}"}
        with evaluating(self._head), FeatureTap(self._head, layer) as tap:
            boxes, logits = self._head(list(look.maps))[1][:2]
            embeddings = tap.read()["embeddings"]
        boxes = boxes[-1].to(torch.promote_types(boxes.dtype, torch.float32))
        return Queries(embeddings, logits[-1], rt_detr.corners(boxes, look.view.size))

    def _dense(
        self,
        maps: Sequence[Tensor],
        look: Look,
        facts: frozenset[str],
        tapped: Mapping[str, Any] | None,
    ) -> Dense:
        if self._encoder is not None:
            return self._encoder.dense(maps, look.view, facts, tapped)
        if self._yolo is None:
            raise self._without("dense")
        return self._yolo.dense(maps, facts, tapped, look.raw)

    def _projected(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [f(x) for f, x in zip(self._head.input_proj, maps, strict=True)]

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        with arguments(self.model):
            total: Tensor = self.model(self._batch(images))[0].sum()
            # The next reading asks it which locations it trains.
            self._criterion = getattr(self.model, "criterion", None)
        return total

    def losses_of(self, view: View, truth: Targets) -> Tensor | None:
        corners, size = truth.boxes, truth.boxes.new_tensor(view.size[::-1]).repeat(2)
        boxes = torch.cat(
            [corners[:, :2] + corners[:, 2:], 2 * (corners[:, 2:] - corners[:, :2])], 1
        )
        batch = {
            "img": self._fitting(view.images),
            "cls": truth.labels.to(boxes.dtype)[:, None],
            "bboxes": boxes / 2 / size,
            "batch_idx": truth.image_index.to(boxes.dtype),
        }
        with arguments(self.model):
            total: Tensor = self.model(batch)[0].sum()
        return total

    def detections(self, view: View) -> list[Detections] | None:
        if self._family == "rtdetr":
            return None
        with torch.no_grad(), evaluating(self.model):
            found = self.model(self._fitting(view.images))[0]
        found = found[0] if isinstance(found, tuple) else found  # masks come beside the boxes
        if getattr(self.model, "end2end", False):
            rows = [x[x[:, 4] > _MIN_SCORE] for x in found]
        else:
            suppress = _non_max_suppression()
            rows = suppress(found, _MIN_SCORE, _MAX_IOU, nc=self._head.nc)
        return [Detections(x[:, :4], x[:, 4], x[:, 5].long()) for x in rows]

    def detach(self) -> None:
        self._tap.remove()

    def _batch(self, images: Any) -> dict[str, Any]:
        """The student's batch on its device, pixels in [0, 1]; the given one stays as it is."""
        if not isinstance(images, Mapping) or any(key not in images for key in _KEYS):
            got = sorted(images) if isinstance(images, Mapping) else type(images).__name__
            raise ValueError(
                "images: expected the batch that an Ultralytics student is called with, a "
                f"dictionary with {', '.join(_KEYS)}, but got {got}"
            )
        device = next(self.model.parameters()).device
        batch = {k: sent(v, device) if isinstance(v, Tensor) else v for k, v in images.items()}
        batch["img"] = self._fitting(batch["img"])
        return batch

    def _fitting(self, images: Any) -> Any:
        """Numbers in [0, 1] of the model's type, also of bytes."""
        if isinstance(images, Tensor) and not images.is_floating_point():
            images = images.float() / 255
        return fitting(images, self.model)


def _truth(batch: dict[str, Any]) -> Targets:
    refuse_other_format("bboxes", batch["bboxes"], "CXCYWH")
    centre, side = batch["bboxes"].float().split(2, dim=1)
    height, width = batch["img"].shape[-2:]
    size = numbers([width, height] * 2, side)
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1) * size
    return Targets(boxes, batch["cls"].reshape(-1).long(), batch["batch_idx"].reshape(-1).long())


def _head(model: Any) -> tuple[Any, str]:
    """The last module and its family."""
    if any(c.__module__ == "ultralytics.engine.model" for c in type(model).__mro__):
        raise ValueError(
            f"student, teacher: expected the network itself, but got {type(model).__name__}(...), "
            "which trains a copy of it; pass its .model, and to distil inside Ultralytics' own "
            "trainer see docs/ultralytics.md"
        )
    layers = getattr(model, "model", None)
    head = layers[-1] if isinstance(layers, torch.nn.Sequential) else None
    names = {c.__name__ for c in type(head).__mro__}
    if "RTDETRDecoder" in names:
        return head, "rtdetr"
    if "Detect" in names and "OBB" not in names:
        return head, "text" if names & {"WorldDetect", "YOLOEDetect"} else "detect"
    raise ValueError(
        "student, teacher: expected an Ultralytics model with upright boxes (its last module a "
        f"Detect head or RT-DETR's decoder), but got {type(model).__name__} with "
        f"{type(head).__name__}; name its pyramid with student_path or teacher_path"
    )


def _non_max_suppression() -> Any:
    try:
        return import_module("ultralytics.utils.nms").non_max_suppression
    except ImportError:  # it moved there in 8.3
        return import_module("ultralytics.utils.ops").non_max_suppression
