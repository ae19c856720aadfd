"""Distil a torchvision detector: python examples/torchvision_frcnn.py

Without arguments a small Faster R-CNN learns to find handwritten digits twice, from the same
start and the same batches: alone, and with the knowledge of a larger teacher. Everything a run
leaves behind (weights, metrics, pictures) lies in one folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import global_kd
import storage
from coco_eval import METRICS, evaluate
from detection_data import DetectionData, load_coco, load_digits, load_voc
from detectors import (
    TEACHER_ITERATIONS,
    build_detector,
    detector_names,
    find_teacher,
    half,
    keep_teacher,
    teacher_fingerprint,
)
from digit_scenes import SceneSettings
from distillation import Experiment, Knowledge, Log
from plots import draw_curves, draw_predictions, draw_prototypes
from training import Interrupted, Recipe, Run

ROWS = {"none": "student", "gk": "student + gk"}
NOT_COMPARED = ("resume", "output", "log_dir", "workers")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what depends on other options filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog=f"Detectors: {', '.join(detector_names())}.",
    )
    known = Knowledge()
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=("digits", "coco", "voc"), default="digits")
    data.add_argument("--root", type=Path, help="folder of the COCO or VOC tree")
    data.add_argument(
        "--scenes", type=int, nargs=2, default=(8000, 600), metavar=("TRAIN", "VALIDATION")
    )
    data.add_argument(
        "--cache", type=Path, default=storage.cache_folder(), help="for what is made once"
    )
    data.add_argument("--workers", type=int, default=0, help="processes that load images")
    models = parser.add_argument_group("detectors")
    models.add_argument("--teacher", help="a detector by name")
    models.add_argument("--student", help="a detector by name")
    models.add_argument("--teacher-weights", help="a file, or DEFAULT: torchvision's")
    models.add_argument("--student-weights", help="likewise, or 'backbone': trained on ImageNet")
    models.add_argument("--train-teacher", action="store_true", help="whatever is kept or shipped")
    models.add_argument("--teacher-iterations", type=int, help=f"default {TEACHER_ITERATIONS}")
    models.add_argument("--side", type=int, default=96, help="px that the small detectors look at")
    method = parser.add_argument_group("distillation")
    method.add_argument("--method", choices=("none", "gk"), default="gk")
    method.add_argument("--no-baseline", action="store_true", help="only the distilled student")
    for term in ("foreground", "background", "relation", "logits"):
        weight = getattr(known, term)
        method.add_argument(f"--{term}", type=float, default=weight, help=f"weight, {weight:g}")
    method.add_argument("--no-robust", action="store_true", help="all instances weigh the same")
    method.add_argument("--own-class", action="store_true", help="relations within the class")
    method.add_argument("--center", action="store_true", help="cosines around the mean prototype")
    method.add_argument("--boxes", choices=("proposals", "ground_truth"), default=known.boxes)
    method.add_argument(
        "--refresh-every",
        type=int,
        default=known.refresh_every,
        help="iterations to new prototypes",
    )
    method.add_argument(
        "--prototype-images", type=int, default=0, help="compute prototypes from N images instead"
    )
    method.add_argument("--warm-start", action="store_true", help="go on from a trained student")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=float, default=2)
    training.add_argument("--iterations", type=int, help="instead of --epochs")
    training.add_argument("--batch-size", type=int, default=16)
    training.add_argument("--lr", type=float, help="default 3e-3 (small detectors) or 1e-4")
    training.add_argument("--device", default="cpu")
    training.add_argument(
        "--threads", type=int, help="of the processor; default 1 (small detectors) or all"
    )
    training.add_argument("--amp", action="store_true", help="automatic mixed precision")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--output", type=Path, default=Path("runs/torchvision_frcnn"))
    training.add_argument("--resume", action="store_true", help="continue the run in --output")
    training.add_argument("--log-dir", type=Path, help="for TensorBoard")
    args = parser.parse_args(arguments)
    digits = args.data == "digits"
    if not digits and args.root is None:
        raise SystemExit(f"--data {args.data} needs --root, the folder of the data set.")
    args.teacher = args.teacher or ("small-teacher" if digits else "fasterrcnn_resnet50_fpn")
    args.student = args.student or (
        "small-student" if digits else "fasterrcnn_mobilenet_v3_large_320_fpn"
    )
    small = args.student.startswith("small")
    args.lr = args.lr or (3e-3 if small else 1e-4)
    # Small maps keep one thread busy; more cost as much as they bring, and a lot beside other work.
    args.threads = args.threads or (1 if small else torch.get_num_threads())
    args.teacher_iterations = args.teacher_iterations or TEACHER_ITERATIONS
    for name in ("batch_size", "epochs", "side", "refresh_every", "lr"):
        if getattr(args, name) <= 0:
            raise SystemExit(f"--{name.replace('_', '-')} must be greater than 0.")
    return args


def knowledge(args: argparse.Namespace) -> Knowledge:
    """What to transfer; other data than digits has larger objects and takes the paper's sizes."""
    terms = Knowledge(
        foreground=args.foreground,
        background=args.background,
        relation=args.relation,
        logits=args.logits,
        robust=not args.no_robust,
        own_class=args.own_class,
        center=args.center,
        boxes=args.boxes,
        refresh_every=args.refresh_every,
        prototype_images=args.prototype_images,
    )
    if args.data == "digits":
        return terms
    return dataclasses.replace(terms, levels="assigned", finest_scale=None, min_side=30.0)


