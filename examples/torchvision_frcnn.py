"""Distil a torchvision detector: python examples/torchvision_frcnn.py

Without arguments a small Faster R-CNN learns to find handwritten digits twice, from the same
start and the same batches: alone, and with the knowledge of a larger teacher. Everything a run
leaves behind (weights, metrics, pictures) lies in one folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any

from torch import nn

import storage
from coco_eval import evaluate
from detection_data import DetectionData, load_coco, load_digits, load_voc
from detectors import build_detector, find_teacher, half, keep_teacher, teacher_fingerprint
from digit_scenes import SceneSettings
from distillation import Experiment, Log
from options import knowledge, parse, prepare, prepare_process, state_file
from report import ROWS, collect, draw, table, tensorboard
from training import Interrupted, Recipe, Run, Trainer


def load_data(args: argparse.Namespace) -> DetectionData:
    """The data set that was asked for."""
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
        flip=data.flip,
        amp=args.amp,
    )

    def make_student() -> nn.Module:
        return build_detector(
            args.student, data.num_classes, weights=args.student_weights, side=args.side
        )

    return Experiment(data, make_student, recipe, device=args.device, workers=args.workers)


def obtain_teacher(
    args: argparse.Namespace, experiment: Experiment
) -> tuple[nn.Module, Run | None]:
    """The teacher from a file, from a former run or trained now (then with its `Run`)."""
    data, weights, fingerprint = experiment.data, args.teacher_weights, ""
    recipe = dataclasses.replace(experiment.recipe, iterations=args.teacher_iterations, seed=0)
    if weights is None and args.data == "digits" and args.teacher == "small-teacher":
        recipe = Recipe(iterations=args.teacher_iterations)
        fingerprint = teacher_fingerprint(SceneSettings(*args.scenes), recipe)
        if not args.train_teacher:
            weights = find_teacher(fingerprint, args.cache)
    elif weights is None and not args.train_teacher:
        raise SystemExit(
            "--method gk needs a trained teacher: give --teacher-weights (a file or DEFAULT) or "
            "--train-teacher."
        )

    def make_teacher() -> nn.Module:
        given = None if weights is None else str(weights)
        return build_detector(args.teacher, data.num_classes, weights=given, side=args.side)

    if weights is not None:
        return make_teacher().to(args.device), None
    school = dataclasses.replace(experiment, make_student=make_teacher, recipe=recipe)
    trainer = school.train("teacher", state=state_file(args, "teacher"), resume=args.resume)
    teacher = trainer.model
    teacher.load_state_dict(half(teacher))  # as it will be when it is read back
    scores = evaluate(teacher, data, label="teacher")
    keep_teacher(teacher, fingerprint, scores, args.output / "teacher.pt")
    if fingerprint:
        keep_teacher(teacher, fingerprint, scores, args.cache / "teacher_digits.pt")
    return teacher, trainer.run


def train_arm(
    args: argparse.Namespace, experiment: Experiment, arm: str, *, resume: bool, log: Log | None
) -> Trainer:
    """The student without ("none") or with ("gk") distillation, as far as it is not trained."""
    start = storage.load(state_file(args, "start"))["model"] if args.warm_start else None
    return experiment.train(
        ROWS[arm],
        knowledge(args) if arm == "gk" else None,
        start=start,
        state=state_file(args, arm),
        resume=resume,
        log=log,
    )


def train_plain(args: argparse.Namespace) -> None:
    """The student without distillation, in a process of its own; the result is its state file."""
    prepare_process(args)
    experiment = dataclasses.replace(make_experiment(args), line=1)
    try:
        train_arm(args, experiment, "none", resume=args.resume, log=logger(args, "none"))
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole job; returns what `metrics.json` holds."""
    prepare(args)
    experiment = make_experiment(args)
    # Wrong names, wrong weights and too little disk show before anything is trained.
    parameters = sum(p.numel() for p in experiment.make_student().parameters())
    storage.require_disk(args.output, 2**26 + 40 * parameters, "the output")
    models: dict[str, nn.Module] = {}
    runs: dict[str, Run | None] = {}
    if args.method == "gk":
        models["teacher"], runs["teacher"] = obtain_teacher(args, experiment)
        experiment = dataclasses.replace(experiment, teacher=models["teacher"])
    if args.warm_start:
        start = state_file(args, "start")
        experiment.train("student, first", state=start, resume=args.resume)
    arms = {"none": ["none"], "gk": ["gk"] if args.no_baseline else ["none", "gk"]}[args.method]
    trainers: dict[str, Trainer] = {}
    if len(arms) == args.processes == 2:
        with beside(train_plain, args):
            log = logger(args, "gk")
            trainers["gk"] = train_arm(args, experiment, "gk", resume=args.resume, log=log)
        trainers["none"] = train_arm(args, experiment, "none", resume=True, log=None)
    else:
        for arm in arms:
            log = logger(args, arm)
            trainers[arm] = train_arm(args, experiment, arm, resume=args.resume, log=log)
    for arm in arms:
        models[ROWS[arm]], runs[ROWS[arm]] = trainers[arm].model, trainers[arm].run
        storage.save(trainers[arm].model.state_dict(), args.output / f"student_{arm}.pt")
    metrics = collect(args, experiment.data, models, runs)
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    draw(args, experiment, models, runs, metrics, trainers["gk"].kd if "gk" in trainers else None)
    print(table(metrics))
    print(f"Weights, metrics.json and pictures are in {args.output}.")
    return metrics


def logger(args: argparse.Namespace, arm: str) -> Log | None:
    """Of one student, if TensorBoard is wanted."""
    return tensorboard(None if args.log_dir is None else args.log_dir / arm)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse(arguments)
    try:
        run(args)
    except (Interrupted, KeyboardInterrupt):
        print("\nInterrupted; the same command with --resume continues.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise SystemExit(f"{error.strerror or storage.first_line(error)}{where}.") from None


if __name__ == "__main__":
    main()
