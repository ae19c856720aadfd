"""Digit scenes: real handwritten digits pasted on real photographs, as a detection data set.

Everything comes with scikit-learn, so nothing is downloaded. Digits are scikit-learn's
`load_digits` (1797 scans of 8 x 8 pixels), photographs its `load_sample_images` (two of
640 x 427). Training and validation share neither a digit nor a pixel of a photograph: the scans
are dealt out class by class, and each photograph is cut down the middle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from . import storage
from .source_digest import source_digest

CLASS_NAMES = ("background", *"0123456789")


@dataclasses.dataclass(frozen=True)
class SceneSettings:
    """What determines the scenes; sizes are pixels of the scene."""

    train: int = 8000
    validation: int = 600
    side: int = 96
    digits: tuple[int, int] = (2, 6)
    height: tuple[float, float] = (12.0, 56.0)
    seed: int = 0

    def fingerprint(self) -> str:
        """Changes with the settings and with the code of this module, not with its comments."""
        settings = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256((settings + source_digest(__file__)).encode()).hexdigest()[:16]


class DigitScenes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Scenes in memory: uint8 `images` (N, 3, side, side) and the boxes of all scenes, packed.

    An item is a float image in [0, 1] and torchvision's target: "boxes" (r, 4) xyxy pixels and
    "labels" (r,) from 1 to 10.
    """

    def __init__(self, images: Tensor, boxes: Tensor, labels: Tensor, first: Tensor) -> None:
        self.images, self.boxes, self.labels = images, boxes, labels
        self.first = first  # (N + 1,): scene n owns the rows first[n] : first[n + 1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index].float() / 255, self.target(index)

    def target(self, index: int) -> dict[str, Tensor]:
        """The boxes of one scene, without touching its pixels."""
        start, end = int(self.first[index]), int(self.first[index + 1])
        return {"boxes": self.boxes[start:end], "labels": self.labels[start:end]}


