"""What `kd.calibrate` sets on digit scenes, measured again from outside of the library.

Students of unlike depth beside the small teacher of the examples. Each term's gradient on the
student's maps, in units of the detection loss's, as a mean over the batches that were calibrated
on and over others; and after some steps of training, with shares that are held and that are not.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from global_kd import Distiller, GlobalKnowledgeLoss, Schedule
from global_kd.losses import FGD, PKD

from .measure import say

SHARE, EVERY, BAND, TOLERANCE = 0.3, 10, 0.1, 0.05
BLOCKS = (1, 2)  # a stage: the student's depth
RATE = 0.02


def run(
    *, quick: bool, device: torch.device, dtype: torch.dtype = torch.float32, compiled: bool = False
) -> dict[str, Any]:
    if dtype != torch.float32:
        raise ValueError(f"dtype: expected float32 for a training step, but got {dtype}")
    from workshop.detection_data import first_batches, load_digits
    from workshop.digit_scenes import SceneSettings

    steps, batches = (2, 1) if quick else (40, 4)
    size = 8
    count = size * (2 * batches + steps)
    with tempfile.TemporaryDirectory() as cache:
        settings = SceneSettings(train=count, validation=1)
        data = load_digits(Path(cache), settings)
        given = [
            ([x.to(device) for x in images], [{k: v.to(device) for k, v in t.items()} for t in ts])
            for images, ts in first_batches(data.train, count, size)
        ]
    found = {}
    for blocks in BLOCKS:
        say(f"shares: {blocks} blocks a stage")
        found[f"{blocks} blocks a stage"] = student(blocks, given, batches, data.num_classes)
    errors = [abs(term["measured"] / SHARE - 1) for row in found.values() for term in row.values()]
    return {
        "size": f"batches of {size} digit scenes: {batches} to calibrate on, {batches} others, "
        f"{steps} steps of training; asked for {SHARE}, held every {EVERY} steps within "
        f"{BAND:.0%}",
        "share": SHARE,
        "students": found,
        "worst_error": max(errors),
        "passed": max(errors) <= TOLERANCE,
    }


def student(blocks: int, given: Sequence[Any], batches: int, classes: int) -> dict[str, Any]:
    """By term: the weight that was set, and its share on several batches."""
    calibrated, others, rest = given[:batches], given[batches : 2 * batches], given[2 * batches :]
    kd, model = distiller(blocks, classes, given[0])
    kd.refresh(calibrated, progress=False)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    table = kd.calibrate(loader=calibrated, batches=batches, share=SHARE, verbose=False)
    weights = {name: x.after for name, x in table.shares.items()}
    measured = shares(model, kd, calibrated, before)
    elsewhere = shares(model, kd, others, before)
    ends = []
    for every in (None, EVERY):
        kd, model = distiller(blocks, classes, given[0])
        kd.refresh(calibrated, progress=False)
        kd.calibrate(
            loader=calibrated, batches=batches, share=SHARE, every=every, band=BAND, verbose=False
        )
        train(model, kd, rest)
        ends.append(shares(model, kd, others, before))
    return {
        name: {
            "weight": weights[name],
            "measured": measured[name],
            "on_other_batches": elsewhere[name],
            "after_training": ends[0][name],
            "after_training_held": ends[1][name],
        }
        for name in weights
    }


def distiller(blocks: int, classes: int, batch: Any) -> tuple[Distiller, Any]:
    from workshop.detectors import SHIPPED_TEACHER, build_detector, load_weights
    from workshop.small_detectors import SIZES, small_faster_rcnn

    torch.manual_seed(0)
    device = batch[0][0].device
    size = dataclasses.replace(SIZES["small-student"], blocks=blocks)
    model = small_faster_rcnn(size, classes).to(device)
    teacher = build_detector("small-teacher", classes)
    load_weights(teacher, SHIPPED_TEACHER, classes)
    # Constant, so that what is trained with is what was asked for.
    knowledge = GlobalKnowledgeLoss(
        classes,
        relation=5,
        refresh_every=None,
        min_side=8,
        finest_scale=16,
        schedule=Schedule("constant"),
    )
    return Distiller(model, teacher.to(device), [knowledge, PKD(), FGD()]), model


def shares(model: Any, kd: Distiller, batches: Sequence[Any], random: Tensor) -> dict[str, float]:
    """Mean norm of each term's gradient on the maps over that of the detection loss's."""
    maps: list[Tensor] = []
    hook = model.backbone.register_forward_hook(lambda m, a, out: maps.extend(out.values()))
    norms: dict[str, list[float]] = {}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    kd.eval()  # counts no step
    model.train()
    with torch.random.fork_rng():
        for images, targets in batches:
            maps.clear()
            torch.set_rng_state(random)  # the student samples proposals
            losses = model(images, targets)
            values = {"detection": torch.stack(list(losses.values())).sum()} | kd(images, targets)
            for name, value in values.items():
                parts = torch.autograd.grad(value, maps, retain_graph=True, allow_unused=True)
                square = sum(float(g.square().sum()) for g in parts if g is not None)
                norms.setdefault(name, []).append(square**0.5)
    hook.remove()
    kd.train()
    model.load_state_dict(state)  # statistics have moved
    whole = sum(norms.pop("detection"))
    return {name: sum(x) / whole for name, x in norms.items()}


def train(model: Any, kd: Distiller, batches: Sequence[Any]) -> None:
    optimizer = torch.optim.SGD([*model.parameters(), *kd.parameters()], lr=RATE, momentum=0.9)
    torch.manual_seed(1)
    for images, targets in batches:
        losses = model(images, targets)
        losses |= kd(images, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()


def table(results: dict[str, Any]) -> str:
    lines = [results["size"]]
    for row in body(results):
        lines.append("  ".join(x.ljust(22) for x in row).rstrip())
    verdict = "within" if results["passed"] else "NOT within"
    lines.append(
        f"off by {results['worst_error']:.1e} of the share at most: {verdict} {TOLERANCE:.0%}"
    )
    return "\n".join(lines)


HEAD = ("student", "term", "weight set", "share", "on others", "after training", "held")


def body(results: dict[str, Any]) -> list[list[str]]:
    keys = ("measured", "on_other_batches", "after_training", "after_training_held")
    return [
        [name, f"`{term}`", f"{x['weight']:.3g}", *(f"{x[key]:.3f}" for key in keys)]
        for name, terms in results["students"].items()
        for term, x in terms.items()
    ]
