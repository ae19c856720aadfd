"""Pictures with boxes in VOC's XML: the VOC tree itself, one like it, or any folder of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from .detection_data import COCO_AREAS, DetectionData, Target, annotation_of, as_coco, target_of

VOC_CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car") + (
    "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant",
    "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Item(NamedTuple):
    """A box xyxy (from 0), the name of its class, and whether it is marked difficult."""

    box: list[float]
    name: str
    difficult: bool


class VocSplit:
    """Pictures and the XML file of each; boxes marked difficult are not trained on."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        self.pictures = [picture for picture, _ in pairs]
        self.items = [_read(xml) for _, xml in pairs]
        self.class_names: Sequence[str] = ()  # what the labels are indices into

    @property
    def names(self) -> set[str]:
        """Of the classes that occur."""
        return {item.name for items in self.items for item in items}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        items = [item for item in self.items[index] if not item.difficult]
        labels = [self.class_names.index(item.name) for item in items]
        picture = Image.open(self.pictures[index]).convert("RGB")
        return pil_to_tensor(picture).float() / 255, target_of([x.box for x in items], labels)

    def ground_truth(self) -> COCO:
        """All boxes; the difficult ones neither help nor harm the score."""
        annotations: list[dict[str, Any]] = []
        for image, items in enumerate(self.items):
            for box, name, difficult in items:
                number, label = len(annotations) + 1, self.class_names.index(name)
                annotations.append(annotation_of(number, image, label, box, difficult))
        return as_coco(range(len(self)), annotations, self.class_names)


def _read(xml: Path) -> list[Item]:
    """The objects of an annotation; those without area are left out."""
    found = []
    try:
        for element in ElementTree.parse(xml).getroot().findall("object"):
            box = element.find("bndbox")
            assert box is not None
            x1, y1, x2, y2 = (
                float(box.findtext(side) or "nan") for side in ("xmin", "ymin", "xmax", "ymax")
            )
            if x1 < x2 and y1 < y2:
                name, difficult = element.findtext("name") or "", element.findtext("difficult")
                found.append(Item([x1 - 1, y1 - 1, x2, y2], name.strip(), difficult == "1"))
    except (ElementTree.ParseError, AssertionError, ValueError) as error:
        raise SystemExit(f"{xml} is not a VOC annotation ({error or 'no bndbox'}).") from None
    return found


def find_pairs(
    pictures: Path, annotations: Path, names: Iterable[str] | None = None
) -> list[tuple[Path, Path]]:
    """Picture and XML file of one name, from two folders or one; all of them, or the `names`."""
    by_stem = {p.stem: p for p in sorted(pictures.iterdir()) if p.suffix.lower() in _PICTURES}
    if names is None:
        names = sorted(path.stem for path in annotations.glob("*.xml"))
    pairs = [(by_stem.get(name), annotations / f"{name}.xml") for name in names]
    for picture, xml in pairs:
        if picture is None or not xml.is_file():
            raise SystemExit(
                f"{xml} is missing." if picture else f"There is no picture for {xml} in {pictures}."
            )
    if not pairs:
        raise SystemExit(f"There is no XML file in {annotations}.")
    return [(picture, xml) for picture, xml in pairs if picture is not None]


def pair_splits(
    name: str, train: VocSplit, validation: VocSplit, class_names: Sequence[str] | None = None
) -> DetectionData:
    """A data set of two splits; its classes are those of the training split, in order of name."""
    class_names = class_names or ("background", *sorted(train.names))
    if unknown := sorted((train.names | validation.names) - set(class_names)):
        raise SystemExit(f"The validation split has classes {unknown} never trained on.")
    train.class_names = validation.class_names = class_names
    truth = validation.ground_truth()
    return DetectionData(name, train, validation, truth, class_names, COCO_AREAS, flip=True)


def load_voc(root: Path) -> DetectionData:
    """`root`/VOCdevkit/VOC<year>, the newest year found, or a `root` that is laid out like one.

    That is, with the folders JPEGImages, Annotations and ImageSets/Main; splits "train" and "val".
    Classes are VOC's 20, or where others occur those that do.
    """
    years = sorted((root / "VOCdevkit").glob("VOC20*"))
    base = years[-1] if years else root
    if not (base / "Annotations").is_dir():
        raise SystemExit(
            f"No VOC data in {root}: Annotations or VOCdevkit/VOC<year> is missing; for other "
            "folders there are --train and --validation."
        )
    splits = []
    for split in ("train", "val"):
        listed = base / "ImageSets" / "Main" / f"{split}.txt"
        if not listed.is_file():
            raise SystemExit(f"No VOC {split} split in {root}: {listed} is missing.")
        names = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
        splits.append(VocSplit(find_pairs(base / "JPEGImages", base / "Annotations", names)))
    train, validation = splits
    known = train.names | validation.names <= set(VOC_CLASSES)
    return pair_splits("voc", train, validation, VOC_CLASSES if known else None)
