"""Which method serves which detector: each is trained for a few steps, and the table is written.

    python -m tests.detectors.methods              # writes methods.json and the table of docs
    python -m tests.detectors.methods --only FCOS  # rows whose name holds a word
    python -m tests.detectors.methods --compiled   # the last column: students under torch.compile

Rows of packages that are not installed are kept as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from global_kd import Distiller, GlobalKnowledgeLoss, losses
from global_kd.losses import DistillLoss

RESULTS = Path(__file__).parent / "methods.json"
COMPILED = Path(__file__).parent / "methods_compiled.json"
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
MARKS = ("<!-- table: methods -->", "<!-- end of the table -->")
STEPS = 3


@dataclass(frozen=True)
class Row:
    """A tiny student and teacher of one kind.

    Attributes:
        needs: The package that must be importable.
        pair: Makes both, random weights.
        batch: The arguments of the student's forward and of ``kd(*batch)``.
        step: The student's training forward: the sum of its own losses.
        classes: For ``GlobalKnowledgeLoss``.
        columns: Of the class logits, for a classifier of ``classes``; ``None``: all.
        options: For the ``Distiller``.
    """

    needs: str
    pair: Callable[[], tuple[nn.Module, nn.Module]]
    batch: Callable[[], tuple[Any, ...]]
    step: Callable[[nn.Module, tuple[Any, ...]], Tensor]
    classes: int
    options: Callable[[], dict[str, Any]] = dict
    columns: range | None = None


def torchvision_row(kind: str) -> Row:
    from .detectors import NUM_CLASSES, detector, scenes

    def step(model, batch):
        return sum(model(*batch).values())

    return Row(
        "torchvision", lambda: (detector(kind, 8), detector(kind, 12)), scenes, step, NUM_CLASSES
    )


def detectron2_row(kind: str) -> Row:
    from . import test_detectron2 as tests

    return Row(
        "detectron2",
        lambda: (tests.detector(kind), tests.detector(kind, 4)),
        lambda: (tests.batch(kind),),
        tests.step,
        tests.NUM_CLASSES,
        columns=range(tests.NUM_CLASSES) if kind == "faster" else None,  # the background is last
    )


def ultralytics_row(student: str, teacher: str) -> Row:
    from .cases import scenes
    from .cases_ultralytics import NUM_CLASSES, batch, model, step
    from .test_ultralytics_facts import rt_detr

    def made(name: str) -> nn.Module:
        return rt_detr(nc=NUM_CLASSES) if name == "rt-detr" else model(name)

    return Row(
        "ultralytics",
        lambda: (made(student), made(teacher)),
        lambda: (batch(scenes(), side=96),),
        step,
        NUM_CLASSES,
    )


def transformers_row(name: str) -> Row:
    from . import test_transformers as tests

    def pair():
        student, teacher = tests.detector(name), tests.detector(name)
        with torch.no_grad():  # both come from one seed
            for p in teacher.parameters():
                p.add_(0.02 * torch.randn(p.shape))
        return student, teacher

    return Row(
        "transformers",
        pair,
        lambda: (tests.batch_of(name),),
        lambda model, batch: model(**batch[0]).loss,
        tests.NUM_CLASSES,
    )


def own_row() -> Row:
    from ..test_distiller import BOXES, IMAGES, Detector

    return Row(
        "torch",
        lambda: (Detector(4), Detector(9)),
        lambda: (IMAGES, BOXES),
        lambda model, batch: sum(x.square().mean() for x in model(batch[0])),
        2,
        lambda: {"example_inputs": (IMAGES,)},
    )


# The names are those of the table; what makes them is called only where the package is.
ROWS: dict[str, tuple[str, Callable[[], Row]]] = {
    "torchvision Faster R-CNN": ("torchvision", lambda: torchvision_row("faster_rcnn")),
    "torchvision RetinaNet": ("torchvision", lambda: torchvision_row("retinanet")),
    "torchvision FCOS": ("torchvision", lambda: torchvision_row("fcos")),
    "torchvision SSD": ("torchvision", lambda: torchvision_row("ssd")),
    "Detectron2 Faster R-CNN": ("detectron2", lambda: detectron2_row("faster")),
    "Detectron2 RetinaNet": ("detectron2", lambda: detectron2_row("retinanet")),
    "Detectron2 FCOS": ("detectron2", lambda: detectron2_row("fcos")),
    "Ultralytics YOLOv8 <- YOLO11": (
        "ultralytics",
        lambda: ultralytics_row("yolov8n.yaml", "yolo11n.yaml"),
    ),
    "Ultralytics YOLO26": (
        "ultralytics",
        lambda: ultralytics_row("yolo26n.yaml", "yolo26n.yaml"),
    ),
    "Ultralytics RT-DETR": ("ultralytics", lambda: ultralytics_row("rt-detr", "rt-detr")),
    "transformers RT-DETR": ("transformers", lambda: transformers_row("rt_detr")),
    "transformers D-FINE": ("transformers", lambda: transformers_row("d_fine")),
    "transformers DETR": ("transformers", lambda: transformers_row("detr")),
    "a detector of one's own": ("torch", own_row),
}


SLOW = {name for name in ROWS if name.startswith("Detectron2")}
SLOW |= {"Ultralytics YOLO26", "Ultralytics RT-DETR", "transformers D-FINE"}
"""Rows that only this command and `pytest -m compatibility` train."""


class Crops(nn.Module):
    """A classifier of crops as DICOD takes it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean(dim=(2, 3)))


