"""Real pictures with boxes, from a checkout of the public repository that holds them.

Pictures are decoded and resized once and kept in the cache; nothing of them is in this project.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from workshop import storage
from workshop.detection_data import DIGIT_AREAS, DetectionData, Target, index_truth, target_of
from workshop.source_digest import source_digest
from workshop.voc_data import Item, VocSplit, find_pairs

from .declaration import CLASSES, Pictures

HELD_OUT = 4  # every fourth training picture is what tuning is scored on
Listed = list[tuple[Path, list[Item]]]  # pictures and what is in them


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: where it can be had, and how a checkout is read.

    `read` gives the pictures to train on and those to be scored on, by the data set's own splits.
    """

    repository: str
    commit: str
    licence: str
    read: Callable[[Path], tuple[Listed, Listed]]
    flip: bool = True


def read_bccd(root: Path) -> tuple[Listed, Listed]:
    """Blood smears: the splits "train", and "val" and "test" together."""
    base = root / "BCCD"

    def split(*names: str) -> Listed:
        listed = [base / "ImageSets" / "Main" / f"{name}.txt" for name in names]
        stems = [stem for file in listed for stem in _lines(file)]
        return _voc(base / "JPEGImages", base / "Annotations", stems)

    return split("train"), split("val", "test")


def read_cards(root: Path) -> tuple[Listed, Listed]:
    """Playing cards: the folders "train" and "test", annotations beside the pictures."""
    folders = [root / "images" / name for name in ("train", "test")]
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(f"--root {root}: there is no folder {folder}.")
    train, test = (_voc(folder, folder) for folder in folders)
    return train, test


def read_deeppcb(root: Path) -> tuple[Listed, Listed]:
    """Circuit boards: "trainval" and "test"; lines `x1 y1 x2 y2 type`, types from 1."""
    base = root / "PCBData"

    def split(name: str) -> Listed:
        found: Listed = []
        for line in _lines(base / f"{name}.txt", whole=True):
            picture, boxes = (base / part for part in line.split()[:2])
            picture = picture.with_name(f"{picture.stem}_test{picture.suffix}")
            if not picture.is_file():
                raise SystemExit(f"--root {root}: {picture} is missing.")
            numbers = [[int(x) for x in row.split()] for row in _lines(boxes, whole=True)]
            items = [
                Item([float(x) for x in row[:4]], CLASSES["deeppcb"][row[4]], False)
                for row in numbers
            ]
            found.append((picture, items))
        return found

    return split("trainval"), split("test")


SOURCES = {
    "bccd": Source(
        "Shenggan/BCCD_Dataset",
        "d272fb1",
        "MIT",
        read_bccd,
    ),
    "cards": Source(
        "EdjeElectronics/TensorFlow-Object-Detection-API-Tutorial-Train-Multiple-Objects-Windows-10",
        "c164582",
        "Apache-2.0",
        read_cards,
        flip=False,  # a mirrored letter is none
    ),
    "deeppcb": Source("tangsanli5201/DeepPCB", "08e98c4", "MIT", read_deeppcb),
}


class PictureSet:
    """Pictures in memory: uint8 `images`, (3, h, w) each, and the boxes of all, packed.

    An item is a float image in [0, 1] and torchvision's target, as of `DigitScenes`.
    """

    def __init__(
        self, images: Sequence[Tensor], boxes: Tensor, labels: Tensor, first: Tensor
    ) -> None:
        self.images, self.boxes, self.labels, self.first = images, boxes, labels, first

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.images[index].float() / 255, self.target(index)

    def target(self, index: int) -> Target:
        """The boxes of one picture, without touching its pixels."""
        start, end = int(self.first[index]), int(self.first[index + 1])
        return {"boxes": self.boxes[start:end], "labels": self.labels[start:end]}

    def take(self, indices: Sequence[int]) -> PictureSet:
        """Some of the pictures, in this order."""
        rows = [torch.arange(int(self.first[i]), int(self.first[i + 1])) for i in indices]
        counts = torch.tensor([0, *(len(x) for x in rows)])
        kept = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        images = [self.images[i] for i in indices]
        return PictureSet(images, self.boxes[kept], self.labels[kept], counts.cumsum(0))


