"""The doctor before the first epoch: what one batch tells about a distillation set-up."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors import Detector, Look, Seen
from ..instances import assign_levels
from ..losses.base import DistillLoss
from ..pair import Pair
from ..targets import Targets
from .batch import ENOUGH, box_problems, pixel_problems
from .prototypes import prototype_facts, schedule_problems
from .report import Level, Report, Term
from .teacher import FindObjects, judge, teacher_findings
from .trial import DetectionLoss, Setup, gradients, norm, trial

_BYSTANDER = 1e-3  # a term below this share of the detection loss changes nothing
_TYRANT = 10.0  # a term above this many detection losses leaves them no say
# The same of gradients on the maps. Soft labels at 6.5 made playing cards worse than no teacher,
# at 1.0 better (docs/evidence_methods.md); at 2.4 they did no harm on blood smears.
_PULL = 5.0


def examine(
    setup: Setup,
    images: Any,
    targets: Any,
    *,
    nothing_distilled: Callable[[], str],
    optimizer: torch.optim.Optimizer | None,
    detection_loss: DetectionLoss | None,
    detections: FindObjects | None,
) -> Report:
    """One step of a student and its teacher, looked at from all sides; nothing is changed."""
    pair, losses = setup.pair, setup.losses
    models, (student, _) = pair.models, pair.models
    facts: list[str] = []
    problems: list[str] = []
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        held = getattr(optimizer, "optimizer", None)  # what a scheduler steps
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, but got {type(optimizer).__name__}; "
            + ("pass its .optimizer" if held is not None else "pass the one that will train")
        )

    with trial(setup, images, targets, detection_loss) as step:
        seen, looked, values, detection = step.seen, step.looked, step.terms, step.detection
        terms = _terms(student, values, detection, seen.look.maps)
        findings = teacher_findings(pair, step, detection_loss, detections)
    truth, unchecked = seen.truth, list(findings.unchecked)
    rows = _levels(losses, pair, seen, looked)
    problems += _terms_problems(terms, values)
    problems += _optimizer_problems(models, losses, optimizer)
    for kept, new in zip((facts, problems), judge(findings, looked), strict=True):
        kept += new
    found = None if findings.bad else findings.found  # a bad one's say nothing of the boxes
    keeper = next((loss for loss in losses.values() if loss.keeps_prototypes), None)
    scale, fits = findings.scale, findings.fits
    problems += box_problems(truth, seen, keeper, pair.student, found, scale, fits)
    problems += pixel_problems(seen.look.view.images, pair.student.pixels)
    for kept, new in zip((facts, problems), _unused(pair, seen, looked), strict=True):
        kept += new
    unchecked += _unknown(pair, keeper, optimizer, detection, truth)
    missing = [n for loss in losses.values() for n in loss.term_names if n not in values]
    if missing:
        wished = frozenset[str]().union(*(loss.wishes for loss in losses.values()))
        why = "; ".join(pair.refusals[f] for f in sorted(wished & pair.refusals.keys()))
        what = "no soft labels (kd_logits)" if missing == ["kd_logits"] else ", ".join(missing)
        facts.append(f"{what}: {why or 'nothing in this batch'}")
    if not values and any(loss.active for loss in losses.values()):
        problems.append(nothing_distilled())
    if keeper is not None:
        prototype_facts(facts, problems, keeper, truth)
        problems += schedule_problems(keeper)
    return Report(rows, terms, facts, problems, unchecked)


def _unused(pair: Pair, seen: Seen, looked: Look) -> tuple[list[str], list[str]]:
    """Levels without a partner: a fact, and a problem where most of the student's are left out."""
    sides = ("student", "teacher"), (seen.look, looked), pair.levels, pair.strides
    left = {
        name: [strides[i] for i in range(len(look.maps)) if i not in used]
        for name, look, used, strides in zip(*sides, strict=True)
    }
    named = [f"{name} strides {', '.join(f'{x:g}' for x in s)}" for name, s in left.items() if s]
    if not named:
        return [], []
    what = f"without a partner of about equal stride, unused: {' and '.join(named)}"
    used, every = len(pair.levels[0]), len(seen.look.maps)
    if 2 * used >= every:
        return [what], []
    return [], [
        f"only {used} of the student's {every} levels are distilled ({what}); take another module "
        "or teacher, or teacher_scale=, if the others matter"
    ]


def _unknown(
    pair: Pair,
    keeper: DistillLoss | None,
    optimizer: torch.optim.Optimizer | None,
    detection: Tensor | None,
    truth: Targets,
) -> Iterable[str]:
    """What this look cannot tell, each with what would tell it."""
    if optimizer is None:
        yield "what the optimizer holds; pass optimizer="
    if detection is None:
        yield "the sizes of the terms beside the detector's own loss; pass detection_loss="
    if pair.student.pixels is None:
        yield (
            "whether both detectors take images in this format (range, mean, order of channels); "
            "pass student_pixels= and teacher_pixels= where they differ"
        )
    if keeper is not None and pair.student.num_classes is None:
        yield (
            f"whether num_classes={keeper.generator.num_classes} is that of the detectors; it must "
            "be above the highest label of the data"
        )
    if 0 < len(truth) < ENOUGH:
        yield f"how the boxes are read: this batch has {len(truth)} only"


