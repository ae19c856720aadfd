"""The options of `torchvision_frcnn.py`, and what can be checked before any work."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from . import storage
from .detectors import TEACHER_ITERATIONS, detector_names
from .distillation import Knowledge
from .methods import known_methods, read_method

SHARE = 1.0  # did well on all data (docs/evidence_methods.md); the own weights fit digit scenes
# A run may be continued with other values of these.
_FREE = ("resume", "output", "cache", "log_dir", "workers", "processes")


def state_file(args: argparse.Namespace, name: str) -> Path:
    """Where a training can be resumed from: "teacher", "start", "none" or a method."""
    path: Path = args.output / "state" / f"{name}.pt"
    return path


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what depends on other options filled in."""
    parser = argparse.ArgumentParser(
        description="Distil a torchvision detector; without options, a small one on digit scenes.",
        epilog=f"Detectors: {', '.join(detector_names())}.",
    )
    known = Knowledge()
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=("digits", "coco", "voc"), default="digits")
    data.add_argument("--root", type=Path, help="folder of the COCO or VOC tree")
    for split in ("train", "validation"):
        data.add_argument(
            f"--{split}",
            type=Path,
            nargs="+",
            metavar=("PICTURES", "ANNOTATIONS"),
            help="data of your own: a folder and a COCO json, or a folder of VOC's XML files",
        )
    data.add_argument("--no-flip", action="store_true", help="do not mirror pictures of your own")
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
    method.add_argument(
        "--method",
        default="gk",
        help="none or one or several joined by +: " + ", ".join(known_methods()),
    )
    method.add_argument(
        "--share",
        type=float,
        help="set all weights so that each term has this share of the detection loss's gradient; "
        f"default {SHARE:g} for gk on other data than digit scenes, 0 keeps the weights",
    )
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
        help=f"iterations to new prototypes; default {known.refresh_every}, or a fifth of the "
        "training where that is less",
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
    training.add_argument(
        "--processes", type=int, help="2 trains both students at once: default where it is faster"
    )
    training.add_argument("--amp", action="store_true", help="automatic mixed precision")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--output", type=Path, default=Path("runs/torchvision_frcnn"))
    training.add_argument("--resume", action="store_true", help="continue the run in --output")
    training.add_argument("--log-dir", type=Path, help="for TensorBoard")
    args = parser.parse_args(arguments)
    if args.train or args.validation:
        if not (args.train and args.validation):
            raise SystemExit("--train and --validation belong together.")
        if max(len(args.train), len(args.validation)) > 2:
            raise SystemExit("--train and --validation take PICTURES and ANNOTATIONS, no more.")
        args.data = "own"
    digits = args.data == "digits"
    if args.method != "none":
        args.method = read_method(args.method)
        if args.prototype_images and "gk" not in args.method.split("+"):
            raise SystemExit("--prototype-images needs gk in --method, which keeps prototypes.")
    if args.share is not None and args.share < 0:
        raise SystemExit("--share must not be less than 0.")
    weights = ("foreground", "background", "relation", "logits")
    as_they_are = all(getattr(args, x) == getattr(known, x) for x in weights)
    if args.share is None and not digits and args.method == "gk" and as_they_are:
        args.share = SHARE
    args.share = args.share or None
    if not digits and args.data != "own" and args.root is None:
        raise SystemExit(f"--data {args.data} needs --root, the folder of the data set.")
    if args.teacher_weights and args.train_teacher:
        raise SystemExit("Give --teacher-weights or --train-teacher, not both.")
    args.teacher = args.teacher or ("small-teacher" if digits else "fasterrcnn_resnet50_fpn")
    args.student = args.student or (
        "small-student" if digits else "fasterrcnn_mobilenet_v3_large_320_fpn"
    )
    small = args.student.startswith("small")
    args.lr = args.lr or (3e-3 if small else 1e-4)
    # Small maps keep one thread busy; more cost as much as they bring, and a lot beside other work.
    args.threads = args.threads or (1 if small else torch.get_num_threads())
    if args.processes is None:
        alone = args.threads > 1 or args.device != "cpu"
        args.processes = 1 if alone else min(2, os.cpu_count() or 1)
    args.teacher_iterations = args.teacher_iterations or TEACHER_ITERATIONS
    for name in ("batch_size", "epochs", "side", "refresh_every", "lr"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise SystemExit(f"--{name.replace('_', '-')} must be greater than 0.")
    return args


def knowledge(args: argparse.Namespace, iterations: int) -> Knowledge:
    """What to transfer by global knowledge in so many iterations, with sizes for digits."""
    fifth = max(1, iterations // 5)
    return Knowledge(
        foreground=args.foreground,
        background=args.background,
        relation=args.relation,
        logits=args.logits,
        robust=not args.no_robust,
        own_class=args.own_class,
        center=args.center,
        boxes=args.boxes,
        refresh_every=args.refresh_every or min(Knowledge.refresh_every, fifth),
        prototype_images=args.prototype_images,
    )


def prepare_process(args: argparse.Namespace) -> None:
    """Settings of PyTorch that belong to a process."""
    torch.set_num_threads(args.threads)
    if args.device == "cpu":  # or several threads would add gradients up in a random order
        torch.use_deterministic_algorithms(True, warn_only=True)


def prepare(args: argparse.Namespace) -> None:
    """Check what can be checked before any work, and note the options for `--resume`."""
    prepare_process(args)
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(
            f"--device {args.device} cannot be used: {storage.first_line(error)}."
        ) from None
    storage.require_disk(args.output, 2**20, "the output")
    note_options(args, _FREE)
    if not args.resume:  # what an earlier run left to resume is not ours
        for state in state_file(args, "none").parent.glob("*.pt"):
            state.unlink()


def note_options(args: argparse.Namespace, free: Collection[str]) -> None:
    """Write the options to `options.json`; `--resume` wants them again, but for `free` ones."""
    note = args.output / "options.json"
    options = {
        name: json.loads(json.dumps(value, default=str))
        for name, value in sorted(vars(args).items())
        if name not in free
    }
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
