"""Are the boxes what the teacher finds, or read in a way that people mistake?"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..detectors import Detections
from ..ops.boxes import pairwise_iou
from ..targets import Targets

SCORE = 0.3  # a detection counts from here on
_FOUND = 0.5  # IoU at which a detection and a box are the same object
_BETTER = 0.2  # mean IoU by which another reading must be better where many boxes are found
_FEW, _MOST = 0.3, 0.6  # shares of boxes found: a reading under the first is doubted, over the
# second believed


def doubts(
    truth: Targets,
    found: list[Detections],
    scale: float,
    size: tuple[int, int],
    *,
    fits: bool = False,
) -> Iterable[str]:
    """Compare the boxes, read in the ways that people mistake, with what the teacher finds.

    Where it `fits` them by its own loss, it is no wonder that it finds few.
    """
    height, width = size
    given = truth.boxes.float()
    whole = given.new_tensor([width, height, width, height])
    a, b = given[:, :2], given[:, 2:]
    readings = {
        "xywh (corner and size)": torch.cat([a, a + b], dim=1),
        "cxcywh (centre and size)": torch.cat([a - b / 2, a + b / 2], dim=1),
        "normalised xyxy": given * whole,
        "normalised cxcywh": torch.cat([a - b / 2, a + b / 2], dim=1) * whole,
    }
    for step in range(-8, 9):
        if step:
            readings[f"pixels of images {2 ** (-step / 4):.2g} times as large"] = given * 2 ** (
                step / 4
            )
    share, agree, overlap = _agreement(given, truth, found, scale)
    if overlap < 1 - _BETTER:
        others = {name: _agreement(x, truth, found, scale) for name, x in readings.items()}
        best, (other, agree_there, better) = max(others.items(), key=lambda item: item[1][2])
        if other >= _MOST and (share < _FEW or better >= overlap + _BETTER):
            yield (
                f"the teacher finds {share:.0%} of the boxes as they are given, and {other:.0%} of "
                f"them read as {best}: convert them to xyxy in pixels of the network input"
            )
            share, agree = other, agree_there
        elif share < _FEW and not fits and any(len(x.boxes) for x in found):
            yield (
                f"the teacher finds {share:.0%} of the batch's boxes: check its weights and the "
                "boxes' pixels, and plot both on an image"
            )
    if share >= _MOST and agree[0] < _FEW:
        shift = max((-1, 1), key=lambda k: agree[k])
        if agree[shift] >= _MOST:
            yield (
                f"the teacher's labels are those of the boxes {'minus' if shift < 0 else 'plus'} "
                "one: one side counts the background as class 0, the other does not; shift the "
                "labels, or use a teacher of the same class numbers"
            )
        else:
            yield (
                f"the teacher finds the boxes but names {agree[0]:.0%} of them as labelled: the "
                "class lists differ; soft labels would teach nonsense (logits=0)"
            )


def _agreement(
    boxes: Tensor, truth: Targets, found: list[Detections], scale: float
) -> tuple[float, dict[int, float], float]:
    """Share of boxes found; of those, share named as labelled + shift; mean IoU of all."""
    hits, overlap = 0, 0.0
    named = dict.fromkeys((-1, 0, 1), 0)
    for i, x in enumerate(found):
        mine = truth.image_index == i
        # Among hundreds of detections there is one for any box.
        keep = (x.scores >= SCORE) & (
            torch.arange(len(x.scores), device=mine.device) < 2 * mine.sum() + 3
        )
        if not keep.any() or not mine.any():
            continue
        iou = pairwise_iou(boxes[mine], x.boxes[keep].float() / scale)
        best, which = iou.max(dim=1)
        overlap += float(best.sum())
        hit = best >= _FOUND
        hits += int(hit.sum())
        theirs, ours = x.labels[keep][which][hit], truth.labels[mine][hit]
        for shift in named:
            named[shift] += int((theirs == ours + shift).sum())
    return (
        hits / len(truth),
        {k: v / max(hits, 1) for k, v in named.items()},
        overlap / len(truth),
    )
