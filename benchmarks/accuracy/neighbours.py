"""Does a teacher's space know classes? Asked before the relation term is trained.

The relation term copies which prototypes an instance resembles. It can teach classes only where the
nearest prototype, or the nearest other instance, has the instance's class more often than chance:
counted here on instances that were not trained on, by level, in several spaces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from global_kd import Targets
from global_kd.functional import select_prototypes
from global_kd.instances import pool_levels
from global_kd.ops.cosine import cosines, unit_rows
from workshop.detection_data import Batch, DetectionData, first_batches

from ..environment import environment
from .declaration import Trial
from .experiments import TEACHER
from .perform import load_data, shipped, trained
from .real import Real
from .store import Store
from .variants import coefficients, embedding
from .wrong_labels import areas

IMAGES = 400  # of either split, at most
PROTOTYPES, INSTANCES = 10, 400  # of a class, and of how many of its instances
SMALLEST = 4.0  # pixels; smaller boxes have next to no cell
STEMS = ("Mul_301", "Mul_334", "Mul_367")  # of YOLOX's head, 64 channels, by their ONNX names
YOLOX_SIDE, YOLOX_STRIDES, PADDING = 416, (8.0, 16.0, 32.0), 114.0

Rows = tuple[dict[str, Tensor], Tensor]  # by space (R, C), and the labels (R,)
Look = Callable[[Batch], Rows]


def looks_of(model: Any, strides: Sequence[float]) -> Look:
    """The spaces of one of torchvision's Faster R-CNNs: its levels, its RoI head's embedding."""

    @torch.no_grad()
    def look(batch: Batch) -> Rows:
        images, truth = model.transform(list(batch[0]), [dict(t) for t in batch[1]])
        maps = list(model.backbone(images.tensors).values())[: len(strides)]
        boxes = Targets.from_list(truth)
        levels = pool_levels(maps, boxes, strides)
        spaces = {f"stride {s:g}": x for s, x in zip(strides, levels, strict=True)}
        return spaces | {"RoI embedding": embedding(model, maps, boxes, strides)}, boxes.labels

    return look


def looks_of_yolox(file: Path) -> Look:
    """Those of the head's stems of a YOLOX in ONNX; needs `pip install onnx2torch`."""
    from onnx2torch import convert

    model = convert(str(file)).eval()
    seen: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name in STEMS:
        modules[name].register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, output)
        )

    @torch.no_grad()
    def look(batch: Batch) -> Rows:
        found: list[list[Tensor]] = []
        for image, target in zip(*batch, strict=True):
            scale = YOLOX_SIDE / max(image.shape[1:])
            size = [round(scale * x) for x in image.shape[1:]]
            bgr = 255 * image.flip(0)[None]
            small = nn.functional.interpolate(bgr, size=size, mode="bilinear", antialias=True)
            right, down = YOLOX_SIDE - size[1], YOLOX_SIDE - size[0]
            model(nn.functional.pad(small, (0, right, 0, down), value=PADDING))
            boxes = Targets.from_list([{**target, "boxes": target["boxes"] * scale}])
            found.append([*pool_levels([seen[x] for x in STEMS], boxes, YOLOX_STRIDES)])
        labels = torch.cat([target["labels"] for target in batch[1]])
        levels = [torch.cat(x) for x in zip(*found, strict=True)]
        names = (f"stride {s:g}" for s in YOLOX_STRIDES)
        return dict(zip(names, levels, strict=True)), labels

    return look


def gather(look: Look, split: Any, label: str) -> Rows:
    """The rows of the first pictures of a split; boxes below `SMALLEST` pixels are left out."""
    spaces: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    for images, targets in tqdm(first_batches(split, IMAGES, 8), desc=label, leave=False):
        kept = []
        for target in targets:
            sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
            large = sides.amin(dim=1) >= SMALLEST
            kept.append({name: target[name][large] for name in ("boxes", "labels")})
        rows, found = look((images, kept))
        labels.append(found)
        for name, x in rows.items():
            spaces.setdefault(name, []).append(x)
    return {name: torch.cat(x) for name, x in spaces.items()}, torch.cat(labels)


