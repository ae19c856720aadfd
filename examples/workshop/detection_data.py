"""Data sets for the examples: digit scenes and a COCO tree; batches in a seeded order."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection
from torchvision.transforms.functional import hflip, pil_to_tensor

from .digit_scenes import CLASS_NAMES, DigitScenes, SceneSettings, load_digit_scenes

Target = dict[str, Tensor]
Batch = tuple[list[Tensor], list[Target]]

COCO_AREAS = (32.0**2, 96.0**2)
DIGIT_AREAS = (16.0**2, 28.0**2)
_BOXES_PER_IMAGE = 1 << 16


class DetectionSet(Protocol):
    """Images (3, H, W) in [0, 1] with torchvision's targets: "boxes" (r, 4), "labels" (r,)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Target]: ...


class Labelled(Protocol):
    """A split in memory, whose targets can be read without its pixels."""

    def __len__(self) -> int: ...
    def target(self, index: int) -> Target: ...


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
    """A split addressed by (index, flipped), its targets with "ids" (r,): its own or `box_id`s."""

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
        ids = target.get("ids")
        if ids is None:
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
    rank: int = 0,
    ranks: int = 1,
    wide: Sequence[bool] | None = None,
) -> Iterator[Batch]:
    """The full batches of one epoch: order and mirroring depend on `seed` and `epoch` alone.

    `skip` leaves out the first batches, to go on where an interrupted run stopped. Several `ranks`
    share batches of `ranks * batch_size` images: all take equally many steps, and together they see
    what one rank would with the larger batch. With `wide`, which says of each image whether it is
    wider than high, the images of a step are of one orientation, so that less of it is padding.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator).tolist()
    mirrored = (torch.rand(len(split), generator=generator) < 0.5 * flip).tolist()
    keys, whole = list(zip(order, mirrored, strict=True)), ranks * batch_size
    groups = [keys]
    if wide is not None:
        groups = [[key for key in keys if wide[key[0]] == side] for side in (True, False)]
    batches = [group[i : i + whole] for group in groups for i in range(0, len(group), whole)]
    if len(batches) > 1:
        batches = [batch for batch in batches if len(batch) == whole]
    if wide is not None:  # else all the wide ones would come first
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    return _load(split, [batch[rank::ranks] for batch in batches[skip:]], workers)


def first_batches(split: DetectionSet, images: int, batch_size: int) -> Iterator[Batch]:
    """The first images of a split, in order."""
    return ordered_batches(split, range(min(images, len(split))), batch_size)


def ordered_batches(
    split: DetectionSet, indices: Sequence[int], batch_size: int, *, workers: int = 0
) -> Iterator[Batch]:
    """These images of a split, in this order and not mirrored."""
    keys = [(index, False) for index in indices]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    return _load(split, batches, workers)


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
    truth = index_truth(validation, CLASS_NAMES)
    return DetectionData("digits", train, validation, truth, CLASS_NAMES, DIGIT_AREAS, flip=False)


def index_truth(scenes: Labelled, class_names: Sequence[str]) -> COCO:
    """The ground truth of a split, its images numbered from 0."""
    annotations: list[dict[str, Any]] = []
    for image in range(len(scenes)):
        target = scenes.target(image)
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            annotations.append(annotation_of(len(annotations) + 1, image, label, box))
    return as_coco(range(len(scenes)), annotations, class_names)


def annotation_of(
    number: int, image: int, label: int, box: Sequence[float], crowd: bool = False
) -> dict[str, Any]:
    """A box xyxy as COCO writes it."""
    x1, y1, x2, y2 = box
    return {
        "id": number, "image_id": image, "category_id": label, "iscrowd": int(crowd),
        "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
    }  # fmt: skip


def as_coco(
    images: Sequence[int], annotations: list[dict[str, Any]], class_names: Sequence[str]
) -> COCO:
    """Ground truth that `COCOeval` scores against; class n is called `class_names[n]`."""
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
    """A COCO annotation file and its pictures; image n is the n-th image id in ascending order.

    Crowds and boxes without area are not trained on; without `keep_empty` neither are images that
    have nothing else. With `annotation_ids` the targets hold the numbers of their annotations as
    "ids".
    """

    def __init__(
        self,
        pictures: Path,
        annotations: Path,
        *,
        annotation_ids: bool = False,
        keep_empty: bool = True,
    ) -> None:
        self.annotations = annotations
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.source = CocoDetection(str(pictures), str(annotations))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise SystemExit(f"{annotations} is not a COCO annotation file: {error}.") from None
        self.truth: COCO = self.source.coco
        if not keep_empty:
            annotated = self.truth.imgToAnns
            self.source.ids = [i for i in self.source.ids if any(map(_trains, annotated[i]))]
        self.image_ids: list[int] = self.source.ids
        self.annotation_ids = annotation_ids

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        picture, annotations = self.source[index]
        annotations = [annotation for annotation in annotations if _trains(annotation)]
        boxes = []
        for annotation in annotations:
            x, y, width, height = annotation["bbox"]
            boxes.append([x, y, x + width, y + height])
        target = target_of(boxes, [annotation["category_id"] for annotation in annotations])
        if self.annotation_ids:
            ids = [annotation["id"] for annotation in annotations]
            target["ids"] = torch.tensor(ids, dtype=torch.int64)
        return pil_to_tensor(picture).float() / 255, target

    @property
    def wide(self) -> list[bool]:
        """Of each image whether it is wider than high, by the annotation file."""
        entries = (self.truth.imgs[image] for image in self.image_ids)
        return [bool(entry["width"] > entry["height"]) for entry in entries]


def _trains(annotation: dict[str, Any]) -> bool:
    """Whether a COCO annotation is a box to train on."""
    width, height = annotation["bbox"][2:]
    return width > 0 and height > 0 and not annotation.get("iscrowd", 0)


def target_of(boxes: list[list[float]], labels: list[int]) -> Target:
    """Boxes xyxy and their labels as tensors, also where there are none."""
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def load_coco(
    root: Path, *, annotation_ids: bool = False, keep_empty: bool = True
) -> DetectionData:
    """`root`/{train2017,val2017} and `root`/annotations/instances_{train2017,val2017}.json.

    The options are those of `CocoSplit`, for the training split.
    """
    train = CocoSplit(
        *_coco_paths(root, "train2017"), annotation_ids=annotation_ids, keep_empty=keep_empty
    )
    validation = CocoSplit(*_coco_paths(root, "val2017"))
    for split in (train, validation):
        if min(split.truth.getCatIds(), default=0) < 1:
            raise SystemExit(
                f"{split.annotations} needs categories with ids from 1; 0 is background."
            )
    categories = {c["id"]: c["name"] for c in train.truth.loadCats(train.truth.getCatIds())}
    unknown = set(validation.truth.getCatIds()) - set(categories)
    if unknown:
        raise SystemExit(f"The validation split has classes {sorted(unknown)} never trained on.")
    names = ["background", *(categories.get(n, "-") for n in range(1, max(categories) + 1))]
    return DetectionData("coco", train, validation, validation.truth, names, COCO_AREAS, flip=True)


def _coco_paths(root: Path, split: str) -> tuple[Path, Path]:
    pictures, annotations = root / split, root / "annotations" / f"instances_{split}.json"
    for path in (pictures, annotations):
        if not path.exists():
            raise SystemExit(f"No COCO data in {root}: {path} is missing.")
    return pictures, annotations
