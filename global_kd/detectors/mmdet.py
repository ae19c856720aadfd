"""MMDetection 3: any detector with a ``backbone``, and a ``neck`` where it has one.

The student is called as MMEngine's runner calls it, with what ``model.data_preprocessor(data,
True)`` returns: ``student(inputs, data_samples, mode="loss")`` (not ``student.loss(...)``, which
passes by the hooks), then ``kd(inputs, data_samples)``.
Boxes are ``data_samples[i].gt_instances.bboxes``, in pixels of the padded ``inputs``. Labels count
from 0; there is no background class. There are no soft labels.

The images are taken for BGR as they come from the data pipeline, which is what MMDetection loads;
``student_pixels`` or ``teacher_pixels`` say otherwise.

Tried by hand with MMDetection 3.3 (RetinaNet, FCOS, RTMDet, YOLOX, Faster R-CNN, DETR), its
compiled operations replaced by torchvision's. The tests know its structures in miniature only.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import evaluating, feature_maps, input_channels
from ..targets import Targets
from .given import taken
from .pixels import Pixels, View, fitting
from .protocol import Detections, Look, MapsOnly, Seen

_EXAMPLE_SIZE = 256  # two cells of a stride-128 level


class MMDetDetector(MapsOnly):
    """A detector of MMDetection.

    Args:
        model: With ``backbone``, ``neck`` (or none) and ``data_preprocessor``.

    Raises:
        ValueError: A model without a backbone of its own, such as a wrapper of two detectors.
    """

    activation = "sigmoid"
    first_label = 0
    inputs: tuple[str, ...] = ()
    kind: str | None = None
    num_logits: int | None = None
    num_classes: int | None = None

    def __init__(self, model: Any) -> None:
        if not isinstance(getattr(model, "backbone", None), nn.Module):
            raise ValueError(
                "student, teacher: expected an MMDetection detector with a backbone, but got "
                f"{type(model).__name__}; pass the detector inside it, or name its pyramid with "
                "student_path or teacher_path"
            )
        self.model = model
        self._neck = getattr(model, "neck", None)
        self.taps = {"features": "backbone" if self._neck is None else "neck"}
        self.pixels = _pixels(model.data_preprocessor)
        # Some necks add maps of neighbouring strides and rely on a data pipeline that pads.
        self.divisor = max(32, int(getattr(model.data_preprocessor, "pad_size_divisor", None) or 1))

    def example(self) -> View:
        like = next(self.model.parameters())
        size = (1, input_channels(self.model.backbone), _EXAMPLE_SIZE, _EXAMPLE_SIZE)
        return View(torch.zeros(size, dtype=like.dtype, device=like.device))

    def look(self, view: View) -> Look:
        features = self.model.backbone(fitting(view.images, self.model))
        if self._neck is not None:
            features = self._neck(features)
        return Look(feature_maps(features), view)

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        view, truth = _read(images, targets)
        return Seen(Look(feature_maps(tapped["features"]), view), truth)

    def parts(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        images, samples = taken(("inputs", "data_samples"), args, kwargs).values()
        if not isinstance(images, Tensor):
            return {}
        if isinstance(samples, Sequence):
            known = (getattr(x, "gt_instances", None) for x in samples)
            samples = [{} if x is None else {"boxes": _boxes(x), "labels": x.labels} for x in known]
        return {"images": images, "targets": samples}

    def see(self, images: Any) -> View:
        if isinstance(images, Mapping):
            images = self.model.data_preprocessor(images, False)["inputs"]
        return View(images)

    def observe(self, images: Any, targets: Any) -> Seen:
        if isinstance(images, Mapping):  # a batch as the data loader yields it
            data = self.model.data_preprocessor(images, False)
            images, targets = data["inputs"], data["data_samples"]
        view, truth = _read(images, targets)
        return Seen(self.look(view), truth)

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        total: Tensor = self.model.parse_losses(self.model(images, targets, mode="loss"))[0]
        return total

    def detections(self, view: View) -> list[Detections] | None:
        sample = import_module("mmdet.structures").DetDataSample
        sizes = [view.size] * len(view.images) if view.sizes is None else view.sizes
        samples = [
            sample(
                metainfo={
                    "img_shape": (int(h), int(w)),
                    "ori_shape": (int(h), int(w)),
                    "batch_input_shape": view.size,
                    "pad_shape": view.size,
                    "scale_factor": (1.0, 1.0),
                }
            )
            for h, w in sizes
        ]
        with torch.no_grad(), evaluating(self.model):
            images = fitting(view.images, self.model)
            samples = self.model.predict(images, samples, rescale=False)
        found = [x.pred_instances for x in samples]
        return [Detections(_boxes(x), x.scores, x.labels) for x in found]

    def detach(self) -> None:
        pass


def _read(inputs: Any, samples: Any) -> tuple[View, Targets]:
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        raise ValueError(
            "images: expected the inputs (B, C, H, W) that the student is called with, as "
            f"data_preprocessor(data, True) returns them, but got {type(inputs).__name__}"
        )
    if not isinstance(samples, Sequence) or not all(hasattr(x, "gt_instances") for x in samples):
        raise ValueError(
            "targets: expected the data samples that the student is called with, each with "
            f"gt_instances, but got {type(samples).__name__}"
        )
    truth = [
        {"boxes": _boxes(x.gt_instances).float(), "labels": x.gt_instances.labels.long()}
        for x in samples
    ]
    if len(samples) != len(inputs):
        raise ValueError(
            f"targets: expected {len(inputs)} data samples, one per image, but got {len(samples)}"
        )
    sizes = [tuple(x.metainfo["img_shape"][:2]) for x in samples]
    return View(inputs, sizes), Targets.from_list(truth, inputs.device)


def _boxes(instances: Any) -> Tensor:
    """``(r, 4)``, taken out of ``HorizontalBoxes`` where they are in it."""
    boxes: Tensor = getattr(instances.bboxes, "tensor", instances.bboxes)
    return boxes


def _pixels(preprocessor: Any) -> Pixels | None:
    if not hasattr(preprocessor, "pad_value"):
        return None
    mean, std = getattr(preprocessor, "mean", None), getattr(preprocessor, "std", None)
    default = Pixels()
    return Pixels(
        mean=default.mean if mean is None else tuple(mean.flatten().tolist()),
        std=default.std if std is None else tuple(std.flatten().tolist()),
        scale=255.0,
        bgr=not preprocessor._channel_conversion,
        pad=float(preprocessor.pad_value),
    )
