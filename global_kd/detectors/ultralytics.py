"""Ultralytics' detection models: YOLOv3 to v12 and YOLO26, YOLO-World, YOLOE and RT-DETR.

The student is the ``DetectionModel`` itself (or a subclass for segmentation or poses), not the
``YOLO(...)`` around it, and it is called with the whole batch: ``student(batch)``, then
``kd(batch)``. A batch is Ultralytics' dictionary: ``img (B, 3, H, W)``, RGB in [0, 1] or bytes as
the data loader yields them, ``cls (R, 1)``, ``bboxes (R, 4)`` as normalised centre and size, and
``batch_idx (R,)``. Boxes are in pixels of ``img``, letterbox and mosaic included. Labels count from
0; there is no background class.

The maps are those that the last module takes. They are read from the layers that make them, since
heads of several versions write into the list that they are given.
"""

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..hooks import FeatureTap, evaluating
from ..targets import Targets
from .pixels import Pixels, View
from .protocol import Detections, Look, MapsOnly, Sampled, Seen

_EXAMPLE_SIZE = 256  # four cells of a stride-64 level
_KEYS = ("img", "cls", "bboxes", "batch_idx")
_MIN_SCORE, _MAX_IOU = 0.05, 0.7


class UltralyticsDetector(MapsOnly):
    """An Ultralytics detection model.

    Soft labels compare the class logits of anchor points that the student's own criterion assigns
    to a box; with a one-to-one head they are those of the one-to-many branch.

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
        self._logits: dict[str, str] = {}
        self._head_tap: dict[str, str] = {}
        self.family = "query" if family == "rtdetr" else "one-stage"
        self.taps = dict(self._levels)
        self.kind: str | None = None
        if family == "detect" and getattr(head, "cv3", None) is not None:
            self.kind = "ultralytics"
            self._logits = {f"logits {i}": f"model.{last}.cv3.{i}" for i in range(len(head.f))}
            self._head_tap = {"head": f"model.{last}"} | self._logits
            self.gives = frozenset({"images", "positives"})
        self.pixels: Pixels | None = Pixels(pad=114 / 255)
        self.divisor = max(32, int(model.stride.max()))
        self._tap = FeatureTap(model, self._levels)

    @property
    def num_logits(self) -> int | None:
        return int(self._head.nc)

    @property
    def num_classes(self) -> int | None:
        return self.num_logits

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        return dict(self._head_tap) if "positives" in facts else {}

    def example(self) -> View:
        like = next(self.model.parameters())
        size = (1, 3, _EXAMPLE_SIZE, _EXAMPLE_SIZE)
        return View(torch.zeros(size, dtype=like.dtype, device=like.device))

    def look(self, view: View) -> Look:
        return self._look(self._tap.run(view.images), view)

    def _look(self, tapped: dict[str, Any], view: View) -> Look:
        return Look([tapped[name] for name in self._levels], view)

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        batch = self._batch(images)
        look, truth = self._look(tapped, View(batch["img"])), _truth(batch)
        look = replace(look, tapped=tapped)
        sampled = self._positives(tapped, batch, truth) if "positives" in facts else None
        return Seen(look, truth, sampled)

    def observe(self, images: Any, targets: Any) -> Seen:
        batch = self._batch(images)
        return Seen(self.look(View(batch["img"])), _truth(batch))

    def soft_labels(self, look: Look, sampled: Sampled) -> tuple[Tensor, Tensor | None]:
        image, location, shapes = sampled.raw
        theirs = {x.shape[-2:]: b(x) for x, b in zip(look.maps, self._head.cv3, strict=True)}
        example = next(iter(theirs.values()))
        # Levels belong together where their grids are equal; a point without partner is left out.
        aligned = [theirs.get(s, example.new_zeros(*example.shape[:2], *s)) for s in shapes]
        logits = _per_point(aligned)[image, location]
        if all(s in theirs for s in shapes):
            return logits, None
        known = [torch.full((s.numel(),), s in theirs, device=image.device) for s in shapes]
        rows = torch.cat(known)[location].nonzero()[:, 0]
        return logits[rows], rows

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        arguments = getattr(self.model, "args", None)
        if self._family != "rtdetr" and not hasattr(arguments, "box"):
            raise ValueError(
                "student: expected model.args to hold the gains of the loss (box, cls, dfl), but "
                f"got {type(arguments).__name__}; set model.args = ultralytics.cfg.get_cfg(), as "
                "the trainer does"
            )
        total: Tensor = self.model(self._batch(images))[0].sum()
        return total

    def detections(self, view: View) -> list[Detections] | None:
        if self._family == "rtdetr":
            return None
        with torch.no_grad(), evaluating(self.model):
            found = self.model(view.images)[0]
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
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in images.items()}
        if not batch["img"].is_floating_point():
            batch["img"] = batch["img"].float() / 255
        return batch

    def _positives(
        self, tapped: dict[str, Any], batch: dict[str, Any], truth: Targets
    ) -> Sampled | None:
        criterion = getattr(self.model, "criterion", None)
        criterion = getattr(criterion, "one2many", criterion)
        if not hasattr(criterion, "assigner"):  # the user computes a loss of his own
            return None
        output = tapped["head"]
        output = output[1] if isinstance(output, tuple) else output  # in eval mode
        if isinstance(output, Mapping):
            output = output.get("one2many", output)
        mask, index = _assign(criterion, output, batch)
        image, location = mask.nonzero(as_tuple=True)
        # The criterion counts the boxes of each image from 0.
        order = truth.image_index.argsort(stable=True)
        images = torch.arange(len(mask), device=mask.device)
        first = (truth.image_index[None] < images[:, None]).sum(dim=1)
        box = order[first[image] + index[image, location].long()]
        levels = [tapped[name] for name in self._logits]
        raw = (image, location, [x.shape[-2:] for x in levels])
        return Sampled(_per_point(levels)[image, location], box, raw=raw)


class _Enough(Exception):
    """The assigner has run: the rest of the criterion is not needed."""


@torch.no_grad()
def _assign(criterion: Any, output: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which anchor points the criterion trains as objects, bool ``(B, A)``, and their boxes."""
    found: list[Any] = []

    def assigner(*args: Any, **kwargs: Any) -> None:
        found.extend(criterion.assigner(*args, **kwargs))
        raise _Enough

    twin = copy.copy(criterion)
    twin.assigner = assigner
    with contextlib.suppress(_Enough):
        twin(output, batch)
    return found[3].bool(), found[4]


def _per_point(levels: list[Tensor]) -> Tensor:
    """Maps ``(B, K, h, w)`` as ``(B, A, K)``, in the order of Ultralytics' anchor points."""
    return torch.cat([x.flatten(2) for x in levels], dim=2).transpose(1, 2)


def _truth(batch: dict[str, Any]) -> Targets:
    centre, side = batch["bboxes"].float().split(2, dim=1)
    size = side.new_tensor(batch["img"].shape[-2:][::-1])
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1) * size.repeat(2)
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
