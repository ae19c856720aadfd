"""Tiny COCO and VOC trees: bright rectangles, one colour a class, on grey pictures."""

import json

import numpy as np
from PIL import Image


def draw(rng, number):
    """A picture (64, 96, 3) and its rectangles xyxy with their class, 0 or 1."""
    picture = np.full((64, 96, 3), 90, dtype=np.uint8)
    boxes = []
    for _ in range(number):
        x, y = int(rng.integers(0, 60)), int(rng.integers(0, 30))
        width, height, kind = (int(n) for n in (*rng.integers(16, 33, 2), rng.integers(2)))
        picture[y : y + height, x : x + width] = (250, 40, 40) if kind else (40, 250, 40)
        boxes.append((x, y, x + width, y + height, kind))
    return picture, boxes


def write_coco(root, images=6):
    """Classes 2 and 5; one image without boxes, a crowd, a box without area."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        rng, annotations, entries = np.random.default_rng(len(split)), [], []
        for image in range(images):
            picture, boxes = draw(rng, image % 3)
            name = f"{image:03d}.jpg"
            Image.fromarray(picture).save(root / split / name)
            entries.append({"id": 10 * image + 3, "file_name": name, "width": 96, "height": 64})
            for x1, y1, x2, y2, kind in boxes:
                bbox = [x1, y1, x2 - x1, y2 - y1]
                annotations.append(_annotation(annotations, image, 5 if kind else 2, bbox))
        annotations.append(_annotation(annotations, 1, 5, [0, 0, 40, 40], crowd=1))
        annotations.append(_annotation(annotations, 2, 2, [5, 5, 0, 9]))
        categories = [{"id": 2, "name": "green"}, {"id": 5, "name": "red"}]
        content = {"images": entries, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _annotation(before, image, category, bbox, crowd=0):
    return {
        "id": len(before) + 1,
        "image_id": 10 * image + 3,
        "category_id": category,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": crowd,
    }


def write_voc(root, images=6):
    """VOC 2007, classes "cat" and "dog"; every third object is difficult."""
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    rng, objects = np.random.default_rng(0), 0
    for split in ("train", "val"):
        names = [f"{split}{image}" for image in range(images)]
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for image, name in enumerate(names):
            picture, boxes = draw(rng, image % 3)
            Image.fromarray(picture).save(base / "JPEGImages" / f"{name}.jpg")
            xml = ""
            for x1, y1, x2, y2, kind in boxes:
                objects += 1
                corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
                xml += (
                    f"<object><name>{('cat', 'dog')[kind]}</name>"
                    f"<difficult>{int(objects % 3 == 0)}</difficult>"
                    f"<bndbox>{corners}<ymax>{y2}</ymax></bndbox></object>"
                )
            text = f"<annotation><filename>{name}.jpg</filename>{xml}</annotation>"
            (base / "Annotations" / f"{name}.xml").write_text(text)
    return root