def methods(classes: int, columns: range | None = None) -> dict[str, Callable[[], DistillLoss]]:
    """Every method that is exported, made as its first user would."""
    special: dict[str, Callable[[], DistillLoss]] = {
        "DICOD": lambda: losses.DICOD(Crops(classes), size=32, columns=columns)
    }
    found: dict[str, Callable[[], DistillLoss]] = {
        "GlobalKnowledgeLoss": lambda: GlobalKnowledgeLoss(
            classes, total_steps=9, refresh_every=1, min_side=4, relation=5
        )
    }
    for name in sorted(vars(losses)):
        method = getattr(losses, name)
        a_loss = isinstance(method, type) and issubclass(method, DistillLoss)
        if a_loss and method is not DistillLoss:
            found[name] = special.get(name, method)
    return found


def put_through(row: Row, method: Callable[[], DistillLoss]) -> str:
    """The terms that came, or why the pair was refused; whatever else goes wrong raises."""
    torch.manual_seed(0)
    student, teacher = row.pair()
    try:
        kd = Distiller(student, teacher, method(), **row.options())
    except ValueError as error:
        if not str(error).startswith("losses: "):
            raise
        return "no: " + str(error).split(", but ", 1)[1].split(". What this pair")[0]
    for loss in kd.losses.values():
        loss.warmup_steps = 0  # FRS is silent in its first step
    frozen = {k: v.clone() for k, v in teacher.state_dict().items()}
    parameters = [p for p in (*student.parameters(), *kd.parameters()) if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-5)
    student.train()
    for _ in range(STEPS):
        batch = row.batch()
        own = row.step(student, batch)
        terms = kd(*batch)
        assert terms, "no term"
        assert all(x.isfinite() for x in terms.values()), terms
        total = sum(terms.values())
        learning = [p for p in student.parameters() if p.requires_grad]
        reached = torch.autograd.grad(total, learning, retain_graph=True, allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in reached), "no gradient"
        assert all(g is None or bool(g.isfinite().all()) for g in reached), "a gradient overflows"
        optimizer.zero_grad()
        (own + total).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)  # random weights
        optimizer.step()
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    kd.detach()
    return ", ".join(name.removeprefix("kd_") for name in sorted(terms))


# Where a compiled student is tried: the first of these that serves the method.
_COMPILED_ON = (
    "a detector of one's own",
    "torchvision FCOS",
    "Ultralytics YOLOv8 <- YOLO11",
    "transformers RT-DETR",
)


def compiled(method: str, backend: str = "inductor") -> str:
    """On which detector a student under `torch.compile` gave the terms of one without."""
    for name in _COMPILED_ON:
        row = ROWS[name][1]()
        make = methods(row.classes, row.columns)[method]
        if not put_through(row, make).startswith("no: "):
            break
    else:
        raise AssertionError(f"no detector serves {method}")
    found = []
    for how in (lambda student: student, lambda student: torch.compile(student, backend=backend)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        student, teacher = row.pair()
        kd = Distiller(student, teacher, make(), **row.options())
        for loss in kd.losses.values():
            loss.warmup_steps = 0
        running, batch = how(student.train()), row.batch()
        torch.manual_seed(1)
        row.step(running, batch)
        terms = kd(*batch)
        parameters = [p for p in student.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(sum(terms.values()), parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(slopes, parameters)]
        found.append((terms, filled))
        kd.detach()
    torch._dynamo.reset()
    (expected, expected_slopes), (terms, slopes) = found
    assert terms.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(terms[key], value, rtol=1e-3, atol=1e-6)
    whole = sum(float(g.norm()) ** 2 for g in expected_slopes) ** 0.5
    assert whole > 0
    for mine, theirs in zip(slopes, expected_slopes):
        assert float((mine - theirs).norm()) <= 1e-3 * whole
    return name


def run(name: str) -> dict[str, str]:
    """One row of the table."""
    row = ROWS[name][1]()
    found = {}
    for method, make in methods(row.classes, row.columns).items():
        try:
            found[method] = put_through(row, make)
        except Exception as error:
            found[method] = f"ERROR: {type(error).__name__}: {error}"
    return found


def table(rows: dict[str, dict[str, str]], under_compile: dict[str, str]) -> str:
    """A row a method, a column a detector: fewer of these, so that the page holds them."""
    detectors = [name for name in ROWS if name in rows]
    heads = [*detectors, "compiled student"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method in dict.fromkeys(method for row in rows.values() for method in row):
        refused = [rows[name].get(method, "no").startswith("no") for name in detectors]
        marks = ["-" if no else "yes" for no in refused]
        marks.append(under_compile.get(method, "not run"))
        lines.append(f"| {method} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def write(rows: dict[str, dict[str, str]]) -> None:
    """To the file and the page, in the order of the table."""
    rows = {name: rows[name] for name in ROWS if name in rows}
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    text = f"{head}{MARKS[0]}\n{table(rows, read(COMPILED))}\n{MARKS[1]}{tail}"
    PAGE.write_text(text, encoding="utf-8")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def run_compiled() -> None:
    """The last column: every method on a student under `torch.compile` with its usual backend."""
    found = {}
    for method in methods(3):
        start = time.perf_counter()
        found[method] = compiled(method)
        print(f"{method}: {found[method]} ({time.perf_counter() - start:.0f} s)", flush=True)
    COMPILED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write(read(RESULTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts of the names of the rows to run"
    )
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    parser.add_argument("--compiled", action="store_true", help="only the column of that name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.compiled:
        return run_compiled()
    rows = read(RESULTS)
    for name, (package, _) in ROWS.items():
        if not any(word in name for word in options.only) or find_spec(package) is None:
            continue
        start = time.perf_counter()
        rows[name] = run(name)
        print(f"{name} ({time.perf_counter() - start:.0f} s)", flush=True)
        for method, result in rows[name].items():
            print(f"    {method}: {result}", flush=True)
        if not options.dry_run:  # after each, so that a run may be cut off
            write(rows)


if __name__ == "__main__":
    main()