def load_data(args: argparse.Namespace) -> DetectionData:
    """The data set that was asked for."""
    if args.data == "digits":
        return load_digits(args.cache, SceneSettings(*args.scenes))
    if not args.root.is_dir():
        raise SystemExit(f"There is no folder {args.root}.")
    return load_coco(args.root) if args.data == "coco" else load_voc(args.root)


def obtain_teacher(
    args: argparse.Namespace, data: DetectionData, recipe: Recipe
) -> tuple[nn.Module, Run | None]:
    """The teacher from a file, from a former run or trained now (then with its `Run`)."""
    weights, fingerprint = args.teacher_weights, ""
    recipe = dataclasses.replace(recipe, iterations=args.teacher_iterations, seed=0)
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
    if weights is not None:
        teacher = build_detector(
            args.teacher, data.num_classes, weights=str(weights), side=args.side
        )
        return teacher.to(args.device), None
    school = Experiment(
        data,
        lambda: build_detector(args.teacher, data.num_classes, side=args.side),
        recipe,
        device=args.device,
        workers=args.workers,
    )
    trainer = school.train("teacher", state=args.output / "state/teacher.pt", resume=args.resume)
    teacher = trainer.model
    teacher.load_state_dict(half(teacher))  # as it will be when it is read back
    scores = evaluate(teacher, data, label="teacher")
    places = [args.output / "teacher.pt"]
    if fingerprint:
        places.append(args.cache / "teacher_digits.pt")
    for path in places:
        keep_teacher(teacher, fingerprint, scores, path)
    return teacher, trainer.run


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole job; returns what `metrics.json` holds."""
    prepare(args)
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

    make_student()  # wrong names and weights show before the teacher is trained
    models: dict[str, nn.Module] = {}
    runs: dict[str, Run | None] = {}
    if args.method == "gk":
        models["teacher"], runs["teacher"] = obtain_teacher(args, data, recipe)
    experiment = Experiment(
        data,
        make_student,
        recipe,
        teacher=models.get("teacher"),
        device=args.device,
        workers=args.workers,
    )
    start = None
    if args.warm_start:
        state = args.output / "state/start.pt"
        warm = experiment.train("student, first", state=state, resume=args.resume)
        start = warm.model.state_dict()
    arms: list[str] = [] if args.no_baseline and args.method == "gk" else ["none"]
    kd = None
    for arm in [*arms, "gk"] if args.method == "gk" else arms:
        trainer = experiment.train(
            ROWS[arm],
            knowledge(args) if arm == "gk" else None,
            start=start,
            state=args.output / "state" / f"{arm}.pt",
            resume=args.resume,
            log=tensorboard(args.log_dir, arm),
        )
        models[ROWS[arm]], runs[ROWS[arm]] = trainer.model, trainer.run
        kd = trainer.kd or kd
        storage.save(trainer.model.state_dict(), args.output / f"student_{arm}.pt")
    metrics = collect(args, data, models, runs)
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    draw(args, data, models, runs, metrics, kd, experiment.curve_images)
    print(table(metrics))
    print(f"Weights, metrics.json and pictures are in {args.output}.")
    return metrics


def prepare(args: argparse.Namespace) -> None:
    """Check what can be checked before any work, and note the options for `--resume`."""
    torch.set_num_threads(args.threads)
    if args.device == "cpu":  # or several threads would add gradients up in a random order
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(
            f"--device {args.device} cannot be used: {storage.first_line(error)}."
        ) from None
    storage.require_disk(args.output, 2**27, "the output")
    note = args.output / "options.json"
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in sorted(vars(args).items())
        if name not in NOT_COMPARED
    }
    options = json.loads(json.dumps(options))
    if args.resume:
        if not note.is_file():
            raise SystemExit(f"Cannot resume: there is no run in {args.output}.")
        former = json.loads(note.read_text())
        for name, value in options.items():
            if former.get(name) != value:
                raise SystemExit(
                    f"Cannot resume: the run in {args.output} has --{name.replace('_', '-')} "
                    f"{former.get(name)}, not {value}."
                )
    note.write_text(json.dumps(options, indent=1) + "\n")


def tensorboard(folder: Path | None, arm: str) -> Log | None:
    """A function that logs (name, value, iteration) for TensorBoard."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SystemExit("--log-dir needs TensorBoard: pip install tensorboard.") from None
    writer = SummaryWriter(str(folder / arm))

    def log(name: str, value: float, iteration: int) -> None:
        writer.add_scalar(name, value, iteration)
        writer.flush()

    return log


