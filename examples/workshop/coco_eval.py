"""COCO metrics of a torchvision detector, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from pycocotools.cocoeval import COCOeval
from torch import nn
from tqdm import tqdm

from .detection_data import DetectionData

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@torch.no_grad()
def detect(
    model: nn.Module,
    data: DetectionData,
    indices: Sequence[int],
    *,
    label: str | None = "evaluate",
    batch_size: int = 25,
) -> list[dict[str, Any]]:
    """Detections on validation images, in COCO's result format; the model keeps its mode.

    `label` stands before the progress bar; None shows no bar. Images of unlike sizes are padded to
    one size in a batch, which may move a detection a little: `batch_size=1` rules that out.
    """
    device = next(model.parameters()).device
    image_ids = sorted(data.ground_truth.imgs)
    found: list[dict[str, Any]] = []
    training = model.training
    model.eval()
    try:
        for start in tqdm(
            range(0, len(indices), batch_size), desc=label, leave=False, disable=label is None
        ):
            batch = indices[start : start + batch_size]
            outputs = model([data.validation[index][0].to(device) for index in batch])
            for index, output in zip(batch, outputs, strict=True):
                sizes = output["boxes"][:, 2:] - output["boxes"][:, :2]
                boxes = torch.cat([output["boxes"][:, :2], sizes], dim=1)
                found += [
                    {"image_id": image_ids[index], "bbox": box, "category_id": name, "score": score}
                    for box, name, score in zip(
                        boxes.tolist(),
                        output["labels"].tolist(),
                        output["scores"].tolist(),
                        strict=True,
                    )
                ]
    finally:
        model.train(training)
    return found


def score(
    data: DetectionData, detections: list[dict[str, Any]], indices: Sequence[int]
) -> dict[str, float]:
    """COCO's six average precisions over the images `indices`, each in [0, 1].

    A class or a range of areas without a single box counts as COCO counts it: not at all (a
    metric without any box at all is 0).
    """
    if not detections:
        return dict.fromkeys(METRICS, 0.0)
    image_ids = sorted(data.ground_truth.imgs)
    small, medium = data.areas
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(data.ground_truth, data.ground_truth.loadRes(detections), "bbox")
        evaluation.params.imgIds = [image_ids[index] for index in indices]
        evaluation.params.areaRng = [[0, 1e10], [0, small], [small, medium], [medium, 1e10]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: max(0.0, float(value))
        for name, value in zip(METRICS, evaluation.stats[:6], strict=True)
    }


def evaluate(
    model: nn.Module,
    data: DetectionData,
    *,
    limit: int | None = None,
    label: str | None = "evaluate",
) -> dict[str, float]:
    """`score` on the validation split, or on its first `limit` images."""
    indices = range(len(data.validation) if limit is None else min(limit, len(data.validation)))
    return score(data, detect(model, data, indices, label=label), indices)
