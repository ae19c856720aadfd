"""Every method beside a step of global knowledge, and beside what is published in plain torch.

Inputs are those of `benchmarks/scene.py` and `benchmarks/heads.py`: one image, and what two heads
say of it. Adapters are left out on all sides. A method is measured with all threads; the ones that
have a bar with one thread, too.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from global_kd import PAPER, RobustDistillLoss, losses
from global_kd.losses import DistillLoss
from global_kd.step import Step

from . import formulations as plain
from .cases import TOLERANCES, with_gradient
from .heads import facts
from .measure import (
    LIBRARY,
    QUICK,
    Bar,
    Effort,
    Work,
    difference,
    first_line,
    peak_memory,
    say,
    take_turns,
)
from .scene import QUICK as QUICK_SIZE
from .scene import Scene, Size, make_scene
from .suite import VERDICT, described, mebibytes, milliseconds, number

GLOBAL_KNOWLEDGE, FORMULATION, COMPILED_FORMULATION = (
    "global knowledge",
    "formulation",
    "compiled formulation",
)
KINDS = {x.name: x for x in vars(losses).values() if isinstance(x, type) and hasattr(x, "name")}
BARRED = ("frs", "cwd", "pkd", "fgd")  # those that people use most
BAR = Bar("share", COMPILED_FORMULATION, cpu=1.5)
SIZE = Size(batch=1, boxes=8)
SECONDS = 8.0  # for each contestant


@dataclass(frozen=True)
class Given:
    """What all methods are given."""

    scene: Scene
    facts: dict[str, Any]
    leaves: list[Tensor]

    @property
    def levels(self) -> dict[str, Any]:
        channels = [x.shape[1] for x in self.scene.teacher]
        return {
            "student_channels": channels,
            "teacher_channels": channels,
            "strides": self.scene.strides,
            "family": "one-stage",
            "adapter": "identity",
        }


def given(size: Size, device: torch.device) -> Given:
    scene = make_scene(size, device)
    ids = torch.arange(len(scene.targets), device=device)
    scene = replace(scene, targets=replace(scene.targets, ids=ids))
    found, leaves = facts(scene, size, device)
    return Given(scene, found, [*scene.student, *leaves])


def classifier(classes: int) -> nn.Module:
    """DICOD's teacher."""
    from torchvision.models import resnet18

    return resnet18(num_classes=classes)  # type: ignore[no-any-return]


def made(name: str, at: Given) -> DistillLoss:
    """A method as it comes, but for adapters and warm-up."""
    options: dict[str, Any] = dict(at.levels)
    if name == "frs":
        options["warmup_steps"] = 0
    if name == "defeat":  # its terms on maps alone, as released
        options |= {"classes_foreground": 0.0, "classes_background": 0.0}
    if name == "tar":
        options["total_steps"] = 10**6  # its schedule at the beginning
    if name == "dicod":
        columns = at.scene.student_logits.shape[1]
        options |= {"classifier": classifier(columns), "activation": "softmax"}
    return KINDS[name](**options).to(at.scene.student[0].device)  # type: ignore[no-any-return]


def names() -> list[str]:
    """Of all methods; those with a bar first."""
    return [*BARRED, *sorted(set(KINDS) - set(BARRED))]


def formulation(name: str, loss: Any, at: Given) -> Callable[[], Sequence[Tensor]] | None:
    """What is published, on the same inputs; `None`: it is more than a few lines."""
    scene, heads = at.scene, at.facts["dense"]
    maps, boxes = (scene.student, scene.teacher), (scene.targets.boxes, scene.targets.image_index)
    if name == "frs":
        return lambda: plain.frs(*maps, heads)
    if name in ("cwd", "pkd"):
        return lambda: [getattr(plain, name)(*maps)]
    if name == "fgd":
        return lambda: plain.fgd(loss, *maps, *boxes)
    if name == "mgd":
        loss.step = 0
        masks = loss.draw_masks(Step(*maps, scene.strides))
        return lambda: [plain.mgd(loss, *maps, masks)]
    if name == "cosine":
        return lambda: [plain.cosine(scene.student[-1], scene.teacher[-1])]
    if name == "soft_labels":
        return lambda: [plain.soft_labels(scene.student_logits, scene.teacher_logits)]
    if name == "bckd":
        return lambda: plain.bckd(heads, at.facts["assigned"])
    if name == "defeat":
        return lambda: plain.defeat(*maps, *boxes, scene.strides)
    return None


