"""Detectron2's batch: a list of dictionaries, images and ground truth in one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.transfer import sent
from ..targets import Targets
from .pixels import View


def ground_truth(batch: Any, targets: Any, device: torch.device) -> list[Any]:
    """The ``Instances`` of a batch."""
    if targets is not None:
        raise ValueError(
            "targets: expected None, since Detectron2 puts the ground truth into the batch: "
            f"kd(batch); but got {type(targets).__name__}"
        )
    if not is_batch(batch):
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
        instances(  # without masks and the like
            x, type(x.gt_boxes)(sent(x.gt_boxes.tensor, device)), sent(x.gt_classes, device)
        )
        for x in (one["instances"] for one in batch)
    ]


def is_batch(batch: Any) -> bool:
    """Whether this has the form of a batch."""
    return isinstance(batch, (list, tuple)) and all(isinstance(x, dict) for x in batch)


def tensors_of(one: dict[str, Any]) -> dict[str, Tensor]:
    """The image and the boxes of an entry."""
    found = {"image": one["image"]} if "image" in one else {}
    truth = one.get("instances")
    if truth is not None and truth.has("gt_boxes"):
        found |= {"boxes": truth.gt_boxes.tensor, "classes": truth.gt_classes}
    return found


def pack(truth: Sequence[Any]) -> Targets:
    """One table of all images."""
    return Targets.from_list(
        [{"boxes": x.gt_boxes.tensor.float(), "labels": x.gt_classes} for x in truth]
    )


def instances(like: Any, boxes: Any, classes: Tensor) -> Any:
    """Ground truth without masks and the like."""
    return type(like)(like.image_size, gt_boxes=boxes, gt_classes=classes)


def image_list(view: View) -> Any:
    """A view as Detectron2's ``ImageList``."""
    from detectron2.structures import ImageList

    sizes = [view.size] * len(view.images) if view.sizes is None else view.sizes
    return ImageList(view.images, [(int(h), int(w)) for h, w in sizes])