def split_digits(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scans of "train" (3 of 4 of every class) or "validation" (the others).

    Returns their row numbers in `load_digits` (n,), images (n, 8, 8) in [0, 1] and classes (n,).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rank = np.zeros(len(digits.target), dtype=np.int64)  # position of a scan within its class
    for digit in range(10):
        members = np.flatnonzero(digits.target == digit)
        rank[members] = np.random.default_rng(digit).permutation(len(members))
    held_out = rank % 4 == 3
    rows = np.flatnonzero(held_out if split == "validation" else ~held_out)
    return rows, digits.images[rows] / 16.0, digits.target[rows]


def split_photographs(split: str) -> list[np.ndarray]:
    """The left ("train") or right ("validation") half of each photograph, (h, w, 3) uint8."""
    from sklearn.datasets import load_sample_images

    halves = []
    for photograph in load_sample_images().images:
        middle = photograph.shape[1] // 2
        halves.append(photograph[:, :middle] if split == "train" else photograph[:, middle:])
    return halves


def _background(rng: np.random.Generator, photographs: list[np.ndarray], side: int) -> np.ndarray:
    """A random square of a photograph, mirrored, recoloured and resized, (side, side, 3) float."""
    photograph = photographs[rng.integers(len(photographs))]
    extent = int(rng.uniform(side, min(photograph.shape[:2])))
    top = rng.integers(photograph.shape[0] - extent + 1)
    left = rng.integers(photograph.shape[1] - extent + 1)
    crop = Image.fromarray(photograph[top : top + extent, left : left + extent])
    canvas = np.asarray(crop.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    if rng.random() < 0.5:
        canvas = canvas[:, ::-1]
    return canvas * rng.uniform(0.6, 1.2) + rng.uniform(-20, 20, size=3).astype(np.float32)


def _stroke(rng: np.random.Generator, digit: np.ndarray, height: float) -> np.ndarray | None:
    """The opacity (h, w) in [0, 1] of a digit about `height` px high, cut to what shows."""
    width = height * rng.uniform(0.75, 1.1)
    ink = np.pad(digit, 2) * 255
    picture = Image.fromarray(ink.astype(np.uint8)).resize(
        (max(4, round(width * 12 / 8)), max(4, round(height * 12 / 8))), Image.Resampling.BICUBIC
    )
    picture = picture.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
    sharp = np.clip((np.asarray(picture, dtype=np.float32) / 255 - 0.35) * 4, 0, 1)
    blur = rng.uniform(0.0, 0.04) * height if rng.random() < 0.5 else 0.0
    soft = Image.fromarray((sharp * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur))
    opacity = np.asarray(soft, dtype=np.float32) / 255
    visible = opacity > 0.3
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    if len(rows) == 0:
        return None
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    rng: np.random.Generator, size: tuple[int, int], boxes: list[list[float]], side: int
) -> tuple[int, int] | None:
    """Top left corner for a digit of (h, w) that hides at most 30 % of any other; None: no room."""
    height, width = size
    for _ in range(12):
        top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
        hidden = 0.0
        for x1, y1, x2, y2 in boxes:
            across = max(0.0, min(x2, left + width) - max(x1, left))
            down = max(0.0, min(y2, top + height) - max(y1, top))
            hidden = max(hidden, across * down / min((x2 - x1) * (y2 - y1), height * width))
        if hidden <= 0.3:
            return top, left
    return None


def _colour(rng: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    """A random RGB colour (3,) that stands out from the pixels (h, w, 3) it will cover."""
    mean = behind.mean((0, 1))
    colour = rng.uniform(0, 255, size=3)
    for _ in range(8):
        if np.abs(colour - mean).sum() > 180:
            break
        colour = rng.uniform(0, 255, size=3)
    return colour.astype(np.float32)


def draw_scene(
    rng: np.random.Generator,
    scans: np.ndarray,
    classes: np.ndarray,
    photographs: list[np.ndarray],
    settings: SceneSettings,
) -> tuple[np.ndarray, list[list[float]], list[int]]:
    """One scene: uint8 (side, side, 3), its boxes xyxy, and their labels (digit + 1)."""
    side = settings.side
    canvas = _background(rng, photographs, side)
    boxes: list[list[float]] = []
    labels: list[int] = []
    low, high = np.log(settings.height)
    for _ in range(rng.integers(settings.digits[0], settings.digits[1] + 1)):
        which = rng.integers(len(scans))
        opacity = _stroke(rng, scans[which], float(np.exp(rng.uniform(low, high))))
        if opacity is None or max(opacity.shape) > side:
            continue
        height, width = opacity.shape
        corner = _place(rng, (height, width), boxes, side)
        if corner is None:
            continue
        top, left = corner
        behind = canvas[top : top + height, left : left + width]
        ink = opacity[..., None] * rng.uniform(0.75, 1.0)
        behind += ink * (_colour(rng, behind) - behind)
        boxes.append([left, top, left + width, top + height])
        labels.append(int(classes[which]) + 1)
    grain = np.float32(rng.uniform(0, 8))
    canvas += grain * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), boxes, labels


def make_scenes(split: str, settings: SceneSettings) -> DigitScenes:
    """Draw the scenes of a split; the same settings always give the same scenes."""
    _, scans, classes = split_digits(split)
    photographs = split_photographs(split)
    number = settings.train if split == "train" else settings.validation
    images = torch.empty((number, 3, settings.side, settings.side), dtype=torch.uint8)
    boxes: list[list[float]] = []
    labels: list[int] = []
    first = [0]
    for scene in tqdm(range(number), desc=f"draw {split} scenes", leave=False):
        rng = np.random.default_rng([settings.seed, split == "validation", scene])
        picture, scene_boxes, scene_labels = draw_scene(rng, scans, classes, photographs, settings)
        images[scene] = torch.from_numpy(picture).permute(2, 0, 1)
        boxes += scene_boxes
        labels += scene_labels
        first.append(len(boxes))
    return DigitScenes(
        images,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(first),
    )


def load_digit_scenes(split: str, settings: SceneSettings, cache: Path) -> DigitScenes:
    """The scenes from the cache folder, or drawn now and cached there.

    A file is taken only if it carries the fingerprint of these settings and this code and opens
    as plain tensors; any other file is drawn again.
    """
    path = cache / f"digit_scenes_{split}.pt"
    stamp = f"{split}-{settings.fingerprint()}"
    stored = storage.load(path)
    if isinstance(stored, dict) and stored.pop("stamp", None) == stamp:
        return DigitScenes(**stored)
    scenes = make_scenes(split, settings)
    storage.require_disk(cache, scenes.images.numel() + 2**24, f"the {split} split")
    storage.save({"stamp": stamp, **vars(scenes)}, path)
    return scenes
