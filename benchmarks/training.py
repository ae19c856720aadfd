"""The share of distillation in a real training step of torchvision's Faster R-CNN.

Each part is a line of its own: the student's step alone, the teacher's forward (its backbone and,
for soft labels, its box head), and what distillation itself adds: loss terms, forward and backward
down to the student's maps, of one method, of another, and of a list of both. The teacher's forward
also comes in other forms. Weights are random, boxes are many: 32 an image, as in the full step.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from global_kd import PAPER, Distiller, GlobalKnowledgeLoss, Targets
from global_kd.losses import PKD, DistillLoss
from global_kd.step import Positives

from .measure import Bar, Effort, peak_memory, say, take_turns
from .scene import boxes_like_coco
from .suite import VERDICT, described, mebibytes, milliseconds, number

ADAPTERS = ("identity", "conv1x1", "conv3x3")
STUDENT = "student step"
TEACHER = "teacher forward"
ONE, OTHER, BOTH = "kd terms, identity", "pkd terms", "terms of a list of both"


def detector(layers: int, side: int, longest: int, small: bool) -> Any:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{layers}",
        weights=None,
        trainable_layers=5,
        norm_layer=nn.BatchNorm2d,
    )
    samples = {"rpn_pre_nms_top_n_train": 200, "rpn_post_nms_top_n_train": 100} if small else {}
    return FasterRCNN(backbone, 91, min_size=side, max_size=longest, **samples)


def batch(height: int, width: int, boxes: int, device: torch.device) -> tuple[list[Any], list[Any]]:
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(3, height, width, generator=g).to(device) for _ in range(2)]
    targets = [
        {
            "boxes": boxes_like_coco(boxes, height, width, g).to(device),
            "labels": torch.randint(1, 91, (boxes,), generator=g).to(device),
        }
        for _ in images
    ]
    return images, targets


def run(
    *,
    quick: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> dict[str, Any]:
    if dtype != torch.float32:
        raise ValueError(f"dtype: expected float32 for a training step, but got {dtype}")
    layers, boxes = (50, 101), 32
    height, width = (800, 1344) if device.type == "cuda" else (256, 320)
    effort = Effort(seconds=10.0 if device.type == "cuda" else 30.0, least=5, most=30)
    if quick:
        (height, width), boxes, layers = (96, 128), 4, (18, 18)
        effort = Effort(seconds=0.1, least=2, most=2)
    torch.manual_seed(0)
    student = detector(layers[0], height, width, quick).to(device).train()
    teacher = detector(layers[1], height, width, quick).to(device).eval().requires_grad_(False)
    images, targets = batch(height, width, boxes, device)
    settle(teacher, images)

    def train(kd: Distiller | None) -> list[Tensor]:
        losses = student(images, targets)
        if kd is not None:
            losses = {**losses, **kd(images, targets)}
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [total.detach()]

    # A rate of 0 costs the same and keeps random detectors from running away.
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0, momentum=0.9)
    train(None)  # makes the optimizer's own buffers
    works: dict[str, Callable[[], Any]] = {STUDENT: partial(train, None)}
    for adapter in ADAPTERS:
        loss = global_knowledge(adapter)
        kd = Distiller(student, teacher, loss)
        fill(loss, device)
        calls = asked(kd, partial(train, kd))
        works[f"kd terms, {adapter}"] = terms_alone(calls)
        if adapter == "identity":
            works["step with kd, identity"] = partial(train, kd)
            proposals = calls[0][1][2]
        else:
            kd.detach()
    loss = global_knowledge("identity")
    several = Distiller(student, teacher, [loss, PKD(adapter="identity")])
    fill(loss, device)
    calls = asked(several, partial(train, several))
    several.detach()
    works[OTHER] = terms_alone([call for call in calls if call[0] is not loss])
    works[BOTH] = terms_alone(calls)
    works[TEACHER] = partial(teach, teacher, images, proposals)
    for form, twin in forms(teacher, compiled).items():
        works[f"{TEACHER}, {form}"] = partial(teach, twin, images, proposals)
    rows: dict[str, dict[str, Any]] = {}
    for name, work in works.items():
        say(f"training: {name}")
        rows[name] = peak_memory(work, device)
    for name, times in take_turns(works, device, effort).items():
        rows[name]["wall"] = times
    alone = rows[STUDENT]["wall"]["median_s"]
    shares = {name: row["wall"]["median_s"] / alone for name, row in rows.items()}
    sums = shares[ONE] + shares[OTHER]
    added = shares["step with kd, identity"] - 1 - shares[TEACHER]
    bar = Bar("share", STUDENT, cuda=0.05).judge(
        {"contestants": {"library": rows[ONE], STUDENT: rows[STUDENT]}},
        None if quick else device.type,
    )
    return {
        "size": f"student R{layers[0]}-FPN, teacher R{layers[1]}-FPN, 2 x {height} x {width}, "
        f"{boxes} boxes an image, {len(proposals)} positive proposals",
        "parts": rows,
        "shares": shares,
        "added_beside_the_teacher": added,
        "list_of_the_sum_of_its_parts": shares[BOTH] / sums,
        "bars": [bar],
        "passed": True,
    }


def settle(model: Any, images: list[Tensor]) -> None:
    """Statistics for the batch norms, without which a random network in eval mode blows up."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model.backbone(model.transform(images)[0].tensors)
    model.eval()


