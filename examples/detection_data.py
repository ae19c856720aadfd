"""Data sets for the examples: digit scenes, a COCO tree, a VOC tree; batches in a seeded order."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection, VOCDetection
from torchvision.transforms.functional import hflip, pil_to_tensor

from digit_scenes import CLASS_NAMES, DigitScenes, SceneSettings, load_digit_scenes

Target = dict[str, Tensor]
Batch = tuple[list[Tensor], list[Target]]

VOC_CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car") + (
    "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant",
    "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
COCO_AREAS = (32.0**2, 96.0**2)
DIGIT_AREAS = (16.0**2, 28.0**2)
_BOXES_PER_IMAGE = 1 << 16


class DetectionSet(Protocol):
    """Images (3, H, W) in [0, 1] with torchvision's targets: "boxes" (r, 4), "labels" (r,)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Target]: ...


@dataclasses.dataclass(frozen=True)
class DetectionData:
    """The two splits of a data set and how it is scored.

    `areas` are the two areas (square pixels of the picture) between small, medium and large.
    """

    name: str
    train: DetectionSet
    validation: DetectionSet
    ground_truth: COCO
    class_names: Sequence[str]
    areas: tuple[float, float]
    flip: bool

    @property
    def num_classes(self) -> int:
        """Classes including the background, as torchvision counts them."""
        return len(self.class_names)


def box_id(image: int, box: int) -> int:
    """The number that `PrototypeBank.ids` reports for a box of a training image."""
    return image * _BOXES_PER_IMAGE + box


def find_box(identity: int) -> tuple[int, int]:
    """The training image and the box in it that `box_id` numbered."""
    return divmod(identity, _BOXES_PER_IMAGE)


class _Batches(Dataset[tuple[Tensor, Target]]):
    """A split addressed by (index, flipped), with "ids" (r,) added to every target."""

    def __init__(self, split: DetectionSet) -> None:
        self.split = split

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, Target]:
        index, flipped = key
        image, target = self.split[index]
        boxes = target["boxes"]
        if flipped:
            image = hflip(image)
            boxes = boxes[:, [2, 1, 0, 3]] * boxes.new_tensor([-1, 1, -1, 1])
            boxes = boxes + boxes.new_tensor([image.shape[-1], 0, image.shape[-1], 0])
        ids = torch.arange(len(boxes)) + box_id(index, 0)
        return image, {"boxes": boxes, "labels": target["labels"], "ids": ids}


def _collate(items: list[tuple[Tensor, Target]]) -> Batch:
    return [image for image, _ in items], [target for _, target in items]


