"""Distil a torchvision detector: python examples/torchvision_frcnn.py

Without arguments a small Faster R-CNN learns to find handwritten digits twice, from the same
start and the same batches: alone, and with the knowledge of a larger teacher. `--method frs` or
`--method gk+pkd` distils by other methods (docs/methods.md), `--train PICTURES JSON` and
`--validation PICTURES JSON` take data of your own. Everything a run leaves behind (weights,
metrics, pictures) lies in one folder.

What distillation is in code stands in this file: `make_distiller`, and the loop of `train`. What
is around it, from arguments to pictures, is in `workshop/job.py`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

import torch
from torch import nn

from global_kd import Distiller
from workshop import storage
from workshop.coco_eval import evaluate
from workshop.detection_data import first_batches, to_device
from workshop.distillation import Experiment, Log
from workshop.job import run
from workshop.methods import make_losses
from workshop.options import knowledge, parse, state_file
from workshop.report import row_name
from workshop.sizes import boxes_at_input, described, finest_stride, thresholds
from workshop.training import Interrupted, Trainer


def make_distiller(
    args: argparse.Namespace, experiment: Experiment, student: nn.Module, *, verbose: bool = False
) -> Distiller:
    """Both detectors and what the student is to learn; `verbose` tells which sizes were chosen."""
    data, teacher = experiment.data, experiment.teacher
    assert teacher is not None
    steps = experiment.recipe.iterations
    settings = knowledge(args, steps).options()  # of global knowledge, where that is distilled
    if args.data != "digits":  # for those the settings were chosen
        sizes, labels = boxes_at_input(data.train, student)
        stride = max(finest_stride(student), finest_stride(teacher))
        settings["min_side"], settings["finest_scale"] = thresholds(sizes, labels, stride)
        if verbose:
            print(described(sizes, settings["min_side"], settings["finest_scale"]))
    losses = make_losses(
        args.method,
        data.num_classes,
        steps=steps,
        seed=args.seed,
        gk=settings,
    )
    try:
        return Distiller(student, teacher, losses)
    except ValueError as error:
        raise SystemExit(f"--method {args.method}: {str(error).rstrip('.')}.") from None


def train(
    args: argparse.Namespace,
    experiment: Experiment,
    method: str,
    *,
    resume: bool,
    log: Log | None,
) -> Trainer:
    """One student, alone (method "none") or with its teacher, from wherever it was interrupted.

    All students start from the same weights and see the same batches.
    """
    data, recipe, device = experiment.data, experiment.recipe, experiment.device
    torch.manual_seed(recipe.seed)
    student = experiment.make_student()
    if args.warm_start:
        student.load_state_dict(storage.load(state_file(args, "start"))["model"])
    student.to(device)
    kd = None if method == "none" else make_distiller(args, experiment, student)
    torch.manual_seed(recipe.seed)

    trainer = Trainer(student, recipe, kd, args.workers)  # its optimizer has kd.parameters(), too
    state = state_file(args, method)
    if resume and state.is_file():
        trainer.load(state)
    elif kd is not None and args.share is not None:
        first = to_device(
            first_batches(data.train, 4 * recipe.batch_size, recipe.batch_size), device
        )
        kd.calibrate(loader=first, share=args.share)  # kept in kd.state_dict()

    def renew_prototypes() -> None:
        if kd is not None and args.prototype_images:
            images = first_batches(data.train, args.prototype_images, 25)
            kd.refresh(to_device(images, device), progress=False)

    for images, targets in trainer.batches(
        data.train,
        label=row_name(method),
        line=experiment.line,
        state=state,
        evaluate=lambda model: evaluate(model, data, limit=experiment.curve_images, label=None),
        log=log,
        before_epoch=renew_prototypes,
    ):
        with trainer.precision():
            losses = student(images, targets)
            if kd is not None:
                losses |= kd(images, targets)
        trainer.update(losses)
    return trainer


def try_out(args: argparse.Namespace, experiment: Experiment) -> None:
    """What the two detectors cannot give shows before anything is trained."""
    student = experiment.make_student().to(experiment.device)
    make_distiller(args, experiment, student, verbose=True).detach()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse(arguments)
    try:
        run(args, train, functools.partial(try_out, args))
    except (Interrupted, KeyboardInterrupt):
        print("\nInterrupted; the same command with --resume continues.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise SystemExit(f"{error.strerror or storage.first_line(error)}{where}.") from None


if __name__ == "__main__":
    main()