def prototypes(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """At most `PROTOTYPES` of each class by the library's pursuit: rows (P, C), classes (P,)."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    chosen: list[Tensor] = []
    for label in labels.unique().tolist():
        mine = order[labels[order] == label][:INSTANCES]
        chosen.append(mine[select_prototypes(rows[mine], rows[mine], PROTOTYPES)])
    picks = torch.cat(chosen)
    return rows[picks], labels[picks]


def right(found: Tensor, labels: Tensor) -> dict[str, float]:
    """How often a class was right: over all instances, and the mean over the classes."""
    hit = (found == labels).double()
    by_class = [float(hit[labels == label].mean()) for label in labels.unique()]
    return {
        "all": round(float(hit.mean()), 4),
        "classes": round(sum(by_class) / len(by_class), 4),
    }


def agreement(train: Tensor, trained_as: Tensor, rows: Tensor, labels: Tensor) -> dict[str, Any]:
    """Of rows (R, C) that were not trained on, how often what is nearest has their class.

    "instance": the nearest other of them; "prototype": the nearest prototype of the training rows;
    "projection": the prototype with the largest coefficient of the ridge projection on all of them.
    "centred" is each around the mean of the prototypes.
    """
    unit = unit_rows(rows)
    itself = (unit @ unit.T).fill_diagonal_(-2)
    told: dict[str, Any] = {"instance": right(labels[itself.argmax(dim=1)], labels)}
    g, classes = prototypes(train, trained_as)
    middle = g.mean(dim=0)
    for name, x, p in (("", rows, g), (", centred", rows - middle, g - middle)):
        told[f"prototype{name}"] = right(classes[cosines(x, p).argmax(dim=1)], labels)
    everywhere = g.expand(1, len(rows), *g.shape)
    valid = torch.ones(1, len(rows), len(g), dtype=torch.bool)
    along = coefficients(rows[None], everywhere, valid)[0]
    told["projection"] = right(classes[along.argmax(dim=1)], labels)
    return told


def measure(look: Look, data: DetectionData) -> dict[str, Any]:
    """`agreement` in each space, with the shares that chance would give."""
    train, trained_as = gather(look, data.train, "training pictures")
    rows, labels = gather(look, data.validation, "others")
    counts = torch.bincount(labels)
    return {
        "instances": len(labels),
        "classes": int((counts > 0).sum()),
        "most frequent": round(float(counts.max() / counts.sum()), 4),
        "spaces": {name: agreement(train[name], trained_as, rows[name], labels) for name in rows},
    }


def write(data: str, store: Store, file: Path, yolox: Path | None = None) -> None:
    """Measure a data set's teacher, and a YOLOX, and keep the numbers beside the others'.

    Raises:
        SystemExit: The teacher was not trained yet.
    """
    trial = TEACHER if data == "digits" else Real(data).teacher()
    loaded, _ = load_data(trial, store)
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    looks: dict[str, tuple[Look, str]] = {}
    if (teacher := teacher_of(trial, store)) is not None:
        looks[f"{data}, its teacher"] = looks_of(teacher.eval(), (4.0, 8.0, 16.0)), trial.identity
    elif yolox is None:
        raise SystemExit(f"Train the teacher first: run --data {data} --only {data}-q1-terms")
    if yolox is not None:
        looks[f"{data}, YOLOX-Nano of COCO"] = looks_of_yolox(yolox), yolox.name
    for name, (look, identity) in looks.items():
        known[name] = {
            "teacher": identity,
            **measure(look, loaded),
            "environment": environment(torch.device("cpu")),
        }
        if identity == trial.identity and data != "digits":
            known[name]["wrong labels"] = areas(data, store)
        print(name, json.dumps(known[name]["spaces"], indent=1))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def teacher_of(trial: Trial, store: Store) -> nn.Module | None:
    """The detector of a teacher's trial, if there is one."""
    if (known := shipped(trial)) is not None:
        return known
    return trained(trial, store) if store.weights(trial).is_file() else None