def in_use(leaves: Sequence[Tensor], forward: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """Those that get a gradient."""
    total = torch.stack(list(forward())).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [x for x, g in zip(leaves, gradients, strict=True) if g is not None]


def contestants(name: str, at: Given, compiled: bool) -> tuple[dict[str, Work], dict[str, Work]]:
    """The library and what is published; beside them the step of global knowledge."""
    loss = made(name, at)
    scene = at.scene

    def forward() -> list[Tensor]:
        loss.step = 0  # the same masks and schedules at each call
        return list(loss(scene.student, scene.teacher, scene.targets, **at.facts).values())

    leaves = in_use([*at.leaves, *loss.parameters()], forward)
    works = {LIBRARY: with_gradient(forward, leaves)}
    published = formulation(name, loss, at)
    if published is not None:
        works[FORMULATION] = with_gradient(published, leaves)
        if compiled:
            works[COMPILED_FORMULATION] = with_gradient(
                torch.compile(published, dynamic=False), leaves
            )
    step = RobustDistillLoss(scene.strides, **PAPER)
    inputs: dict[str, Any] = scene.inputs()
    beside = with_gradient(lambda: list(step(bank=scene.bank, **inputs).values()), scene.leaves())
    return works, {GLOBAL_KNOWLEDGE: beside}


def measured(
    name: str, at: Given, device: torch.device, effort: Effort, compiled: bool, judged: bool
) -> dict[str, Any]:
    """The gate, the peaks and the times of one method."""
    torch.compiler.reset()
    works, beside = contestants(name, at, compiled)
    expected = works[FORMULATION if FORMULATION in works else LIBRARY]()
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, Work] = {}
    for who, work in {**works, **beside}.items():
        try:
            rows[who] = {}
            if who in works:
                gap = difference(work(), expected)
                gate = gap <= TOLERANCES[at.scene.student[0].dtype]
                rows[who] = {"difference": gap, "gate": gate, **peak_memory(work, device)}
            running[who] = work
        except Exception as error:  # a compiler that is not there is a result, too
            rows[who] = {"failed": first_line(error)}
            say(f"  {who} failed: {rows[who]['failed']}")
    del expected
    for who, times in take_turns(running, device, effort).items():
        rows[who]["wall"] = times
    found: dict[str, Any] = {
        "name": name,
        "threads": torch.get_num_threads(),
        "contestants": rows,
        "gate": all(row.get("gate", True) for row in rows.values()),
    }
    bars = [BAR] if name in BARRED else []
    found["bars"] = [bar.judge(found, device.type if judged else None) for bar in bars]
    return found


def run(
    *,
    quick: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: bool = True,
    only: Sequence[str] = (),
    seconds: float = SECONDS,
) -> dict[str, Any]:
    size = replace(QUICK_SIZE, batch=1) if quick else SIZE
    size = replace(size, dtype=dtype)
    effort = QUICK if quick else Effort(seconds=seconds, least=3)
    everybody = torch.get_num_threads()
    plans = [(name, everybody) for name in only or names()]
    if device.type == "cpu" and everybody > 1:
        plans += [(name, 1) for name, _ in plans if name in BARRED]
    cases = []
    at = given(size, device)
    for count, (name, threads) in enumerate(plans, start=1):
        say(f"{count} of {len(plans)}: {name}, {threads} threads")
        torch.set_num_threads(threads)
        try:
            cases.append(measured(name, at, device, effort, compiled, judged=not quick))
        except ImportError as error:
            cases.append({"name": name, "threads": threads, "failed": first_line(error)})
        finally:
            torch.set_num_threads(everybody)
        say("  " + summary(cases[-1]))
        gc.collect()
    passed = all(case.get("gate", True) for case in cases)
    return {"size": words(size), "methods": cases, "passed": passed}


def date(results: dict[str, Any], where: Mapping[str, Any]) -> None:
    """Say of each row when it was measured: a file may hold rows of several runs."""
    for case in results["methods"]:
        case["measured"] = {key: where[key] for key in ("date", "commit", "load_average")}


def keep_others(results: dict[str, Any], old: Mapping[str, Any]) -> None:
    """Take over the rows of methods that were not measured now."""
    if any(old.get(key) != results[key] for key in ("size", "quick")):
        raise SystemExit("the file is of another size: name another, or measure all methods")
    known = {case["name"] for case in results["methods"]}
    cases = results["methods"] + [x for x in old["methods"] if x["name"] not in known]
    order = {name: i for i, name in enumerate(names())}
    cases.sort(key=lambda x: (x["name"] not in BARRED, order.get(x["name"], 0), -x["threads"]))
    results["methods"] = cases
    results["passed"] = all(case.get("gate", True) for case in cases)


def words(size: Size) -> str:
    return (
        f"P2 to P6 of {size.batch} x {size.height} x {size.width}, C = {size.channels}, "
        f"{size.boxes} boxes, {size.classes} classes, "
        f"{str(size.dtype).removeprefix('torch.')}, no adapters"
    )


def times(case: Mapping[str, Any], rival: str) -> float | None:
    """How many times a rival's time the library takes; of one with another answer `None`."""
    rows = case.get("contestants", {})
    if any("wall" not in rows.get(who, {}) for who in (LIBRARY, rival)):
        return None
    if not rows[rival].get("gate", True):
        return None
    return float(rows[LIBRARY]["wall"]["median_s"] / rows[rival]["wall"]["median_s"])


def summary(case: Mapping[str, Any]) -> str:
    if "failed" in case:
        return f"failed: {case['failed']}"
    mine = case["contestants"][LIBRARY]
    if "failed" in mine:
        return f"failed: {mine['failed']}"
    parts = [f"{milliseconds(mine['wall'])} ms", f"{mebibytes(mine['peak_bytes'])} MiB"]
    for rival in (GLOBAL_KNOWLEDGE, FORMULATION, COMPILED_FORMULATION):
        ratio = times(case, rival)
        if ratio is not None:
            parts.append(f"{number(ratio)} of {rival}")
    gaps = [row["difference"] for row in case["contestants"].values() if "difference" in row]
    same = "same answer" if case["gate"] else "ANOTHER ANSWER"
    verdict = [VERDICT[bar["met"]] for bar in case["bars"] if bar["met"] is not None]
    return ", ".join([*parts, f"{same} ({max(gaps):.0e})", *verdict])


def table(results: Mapping[str, Any]) -> str:
    lines = [described(results["environment"]), results["size"], ""]
    for case in results["methods"]:
        lines.append(f"{case['name']:13}{case['threads']} threads: {summary(case)}")
    return "\n".join(lines)
