"""Why a term helps or not: python -m benchmarks.digits.diagnosis

Three measurements on digit scenes, with the teacher and a student that has trained for a while:
how much the pooled features of an instance say about its class, how alike the pooled features of
any two instances are, and how the gradient of each term lies to that of the detection losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from global_kd import Distiller, Targets
from global_kd.instances import pool_levels
from workshop import storage
from workshop.detection_data import DetectionData, first_batches, load_digits
from workshop.detectors import SHIPPED_TEACHER, build_detector
from workshop.digit_scenes import SceneSettings
from workshop.distillation import STUDIED, Experiment
from workshop.environment import environment
from workshop.training import Recipe

RESULTS = Path(__file__).parents[1] / "results" / "digits" / "diagnosis.json"
EVERYTHING = dataclasses.replace(STUDIED, foreground=1, background=1, relation=1, logits=1)
BATCH = 25


@torch.no_grad()
def describe(
    model: Any, data: DetectionData, count: int, strides: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled rows `(L, R, C)`, labels and the RoI head's class of validation ground truth."""
    model.eval()
    rows, labels, predicted = [], [], []
    for images, targets in first_batches(data.validation, count, BATCH):
        transformed, truth = model.transform(list(images), [dict(t) for t in targets])
        features = model.backbone(transformed.tensors)
        packed = Targets.from_list(truth)
        rows.append(pool_levels(list(features.values()), packed, strides))
        heads, boxes = model.roi_heads, [t["boxes"] for t in truth]
        pooled = heads.box_roi_pool(features, boxes, transformed.image_sizes)
        predicted.append(heads.box_predictor(heads.box_head(pooled))[0].argmax(dim=1))
        labels.append(packed.labels)
    return torch.cat(rows, dim=1), torch.cat(labels), torch.cat(predicted)


def separability(
    rows: Tensor, labels: Tensor, predicted: Tensor, prototypes: Tensor, classes: Tensor
) -> dict[str, Any]:
    """What cosines know: class of the nearest prototype, and the mean cosine of two instances."""

    def unit(x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)

    found: dict[str, Any] = {"class accuracy of the RoI head": _share(predicted == labels)}
    for name, centered in (("plain", False), ("centered", True)):
        nearest, alike = [], []
        for level in range(len(rows)):
            bank = prototypes[level][classes[level] >= 0]
            middle = bank.mean(dim=0) if centered else torch.zeros_like(bank[0])
            u, v = unit(rows[level] - middle), unit(bank - middle)
            best = classes[level][classes[level] >= 0][(u @ v.T).argmax(dim=1)]
            nearest.append(_share(best == labels))
            pairs = u @ u.T
            alike.append(float((pairs.sum() - len(u)) / (len(u) * (len(u) - 1))))
        found[f"class accuracy of the nearest prototype, per level, {name}"] = nearest
        found[f"mean cosine of two instances, per level, {name}"] = alike
    return found


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())


def gradients(student: nn.Module, kd: Distiller, data: DetectionData) -> dict[str, Any]:
    """Cosine of each term's gradient to the detection losses', and its relative length."""
    student.train()
    parameters = [p for p in student.backbone.parameters() if p.requires_grad]  # type: ignore[union-attr]
    measured: dict[str, list[tuple[float, float]]] = {}
    for images, targets in first_batches(data.train, 8 * 16, 16):
        losses = student(images, targets)
        terms = kd(images, targets)
        detection = _gradient(sum(losses.values()), parameters)
        for name, term in terms.items():
            mine = _gradient(term, parameters)
            cosine = float(nn.functional.cosine_similarity(mine, detection, dim=0))
            measured.setdefault(name, []).append((cosine, float(mine.norm() / detection.norm())))
    return {
        name: {"cosine": mean(c for c, _ in values), "relative length": mean(r for _, r in values)}
        for name, values in measured.items()
    }


def _gradient(loss: Any, parameters: Sequence[Tensor]) -> Tensor:
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(p.numel()) if g is None else g.flatten()
            for g, p in zip(grads, parameters, strict=True)
        ]
    )


def diagnose(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    torch.set_num_threads(1)
    settings = SceneSettings(*args.scenes)
    data = load_digits(args.cache, settings)
    teacher = build_detector("small-teacher", data.num_classes, weights=str(SHIPPED_TEACHER))
    recipe = Recipe(args.iterations, evaluations=1)
    experiment = Experiment(
        data, lambda: build_detector("small-student", data.num_classes), recipe, curve_images=1
    )
    student = experiment.train("student").model
    kd = EVERYTHING.distiller(student, teacher, data.num_classes, recipe.iterations, recipe.seed)
    kd.refresh(first_batches(data.train, args.images, BATCH))
    bank, strides = kd.loss.bank, kd.loss.rdm.strides
    g_s, g_t, classes = bank.flat()
    seen = [describe(model, data, args.images, strides) for model in (teacher, student)]
    return {
        "teacher": separability(*seen[0], prototypes=g_t, classes=classes),
        "student": separability(*seen[1], prototypes=g_s, classes=classes),
        "gradients": gradients(student, kd, data),
        "settings": {
            "iterations": args.iterations,
            "images": args.images,
            "scenes": settings.fingerprint(),
        },
        "environment": environment(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=500, help="that the student has trained")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--scenes", type=int, nargs=2, default=(8000, 600))
    parser.add_argument("--cache", type=Path, default=storage.cache_folder())
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    found = diagnose(args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: found[k] for k in ("teacher", "student", "gradients")}, indent=1))


if __name__ == "__main__":
    main()
