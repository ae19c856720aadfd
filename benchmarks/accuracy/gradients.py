"""How large the gradient of each term is beside that of the detection losses.

Of the variants of question 2, on a student that was trained without distillation; and of the
library's own weights at the start of a training, on all data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from workshop.detection_data import first_batches
from workshop.digit_scenes import CLASS_NAMES

from ..environment import environment
from .declaration import Method, Trial
from .experiments import REDUCED, TEACHER
from .perform import CALIBRATED, experiment_of, load_data, trained
from .store import RESULTS, Store

PULL = RESULTS / "pull.json"
COLLECTED, MEASURED = 12, 5  # batches: for the prototypes, and those that are looked at
START = REDUCED.continued(split="tuning").start


def measure(store: Store) -> dict[str, Any]:
    """Ratios of the norms of gradients on the backbone, by variant of the relation and term.

    Of a student that was trained without distillation, on `MEASURED` batches.

    Raises:
        SystemExit: That student, or the teacher, was not trained yet.
    """
    assert START is not None
    for needed in (START, TEACHER):
        if not store.weights(needed).is_file():
            raise SystemExit("Train the warm starts first: run --only q2-warm-alone/none")
    found = {
        name: ratios(START, REDUCED.method("all", **how), store)
        for name, how in tqdm(REDUCED.relations().items())
    }
    return {
        "student": START.identity,
        "teacher": TEACHER.identity,
        "ratios": found,
        "environment": environment(torch.device("cpu")),
    }


def ratios(start: Trial, how: Method, store: Store) -> dict[str, float]:
    """For each term the norm of its gradient, divided by that of the detection losses."""
    torch.manual_seed(0)
    student, (data, _) = trained(start, store), load_data(start, store)
    # Prototypes once, after the batches in which instances are collected.
    settings = dataclasses.replace(how, refresh_every=COLLECTED, prototype_images=0)
    kd = settings.distiller(student, trained(TEACHER, store), len(CLASS_NAMES), 10**6, 0)
    body: Any = student.backbone
    parameters = [p for p in body.parameters() if p.requires_grad]
    sizes: dict[str, list[float]] = {}
    student.train()
    for images, targets in first_batches(data.train, 16 * (COLLECTED + MEASURED), 16):
        detection = torch.stack(list(student(images, targets).values())).sum()
        terms = kd(images, targets)
        if kd.loss.step <= COLLECTED:
            continue
        beside = length(detection, parameters)
        for name, term in terms.items():
            sizes.setdefault(name, []).append(length(term, parameters) / beside)
    return {name: round(mean(x), 4) for name, x in sizes.items()}


def length(loss: Tensor, parameters: Sequence[Tensor]) -> float:
    """Norm of the gradient."""
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return float(torch.stack([g.square().sum() for g in parts if g is not None]).sum().sqrt())


def write(store: Store) -> None:
    """Keep it beside the results, and show it."""
    found = measure(store)
    file = store.results.parent / "gradients.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, sizes in found["ratios"].items():
        print(f"{name:42}", "  ".join(f"{term} {x:.2f}" for term, x in sizes.items()))


def pull(trial: Trial, store: Store) -> dict[str, float]:
    """The share of the detection gradient with which each term pulls at the start of a training.

    As `kd.calibrate` measures it, on the batches with which it would set the weights.
    """
    assert trial.teacher is not None
    if not store.weights(trial.teacher).is_file():
        raise SystemExit(f"Train the teacher {trial.teacher.identity} first, with `run`")
    data, _ = load_data(trial, store)
    experiment = experiment_of(trial, data, store, "cpu", trial.iterations)
    kd = experiment.prepare(trial.method).kd
    assert kd is not None
    batches = first_batches(data.train, CALIBRATED * trial.batch_size, trial.batch_size)
    shares = kd.calibrate(loader=batches, share={}, verbose=False).shares
    return {term: round(share.measured, 4) for term, share in shares.items()}


def write_pull(name: str, trials: Sequence[Trial], store: Store) -> None:
    """Means over trials of several seeds, beside those of other data."""
    found = [pull(trial, store) for trial in trials]
    known = json.loads(PULL.read_text(encoding="utf-8")) if PULL.is_file() else {}
    known[name] = {
        "seeds": len(found),
        "shares": {term: round(mean(x[term] for x in found), 4) for term in found[0]},
    }
    PULL.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(name, known[name]["shares"])


def pulls() -> Iterator[str]:
    """What `write_pull` found, as a table."""
    known = json.loads(PULL.read_text(encoding="utf-8")) if PULL.is_file() else {}
    terms = list(dict.fromkeys(term for one in known.values() for term in one["shares"]))
    yield f"| {' | '.join(['data', 'seeds', *terms, 'sum'])} |"
    yield f"|{' --- |' * (len(terms) + 3)}"
    for name, one in known.items():
        shares = one["shares"]
        cells = [f"{shares[term]:.2f}" if term in shares else "" for term in terms]
        total = f"{sum(shares.values()):.2f}"
        yield f"| {' | '.join([name, str(one['seeds']), *cells, total])} |"