def load(wanted: Pictures, root: Path | None, cache: Path) -> tuple[DetectionData, Tensor]:
    """The data that a training declares, and bool (R,): whose label was made wrong.

    Boxes marked difficult and boxes without area are left out.

    Raises:
        SystemExit: They are not cached yet and `root` is no checkout of the public repository.
    """
    train, scored = resized(wanted.source, wanted.side, root, cache)
    class_names, flip = CLASSES[wanted.source], SOURCES[wanted.source].flip
    numbers = range(len(train))
    if wanted.held_out:
        scored = train.take([i for i in numbers if i % HELD_OUT == HELD_OUT - 1])
        train = train.take([i for i in numbers if i % HELD_OUT != HELD_OUT - 1])
    if wanted.share < 1:
        order = np.random.default_rng(0).permutation(len(train))
        train = train.take(sorted(order[: round(wanted.share * len(train))].tolist()))
    train, wrong = mislabelled(train, wanted.wrong_labels, len(class_names))
    truth = index_truth(scored, class_names)
    data = DetectionData(wanted.source, train, scored, truth, class_names, DIGIT_AREAS, flip=flip)
    return data, wrong


def mislabelled(given: PictureSet, share: float, classes: int) -> tuple[PictureSet, Tensor]:
    """Another class, any of them alike, for `round(share * R)` of R boxes; and which, bool (R,).

    Those of a small share are among those of a larger one.
    """
    number, rng = len(given.labels), np.random.default_rng(0)
    rows = torch.from_numpy(rng.permutation(number)[: round(share * number)])
    step = torch.from_numpy(rng.integers(1, classes - 1, size=number))
    wrong = torch.zeros(number, dtype=torch.bool)
    wrong[rows] = True
    others = 1 + (given.labels - 1 + step) % (classes - 1)
    labels = torch.where(wrong, others, given.labels)
    return PictureSet(given.images, given.boxes, labels, given.first), wrong


def resized(name: str, side: int, root: Path | None, cache: Path) -> tuple[PictureSet, PictureSet]:
    """All pictures, their longer side `side` px, from the cache or read now and kept there."""
    stamp = f"{name}-{side}-{source_digest(__file__)[:12]}"
    path = cache / "pictures" / f"{stamp}.pt"
    stored = storage.load(path)
    if not isinstance(stored, list):
        if root is None:
            raise SystemExit(
                f"--data {name} needs --root, a checkout of github.com/{SOURCES[name].repository}."
            )
        if not root.is_dir():
            raise SystemExit(f"--root: there is no folder {root}.")
        stored = [_decoded(x, side, CLASSES[name]) for x in SOURCES[name].read(root)]
        storage.save(stored, path)
    train, scored = (PictureSet(**x) for x in stored)
    return train, scored


def described(wanted: Pictures, data: DetectionData) -> dict[str, Any]:
    """What a result says of its data, with a digest of what was trained and scored on."""
    source, digest = SOURCES[wanted.source], hashlib.sha256()
    for split in (data.train, data.validation):
        assert isinstance(split, PictureSet)
        for x in (*split.images, split.boxes, split.labels, split.first):
            digest.update(x.numpy().tobytes())
    return {
        "name": wanted.source,
        "repository": f"github.com/{source.repository}",
        "commit": source.commit,
        "licence": source.licence,
        "trained on": len(data.train),
        "scored on": len(data.validation),
        "digest": digest.hexdigest()[:12],
    }


def _decoded(listed: Listed, side: int, class_names: Sequence[str]) -> Mapping[str, Any]:
    """The contents of a `PictureSet`."""
    images: list[Tensor] = []
    boxes: list[list[float]] = []
    labels: list[int] = []
    first = [0]
    for path, items in listed:
        picture = Image.open(path).convert("RGB")
        factor = side / max(picture.size)
        width, height = (max(1, round(factor * x)) for x in picture.size)
        small = picture.resize((width, height), Image.Resampling.BOX, reducing_gap=None)
        across, down = width / picture.width, height / picture.height
        images.append(pil_to_tensor(small))
        for box, name, difficult in items:
            if not difficult:
                boxes.append([v * (down if i % 2 else across) for i, v in enumerate(box)])
                labels.append(class_names.index(name))
        first.append(len(boxes))
    return {"images": images, **target_of(boxes, labels), "first": torch.tensor(first)}


def _voc(pictures: Path, annotations: Path, stems: Sequence[str] | None = None) -> Listed:
    """Pairs of one folder or two in VOC's layout."""
    pairs = find_pairs(pictures, annotations, stems)
    return list(zip((picture for picture, _ in pairs), VocSplit(pairs).items, strict=True))


def _lines(file: Path, *, whole: bool = False) -> Iterator[str]:
    """The lines of a list, or their first words."""
    if not file.is_file():
        raise SystemExit(f"--root: {file} is missing; expected a checkout of the repository.")
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield line if whole else line.split()[0]
