"""The registry: one builder for each op and for the full step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import global_kd.functional as F
from global_kd import PAPER, RobustDistillLoss
from global_kd.ops.dispatch import force
from global_kd.ops.relation import own_class, relate

from . import released
from .measure import LIBRARY, Bar, Case, Work
from .scene import Scene, Size, make_scene

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DEFINITION, COMPILED, RELEASED = "definition", "compiled definition", "released"


@dataclass(frozen=True)
class Setting:
    device: torch.device
    size: Size
    compile: bool = True

    def scene(self) -> Scene:
        return make_scene(self.size, self.device)

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.size.dtype]


Builder = Callable[[Setting], tuple[Case, Tensor]]  # with the case, what the copy copies
OPS: dict[str, Builder] = {}
END_TO_END: dict[str, Builder] = {}


def op(build: Builder) -> Builder:
    OPS[build.__name__] = build
    return build


def end_to_end(build: Builder) -> Builder:
    END_TO_END[build.__name__] = build
    return build


def with_gradient(
    forward: Callable[[], Sequence[Tensor]],
    leaves: Sequence[Tensor],
    upstream: Sequence[Tensor] | None = None,
) -> Work:
    """Forward and backward; without `upstream` of the outputs' sum, as in training."""

    def work() -> list[Tensor]:
        out = list(forward())
        if upstream is None:
            total = torch.stack([x.to(torch.promote_types(x.dtype, torch.float32)) for x in out])
            gradients = torch.autograd.grad(total.sum(), leaves)
        else:
            upstreams = [u.to(x.dtype) for u, x in zip(upstream, out, strict=True)]
            gradients = torch.autograd.grad(out, leaves, upstreams)
        return [*(x.detach() for x in out), *gradients]

    return work


def forced(backend: str, work: Work) -> Work:
    def inside() -> Sequence[Tensor]:
        with force(backend):
            return work()

    return inside


def ours_and_definition(
    setting: Setting,
    forward: Callable[..., Any],
    arguments: Sequence[Any],
    leaves: Sequence[Tensor],
    upstream: Sequence[Tensor] | None = None,
) -> dict[str, Work]:
    """The library as it dispatches, its definition, and the definition compiled."""

    def of(function: Callable[..., Any]) -> Work:
        return with_gradient(lambda: function(*arguments), leaves, upstream)

    contestants = {LIBRARY: of(forward), DEFINITION: forced(DEFINITION, of(forward))}
    if setting.compile:
        compiled = torch.compile(forward, dynamic=False)
        contestants[COMPILED] = forced(DEFINITION, of(compiled))
    return contestants


