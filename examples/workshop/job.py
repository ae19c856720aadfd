"""The job around `torchvision_frcnn.py`: data, teacher, the students' processes, what is kept."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import signal
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any, Protocol

from torch import nn

from . import storage
from .coco_eval import evaluate
from .detection_data import DetectionData, load_coco, load_digits
from .detectors import build_detector, find_teacher, half, keep_teacher, teacher_fingerprint
from .digit_scenes import SceneSettings
from .distillation import Experiment, Log
from .forecast import forecast
from .options import prepare, prepare_process, state_file
from .own_data import load_own
from .report import collect, draw, row_name, table, tensorboard
from .training import Interrupted, Recipe, Run, Trainer
from .voc_data import load_voc


class Train(Protocol):
    """Trains a student as far as it is not trained; `method` is "none" or what to distil."""

    def __call__(
        self,
        args: argparse.Namespace,
        experiment: Experiment,
        method: str,
        *,
        resume: bool,
        log: Log | None,
    ) -> Trainer: ...


def load_data(args: argparse.Namespace) -> DetectionData:
    """The data set that was asked for."""
    if args.data == "own":
        return load_own(args.train, args.validation)
    if args.data == "digits":
        return load_digits(args.cache, SceneSettings(*args.scenes))
    if not args.root.is_dir():
        raise SystemExit(f"There is no folder {args.root}.")
    return load_coco(args.root) if args.data == "coco" else load_voc(args.root)


def make_experiment(args: argparse.Namespace) -> Experiment:
    """What the students share, still without a teacher."""
    data = load_data(args)
    batches = max(1, len(data.train) // args.batch_size)
    recipe = Recipe(
        iterations=args.iterations or max(1, round(args.epochs * batches)),
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        flip=data.flip and not args.no_flip,
        amp=args.amp,
    )

    def make_student() -> nn.Module:
        return build_detector(
            args.student, data.num_classes, weights=args.student_weights, side=args.side
        )

    return Experiment(data, make_student, recipe, device=args.device, workers=args.workers)


def obtain_teacher(
    args: argparse.Namespace, experiment: Experiment, try_out: Callable[[Experiment], None]
) -> tuple[nn.Module, Run | None]:
    """The teacher from a file, from a former run or trained now (then with its `Run`).

    `try_out` gets the experiment with an untrained one, so that what cannot work shows before hours
    of training.
    """
    data, weights, fingerprint = experiment.data, args.teacher_weights, ""
    recipe = dataclasses.replace(experiment.recipe, iterations=args.teacher_iterations, seed=0)
    if weights is None and args.data == "digits" and args.teacher == "small-teacher":
        recipe = Recipe(iterations=args.teacher_iterations)
        fingerprint = teacher_fingerprint(SceneSettings(*args.scenes), recipe)
        if not args.train_teacher:
            weights = find_teacher(fingerprint, args.cache)
    elif weights is None and not args.train_teacher:
        raise SystemExit(
            f"--method {args.method} needs a trained teacher: give --teacher-weights (a file or "
            "DEFAULT) or --train-teacher."
        )

    def make_teacher() -> nn.Module:
        given = None if weights is None else str(weights)
        return build_detector(args.teacher, data.num_classes, weights=given, side=args.side)

    if weights is not None:
        return make_teacher().to(args.device), None
    untrained = make_teacher().to(args.device)
    try_out(dataclasses.replace(experiment, teacher=untrained))
    school = dataclasses.replace(experiment, make_student=make_teacher, recipe=recipe)
    forecast("The teacher", untrained, data, recipe)
    trainer = school.train("teacher", state=state_file(args, "teacher"), resume=args.resume)
    teacher = trainer.model
    teacher.load_state_dict(half(teacher))  # as it will be when it is read back
    scores = evaluate(teacher, data, label="teacher")
    keep_teacher(teacher, fingerprint, scores, args.output / "teacher.pt")
    if fingerprint:
        keep_teacher(teacher, fingerprint, scores, args.cache / "teacher_digits.pt")
    return teacher, trainer.run


def train_plain(train: Train, args: argparse.Namespace) -> None:
    """The student without distillation, in a process of its own; the result is its state file."""
    prepare_process(args)
    experiment = dataclasses.replace(make_experiment(args), line=1)
    try:
        train(args, experiment, "none", resume=args.resume, log=logger(args, "none"))
    except (Interrupted, KeyboardInterrupt):
        raise SystemExit(130) from None


@contextlib.contextmanager
def beside(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> Iterator[None]:
    """Do `work` in another process while the block runs; both stop when one is stopped."""
    process = get_context("spawn").Process(target=work, args=(args,))
    ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: quiet until it trains
    process.start()
    signal.signal(signal.SIGINT, ours)
    try:
        yield
        process.join()
    finally:
        process.terminate()  # a training takes this as Ctrl-C
        process.join()
    if process.exitcode == 130:
        raise Interrupted
    if process.exitcode:
        raise SystemExit("The student without distillation could not be trained.")


def run(
    args: argparse.Namespace, train: Train, try_out: Callable[[Experiment], None]
) -> dict[str, Any]:
    """The whole job; returns what `metrics.json` holds.

    `train` trains one student, `try_out` makes a distiller without training.
    """
    prepare(args)
    experiment = make_experiment(args)
    # Wrong names, wrong weights and too little disk show before anything is trained.
    student = experiment.make_student()
    parameters = sum(p.numel() for p in student.parameters())
    storage.require_disk(args.output, 2**26 + 40 * parameters, "the output")
    models: dict[str, nn.Module] = {}
    runs: dict[str, Run | None] = {}
    if args.method != "none":
        models["teacher"], runs["teacher"] = obtain_teacher(args, experiment, try_out)
        experiment = dataclasses.replace(experiment, teacher=models["teacher"])
        if runs["teacher"] is None:
            try_out(experiment)
    forecast("A student", student.to(args.device), experiment.data, experiment.recipe)
    if args.warm_start:
        start = state_file(args, "start")
        experiment.train("student, first", state=start, resume=args.resume)
    arms = [args.method] if args.no_baseline or args.method == "none" else ["none", args.method]
    trainers: dict[str, Trainer] = {}
    if len(arms) == args.processes == 2:
        with beside(functools.partial(train_plain, train), args):
            log = logger(args, args.method)
            distilled = train(args, experiment, args.method, resume=args.resume, log=log)
        trainers["none"] = train(args, experiment, "none", resume=True, log=None)
        trainers[args.method] = distilled
    else:
        for arm in arms:
            trainers[arm] = train(args, experiment, arm, resume=args.resume, log=logger(args, arm))
    for arm, trainer in trainers.items():
        models[row_name(arm)], runs[row_name(arm)] = trainer.model, trainer.run
        storage.save(trainer.model.state_dict(), args.output / f"student_{arm}.pt")
    metrics = collect(args, experiment.data, models, runs)
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    draw(args, experiment, models, runs, metrics, trainers[args.method].kd)
    print(table(metrics))
    print(f"Weights, metrics.json and pictures are in {args.output}.")
    return metrics


def logger(args: argparse.Namespace, arm: str) -> Log | None:
    """Of one student, if TensorBoard is wanted."""
    return tensorboard(None if args.log_dir is None else args.log_dir / arm)
