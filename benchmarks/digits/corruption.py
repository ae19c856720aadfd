"""Errors put into the labels of digit scenes on purpose, and remembered."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from workshop.digit_scenes import DigitScenes

KINDS = ("clean", "label", "shifted", "moved")
CLEAN, LABEL, SHIFTED, MOVED = range(len(KINDS))
OVERLAP = (0.3, 0.6)  # of a shifted box with the true one
_TRIES = 200


@dataclasses.dataclass(frozen=True)
class Corrupted:
    """Scenes with errors in them, the same scenes without, and what was done to each instance.

    `kind` (N,) is an index into `KINDS`; its rows are those of `DigitScenes.boxes`. `truth` is for
    the judge, never for a training.
    """

    scenes: DigitScenes
    truth: DigitScenes
    kind: Tensor


def corrupt(scenes: DigitScenes, share: float, seed: int) -> Corrupted:
    """Give `share` of the instances another class, and `share` of them, others, a wrong box.

    Half of the wrong boxes are shifted and scaled until their IoU with the true box lies within
    `OVERLAP`; the other half keep their size and move to a place that no true box touches. All
    boxes stay in the picture. An instance for which no such box was found keeps its own, and the
    next one in the random order is taken. Pixels stay as they are.
    """
    rng = np.random.default_rng(seed)
    boxes, labels = scenes.boxes.clone(), scenes.labels.clone()
    kind = torch.zeros(len(labels), dtype=torch.int64)
    number = round(share * len(labels))
    wanted = {LABEL: number, SHIFTED: number // 2, MOVED: number - number // 2}
    side = scenes.images.shape[-1]
    scene_of = torch.repeat_interleave(torch.arange(len(scenes)), scenes.first.diff()).tolist()
    for row in rng.permutation(len(labels)).tolist():
        error = next((name for name, left in wanted.items() if left > 0), CLEAN)
        if error == CLEAN:
            break
        if error == LABEL:
            labels[row] = another_class(rng, int(labels[row]))
        else:
            true = scenes.target(scene_of[row])["boxes"]
            wrong = wrong_box(rng, scenes.boxes[row], true, error, side)
            if wrong is None:
                continue
            boxes[row] = wrong
        kind[row] = error
        wanted[error] -= 1
    if any(wanted.values()):
        raise ValueError(f"share: expected one that {len(labels)} instances allow, but got {share}")
    return Corrupted(DigitScenes(scenes.images, boxes, labels, scenes.first), scenes, kind)


def another_class(rng: np.random.Generator, label: int) -> int:
    """One of the nine other labels from 1 to 10."""
    return 1 + (label - 1 + int(rng.integers(1, 10))) % 10


def wrong_box(
    rng: np.random.Generator, box: Tensor, true: Tensor, error: int, side: int
) -> Tensor | None:
    """A box (4,) with the error SHIFTED or MOVED, within the picture; None if chance found none.

    `true` (r, 4) are the boxes of the scene, which one that moved must not touch.
    """
    low, high = OVERLAP
    size, middle = (box[2:] - box[:2]).numpy(), ((box[2:] + box[:2]) / 2).numpy()
    for _ in range(_TRIES):
        if error == SHIFTED:
            extent = size * np.exp(rng.uniform(-0.5, 0.5, size=2))
            centre = middle + size * rng.uniform(-0.5, 0.5, size=2)
        else:
            extent = size
            centre = rng.uniform(size / 2, side - size / 2)
        wrong = torch.from_numpy(np.concatenate([centre - extent / 2, centre + extent / 2])).float()
        if float(wrong.min()) < 0 or float(wrong.max()) > side:
            continue
        if error == SHIFTED and low <= float(box_iou(wrong[None], box[None])) <= high:
            return wrong
        if error == MOVED and float(box_iou(wrong[None], true).max()) == 0:
            return wrong
    return None
