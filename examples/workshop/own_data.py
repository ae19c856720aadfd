"""Data of one's own: COCO json or VOC XML, with any folder of pictures and any classes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from .detection_data import COCO_AREAS, CocoSplit, DetectionData
from .voc_data import VocSplit, find_pairs, pair_splits


def load_own(train: Sequence[Path], validation: Sequence[Path]) -> DetectionData:
    """Two splits: each a folder of pictures and a COCO json or folder of XML files.

    One folder alone holds pictures and XML files side by side.
    """
    for path in (*train, *validation):
        if not path.exists():
            raise SystemExit(f"There is no {path}.")
    if train[-1].is_dir() != validation[-1].is_dir():
        raise SystemExit("--train and --validation need annotations of one kind, json or XML.")
    if train[-1].is_dir():
        pairs = [find_pairs(paths[0], paths[-1]) for paths in (train, validation)]
        return pair_splits("own", VocSplit(pairs[0]), VocSplit(pairs[1]))
    if len(train) == 1 or len(validation) == 1:
        raise SystemExit("A COCO json needs its pictures: --train PICTURES JSON.")
    return _coco(CocoSplit(*train), CocoSplit(*validation))


def _coco(train: CocoSplit, validation: CocoSplit) -> DetectionData:
    """Labels from 1, in order of the training split's category ids.

    COCO's own categories keep the ids that torchvision's weights were trained with.
    """
    categories = {c["id"]: str(c["name"]) for c in train.truth.dataset.get("categories", ())}
    if not categories:
        raise SystemExit(f"{train.annotations} has no categories.")
    known: list[str] = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if all(0 < n < len(known) and known[n] == name for n, name in categories.items()):
        class_names = ["background", *known[1:]]
    else:
        class_names = ["background", *dict.fromkeys(categories[n] for n in sorted(categories))]
    for split in (train, validation):
        _relabel(split, class_names)
    return DetectionData(
        "own", train, validation, validation.truth, class_names, COCO_AREAS, flip=True
    )


def _relabel(split: CocoSplit, class_names: Sequence[str]) -> None:
    """Category ids become labels, by name; what evaluation or training needs is filled in."""
    content, file = split.truth.dataset, split.annotations
    labels = {name: n for n, name in enumerate(class_names) if n}
    names = {c["id"]: str(c["name"]) for c in content.get("categories", ())}
    used = {names.get(a["category_id"], str(a["category_id"])) for a in content["annotations"]}
    if unknown := sorted(used - set(labels)):
        raise SystemExit(f"{file} has classes {unknown} never trained on.")
    for annotation in content["annotations"]:
        if len(annotation.get("bbox", ())) != 4:
            raise SystemExit(f"{file}: annotation {annotation['id']} has no bbox of four numbers.")
        width, height = annotation["bbox"][2:]
        annotation["category_id"] = labels[names[annotation["category_id"]]]
        annotation.setdefault("area", width * height)
        annotation.setdefault("iscrowd", 0)
    content["categories"] = [{"id": n, "name": name} for name, n in labels.items()]
    content.setdefault("info", {})
    root, missing = Path(split.source.root), []
    for entry in content["images"]:
        given = Path(entry["file_name"])
        if not (root / given).is_file():
            entry["file_name"] = given.name  # tools write the folder that they saw
        if not (root / entry["file_name"]).is_file():
            missing.append(given)
    if missing:
        number = f"{len(missing)} of {len(content['images'])} pictures are"
        raise SystemExit(f"{number} not in {root}, the first: {missing[0]}.")
    with contextlib.redirect_stdout(io.StringIO()):
        split.truth.createIndex()
