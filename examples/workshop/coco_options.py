"""The options of `coco_torchvision.py`; defaults as that file's first lines say."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

from global_kd import PAPER, RobustDistillLoss

from .methods import known_methods, read_method

# Epochs, and those after which the learning rate is divided by 10.
SCHEDULES = {"1x": (12, (8, 11)), "2x": (24, (16, 22)), "quick": (2, (1,))}
RATES = {"fasterrcnn": 0.02, "retinanet": 0.01}  # for 16 images
TERMS = ("foreground", "background", "relation", "logits")
_DEFAULTS = inspect.signature(RobustDistillLoss).parameters
WEIGHTS = {"paper": dict(PAPER), "library": {name: _DEFAULTS[name].default for name in PAPER}}

# A run may be continued with other values of these.
FREE = ("resume", "data", "output", "log_dir", "workers", "evaluate_every")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Distil a torchvision detector on COCO; start it with torchrun on several GPUs."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the COCO tree")
    parser.add_argument("--output", type=Path, default=Path("runs/coco_torchvision"))
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument("--arch", choices=tuple(RATES), default="fasterrcnn")
    depths = (18, 34, 50, 101, 152)
    parser.add_argument("--depth", type=int, choices=depths, default=50, help="of the ResNet")
    parser.add_argument("--backbone-weights", default="imagenet", help="a file, imagenet or random")
    parser.add_argument("--start", type=Path, help="weights of a trained detector to go on from")
    parser.add_argument("--teacher", type=Path, help="weights of the teacher, a model.pt")
    parser.add_argument("--teacher-depth", type=int, choices=depths, default=101)
    parser.add_argument("--no-distill", action="store_true", help="train without a teacher")
    parser.add_argument(
        "--method", default="gk", help="one or several joined by +: " + ", ".join(known_methods())
    )
    parser.add_argument(
        "--share",
        type=float,
        help="set all weights so that each term has this share of the detection loss's gradient",
    )
    parser.add_argument("--weights", choices=tuple(WEIGHTS), default="paper", help="of gk's terms")
    for name in TERMS:
        weights = " or ".join(f"{settings[name]:g}" for settings in WEIGHTS.values())
        parser.add_argument(f"--{name}", type=float, help=f"weight instead of {weights}")
    parser.add_argument("--adapter", choices=("conv3x3", "conv1x1", "identity"), default="conv3x3")
    parser.add_argument(
        "--prototypes",
        choices=("refresh", "stream"),
        default="refresh",
        help="from a pass over the images before each epoch (paper), or from the training stream",
    )
    parser.add_argument("--schedule", choices=("1x", "2x"), default="2x")
    parser.add_argument("--batch-size", type=int, default=2, help="images per process")
    parser.add_argument("--lr", type=float, help="default: 0.02 (RetinaNet 0.01) for 16 images")
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, help="bfloat16; on for GPUs"
    )
    parser.add_argument("--channels-last", action="store_true", help="memory format of the models")
    parser.add_argument("--workers", type=int, default=4, help="that load images, per process")
    parser.add_argument("--evaluate-every", type=int, default=4, metavar="EPOCHS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, help="for TensorBoard")
    parser.add_argument("--quick", action="store_true", help="small models, two epochs: a try")
    args = parser.parse_args(arguments)
    if args.no_distill == (args.teacher is not None):
        raise SystemExit("Give --teacher, the weights to distil from, or --no-distill.")
    for path in (args.teacher, args.start):
        if path is not None and not path.is_file():
            raise SystemExit(f"There are no weights at {path}.")
    args.method = read_method(args.method)
    if args.share is not None and args.share <= 0:
        raise SystemExit("--share must be greater than 0.")
    for name in ("batch_size", "evaluate_every"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1.")
    for name in TERMS:
        if getattr(args, name) is None:
            setattr(args, name, WEIGHTS[args.weights][name])
    if args.quick:
        args.schedule, args.workers = "quick", 0
    return args
