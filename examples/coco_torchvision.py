"""Distil torchvision detectors on COCO: ResNet-101-FPN into ResNet-50-FPN, on one or more GPUs.

    torchrun --nproc-per-node=8 examples/coco_torchvision.py --data /path/to/coco \
        --depth 101 --no-distill --output runs/teacher
    torchrun --nproc-per-node=8 examples/coco_torchvision.py --data /path/to/coco \
        --teacher runs/teacher/model.pt --output runs/distilled

`--arch` is fasterrcnn or retinanet. docs/coco.md has all commands and how to read the results.

Taken from Tang et al. (ECCV 2022) and the configuration released with it: the pairs; SGD with
momentum 0.9, weight decay 1e-4 and a learning rate of 0.02 (RetinaNet: 0.01) for 16 images, warmed
up over 500 iterations and divided by 10 before epochs 17 and 23 of 24 (`--schedule 1x`: 9 and 12
of 12); images of 800 to 1333 pixels, mirrored at random; imitation inside of boxes with weight 1,
outside with 4, through 3x3 adapters, and relations with 25 (theirs is 5, summed over five levels;
the library takes the mean), the three decaying as 1 - epoch / epochs; soft labels with weight 1 and
temperature 2; the student's sampled proposals as boxes; ten prototypes of up to 800 instances per
class and level, larger than 30 pixels, made before each epoch in eval mode.

Otherwise than there: the student starts from ImageNet weights, unless `--start` gives it the
trained student that theirs started from. Their released code never reached the relation term.
RetinaNet, whose configuration was not released, learns on ground-truth boxes (theirs: positive
anchors), with one sigmoid per class. The head counts 91 classes, so a mean over classes is over 91
columns, not 81. The 30 pixels are those of the resized image, the 800 count instances, not images.
Batch norm of a trained backbone is frozen with its affine part, as torchvision does it. bfloat16
autocast on GPUs; theirs ran in float32.

As there, images without boxes are left out and crowd boxes are not trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from global_kd import Distiller, Schedule
from workshop import storage
from workshop.coco_eval import METRICS, detect, score
from workshop.coco_options import FREE, RATES, SCHEDULES, TERMS, WEIGHTS, parse
from workshop.detection_data import (
    Batch,
    CocoSplit,
    Target,
    epoch_batches,
    load_coco,
    ordered_batches,
    to_device,
)
from workshop.detectors import load_backbone, load_weights, resnet_detector, small_retinanet
from workshop.methods import make_losses
from workshop.options import note_options
from workshop.processes import Place, join
from workshop.report import environment, tensorboard
from workshop.small_detectors import SIZES, small_faster_rcnn

LOG_EVERY = 50  # iterations


class Training:
    """One detector in training, with its teacher if it has one, on this rank of the job."""

    def __init__(self, args: argparse.Namespace, place: Place) -> None:
        self.args, self.place = args, place
        if not args.data.is_dir():
            raise SystemExit(f"There is no folder {args.data}.")
        self.data = load_coco(args.data, annotation_ids=True, keep_empty=False)
        assert isinstance(self.data.train, CocoSplit)
        self.train, self.wide = self.data.train, self.data.train.wide
        whole = args.batch_size * place.size
        self.steps = sum(images // whole for images in Counter(self.wide).values())
        if self.steps == 0:
            raise SystemExit(f"{args.data} has too few images for a batch of {whole}.")
        self.epochs, milestones = SCHEDULES[args.schedule]
        torch.manual_seed(args.seed)
        trained = args.start is not None or args.backbone_weights != "random"
        self.student = self.build(args.depth, trained=trained)
        if place.rank == 0 and not args.resume:  # the other ranks take over what rank 0 has
            self.initialise()
        self.student.to(place.device)
        self.kd = None if args.no_distill else self.distiller()
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        if self.kd is not None:
            parameters += self.kd.parameters()
        lr = args.lr or RATES[args.arch] * whole / 16
        self.optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)
        drops, warmup = [self.steps * epoch for epoch in milestones], 2 if args.quick else 500

        def factor(step: int) -> float:
            rise = min(1.0, 0.001 + step / warmup)
            return rise * 0.1 ** sum(step >= drop for drop in drops)

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.history: list[dict[str, Any]] = []
        self.log = tensorboard(args.log_dir) if place.rank == 0 else None
        if place.rank == 0 and not args.resume:
            self.check()
        self.model = place.wrap(self.student)
        if not args.resume:
            self.calibrate()
        torch.manual_seed(args.seed * 1000 + place.rank)  # each rank samples its own proposals
        if args.resume:
            self.load()

    def build(self, depth: int, *, trained: bool) -> nn.Module:
        """The detector that was asked for, not yet with its weights."""
        args, classes = self.args, self.data.num_classes
        if not args.quick:
            model = resnet_detector(args.arch, depth, classes, trained=trained)
        else:
            small = small_retinanet if args.arch == "retinanet" else small_faster_rcnn
            model = small(SIZES["small-student" if depth == 50 else "small-teacher"], classes)
        return model.to(memory_format=torch.channels_last) if args.channels_last else model

    def initialise(self) -> None:
        """The weights that the student starts from."""
        if self.args.start is not None:
            load_weights(self.student, self.args.start, self.data.num_classes)
        elif self.args.backbone_weights == "random" or self.args.quick:
            print("The backbone starts from random weights: expect a much lower AP.", flush=True)
        else:
            load_backbone(self.student, self.args.backbone_weights, self.args.depth)

    def distiller(self) -> Distiller:
        """The teacher, and what the student is to learn from it."""
        args, data = self.args, self.data
        teacher = self.build(args.teacher_depth, trained=True)
        load_weights(teacher, args.teacher, data.num_classes)
        decay = Schedule("linear", steps=self.epochs)
        global_knowledge = {
            **WEIGHTS[args.weights],
            **{name: getattr(args, name) for name in TERMS},
            "adapter": args.adapter,
            "schedule": {f"kd_{name}": decay for name in TERMS if name != "logits"},
            "refresh_every": self.steps if args.prototypes == "stream" else None,
            "min_side": 10.0 if args.quick else 30.0,
            "class_names": data.class_names,
        }
        losses = make_losses(
            args.method,
            data.num_classes,
            steps=self.epochs * self.steps,
            seed=args.seed,
            gk=global_knowledge,
        )
        try:
            return Distiller(self.student, teacher.to(self.place.device), losses)
        except ValueError as error:
            raise SystemExit(f"--method {args.method}: {str(error).rstrip('.')}.") from None

    @property
    def prototypes(self) -> str | None:
        """Where prototypes come from, if the method has some: "refresh" or "stream"."""
        return self.args.prototypes if "gk" in self.args.method.split("+") else None

    def batches(self, epoch: int, workers: int) -> Iterator[Batch]:
        """This rank's batches of an epoch, on its device."""
        loaded = epoch_batches(
            self.train,
            self.args.batch_size,
            seed=self.args.seed,
            epoch=epoch,
            flip=True,
            workers=workers,
            rank=self.place.rank,
            ranks=self.place.size,
            wide=self.wide,
        )
        return to_device(loaded, self.place.device)

    def precision(self) -> torch.autocast:
        """The region in which the detectors run."""
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.args.amp)

    def check(self) -> None:
        """The doctor on the first batch: on the screen, and in `check.txt`."""
        if self.kd is None:
            return
        images, targets = next(self.batches(0, workers=0))
        with self.precision():
            report = self.kd.check(images, targets, optimizer=self.optimizer)
        (self.args.output / "check.txt").write_text(f"{report}\n")

    def calibrate(self) -> None:
        """Weights from the gradients on the first batches, kept in the checkpoint; all ranks."""
        if self.kd is None or self.args.share is None:
            return
        with self.precision():
            self.kd.calibrate(
                loader=self.batches(0, workers=0),
                share=self.args.share,
                verbose=self.place.rank == 0,
            )

    def fit(self) -> None:
        """Train to the last epoch, from wherever the history ends; evaluate on the way."""
        self.evaluate_if_due()  # a resumed run may have been cut off there
        while len(self.history) < self.epochs:
            start, done = time.perf_counter(), len(self.history)
            self.renew_prototypes()
            losses = self.train_epoch(done)
            self.place.share_buffers(self.student)
            if self.kd is not None and self.prototypes == "stream":
                self.kd.loss.refresh()  # now, so that the checkpoint holds no sample
            seconds = round(time.perf_counter() - start, 1)
            self.history.append({"epoch": done + 1, "seconds": seconds, "losses": losses})
            self.save()
            self.evaluate_if_due()
        if self.place.rank == 0:
            storage.save(self.student.state_dict(), self.args.output / "model.pt")

    def renew_prototypes(self) -> None:
        """The paper's: before each epoch, from all training images, each rank reading a share."""
        if self.kd is None or self.prototypes != "refresh":
            return
        mine = range(self.place.rank, len(self.train), self.place.size)
        size = self.args.batch_size
        loaded = ordered_batches(self.train, mine, size, workers=self.args.workers)
        batches = tqdm(
            to_device(loaded, self.place.device),
            total=math.ceil(len(mine) / size),
            desc="prototypes",
            disable=self.place.rank != 0,
        )
        with self.precision():
            self.kd.refresh(batches, progress=False)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images; returns the losses of its last iteration."""
        self.model.train()
        first = self.place.rank == 0
        bar = tqdm(total=self.steps, desc=f"epoch {epoch + 1}/{self.epochs}", disable=not first)
        numbers: dict[str, float] = {}
        with bar:
            for images, targets in self.batches(epoch, self.args.workers):
                losses = self.step(images, targets)
                bar.update()
                if first and (bar.n % LOG_EVERY == 0 or bar.n == self.steps):
                    numbers = self.note(losses, epoch * self.steps + bar.n)
                    bar.set_postfix(loss=f"{sum(numbers.values()):.3f}")
        return numbers

    def step(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """One iteration; returns each term of the loss."""
        with self.precision():
            losses: dict[str, Tensor] = self.model(images, targets)
            if self.kd is not None:
                losses = losses | self.kd(images, targets)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack([x.float() for x in losses.values()]).sum().backward()
        self.optimizer.step()
        self.scheduler.step()
        return {name: x.detach() for name, x in losses.items()}

    def note(self, terms: dict[str, Tensor], iteration: int) -> dict[str, float]:
        """The losses as numbers, for the log, too; one that is not finite ends the run."""
        losses = {name: float(x) for name, x in terms.items()}
        bad = ", ".join(name for name, value in losses.items() if not math.isfinite(value))
        if bad:
            raise SystemExit(
                f"Training diverged before iteration {iteration} ({bad} is not finite); "
                "try a lower --lr."
            )
        if self.log is not None:
            numbers = {f"loss/{name}": value for name, value in losses.items()}
            numbers["lr"] = self.optimizer.param_groups[0]["lr"]
            if self.kd is not None:
                own = sum(value for name, value in losses.items() if not name.startswith("kd_"))
                numbers |= {f"kd/{k}": v for k, v in self.kd.telemetry(own).items()}
            for name, value in numbers.items():
                self.log(name, value, iteration)
        return losses

    def evaluate_if_due(self) -> None:
        """Score the last epoch, if its turn has come and nobody has yet."""
        done = len(self.history)
        due = done and (done == self.epochs or done % self.args.evaluate_every == 0)
        if due and "AP" not in self.history[-1]:
            self.history[-1] |= self.evaluate()
            self.write_results()

    def evaluate(self) -> dict[str, float]:
        """COCO's metrics on all validation images, the same on every rank."""
        images, found = range(len(self.data.validation)), self.detections()
        scores = score(self.data, found, images) if self.place.rank == 0 else {}
        scores = self.place.gather(scores)[0]
        if self.log is not None:
            for name, value in scores.items():
                self.log(name, value, len(self.history) * self.steps)
        return scores

    def detections(self) -> list[dict[str, Any]]:
        """Those on all validation images; each rank detects on a share, in float32."""
        mine = range(self.place.rank, len(self.data.validation), self.place.size)
        label = "evaluate" if self.place.rank == 0 else None
        found = detect(self.student, self.data, mine, label=label, batch_size=1)
        return [x for part in self.place.gather(found) for x in part]

    def write_results(self) -> None:
        """`results.json`: the scores of the last epoch evaluated, and what led to them."""
        if self.place.rank != 0:
            return
        args, last = self.args, self.history[-1]
        results = {
            **{name: last[name] for name in METRICS},
            "epoch": last["epoch"],
            "parameters": sum(p.numel() for p in self.student.parameters()),
            "training_seconds": round(sum(row["seconds"] for row in self.history), 1),
            "epochs": self.history,
            "options": json.loads((args.output / "options.json").read_text()),
            "environment": environment(self.place.device_name),
        }
        (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        shown = "  ".join(f"{name} {100 * last[name]:.1f}" for name in METRICS)
        print(f"epoch {last['epoch']}: {shown}", flush=True)

    def save(self) -> None:
        """Rank 0 writes everything needed to go on, in one file that is complete or not there."""
        cuda = torch.cuda.get_rng_state() if self.place.device.type == "cuda" else None
        random = self.place.gather({"cpu": torch.get_rng_state(), "cuda": cuda})
        if self.place.rank == 0:
            state = {
                "history": self.history,
                "model": self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "kd": None if self.kd is None else self.kd.state_dict(),
                "random": random,
            }
            storage.save(state, self.args.output / "checkpoint.pt")

    def load(self) -> None:
        """Go back to where `save` was called."""
        path = self.args.output / "checkpoint.pt"
        state = storage.load(path)
        if state is None:
            raise SystemExit(f"Cannot resume: {path} is missing or damaged.")
        self.history = state["history"]
        self.student.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.kd is not None:
            self.kd.load_state_dict(state["kd"])
        random = state["random"][self.place.rank]
        torch.set_rng_state(random["cpu"])
        if random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"])


def run(args: argparse.Namespace, place: Place) -> Training:
    """The whole job."""
    args.processes = place.size
    if args.amp is None:
        args.amp = place.device.type == "cuda"
    if place.rank == 0:
        storage.require_disk(args.output, 2**30 if not args.quick else 2**24, "the output")
        if not args.resume and (args.output / "checkpoint.pt").exists():
            raise SystemExit(
                f"There is a run in {args.output}: give --resume, or another --output."
            )
        note_options(args, FREE)
    training = Training(args, place)
    training.fit()
    return training


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse(arguments)
    with join() as place:
        run(args, place)
        if place.rank == 0:
            print(f"Weights, checkpoint and results.json are in {args.output}.")


if __name__ == "__main__":
    main()
