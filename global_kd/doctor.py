"""The doctor before the first epoch: what one batch tells about a distillation set-up."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .detector import Detections, Detector, Look, Seen
from .hooks import FeatureTap
from .instances import assign_levels
from .losses.global_knowledge import GlobalKnowledgeLoss
from .targets import Targets

_SCORE = 0.3  # a detection counts from here on
_FOUND = 0.5  # IoU at which a detection and a box are the same object
_FEW, _MOST = 0.3, 0.6  # shares of boxes found: a reading under the first is doubted, over the
# second believed
_ENOUGH = 3  # boxes from which on a batch can tell one reading from another
_BYSTANDER = 1e-3  # a term below this share of the detection loss changes nothing
_TYRANT = 10.0  # a term above this many detection losses leaves them no say
NOTHING_DISTILLED = (
    "only soft labels have a weight, and the two heads give no comparable class logits (or "
    "teacher_scale is not 1), so nothing is distilled; give foreground or background a weight"
)

PassOn = Callable[[GlobalKnowledgeLoss, Seen, Look], dict[str, Tensor]]


@dataclass(frozen=True)
class Level:
    """A pair of levels.

    Attributes:
        stride: Pixels of the student's network input per cell.
        student: Shape ``(B, C, H, W)`` of the student's map.
        teacher: Of the teacher's, as it comes.
        student_path: The student's module that it is read from.
        teacher_path: Likewise.
        adapter: Its kind and its number of parameters.
        boxes: How many boxes of the batch are imitated here.
    """

    stride: float
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    student_path: str
    teacher_path: str
    adapter: str
    boxes: int


@dataclass(frozen=True)
class Term:
    """A term on this batch.

    Attributes:
        value: With its weight and schedule.
        share: In units of the detection loss, where that is known.
        gradient: Norm of its gradient on the student's parameters.
        reached: For each child of the student: parameters with a gradient, and all of them.
    """

    value: float
    share: float | None
    gradient: float
    reached: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Report:
    """What :meth:`global_kd.Distiller.check` found; ``print`` shows it as tables.

    Attributes:
        levels: Finest first.
        terms: By name; ``"detection"`` is the student's own loss, where known.
        facts: Further findings, a sentence each.
        problems: What should be mended, each with the sentence that mends it.
    """

    levels: list[Level]
    terms: dict[str, Term]
    facts: list[str]
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether there is nothing to mend."""
        return not self.problems

    def __str__(self) -> str:
        shown = [["stride", "student", "", "teacher", "", "adapter", "boxes"]]
        for x in self.levels:
            mine, theirs = ("x".join(map(str, shape)) for shape in (x.student, x.teacher))
            sides = [x.student_path, mine, x.teacher_path, theirs]
            shown.append([f"{x.stride:g}", *sides, x.adapter, str(x.boxes)])
        parts = [_table(shown)]
        shown = [["term", "value", "/ detection", "gradient"]]
        for name, t in self.terms.items():
            share = "-" if t.share is None else f"{t.share:.3g}"
            shown.append([name, f"{t.value:.4g}", share, f"{t.gradient:.3g}"])
        parts.append(_table(shown))
        children = list(dict.fromkeys(c for t in self.terms.values() for c in t.reached))
        shown = [["gradient reaches", *self.terms]]
        for child in children:
            counts = [t.reached[child] for t in self.terms.values()]
            shown.append([child, *(f"{some}/{everything}" for some, everything in counts)])
        parts.append(_table(shown))
        parts.append("\n".join(f"- {x}" for x in self.facts))
        parts.append("\n".join(f"! {x}" for x in self.problems) or "No problem found.")
        return "\n\n".join(parts)


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def examine(
    models: tuple[nn.Module, nn.Module],
    detectors: tuple[Detector, Detector],
    loss: GlobalKnowledgeLoss,
    tap: FeatureTap,
    look: Callable[[Any], Look],
    pass_on: PassOn,
    levels: tuple[Sequence[int], Sequence[int]],
    images: Any,
    targets: Any,
    *,
    soft: bool,
    scale: float,
    optimizer: torch.optim.Optimizer | None,
    detection_loss: Callable[[nn.Module], Tensor] | None,
) -> Report:
    """One step of a student and its teacher, looked at from all sides; nothing is changed."""
    student, teacher = models
    facts: list[str] = []
    problems: list[str] = []

    def own_loss(model: nn.Module, detector: Detector) -> Tensor | None:
        if detection_loss is not None:
            return detection_loss(model)
        return detector.losses(images, targets)

    with _untouched(*models):
        student.train()
        _wait_for_no_rank(student)
        teacher.eval()
        with torch.enable_grad():
            detection = own_loss(student, detectors[0])
            seen = detectors[0].read(tap.read(), images, targets, soft)
            with torch.no_grad():
                looked, again = look(seen.look.view), look(seen.look.view)
            trial = copy.deepcopy(loss).train()
            trial.generator.distributed = False  # one rank may look alone
            if not trial.bank.valid.any():  # relations and omega need prototypes: these boxes'
                trial.generator.min_side = 0.0
                trial.refresh_every = trial.refresh_every or 1
                pass_on(trial, seen, looked)
                trial.refresh()
            values = pass_on(trial, seen, looked)
            terms = _terms(student, values, detection)
        own = None if detection is None else float(detection.detach())
        theirs = None
        if detectors[0].kind is not None and detectors[0].kind == detectors[1].kind:
            _train_all_but_statistics(teacher)
            with torch.no_grad():
                theirs = own_loss(teacher, detectors[1])
        teacher.eval()
        with torch.no_grad():
            found = detectors[1].detections(looked.view)
    truth = seen.truth
    rows = _levels(loss, detectors, seen, looked, levels)
    problems += _terms_problems(terms, values)
    problems += _optimizer_problems(models, loss, optimizer)
    _teacher(facts, problems, looked, again, found, own, theirs)
    if own is not None and theirs is not None and float(theirs) >= own:
        found = None  # what a bad teacher detects says nothing of the boxes
    problems += _boxes_problems(truth, seen, loss, detectors[0], found, scale)
    unpaired = [
        f"{name} levels {[i for i in range(len(x.maps)) if i not in used]}"
        for name, x, used in zip(("student", "teacher"), (seen.look, looked), levels, strict=True)
        if len(used) < len(x.maps)
    ]
    if unpaired:
        facts.append(f"without a partner of equal stride, unused: {', '.join(unpaired)}")
    if "kd_logits" not in terms and loss.rdm.logits > 0:
        facts.append(
            "no soft labels (kd_logits): the two heads give no comparable class logits, or "
            "teacher_scale is not 1"
        )
    if loss.active and not values:
        problems.append(NOTHING_DISTILLED)
    small = (truth.boxes[:, 2:] - truth.boxes[:, :2]).amin(dim=1) <= loss.generator.min_side
    if loss.rdm.uses_prototypes and len(truth) >= _ENOUGH and bool(small.all()):
        problems.append(
            f"none of the batch's {len(truth)} boxes is larger than min_side="
            f"{loss.generator.min_side:g} pixels of the network input both ways, so none of them "
            "can become a prototype; pass a smaller min_side"
        )
    if not loss.bank.valid.any():
        facts.append(
            "no prototypes yet: the terms above use some made of this batch's boxes; in training "
            "omega is 1 and kd_relation 0 until the first refresh"
        )
    return Report(rows, terms, facts, problems)


