"""A golden record: what the library computes today, to be compared bit for bit after a change.

    python tests/golden.py record before.json
    python tests/golden.py compare before.json

For changes that must change no number, such as moving code. Small detectors train for some steps
under fixed seeds; kept are all terms, and hashes of what comes of them. Bits differ between
processors and versions of torch, so record and compare on one machine. Only names that
`global_kd` itself offers are used, so that everything behind them may move.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whatever is installed

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import global_kd
from global_kd import PAPER, Distiller, FeatureTap, GlobalKnowledgeLoss, Schedule, Targets
from global_kd.losses import LabelOptions, RelationOptions

K, STEPS = 4, 6  # the background of torchvision included
SIDES = ((64, 96), (56, 90), (80, 60))  # of the images; the last one has no boxes
CANVAS = (96, 96)  # of a home-made detector's batch

# --- detectors ---------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Strides 4, 8 and 16."""

    def __init__(self, width):
        super().__init__()
        self.out_channels = width
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.BatchNorm2d(width)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1) for _ in range(2))

    def forward(self, images):
        maps = [self.norm(self.stem(images))]
        for down in self.down:
            maps.append(down(maps[-1].relu()))
        return OrderedDict((str(i), x) for i, x in enumerate(maps))


class Neck(Backbone):
    """The same as a list."""

    def forward(self, images):
        return list(super().forward(images).values())


ANCHORS = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
SIZE = {"min_size": 64, "max_size": 96}


def faster_rcnn(width):
    return FasterRCNN(
        Backbone(width),
        rpn_anchor_generator=ANCHORS,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 3, 1),
        box_head=TwoMLPHead(width * 9, 16),
        box_predictor=FastRCNNPredictor(16, K),
        box_batch_size_per_image=32,
        rpn_batch_size_per_image=32,
        rpn_post_nms_top_n_train=100,
        **SIZE,
    )


def retinanet(width):
    model = RetinaNet(Backbone(width), K, anchor_generator=ANCHORS, **SIZE)
    last = model.head.classification_head.cls_logits  # as made it says "nothing" everywhere,
    nn.init.normal_(last.weight, std=0.3)  # and soft labels would be 0
    nn.init.constant_(last.bias, -1)
    return model


class HomeMade(nn.Module):
    """Of no framework."""

    def __init__(self, width):
        super().__init__()
        self.neck = Neck(width)
        self.head = nn.Conv2d(width, K, 1)

    def forward(self, images):
        return [self.head(x) for x in self.neck(images)]


# --- batches -----------------------------------------------------------------------------------


def scenes(seed, ids=False):
    """Images and targets as torchvision takes them; boxes of 12 to about 60 pixels."""
    g = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for i, (height, width) in enumerate(SIDES):
        count = 0 if i == len(SIDES) - 1 else 6
        image = torch.rand(3, height, width, generator=g)
        span = torch.tensor([width, height])
        corner = torch.rand(count, 2, generator=g) * 0.35 * span
        boxes = torch.cat([corner, corner + 12 + 0.4 * torch.rand(count, 2, generator=g) * span], 1)
        labels = torch.randint(1, K, (count,), generator=g)
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist()):
            image[label - 1, y1:y2, x1:x2] += 0.7
        images.append(image)
        targets.append({"boxes": boxes, "labels": labels})
        if ids:
            targets[-1]["ids"] = torch.arange(count) + 100 * seed + 10 * i
    return images, targets