def forms(teacher: Any, compiled: bool) -> dict[str, Any]:
    """The same teacher, as docs/training.md says that it may be given."""
    found = {
        "bfloat16": copy.deepcopy(teacher).to(torch.bfloat16),
        "channels last": copy.deepcopy(teacher).to(memory_format=torch.channels_last),
    }
    if compiled:
        found["compiled"] = copy.deepcopy(teacher)
        found["compiled"].backbone.compile(dynamic=False)
    return found


@torch.no_grad()
def teach(teacher: Any, images: list[Tensor], proposals: Targets) -> list[Tensor]:
    """What distillation asks of the teacher: its maps, and its logits of the student's boxes."""
    seen, _ = teacher.transform(images)
    dtype = next(teacher.parameters()).dtype
    maps, heads = teacher.backbone(seen.tensors.to(dtype)), teacher.roi_heads
    boxes = [proposals.boxes[proposals.image_index == i] for i in range(len(images))]
    whole = {name: x.float() for name, x in maps.items()}  # pooling knows no half on processors
    pooled = heads.box_roi_pool(whole, boxes, seen.image_sizes).to(dtype)
    return [*maps.values(), heads.box_predictor(heads.box_head(pooled))[0]]


def global_knowledge(adapter: str) -> GlobalKnowledgeLoss:
    """Rows are collected as by default, but no refresh falls into the measurement."""
    options: dict[str, Any] = {"adapter": adapter, "total_steps": 1000, **PAPER}
    return GlobalKnowledgeLoss(91, refresh_every=999, **options)


def fill(loss: GlobalKnowledgeLoss, device: torch.device) -> None:
    """A bank as after the first refresh: without one, terms are cheaper."""
    bank = loss.to(device).bank
    g = torch.Generator().manual_seed(1)
    for rows in (bank.student, bank.teacher):
        rows.copy_(torch.randn(rows.shape, generator=g))
    bank.valid.fill_(True)


Call = tuple[DistillLoss, Any, dict[str, Any]]


def asked(kd: Distiller, step: Callable[[], Any]) -> list[Call]:
    """What each loss was called with in a step, in turn."""
    calls: list[Call] = []

    def note(loss: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((loss, args, kwargs))

    hooks = [loss.register_forward_pre_hook(note, with_kwargs=True) for loss in kd.losses.values()]
    step()
    for hook in hooks:
        hook.remove()
    return calls


def terms_alone(calls: Sequence[Call]) -> Callable[[], list[Tensor]]:
    """Losses on what they were given in a step, and one backward down to the student's maps."""
    maps = [x.detach().requires_grad_() for x in calls[0][1][0]]
    leaves, given = list(maps), []
    for loss, (_, *others), kwargs in calls:
        leaves += loss.parameters()
        positives: Positives | None = kwargs.get("positives")
        if positives is not None and positives.student is not None:
            rows = positives.student.detach().requires_grad_()
            kwargs = {**kwargs, "positives": dataclasses.replace(positives, student=rows)}
            leaves.append(rows)
        given.append((loss, others, kwargs))

    def work() -> list[Tensor]:
        terms = [
            x for loss, others, kwargs in given for x in loss(maps, *others, **kwargs).values()
        ]
        return list(torch.autograd.grad(torch.stack(terms).sum(), leaves))

    return work


def table(results: Mapping[str, Any]) -> str:
    lines = [described(results["environment"]), results["size"], ""]
    lines.append(f"{'':24}{'ms, median (quartiles)':>26}{'of student step':>17}{'peak MiB':>10}")
    for name, row in results["parts"].items():
        lines.append(
            f"{name:24}{milliseconds(row['wall']):>26}{results['shares'][name]:>16.1%} "
            f"{mebibytes(row['peak_bytes']):>10}"
        )
    lines.append(
        "step with kd less student step and teacher forward: "
        f"{results['added_beside_the_teacher']:+.1%} of the student step"
    )
    lines.append(
        f"a list of two losses takes {results['list_of_the_sum_of_its_parts']:.2f} of the time of "
        "its parts"
    )
    for bar in results["bars"]:
        judged = f"({bar['bar']})" if bar["bar"] else "(reported, no bar)"
        lines.append(
            f"{VERDICT[bar['met']]} kd terms: {number(bar['measured'])} {bar['what']} {judged}"
        )
    return "\n".join(lines)