@contextmanager
def _untouched(*models: nn.Module) -> Iterator[None]:
    """Modes, counters, buffers and the random state come back as they were."""
    numbers = [(m, _numbers(m)) for model in models for m in model.modules()]
    buffers = [(b, b.clone()) for model in models for b in model.buffers()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for module, kept in numbers:
                for name in _numbers(module).keys() - kept.keys():
                    delattr(module, name)
                vars(module).update(kept)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Its mode, and running means that are plain attributes, as Detectron2's RetinaNet has one."""
    return {name: x for name, x in vars(module).items() if isinstance(x, (bool, int, float))}


def _train_all_but_statistics(model: nn.Module) -> None:
    """Train mode, so that a detector computes its losses, with nothing random or moving in it."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            module.eval()


def _wait_for_no_rank(model: nn.Module) -> None:
    """Synchronised batch norm, of any framework, uses its running means: one rank looks alone."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    own = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in own:
            module.eval()


def _terms(
    student: nn.Module, values: dict[str, Tensor], detection: Tensor | None
) -> dict[str, Term]:
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    whole = None if detection is None else abs(float(detection.detach()))
    terms = {}
    everything = {**values, **({} if detection is None else {"detection": detection})}
    for name, value in everything.items():
        gradients: Sequence[Tensor | None] = [None] * len(named)
        if value.requires_grad and named:
            gradients = torch.autograd.grad(
                value, [p for _, p in named], retain_graph=True, allow_unused=True
            )
        reached: dict[str, tuple[int, int]] = {}
        squares = 0.0
        for (path, _), g in zip(named, gradients, strict=True):
            child = path.split(".")[0]
            some, count = reached.get(child, (0, 0))
            hit = g is not None and bool(g.any())
            reached[child] = (some + hit, count + 1)
            squares += 0.0 if g is None else float(g.float().square().sum())
        number = float(value.detach())
        share = number / whole if whole and name != "detection" else None
        terms[name] = Term(number, share, squares**0.5, reached)
    return terms


def _levels(
    loss: GlobalKnowledgeLoss,
    detectors: tuple[Detector, Detector],
    seen: Seen,
    looked: Look,
    levels: tuple[Sequence[int], Sequence[int]],
) -> list[Level]:
    assigned = assign_levels(seen.truth.boxes, loss.rdm.strides, loss.rdm.finest_scale)
    adapters: list[nn.Module | None] = [*loss.adapters] or [None] * len(loss.rdm.strides)
    rows = []
    for n, (i, j) in enumerate(zip(*levels, strict=True)):
        adapter = adapters[n]
        size = 0 if adapter is None else sum(p.numel() for p in adapter.parameters())
        kind = "none" if adapter is None else f"{loss.adapter} ({size:,} parameters)"
        shapes = tuple(seen.look.maps[i].shape), tuple(looked.maps[j].shape)
        paths = (_path(detectors[0], i), _path(detectors[1], j))
        rows.append(Level(loss.rdm.strides[n], *shapes, *paths, kind, int((assigned == n).sum())))
    return rows


def _path(detector: Detector, level: int) -> str:
    """All maps are tapped at one module, or each at its own; the maps that go into it are told."""
    name = "features" if "features" in detector.taps else f"level {level}"
    path = detector.taps[name]
    return f"into {path}" if name in detector.inputs else path


def _terms_problems(terms: dict[str, Term], values: dict[str, Tensor]) -> Iterable[str]:
    for name, term in terms.items():
        if not torch.tensor(term.value).isfinite():
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
    loss: GlobalKnowledgeLoss,
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
    missing = [n for n, p in loss.named_parameters() if id(p) not in held]
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
        count = sum(int((x.scores >= _SCORE).sum()) for x in found)
        facts.append(
            f"the teacher finds {count} objects of score >= {_SCORE} in {len(found)} images"
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
    loss: GlobalKnowledgeLoss,
    detector: Detector,
    found: list[Detections] | None,
    scale: float,
) -> Iterable[str]:
    if len(truth) == 0:
        yield "the batch has no boxes: check another one"
        return
    boxes, labels = truth.boxes.float(), truth.labels
    height, width = seen.look.view.size
    classes = loss.generator.num_classes
    if detector.num_classes not in (None, classes):
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
        yield from _doubts(truth, found, scale, (height, width))


def _doubts(
    truth: Targets, found: list[Detections], scale: float, size: tuple[int, int]
) -> Iterable[str]:
    """Compare the boxes, read in the ways that people mistake, with what the teacher finds."""
    height, width = size
    given = truth.boxes.float()
    whole = given.new_tensor([width, height, width, height])
    a, b = given[:, :2], given[:, 2:]
    readings = {
        "xywh (corner and size)": torch.cat([a, a + b], dim=1),
        "cxcywh (centre and size)": torch.cat([a - b / 2, a + b / 2], dim=1),
        "normalised xyxy": given * whole,
        "normalised cxcywh": torch.cat([a - b / 2, a + b / 2], dim=1) * whole,
    }
    for step in range(-8, 9):
        if step:
            readings[f"pixels of images {2 ** (-step / 4):.2g} times as large"] = given * 2 ** (
                step / 4
            )
    share, agree, _ = _agreement(given, truth, found, scale)
    if share < _FEW:
        others = {name: _agreement(x, truth, found, scale) for name, x in readings.items()}
        best, (other, agree_there, _) = max(others.items(), key=lambda item: item[1][2])
        if other >= _MOST:
            yield (
                f"the teacher finds {share:.0%} of the boxes as they are given, and {other:.0%} of "
                f"them read as {best}: convert them to xyxy in pixels of the network input"
            )
            share, agree = other, agree_there
        elif any(len(x.boxes) for x in found):
            yield (
                f"the teacher finds {share:.0%} of the batch's boxes: check its weights and the "
                "boxes' pixels, and plot both on an image"
            )
    if share >= _MOST and agree[0] < _FEW:
        shift = max((-1, 1), key=lambda k: agree[k])
        if agree[shift] >= _MOST:
            yield (
                f"the teacher's labels are those of the boxes {'minus' if shift < 0 else 'plus'} "
                "one: one side counts the background as class 0, the other does not; shift the "
                "labels, or use a teacher of the same class numbers"
            )
        else:
            yield (
                f"the teacher finds the boxes but names {agree[0]:.0%} of them as labelled: the "
                "class lists differ; soft labels would teach nonsense (logits=0)"
            )


def _agreement(
    boxes: Tensor, truth: Targets, found: list[Detections], scale: float
) -> tuple[float, dict[int, float], float]:
    """Share of boxes found; of those, share named as labelled + shift; mean IoU of all."""
    hits, overlap = 0, 0.0
    named = dict.fromkeys((-1, 0, 1), 0)
    for i, x in enumerate(found):
        mine = truth.image_index == i
        # Among hundreds of detections there is one for any box.
        keep = (x.scores >= _SCORE) & (
            torch.arange(len(x.scores), device=mine.device) < 2 * mine.sum() + 3
        )
        if not keep.any() or not mine.any():
            continue
        iou = _iou(boxes[mine], x.boxes[keep].float() / scale)
        best, which = iou.max(dim=1)
        overlap += float(best.sum())
        hit = best >= _FOUND
        hits += int(hit.sum())
        theirs, ours = x.labels[keep][which][hit], truth.labels[mine][hit]
        for shift in named:
            named[shift] += int((theirs == ours + shift).sum())
    return (
        hits / len(truth),
        {k: v / max(hits, 1) for k, v in named.items()},
        overlap / len(truth),
    )


def _iou(a: Tensor, b: Tensor) -> Tensor:
    corner = torch.maximum(a[:, None, :2], b[None, :, :2])
    end = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (end - corner).clamp(min=0).prod(dim=2)
    areas = [(x[:, 2:] - x[:, :2]).prod(dim=1) for x in (a, b)]
    return common / (areas[0][:, None] + areas[1][None] - common).clamp(min=1e-9)
