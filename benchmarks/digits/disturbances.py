"""Digit scenes made harder on purpose: wrong labels, loose boxes, blurred and covered digits.

Scenes are disturbed after they were drawn. The code of `digit_scenes.py` belongs to the
fingerprint by which the shipped teacher is known, so it stays as it is, and so do its scenes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from workshop.digit_scenes import DigitScenes

from .corruption import OVERLAP, SHIFTED, another_class, wrong_box

KINDS = ("labels", "boxes", "blur", "occlusion")
BLUR = 0.15  # standard deviation of the blur, of the height of the box
COVERED = 0.5  # of a box, at one of its sides


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """What share of the instances, in [0, 1], is disturbed in which way.

    `labels`: another class; `boxes`: moved and resized until the IoU with the true box lies within
    `OVERLAP`; `blur`: the pixels of the box; `occlusion`: half of the box under a plain colour.
    The kinds are drawn one by one, so an instance may be met by several. With the same seed, those
    of a small share are among those of a larger one.
    """

    labels: float = 0.0
    boxes: float = 0.0
    blur: float = 0.0
    occlusion: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in KINDS:
            if not 0 <= getattr(self, kind) <= 1:
                raise ValueError(
                    f"{kind}: expected a share in [0, 1], but got {getattr(self, kind)}"
                )


def disturb(scenes: DigitScenes, how: Disturbance) -> tuple[DigitScenes, Tensor]:
    """The scenes disturbed, and bool (R, 4): which of their R instances in which of the `KINDS`.

    Exactly `round(share * R)` instances are disturbed in each kind. The scenes given stay as they
    are; their boxes, in packed order, are the true ones.
    """
    images, boxes, labels = scenes.images, scenes.boxes.clone(), scenes.labels.clone()
    if how.blur or how.occlusion:
        images = images.clone()
    number, side = len(labels), images.shape[-1]
    scene_of = torch.repeat_interleave(torch.arange(len(scenes)), scenes.first.diff()).tolist()
    met = torch.zeros(number, len(KINDS), dtype=torch.bool)
    for kind, name in enumerate(KINDS):
        order = np.random.default_rng([how.seed, kind]).permutation(number)
        met[order[: round(getattr(how, name) * number)], kind] = True
    wrong_label, loose, blurred, covered = met.unbind(dim=1)
    for row in met.any(dim=1).nonzero().flatten().tolist():
        rngs = [np.random.default_rng([how.seed, kind, row]) for kind in range(len(KINDS))]
        if wrong_label[row]:
            labels[row] = another_class(rngs[0], int(labels[row]))
        if loose[row]:
            boxes[row] = _loosen(rngs[1], scenes.boxes[row], side)
        if blurred[row]:
            _blur(images[scene_of[row]], scenes.boxes[row])
        if covered[row]:
            _cover(rngs[3], images[scene_of[row]], scenes.boxes[row])
    return DigitScenes(images, boxes, labels, scenes.first), met


def _loosen(rng: np.random.Generator, box: Tensor, side: int) -> Tensor:
    """Another box (4,) within the picture, its IoU with `box` within `OVERLAP`."""
    loose = wrong_box(rng, box, box[None], SHIFTED, side)
    if loose is not None:
        return loose
    # A box that fills the picture has few others: the same, smaller.
    half = (box[2:] - box[:2]) * (sum(OVERLAP) / 2) ** 0.5 / 2
    middle = (box[2:] + box[:2]) / 2
    return torch.cat([middle - half, middle + half])


def _blur(image: Tensor, box: Tensor) -> None:
    """Blur the box's pixels of a picture (3, H, W), with what lies around it, in place."""
    x1, y1, x2, y2 = (int(x) for x in box)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    soft = picture.filter(ImageFilter.GaussianBlur(BLUR * (y2 - y1)))
    image[:, y1:y2, x1:x2] = torch.from_numpy(np.array(soft)).permute(2, 0, 1)[:, y1:y2, x1:x2]


def _cover(rng: np.random.Generator, image: Tensor, box: Tensor) -> None:
    """Paint one side of the box in a picture (3, H, W) with one colour, in place."""
    x1, y1, x2, y2 = (int(x) for x in box)
    across, down = round(COVERED * (x2 - x1)), round(COVERED * (y2 - y1))
    sides = ((x1, y1, x1 + across, y2), (x2 - across, y1, x2, y2),
             (x1, y1, x2, y1 + down), (x1, y2 - down, x2, y2))  # fmt: skip
    left, top, right, bottom = sides[rng.integers(4)]
    colour = torch.from_numpy(rng.integers(0, 256, size=3)).to(image.dtype)
    image[:, top:bottom, left:right] = colour[:, None, None]