def epoch_batches(
    split: DetectionSet,
    batch_size: int,
    *,
    seed: int,
    epoch: int = 0,
    flip: bool = False,
    skip: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """The full batches of one epoch: order and mirroring depend on `seed` and `epoch` alone.

    `skip` leaves out the first batches, to go on where an interrupted run stopped.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator).tolist()
    mirrored = (torch.rand(len(split), generator=generator) < 0.5 * flip).tolist()
    keys = list(zip(order, mirrored, strict=True))
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return _load(split, batches[skip:], workers)


def first_batches(split: DetectionSet, images: int, batch_size: int) -> Iterator[Batch]:
    """The first images of a split, in order."""
    keys = [(index, False) for index in range(min(images, len(split)))]
    return _load(split, [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)], 0)


def to_device(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """The batches with all their tensors on `device`."""
    for images, targets in batches:
        yield (
            [image.to(device) for image in images],
            [{name: tensor.to(device) for name, tensor in target.items()} for target in targets],
        )


def _load(
    split: DetectionSet, batches: list[list[tuple[int, bool]]], workers: int
) -> Iterator[Batch]:
    loader = DataLoader(
        _Batches(split),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # or the loader would draw from the global random state
    )
    return iter(loader)


def load_digits(cache: Path, settings: SceneSettings) -> DetectionData:
    """Digit scenes, made on the first call."""
    splits = (load_digit_scenes(split, settings, cache) for split in ("train", "validation"))
    return pair_scenes(*splits)


def pair_scenes(train: DigitScenes, validation: DigitScenes) -> DetectionData:
    """A data set of digit scenes to train on and others to be scored on."""
    truth = _index_truth(validation, CLASS_NAMES)
    return DetectionData("digits", train, validation, truth, CLASS_NAMES, DIGIT_AREAS, flip=False)


def _index_truth(scenes: DigitScenes, class_names: Sequence[str]) -> COCO:
    annotations: list[dict[str, Any]] = []
    for image in range(len(scenes)):
        target = scenes.target(image)
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            annotations.append(_annotation(len(annotations) + 1, image, label, box))
    return _as_coco(range(len(scenes)), annotations, class_names)


def _annotation(
    number: int, image: int, label: int, box: Sequence[float], crowd: bool = False
) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    return {
        "id": number, "image_id": image, "category_id": label, "iscrowd": int(crowd),
        "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
    }  # fmt: skip


def _as_coco(
    images: Sequence[int], annotations: list[dict[str, Any]], class_names: Sequence[str]
) -> COCO:
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": image} for image in images],
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(class_names) if n],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools speaks to the world
        truth.createIndex()
    return truth


class CocoSplit:
    """One split of a COCO tree; image n is the n-th image id in ascending order."""

    def __init__(self, root: Path, split: str) -> None:
        pictures, annotations = root / split, root / "annotations" / f"instances_{split}.json"
        for path in (pictures, annotations):
            if not path.exists():
                raise SystemExit(f"No COCO data in {root}: {path} is missing.")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.source = CocoDetection(str(pictures), str(annotations))
        except (json.JSONDecodeError, KeyError, AssertionError) as error:
            raise SystemExit(f"{annotations} is not a COCO annotation file: {error}.") from None
        self.truth: COCO = self.source.coco
        if min(self.truth.getCatIds(), default=0) < 1:
            raise SystemExit(f"{annotations} needs categories with ids from 1; 0 is background.")
        self.image_ids: list[int] = self.source.ids

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        picture, annotations = self.source[index]
        boxes, labels = [], []
        for annotation in annotations:
            x, y, width, height = annotation["bbox"]
            if width > 0 and height > 0 and not annotation.get("iscrowd", 0):
                boxes.append([x, y, x + width, y + height])
                labels.append(annotation["category_id"])
        return pil_to_tensor(picture).float() / 255, _target(boxes, labels)


class VocSplit:
    """One split of a VOC tree; boxes marked difficult are not trained on."""

    def __init__(self, root: Path, split: str) -> None:
        years = sorted(path.name[3:] for path in (root / "VOCdevkit").glob("VOC20*"))
        if not years:
            raise SystemExit(f"No VOC data in {root}: VOCdevkit/VOC<year> is missing.")
        try:
            self.source = VOCDetection(str(root), year=years[-1], image_set=split)
        except (RuntimeError, OSError, ValueError) as error:
            raise SystemExit(f"No VOC {split} split in {root}: {error}.") from None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        picture, annotation = self.source[index]
        objects = [o for o in _objects(annotation) if not o[2]]
        target = _target([box for box, _, _ in objects], [label for _, label, _ in objects])
        return pil_to_tensor(picture).float() / 255, target

    def ground_truth(self) -> COCO:
        """All boxes; the difficult ones neither help nor harm the score."""
        annotations: list[dict[str, Any]] = []
        for image, file in enumerate(self.source.annotations):
            parsed = self.source.parse_voc_xml(ElementTree.parse(file).getroot())
            for box, label, difficult in _objects(parsed):
                annotations.append(_annotation(len(annotations) + 1, image, label, box, difficult))
        return _as_coco(range(len(self)), annotations, VOC_CLASSES)


def _objects(annotation: dict[str, Any]) -> Iterator[tuple[list[float], int, bool]]:
    """Box xyxy (from 0), label and difficulty of each object of a parsed VOC annotation."""
    for item in annotation["annotation"].get("object", []):
        corners = [float(item["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")]
        box = [corners[0] - 1, corners[1] - 1, corners[2], corners[3]]
        if item["name"] not in VOC_CLASSES:
            raise SystemExit(f"{item['name']!r} is not one of the 20 classes of VOC.")
        yield box, VOC_CLASSES.index(item["name"]), item.get("difficult", "0") == "1"


def _target(boxes: list[list[float]], labels: list[int]) -> Target:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def load_coco(root: Path) -> DetectionData:
    """`root`/{train2017,val2017} and `root`/annotations/instances_{train2017,val2017}.json."""
    train, validation = CocoSplit(root, "train2017"), CocoSplit(root, "val2017")
    categories = {c["id"]: c["name"] for c in train.truth.loadCats(train.truth.getCatIds())}
    unknown = set(validation.truth.getCatIds()) - set(categories)
    if unknown:
        raise SystemExit(f"The validation split has classes {sorted(unknown)} never trained on.")
    names = ["background", *(categories.get(n, "-") for n in range(1, max(categories) + 1))]
    return DetectionData("coco", train, validation, validation.truth, names, COCO_AREAS, flip=True)


def load_voc(root: Path) -> DetectionData:
    """`root`/VOCdevkit/VOC<year>, the newest year found; splits "train" and "val"."""
    train, validation = VocSplit(root, "train"), VocSplit(root, "val")
    truth = validation.ground_truth()
    return DetectionData("voc", train, validation, truth, VOC_CLASSES, COCO_AREAS, flip=True)