def stacked(seed, ids=False):
    """The same for a home-made detector: one tensor and one table."""
    images, targets = scenes(seed, ids)
    canvas = torch.zeros(len(images), 3, *CANVAS)
    for place, image in zip(canvas, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    return canvas, Targets.from_list(targets)


# --- cases and settings ------------------------------------------------------------------------


def own_losses(model, images, targets):
    return model(images, targets)


def home_made_losses(model, images, targets):
    return {"loss": sum((x - 0.5).square().mean() for x in model(images))}


class Case(NamedTuple):
    detector: Callable  # width -> model
    batch: Callable  # seed -> images and targets
    losses: Callable  # model, images, targets -> the detector's own, by name
    pyramid: str  # the module that puts it out
    options: dict  # of the Distiller


HOME_MADE = {
    "student_path": "neck",
    "teacher_path": "neck",
    "example_inputs": (torch.zeros(1, 3, *CANVAS),),
}
CASES = {
    "faster_rcnn": Case(faster_rcnn, scenes, own_losses, "backbone", {}),
    "retinanet": Case(retinanet, scenes, own_losses, "backbone", {}),
    "home_made": Case(HomeMade, stacked, home_made_losses, "neck", HOME_MADE),
}
SMALL = {"total_steps": 8, "refresh_every": 2, "min_side": 4, "num_prototypes": 3}
OTHERS = {
    "adapter": "conv1x1",
    "schedule": Schedule("cosine"),
    "relation": 5,
    "levels": "all",
    "normalizer": "cells",
    "label_options": LabelOptions(class_reduction="sum"),
    "relation_options": RelationOptions(own_class=True, center=True),
    "max_instances": 5,
    "seed": 3,
}
SETTINGS = {  # options of the loss, and of the Distiller
    "defaults": ({}, {}),
    "paper": ({**PAPER, "finest_scale": 12}, {}),
    "others": ({**OTHERS, "boxes": "ground_truth"}, {}),
}

# --- recording ---------------------------------------------------------------------------------


def digest(tensors: Iterable[Tensor]) -> str:
    """Of dtypes, shapes and every bit."""
    whole = hashlib.sha256()
    for x in tensors:
        x = x.detach().contiguous()
        whole.update(f"{x.dtype} {tuple(x.shape)}".encode())
        whole.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def exact(numbers: Mapping[str, float]) -> dict[str, str]:
    return {name: x.hex() for name, x in numbers.items()}


def adapters(kd) -> str:
    """By the last two parts of their names, so that what owns them may be called otherwise."""
    state = {
        tuple(name.split(".")[-2:]): x
        for name, x in kd.state_dict().items()
        if "adapters" in name and torch.is_tensor(x) and x.is_floating_point()
    }
    return digest(state[name] for name in sorted(state))


def bank(kd) -> dict[str, str]:
    return dict(zip(("student", "teacher", "labels"), (digest([x]) for x in kd.loss.bank.flat())))


def run(case: Case, setting) -> dict:
    """Everything that one training leaves; the global random state is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _run(case, *setting)


def _run(case: Case, rdm, options) -> dict:
    student, teacher = case.detector(8), case.detector(12)
    drawn = digest([torch.get_rng_state()])
    kd = Distiller(
        student, teacher, GlobalKnowledgeLoss(K, **SMALL, **rdm), **case.options | options
    )
    tap = FeatureTap(student, case.pyramid)
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.01, momentum=0.9)

    def detection_loss(model):
        return sum(case.losses(model, *case.batch(0)).values())

    first = kd.check(
        *case.batch(0), optimizer=optimizer, detection_loss=detection_loss, verbose=False
    )
    record = {"check before": str(first).splitlines(), "steps": []}
    for seed in range(STEPS):
        images, targets = case.batch(seed)
        losses = case.losses(student, images, targets)
        terms = kd(images, targets)
        losses |= terms
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        record["steps"].append(exact({name: x.item() for name, x in losses.items()}))
    maps = tap.read(images)[case.pyramid]
    truth, omega = kd.weigh(*case.batch(0))
    record |= {
        "student": digest(student.state_dict().values()),
        "adapters": adapters(kd),
        "bank": bank(kd),
        "tapped maps": digest(maps.values() if isinstance(maps, dict) else maps),
        "weigh": digest([truth.boxes, truth.labels, truth.image_index, omega]),
        "telemetry": exact(kd.loss.telemetry()),
        "check": str(kd.check(*case.batch(0), verbose=False)).splitlines(),
    }
    # Twice: the second pass uses the rows that the first has kept of the teacher.
    for name in ("refreshed", "refreshed again"):
        kd.refresh([case.batch(seed, ids=True) for seed in (7, 8, 9)], progress=False)
        record[name] = bank(kd)
        record[name]["text"] = str(kd.loss.bank).splitlines()
    # Known detectors draw samples of their own; the library must draw nothing.
    drawn_since = digest([torch.get_rng_state()])
    record["random state"] = "as before" if drawn_since == drawn else drawn_since
    return record


def everything() -> dict:
    made_with = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    runs = {
        f"{name}, {setting}": run(case, options)
        for name, case in CASES.items()
        for setting, options in SETTINGS.items()
    }
    return {"made with": made_with, **runs}


# --- comparing ---------------------------------------------------------------------------------


def flat(value, path="") -> dict[str, object]:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, x in items for k, v in flat(x, f"{path} / {key}".strip(" /")).items()}
    return {path: value}


def differences(before, after) -> list[str]:
    """A line for every entry that is not the same, or on one side only."""
    old, new = flat(before), flat(after)
    return [
        f"{path}: {old.get(path, 'nothing')} -> {new.get(path, 'nothing')}"
        for path in dict.fromkeys([*old, *new])
        if old.get(path, "nothing") != new.get(path, "nothing")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"running {Path(global_kd.__file__).parent}")
    now = everything()
    if args.what == "record":
        args.file.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        return 0
    before = json.loads(args.file.read_text(encoding="utf-8"))
    found = differences(before, now)
    print("\n".join(found) or f"all {len(flat(now))} entries are the same")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