def _terms(
    student: nn.Module,
    values: dict[str, Tensor],
    detection: Tensor | None,
    maps: Sequence[Tensor],
) -> dict[str, Term]:
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    whole = None if detection is None else abs(float(detection.detach()))
    pull = None if detection is None else norm(gradients(detection, maps))
    terms = {}
    everything = {**values, **({} if detection is None else {"detection": detection})}
    for name, value in everything.items():
        found = gradients(value, [p for _, p in named])
        reached: dict[str, tuple[int, int]] = {}
        for (path, _), g in zip(named, found, strict=True):
            child = path.split(".")[0]
            some, count = reached.get(child, (0, 0))
            hit = g is not None and bool(g.any())
            reached[child] = (some + hit, count + 1)
        number = float(value.detach())
        share = number / whole if whole and name != "detection" else None
        pulls = norm(gradients(value, maps)) / pull if pull and name != "detection" else None
        terms[name] = Term(number, share, norm(found), pulls, reached)
    return terms


def _levels(losses: Mapping[str, DistillLoss], pair: Pair, seen: Seen, looked: Look) -> list[Level]:
    strides = [pair.strides[0][i] for i in pair.levels[0]]
    adapting = next((loss for loss in losses.values() if len(loss.adapters)), None)
    scale = None if adapting is None else adapting.finest_scale
    assigned = assign_levels(seen.truth.boxes, strides, scale)
    rows = []
    for n, (i, j) in enumerate(zip(*pair.levels, strict=True)):
        adapter = None
        if adapting is not None and strides[n] in adapting.strides:
            adapter = adapting.adapters[adapting.strides.index(strides[n])]
        size = 0 if adapter is None else sum(p.numel() for p in adapter.parameters())
        kind = "none"
        if adapting is not None and adapter is not None:
            kind = f"{adapting.adapter} ({size:,} parameters)"
        shapes = tuple(seen.look.maps[i].shape), tuple(looked.maps[j].shape)
        paths = (_path(pair.student, i), _path(pair.teacher, j))
        rows.append(Level(strides[n], *shapes, *paths, kind, int((assigned == n).sum())))
    return rows


def _path(detector: Detector, level: int) -> str:
    """All maps are tapped at one module, or each at its own; the maps that go into it are told."""
    name = "features" if "features" in detector.taps else f"level {level}"
    path = detector.taps[name]
    return f"into {path}" if name in detector.inputs else path


def _terms_problems(terms: dict[str, Term], values: dict[str, Tensor]) -> Iterable[str]:
    for name, term in terms.items():
        if not math.isfinite(term.value):
            yield (
                f"{name} is {term.value}: look for NaN in the images, the weights or the teacher's "
                "maps; lower the learning rate if the student has diverged"
            )
        elif name != "detection" and term.gradient == 0 and term.value != 0:
            yield (
                f"{name} puts no gradient on the student: its parameters are frozen, or the tapped "
                "module lies behind a detach; tap a module that is trained"
            )
        elif term.share is not None and abs(term.share) < _BYSTANDER and term.value != 0:
            yield (
                f"{name} is {term.share:.2%} of the detection loss and will hardly be felt; raise "
                "its weight"
            )
        elif term.share is not None and abs(term.share) > _TYRANT:
            yield (
                f"{name} is {term.share:.0f} times the detection loss and will drown it; lower its "
                "weight, and see that the teacher is trained: imitation is in units of the "
                "variance of its maps, unless standardize=False"
            )
        elif term.pull is not None and term.pull > _PULL:
            yield (
                f"{name} pulls at the student's maps with {term.pull:.1f} times the gradient of "
                "the detection loss, which hides your annotations; "
                "kd.calibrate(images, targets) sets the weights"
            )


def _optimizer_problems(
    models: tuple[nn.Module, nn.Module],
    losses: Mapping[str, DistillLoss],
    optimizer: torch.optim.Optimizer | None,
) -> Iterable[str]:
    student, teacher = ({id(p) for p in m.parameters()} for m in models)
    if student & teacher:
        yield (
            f"student and teacher share {len(student & teacher)} parameters: training the student "
            "would change its teacher; use copy.deepcopy for one of them"
        )
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    owned = [item for loss in losses.values() for item in loss.named_parameters()]
    missing = [n for n, p in owned if p.requires_grad and id(p) not in held]
    if missing:
        yield (
            f"{len(missing)} parameters of the adapters are not in the optimizer ({missing[0]}, "
            "...); build it from [*student.parameters(), *kd.parameters()]"
        )
    wanted = {id(p) for p in models[0].parameters() if p.requires_grad}
    if not wanted & held:
        yield "the optimizer holds no parameter of the student; give it student.parameters()"
    if teacher & held:
        yield (
            f"the optimizer holds {len(teacher & held)} parameters of the teacher; weight decay "
            "would change it; leave teacher.parameters() out"
        )
