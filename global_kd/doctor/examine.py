"""The doctor before the first epoch: what one batch tells about a distillation set-up."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors import Detections, Detector, Look, Seen
from ..hooks import set_mode
from ..instances import assign_levels
from ..losses.base import DistillLoss
from ..pair import Pair
from ..targets import Targets
from .boxes import SCORE, doubts
from .report import Level, Report, Term
from .trial import DetectionLoss, Setup, gradients, norm, own_loss, trial
from .untouched import train_all_but_statistics

_ENOUGH = 3  # boxes from which on a batch can tell one reading from another
_BYSTANDER = 1e-3  # a term below this share of the detection loss changes nothing
_TYRANT = 10.0  # a term above this many detection losses leaves them no say


def examine(
    setup: Setup,
    images: Any,
    targets: Any,
    *,
    nothing_distilled: Callable[[], str],
    optimizer: torch.optim.Optimizer | None,
    detection_loss: DetectionLoss | None,
) -> Report:
    """One step of a student and its teacher, looked at from all sides; nothing is changed."""
    pair, losses = setup.pair, setup.losses
    models, (student, teacher) = pair.models, pair.models
    facts: list[str] = []
    problems: list[str] = []

    with trial(setup, images, targets, detection_loss) as step:
        seen, looked, values, detection = step.seen, step.looked, step.terms, step.detection
        with torch.no_grad():
            again = pair.look(seen.look.view)
        terms = _terms(student, values, detection)
        own = None if detection is None else float(detection.detach())
        theirs = None
        like = next(teacher.parameters(), None)  # in half precision few compute their own losses
        whole = like is None or like.dtype in (torch.float32, torch.float64)
        if whole and pair.student.kind is not None and pair.student.kind == pair.teacher.kind:
            train_all_but_statistics(teacher)
            with torch.no_grad():
                theirs = own_loss(teacher, pair.teacher, images, targets, detection_loss)
        set_mode(teacher, False)
        with torch.no_grad():
            found = pair.teacher.detections(looked.view)
    truth = seen.truth
    rows = _levels(losses, pair, seen, looked)
    problems += _terms_problems(terms, values)
    problems += _optimizer_problems(models, losses, optimizer)
    _teacher(facts, problems, looked, again, found, own, theirs)
    if own is not None and theirs is not None and float(theirs) >= own:
        found = None  # what a bad teacher detects says nothing of the boxes
    keeper = next((loss for loss in losses.values() if loss.keeps_prototypes), None)
    problems += _boxes_problems(truth, seen, keeper, pair.student, found, pair.scale)
    unpaired = [
        f"{name} levels {[i for i in range(len(x.maps)) if i not in used]}"
        for name, x, used in zip(
            ("student", "teacher"), (seen.look, looked), pair.levels, strict=True
        )
        if len(used) < len(x.maps)
    ]
    if unpaired:
        facts.append(f"without a partner of equal stride, unused: {', '.join(unpaired)}")
    missing = [n for loss in losses.values() for n in loss.term_names if n not in values]
    if missing:
        wished = frozenset[str]().union(*(loss.wishes for loss in losses.values()))
        why = "; ".join(pair.refusals[f] for f in sorted(wished & pair.refusals.keys()))
        what = "no soft labels (kd_logits)" if missing == ["kd_logits"] else ", ".join(missing)
        facts.append(f"{what}: {why or 'nothing in this batch'}")
    if not values and any(loss.active for loss in losses.values()):
        problems.append(nothing_distilled())
    if keeper is not None:
        _prototypes(facts, problems, keeper, truth)
    return Report(rows, terms, facts, problems)


def _prototypes(facts: list[str], problems: list[str], keeper: DistillLoss, truth: Targets) -> None:
    least = keeper.generator.min_side
    small = (truth.boxes[:, 2:] - truth.boxes[:, :2]).amin(dim=1) <= least
    if keeper.uses_prototypes and len(truth) >= _ENOUGH and bool(small.all()):
        problems.append(
            f"none of the batch's {len(truth)} boxes is larger than min_side="
            f"{least:g} pixels of the network input both ways, so none of them "
            "can become a prototype; pass a smaller min_side"
        )
    if not keeper.bank.valid.any():
        facts.append(
            "no prototypes yet: the terms above use some made of this batch's boxes; in training "
            "omega is 1 and kd_relation 0 until the first refresh"
        )


def _terms(
    student: nn.Module, values: dict[str, Tensor], detection: Tensor | None
) -> dict[str, Term]:
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    whole = None if detection is None else abs(float(detection.detach()))
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
        terms[name] = Term(number, share, norm(found), reached)
    return terms


def _levels(losses: Mapping[str, DistillLoss], pair: Pair, seen: Seen, looked: Look) -> list[Level]:
    strides = [pair.strides[0][i] for i in pair.levels[0]]
    adapting = next((loss for loss in losses.values() if len(loss.adapters)), None)
    scale = getattr(getattr(adapting, "rdm", None), "finest_scale", None)
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
    missing = [n for n, p in owned if id(p) not in held]
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


def _teacher(
    facts: list[str],
    problems: list[str],
    looked: Look,
    again: Look,
    found: list[Detections] | None,
    own: float | None,
    theirs: Tensor | None,
) -> None:
    equal = all(torch.equal(a, b) for a, b in zip(looked.maps, again.maps, strict=True))
    facts.append("the teacher is in eval mode at every step and gets no gradient")
    if not equal:
        problems.append(
            "the teacher gives other maps when it sees the same images twice: it draws random "
            "numbers in eval mode (functional dropout without training=False?); switch that off"
        )
    if not all(x.isfinite().all() for x in looked.maps):
        problems.append("the teacher's maps hold NaN or infinities; load its weights anew")
    if found is None:
        facts.append("whether the teacher detects anything is unknown for this kind of model")
    else:
        count = sum(int((x.scores >= SCORE).sum()) for x in found)
        facts.append(
            f"the teacher finds {count} objects of score >= {SCORE} in {len(found)} images"
        )
        if count == 0:
            problems.append(
                "the teacher detects nothing on this batch: load its trained weights, and check "
                "that it sees images in its own format (teacher_pixels)"
            )
    if own is not None and theirs is not None:
        facts.append(f"detection loss: student {own:.4g}, teacher {float(theirs):.4g}")
        if float(theirs) >= own:
            problems.append(
                f"the teacher's detection loss on this batch ({float(theirs):.4g}) is not below "
                f"the student's ({own:.4g}): load its trained weights, and check that both use the "
                "same class numbers"
            )


def _boxes_problems(
    truth: Targets,
    seen: Seen,
    keeper: DistillLoss | None,
    detector: Detector,
    found: list[Detections] | None,
    scale: float,
) -> Iterable[str]:
    if len(truth) == 0:
        yield "the batch has no boxes: check another one"
        return
    boxes, labels = truth.boxes.float(), truth.labels
    height, width = seen.look.view.size
    classes = None if keeper is None else keeper.generator.num_classes
    if classes is not None and detector.num_classes not in (None, classes):
        yield (
            f"the student was made for {detector.num_classes} classes, but the loss for "
            f"{classes}; pass num_classes={detector.num_classes}"
        )
    first = detector.first_label
    if labels.min() < first:
        yield (
            f"label {int(labels.min())} is the background in this framework: classes start at "
            f"{first}; add {first} to the labels"
        )
    if boxes.max() <= 2 and max(height, width) >= 32:
        yield (
            f"no box coordinate is above {float(boxes.max()):.3g} on a canvas of {width} x "
            f"{height}: these look normalised; multiply by the width and height in pixels"
        )
        return
    over = (boxes[:, 2:] > 1.05 * boxes.new_tensor([width, height])).any(dim=1)
    if over.any():
        yield (
            f"{int(over.sum())} of {len(truth)} boxes reach beyond the canvas of {width} x "
            f"{height} pixels: these look like pixels of the original image; scale them as the "
            "image was resized"
        )
    if found is not None and len(truth) >= _ENOUGH:
        yield from doubts(truth, found, scale, (height, width))
