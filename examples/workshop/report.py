"""What a run tells: metrics, a table and pictures."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import global_kd

from .coco_eval import METRICS, evaluate
from .detection_data import DetectionData
from .distillation import Experiment, Log
from .plots import draw_curves, draw_predictions, draw_prototypes
from .training import Run


def row_name(method: str) -> str:
    """What a student is called in tables and plots."""
    return "student" if method == "none" else f"student + {method}"


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
    slow, plain = (
        rows.get(row_name(arm), {}).get("seconds") if args.method != "none" else None
        for arm in (args.method, "none")
    )
    small, medium = data.areas
    return {
        "models": rows,
        "overhead": slow / plain - 1 if slow and plain else None,
        "areas": {"small": [0, small], "medium": [small, medium], "large": [medium, None]},
        "options": json.loads((args.output / "options.json").read_text()),
        "environment": environment(args.device),
    }


def environment(device: str) -> dict[str, Any]:
    """What else numbers depend on."""
    return {
        "global_kd": getattr(global_kd, "__version__", "unknown"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": device,
    }


def tensorboard(folder: Path | None) -> Log | None:
    """A function that logs (name, value, iteration) for TensorBoard; None without a folder."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SystemExit("--log-dir needs TensorBoard: pip install tensorboard.") from None
    writer = SummaryWriter(str(folder))

    def log(name: str, value: float, iteration: int) -> None:
        writer.add_scalar(name, value, iteration)
        writer.flush()

    return log


def table(metrics: dict[str, Any]) -> str:
    """The result for people: AP in percent, one line a model."""
    width = max(14, 2 + max(map(len, metrics["models"])))
    lines = ["".join([f"\n{'':{width}}", *(f"{name:>7}" for name in METRICS), "  params  train s"])]
    for name, row in metrics["models"].items():
        seconds = "kept" if row["seconds"] is None else f"{row['seconds']:.0f}"
        scores = "".join(f"{100 * row[metric]:7.1f}" for metric in METRICS)
        lines.append(f"{name:{width}}{scores}{row['parameters'] / 1e6:6.2f} M{seconds:>9}")
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
    experiment: Experiment,
    models: dict[str, nn.Module],
    runs: dict[str, Run | None],
    metrics: dict[str, Any],
    kd: global_kd.Distiller | None,
) -> None:
    """All pictures of a run."""
    data, folder = experiment.data, args.output
    students = {name: done for name, done in runs.items() if done and name != "teacher"}
    teacher_ap = metrics["models"].get("teacher", {}).get("AP")
    draw_curves(students, teacher_ap, experiment.curve_images, folder / "curves.png")
    shown = range(min(4, len(data.validation)))
    draw_predictions(models, data, folder / "predictions.png", images=shown)
    if kd is not None and any(loss.keeps_prototypes for loss in kd.losses.values()):
        path, level = folder / "prototypes.png", len(kd.loss.rdm.strides) // 2
        draw_prototypes(kd, data, level, path, images=200, device=args.device)
