"""Distil an FCOS or RetinaNet of torchvision: python examples/torchvision_retinanet.py

A large detector learns to find handwritten digits, then a small one twice, from the same start:
alone and with the large one as its teacher. About ten minutes on two cores, no download; where
other work runs beside it, set OMP_NUM_THREADS=1. FCOS learns these digits in a few hundred steps;
`--arch retinanet` takes far more (`--steps`). For pictures of your own replace `data`, and
`detector` by torchvision's `fcos_resnet50_fpn`, `retinanet_resnet50_fpn` or any other;
docs/torchvision.md goes through that.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

from global_kd import Distiller, GlobalKnowledgeLoss
from workshop import storage
from workshop.coco_eval import evaluate
from workshop.detection_data import DetectionData, epoch_batches, load_digits
from workshop.digit_scenes import SceneSettings
from workshop.small_detectors import SIZES, SmallPyramid

BATCH = 16


def detector(arch: str, size: str, num_classes: int) -> nn.Module:
    """torchvision's own classes on a small pyramid of strides 4, 8 and 16."""
    body, squares = SmallPyramid(SIZES[size]), ((1.0,),) * 3
    sides = {"min_size": 96, "max_size": 96, "score_thresh": 0.001, "detections_per_img": 30}
    if arch == "fcos":
        cells = AnchorGenerator(((4,), (8,), (16,)), squares)
        return FCOS(body, num_classes, anchor_generator=cells, **sides)
    anchors = AnchorGenerator(((13,), (22,), (40,)), squares)
    norm = functools.partial(nn.GroupNorm, 8)  # without it this head learns slowly
    head = RetinaNetHead(body.out_channels, 1, num_classes, norm_layer=norm)
    return RetinaNet(body, num_classes, anchor_generator=anchors, head=head, **sides)


def train(
    student: nn.Module, data: DetectionData, steps: int, teacher: nn.Module | None = None
) -> None:
    """The loop, with a teacher or without."""
    epochs = (epoch_batches(data.train, BATCH, seed=0, epoch=n) for n in itertools.count())
    loader = itertools.chain.from_iterable(epochs)
    kd = None
    if teacher is not None:
        loss = GlobalKnowledgeLoss(
            data.num_classes,
            total_steps=steps,
            refresh_every=max(1, steps // 10),  # a few times in the training: often once an epoch
            min_side=10,  # digits are small: the default leaves out those under 15 px,
            finest_scale=16,  # and puts all of them on the finest level
        )
        kd = Distiller(student, teacher, loss, share=1.0)  # each term as strong as its own loss
    parameters = [*student.parameters(), *([] if kd is None else kd.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    student.train()
    for step in range(steps):
        images, targets = next(loader)
        if kd is not None and step == 0:
            kd.check(images, targets, optimizer=optimizer)  # what is wrong shows here
        losses = student(images, targets)
        if kd is not None:
            losses |= kd(images, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            terms = ", ".join(f"{name} {float(loss.detach()):.2f}" for name, loss in losses.items())
            print(f"step {step + 1} of {steps}: {terms}")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train all three; returns the AP of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", choices=("fcos", "retinanet"), default="fcos")
    parser.add_argument("--steps", type=int, default=300, help="of a student; the teacher has more")
    parser.add_argument("--scenes", type=int, nargs=2, default=(8000, 600), metavar="N")
    parser.add_argument("--cache", type=Path, default=storage.cache_folder())
    parser.add_argument("--output", type=Path, default=Path("runs/student.pt"))
    args = parser.parse_args(arguments)
    data = load_digits(args.cache, SceneSettings(*args.scenes))
    torch.manual_seed(0)
    teacher = detector(args.arch, "small-teacher", data.num_classes)
    alone = detector(args.arch, "small-student", data.num_classes)
    student = copy.deepcopy(alone)

    print("The teacher:")
    train(teacher, data, 2 * args.steps)
    print("The student alone:")
    train(alone, data, args.steps)
    print("The student with its teacher:")
    train(student, data, args.steps, teacher)

    storage.save(student.state_dict(), args.output)  # loads into the bare torchvision model
    scores = {
        name: evaluate(model, data)["AP"]
        for name, model in (("teacher", teacher), ("alone", alone), ("distilled", student))
    }
    print("AP in percent: " + ", ".join(f"{name} {100 * x:.1f}" for name, x in scores.items()))
    print(f"The distilled student is in {args.output}.")
    return scores


if __name__ == "__main__":
    main()
