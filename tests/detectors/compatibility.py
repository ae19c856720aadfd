"""The compatibility table of docs/detectors.md: every case put through the same checks.

`python -m tests.detectors.compatibility` runs all cases whose packages are here, keeps the
results of the others, and writes compatibility.json and the table.
"""

import argparse
import contextlib
import io
import json
import time
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from global_kd import Distiller, GlobalKnowledgeLoss, Pixels, Schedule
from global_kd.functional import pool_boxes

from .cases import Case, Scene, scenes

HERE = Path(__file__).parent
RESULTS = HERE / "compatibility.json"
PAGE = HERE.parents[1] / "docs" / "detectors.md"
MARKS = ("<!-- compatibility -->", "<!-- /compatibility -->")
STEPS = 12


def cases() -> list[Case]:
    """All cases whose packages are here."""
    found: list[Case] = []
    for package in ("torchvision", "detectron2", "transformers", "ultralytics"):
        with contextlib.suppress(ImportError):
            found += import_module(f".cases_{package}", __package__).CASES
    return [c for c in found if all(map(importable, c.needs))]


def importable(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True


class Bench:
    """A pair of detectors, made once, with its distiller and a batch."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.student, self.teacher = case.student(), case.teacher()
        self.loss = GlobalKnowledgeLoss(
            case.num_classes,
            total_steps=1000,
            refresh_every=None,
            schedule=Schedule("constant"),
            relation=5,
            # Maps of random weights hardly vary: in units of their variance a term stands at its
            # largest value, and its fall cannot be seen.
            standardize=False,
        )
        self.kd = Distiller(self.student, self.teacher, self.loss, **case.options)
        self.student.train()
        self.batch = case.batch(scenes(num_classes=2))

    def step(self, model: nn.Module | None = None):
        own = self.case.step(self.student if model is None else model, self.batch)
        return own, self.kd(*self.batch)


def gradients(bench: Bench, terms):
    trained = [p for p in bench.student.parameters() if p.requires_grad]
    return torch.autograd.grad(sum(terms.values()), trained, allow_unused=True)


def hooks(bench: Bench) -> str:
    """Taps fire once in the user's own step, terms are finite and reach the student."""
    teacher = {k: v.clone() for k, v in bench.teacher.state_dict().items()}
    keys = list(bench.student.state_dict())
    _, terms = bench.step()
    wanted = {"kd_foreground", "kd_background", "kd_relation"}
    assert wanted <= set(terms), sorted(terms)
    assert all(v.isfinite() for v in terms.values()), terms
    assert any(g is not None and bool(g.any()) for g in gradients(bench, terms))
    assert list(bench.student.state_dict()) == keys
    assert all(torch.equal(v, teacher[k]) for k, v in bench.teacher.state_dict().items())
    assert not any(m.training for m in bench.teacher.modules())
    return "with soft labels" if "kd_logits" in terms else "yes"


def levels(bench: Bench) -> str:
    """Levels pair, and their maps lie on one grid."""
    with torch.no_grad():
        bench.student.eval()
        seen = bench.kd._pair.student.observe(*arguments(bench.batch))
        student, teacher = bench.kd._pair.maps(seen.look, bench.kd._pair.look(seen.look.view))
    bench.student.train()
    assert len(student) >= 1
    for s, t in zip(student, teacher, strict=True):
        assert s.shape[0] == t.shape[0] and s.shape[2:] == t.shape[2:]
    return " ".join(f"{s:g}" for s in bench.loss.rdm.strides)


def arguments(batch):
    return batch if len(batch) == 2 else (batch[0], None)


def boxes(bench: Bench) -> str:
    """Bright squares drawn into images of unlike size: the boxes are where they are in the input,
    the pooled region is the object, and the maps answer there."""
    dark = [torch.full((3, h, w), 0.1) for h, w in ((96, 128), (128, 100))]
    squares = [torch.tensor([[40.0, 24, 104, 72]]), torch.tensor([[16.0, 48, 64, 112]])]
    bright = [x.clone() for x in dark]
    for image, box in zip(bright, squares, strict=True):
        x1, y1, x2, y2 = box[0].int().tolist()
        image[:, y1:y2, x1:x2] = 0.9
    label = torch.zeros(1, dtype=torch.int64)

    def observe(images):
        made = [Scene(x, b, label) for x, b in zip(images, squares, strict=True)]
        with torch.no_grad():
            seen = bench.kd._pair.student.observe(*arguments(bench.case.batch(made)))
            return seen, bench.kd._pair.maps(seen.look, bench.kd._pair.look(seen.look.view))

    bench.student.eval()
    (seen, with_squares), (_, without) = observe(bright), observe(dark)
    bench.student.train()
    x = seen.look.view.images
    pixels = bench.kd._pair.student.pixels or Pixels()
    light = pixels.convert(x, Pixels()).mean(dim=1)
    truth = seen.truth
    assert sorted(truth.image_index.tolist()) == [0, 1]
    stride = bench.loss.rdm.strides[0]
    for box, i in zip(truth.boxes, truth.image_index.tolist(), strict=True):
        x1, y1, x2, y2 = box.tolist()
        h, w = light.shape[1:]
        rows, columns = torch.arange(h) + 0.5, torch.arange(w) + 0.5

        def region(margin, x1=x1, y1=y1, x2=x2, y2=y2, rows=rows, columns=columns):
            inside_y = (rows > y1 - margin) & (rows < y2 + margin)
            inside_x = (columns > x1 - margin) & (columns < x2 + margin)
            return inside_y[:, None] & inside_x

        edge = 0.06 * min(x2 - x1, y2 - y1)  # resizing blurs
        assert light[i][region(-edge)].min() > 0.75, "dark inside the box"
        around = region(3 * edge) & ~region(edge)
        assert light[i][around].max() < 0.6, "bright outside the box"
    cells = functional.avg_pool2d(light[:, None], int(stride), ceil_mode=True)
    pooled = pool_boxes(cells, truth.boxes, truth.image_index, stride)
    assert (pooled > 0.5).all(), "the pooled cells are not the object"
    for name, a, b in zip(("student", "teacher"), with_squares, without, strict=True):
        change = (a[0] - b[0]).float().square().mean(dim=1, keepdim=True)
        here = pool_boxes(change, truth.boxes, truth.image_index, stride)[:, 0]
        everywhere = change.mean(dim=(1, 2, 3))[truth.image_index]
        assert (here > everywhere).all(), f"the {name}'s map answers elsewhere"
    return "yes"


def bare(bench: Bench) -> str:
    """The student's file loads into a student that was never distilled, and nothing stays on it."""
    buffer = io.BytesIO()
    torch.save(bench.student.state_dict(), buffer)
    buffer.seek(0)
    fresh = bench.case.student()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return "yes"


def compiled(bench: Bench) -> str:
    """`torch.compile` of the student after attaching: the same terms."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    _, expected = bench.step()
    torch.manual_seed(1)
    _, terms = bench.step(torch.compile(bench.student, backend="eager"))
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()
    return "yes"


def autocast(bench: Bench) -> str:
    """A step under bfloat16 autocast: finite terms and gradients, about the size of float32's."""
    torch.manual_seed(1)
    _, expected = bench.step()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        own, terms = bench.step()
    assert all(v.isfinite() for v in terms.values()), terms
    ratio = (sum(terms.values()) / sum(expected.values())).item()
    assert 0.8 < ratio < 1.25, f"{ratio:.2f} of the float32 terms"
    assert all(g.isfinite().all() for g in gradients(bench, terms) if g is not None)
    return "yes"


def checked(bench: Bench) -> str:
    """`kd.check` reads the pair: a level and a term each, whatever it thinks of random weights."""
    before = {k: v.clone() for k, v in bench.student.state_dict().items()}
    report = bench.kd.check(*bench.batch, verbose=False)
    assert len(report.levels) == len(bench.loss.rdm.strides)
    assert {"kd_foreground", "kd_background", "kd_relation"} <= set(report.terms)
    assert all(torch.tensor(t.value).isfinite() for t in report.terms.values()), report.terms
    assert "detection" in report.terms or not bench.case.needs
    named = " ".join(report.problems)
    assert "was made for" not in named and "is the background" not in named, named
    assert "beyond the canvas" not in named and "normalised" not in named, named
    assert all(torch.equal(v, before[k]) for k, v in bench.student.state_dict().items())
    assert bench.student.training
    return "yes"


def falls(bench: Bench) -> str:
    """The KD terms fall while student and adapters fit four images; leaves a trained student."""
    everything = [*bench.student.parameters(), *bench.kd.parameters()]
    parameters = [p for p in everything if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=bench.case.lr)
    totals = []
    for _ in range(STEPS):
        _, terms = bench.step()
        total = sum(terms.values())
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    last = min(totals[-3:])
    assert last < 0.8 * totals[0], [f"{x:.3f}" for x in totals]
    return f"to {last / totals[0]:.0%}"


def detached(bench: Bench) -> str:
    """After `detach` no hook of ours is left."""
    before = count(bench)
    bench.kd.detach()
    assert count(bench) < before
    fresh = nn.ModuleList([bench.case.student(), bench.case.teacher()])
    assert count(bench) == sum(hooks_on(fresh))
    return "yes"


def count(bench: Bench) -> int:
    return sum(hooks_on(bench.student)) + sum(hooks_on(bench.teacher))


def hooks_on(model):
    return (len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


COLUMNS = {
    "taps": hooks,
    "levels": levels,
    "boxes": boxes,
    "kd.check": checked,
    "torch.compile": compiled,
    "autocast": autocast,
    "KD terms fall": falls,
    "file loads bare": bare,
    "detaches": detached,
}


def run(case: Case) -> dict[str, str]:
    """One row; a check that fails says why."""
    row: dict[str, str] = {}
    bench = Bench(case)
    for column, check in COLUMNS.items():
        try:
            row[column] = check(bench)
        except Exception as error:
            row[column] = f"no: {type(error).__name__}: {str(error).splitlines()[0]}"
    return row


def table(results: dict) -> str:
    lines = [
        "| student <- teacher | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in results["rows"].items():
        lines.append(f"| {name} | " + " | ".join(row[c] for c in COLUMNS) + " |")
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    return "\n".join([*lines, "", f"Made with {versions}."])


def write(results: dict) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    PAGE.write_text(f"{head}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}, "versions": {}}
    rows, versions = dict(old["rows"]), dict(old["versions"])
    for case in cases():
        if options.only not in case.name:
            continue
        start = time.perf_counter()
        rows[case.name] = run(case)
        print(f"{case.name} ({time.perf_counter() - start:.0f} s)", flush=True)
        for column, result in rows[case.name].items():
            print(f"    {column}: {result}", flush=True)
        for package in ("torch", *case.needs):
            versions[package] = import_module(package).__version__
    if not options.dry_run:
        write({"rows": rows, "versions": versions})


if __name__ == "__main__":
    main()