def collect(
    args: argparse.Namespace,
    data: DetectionData,
    models: dict[str, nn.Module],
    runs: dict[str, Run | None],
) -> dict[str, Any]:
    """Evaluate every model and gather what is worth keeping."""
    rows: dict[str, Any] = {}
    for name, model in models.items():
        done = runs[name]
        rows[name] = {
            **evaluate(model, data, label=name),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": None if done is None else round(done.seconds, 2),
            "curve": [] if done is None else done.scores,
        }
    slow, plain = (rows.get(ROWS[arm], {}).get("seconds") for arm in ("gk", "none"))
    small, medium = data.areas
    return {
        "models": rows,
        "overhead": slow / plain - 1 if slow and plain else None,
        "areas": {"small": [0, small], "medium": [small, medium], "large": [medium, None]},
        "options": json.loads((args.output / "options.json").read_text()),
        "environment": {
            "global_kd": getattr(global_kd, "__version__", "unknown"),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": args.device,
        },
    }


def table(metrics: dict[str, Any]) -> str:
    """The result for people: AP in percent, one line a model."""
    lines = ["".join([f"\n{'':14}", *(f"{name:>7}" for name in METRICS), "  params  train s"])]
    for name, row in metrics["models"].items():
        seconds = "kept" if row["seconds"] is None else f"{row['seconds']:.0f}"
        scores = "".join(f"{100 * row[metric]:7.1f}" for metric in METRICS)
        lines.append(f"{name:14}{scores}{row['parameters'] / 1e6:6.2f} M{seconds:>9}")
    if metrics["overhead"] is not None:
        lines[-1] += f"  (distillation {100 * metrics['overhead']:+.0f} % time)"
    small, medium = (round(metrics["areas"][size][1] ** 0.5) for size in ("small", "medium"))
    lines.append(
        f"AP in percent; s: boxes up to {small}² px, m: up to {medium}², l: larger; "
        "kept: trained by a former run or shipped."
    )
    return "\n".join(lines)


def draw(
    args: argparse.Namespace,
    data: DetectionData,
    models: dict[str, nn.Module],
    runs: dict[str, Run | None],
    metrics: dict[str, Any],
    kd: global_kd.Distiller | None,
    curve_images: int,
) -> None:
    """All pictures of a run."""
    students = {name: done for name, done in runs.items() if done and name != "teacher"}
    teacher_ap = metrics["models"].get("teacher", {}).get("AP")
    shown = range(min(5, len(data.validation)))
    draw_curves(students, teacher_ap, curve_images, args.output / "curves.png")
    draw_predictions(models, data, args.output / "predictions.png", images=shown)
    if kd is not None:
        path, level = args.output / "prototypes.png", len(kd.loss.rdm.strides) // 2
        draw_prototypes(kd, data, level, path, images=200, device=args.device)


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