@op
def imitation(setting: Setting) -> tuple[Case, Tensor]:
    scene = setting.scene()
    student, teacher, stride = scene.student[0], scene.teacher[0], scene.strides[0]
    boxes, index = scene.targets.boxes, scene.targets.image_index
    weights = torch.linspace(0.2, 1.0, len(boxes), device=setting.device)

    def forward(student: Tensor, boxes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return F.imitation_loss(student, teacher, boxes, index, stride, weights)

    def as_released() -> Sequence[Tensor]:
        painted = released.mask(
            student.shape, boxes, index, stride, list(weights), [True] * len(boxes)
        )
        foreground, background = released.imitation(student, teacher, painted)
        return foreground, 4.0 * background

    cells = student.numel()
    case = Case(
        name="imitation",
        what=f"P2 {tuple(student.shape)}, {len(boxes)} boxes, {student.dtype}",
        contestants={
            **ours_and_definition(setting, forward, (student, boxes, weights), [student]),
            RELEASED: with_gradient(as_released, [student]),
        },
        reference=RELEASED,
        tolerance=setting.tolerance,
        bytes=3 * student.nbytes,
        bytes_how="student and teacher read once, the student's gradient written once",
        flops=7 * cells,
        flops_how="an entry: difference, square, two weighted sums of two each, gradient",
        bars=[
            Bar("speedup", COMPILED, cpu=1.0, cuda=1.4),
            Bar("speedup", DEFINITION),
            Bar("speedup", RELEASED),
            Bar("traffic", "copy", cpu=2.0, cuda=1.25),
            Bar("extra", RELEASED),
        ],
        graphs=(LIBRARY, DEFINITION, COMPILED),
    )
    return case, student


def rows_of_maps(levels: Sequence[Tensor], scene: Scene) -> list[Tensor]:
    boxes, index = scene.targets.boxes, scene.targets.image_index
    return [F.pool_boxes(x, boxes, index, s) for x, s in zip(levels, scene.strides, strict=True)]


@op
def pool_boxes(setting: Setting) -> tuple[Case, Tensor]:
    scene = setting.scene()
    boxes, index = scene.targets.boxes, scene.targets.image_index
    pairs = list(zip(scene.student, scene.strides, strict=True))
    cells = [
        [released.cells(box, s, x.shape[2], x.shape[3]) for box in boxes.cpu()] for x, s in pairs
    ]
    upstream = [torch.randn(len(boxes), x.shape[1], device=setting.device) for x in scene.student]

    def forward(*levels: Tensor) -> list[Tensor]:
        return rows_of_maps(levels, scene)

    def slicing() -> list[Tensor]:
        pooled = []
        for (x, _), of_level in zip(pairs, cells, strict=True):
            crops = [
                x[i, :, y1:y2, x1:x2].mean(dim=(1, 2))
                for i, (x1, y1, x2, y2) in zip(where, of_level, strict=True)
            ]
            pooled.append(torch.stack(crops))
        return pooled

    where = index.tolist()
    contestants = {
        **ours_and_definition(setting, forward, scene.student, scene.student, upstream),
        "slicing each box": with_gradient(slicing, scene.student, upstream),
    }
    try:
        from torchvision.ops import roi_align
    except ImportError:
        pass
    else:
        # On boxes of whole cells, adaptive sampling takes every cell's centre once: the same mean.
        snapped = [
            torch.cat([index[:, None], torch.tensor(of_level, device=setting.device) * s], dim=1)
            for (_, s), of_level in zip(pairs, cells, strict=True)
        ]

        def align() -> list[Tensor]:
            return [
                roi_align(
                    x, b.to(x.dtype), 1, spatial_scale=1 / s, sampling_ratio=-1, aligned=True
                ).flatten(1)
                for (x, s), b in zip(pairs, snapped, strict=True)
            ]

        contestants["roi_align"] = with_gradient(align, scene.student, upstream)
    areas = sum((x2 - x1) * (y2 - y1) for level in cells for x1, y1, x2, y2 in level)
    map_bytes = sum(x.nbytes for x in scene.student)
    case = Case(
        name="pool_boxes",
        what=f"P2 to P6, {len(boxes)} boxes on each, C = {setting.size.channels}, "
        f"{setting.size.dtype}",
        contestants=contestants,
        reference="slicing each box",
        tolerance=setting.tolerance,
        bytes=2 * map_bytes,
        bytes_how="maps read once, gradients written once",
        flops=2 * areas * setting.size.channels,
        flops_how="one sum forward and one backward for each channel of each cell of each box",
        bars=[
            Bar("speedup", "slicing each box", cpu=25, cuda=100),
            Bar("speedup", "roi_align", cpu=1.0, cuda=1.0),
            Bar("speedup", DEFINITION),
            Bar("speedup", COMPILED),
            Bar("extra", "slicing each box"),
        ],
        graphs=(LIBRARY, DEFINITION, COMPILED, "slicing each box", "roi_align"),
    )
    return case, scene.student[0]


@op
def relation(setting: Setting) -> tuple[Case, Tensor]:
    scene = setting.scene()
    with torch.no_grad():
        mine = torch.stack(rows_of_maps(scene.student, scene))
        theirs = torch.stack(rows_of_maps(scene.teacher, scene))
    mine = mine.requires_grad_()
    g_s, g_t, prototype_labels = scene.bank.flat()
    labels, prototypes = scene.targets.labels, released.concatenate(scene.bank)

    def forward(rows: Tensor) -> list[Tensor]:
        own = own_class(prototype_labels, labels)
        loss, _ = relate(rows, theirs, g_s, g_t, pairs=None, beta=1.0, own=own, robust=True)
        return [loss]

    def as_released() -> list[Tensor]:
        losses = []
        for level in range(len(mine)):
            s, t = list(mine[level]), list(theirs[level])
            omega = released.robust_weights(s, t, labels, prototypes, level)
            losses.append(released.relation(s, t, omega, prototypes, level))
        return [torch.stack(losses).mean()]

    count, channels = mine.numel() // mine.shape[-1], mine.shape[-1]
    pairs = count * g_s.shape[1]
    case = Case(
        name="relation",
        what=f"robust weights and relation: {tuple(mine.shape)} rows, {g_s.shape[1]} prototypes",
        contestants={
            **ours_and_definition(setting, forward, (mine,), [mine]),
            RELEASED: with_gradient(as_released, [mine]),
        },
        reference=RELEASED,
        tolerance=1e-4,  # rows are float32 whatever the maps are
        bytes=2 * (mine.nbytes + g_s.nbytes) + mine.nbytes,
        bytes_how="rows and prototypes of both spaces read once, the rows' gradient written once",
        flops=6 * pairs * channels,
        flops_how="three matrix products: cosines in both spaces, the rows' gradient",
        bars=[Bar("speedup", name) for name in (RELEASED, DEFINITION, COMPILED)],
        graphs=(LIBRARY, DEFINITION, COMPILED),
    )
    return case, scene.student[0]


@op
def logits(setting: Setting) -> tuple[Case, Tensor]:
    scene = setting.scene()
    mine, theirs = scene.student_logits, scene.teacher_logits
    weights = torch.linspace(0.2, 1.0, len(mine), device=setting.device)

    def forward(rows: Tensor) -> list[Tensor]:
        return [F.logit_loss(rows, theirs, weights)]

    def public() -> list[Tensor]:
        divergence = functional.kl_div(
            (mine.float() / 2).log_softmax(1),
            (theirs.float() / 2).log_softmax(1),
            reduction="none",
            log_target=True,
        )
        return [4 * (divergence.mean(1) * weights).mean()]

    def as_released() -> list[Tensor]:
        return [released.soft_labels(mine, theirs, list(weights))]

    case = Case(
        name="logits",
        what=f"softmax, {tuple(mine.shape)} logits, {mine.dtype}",
        contestants={
            **ours_and_definition(setting, forward, (mine,), [mine]),
            RELEASED: with_gradient(as_released, [mine]),
            "kl_div": with_gradient(public, [mine]),
        },
        reference=RELEASED,
        tolerance=setting.tolerance,
        bytes=3 * mine.nbytes,
        bytes_how="logits of both read once, the student's gradient written once",
        flops=20 * mine.numel(),
        flops_how="an entry: two softmaxes, a divergence, a gradient; exponentials count as one",
        bars=[Bar("speedup", name) for name in (RELEASED, "kl_div", DEFINITION, COMPILED)],
        graphs=(LIBRARY, DEFINITION, COMPILED, "kl_div"),
    )
    return case, scene.student[0]


@end_to_end
def step(setting: Setting) -> tuple[Case, Tensor]:
    scene = setting.scene()
    loss = RobustDistillLoss(scene.strides, **PAPER)
    prototypes = released.concatenate(scene.bank)
    inputs = scene.inputs()

    def forward(loss: Callable[..., dict[str, Tensor]] = loss) -> list[Tensor]:
        return list(loss(bank=scene.bank, **inputs).values())

    def as_released() -> list[Tensor]:
        terms = released.robust_distill(scene.strides, prototypes=prototypes, **inputs)  # type: ignore[arg-type]
        return list(terms.values())

    # No CUDA graphs here: a step is judged by the clock on the wall, launches and all.
    leaves = scene.leaves()
    contestants: dict[str, Work] = {
        LIBRARY: with_gradient(forward, leaves),
        DEFINITION: forced(DEFINITION, with_gradient(forward, leaves)),
        RELEASED: with_gradient(as_released, leaves),
    }
    if setting.compile:
        compiled = torch.compile(loss, dynamic=False)
        contestants[COMPILED] = forced(DEFINITION, with_gradient(lambda: forward(compiled), leaves))
    map_bytes = sum(x.nbytes for x in scene.student)
    entries = sum(x.numel() for x in scene.student)
    rows = len(scene.strides) * len(scene.targets)
    pairs = rows * scene.bank.valid[0].numel()
    case = Case(
        name="step",
        what=f"four terms, forward and backward: {setting.size.words()}",
        contestants=contestants,
        reference=RELEASED,
        tolerance=setting.tolerance,
        bytes=5 * map_bytes,
        bytes_how="both maps read by pooling and by imitation, the student's gradient written",
        flops=9 * entries + 6 * pairs * setting.size.channels,
        flops_how="9 an entry (imitation 7, pooling at least 2) and the relation's three products",
        bars=[
            Bar("speedup", RELEASED, cpu=25, cuda=150),
            Bar("extra", RELEASED, cpu=1 / 8, cuda=1 / 8),
            Bar("memory", RELEASED),
            Bar("speedup", DEFINITION),
            Bar("speedup", COMPILED),
        ],
    )
    return case, scene.student[0]
