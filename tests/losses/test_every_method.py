"""What must hold for every method, whatever it is made of: finite terms, finite gradients.

Each method's own tests say what its numbers are. Here all of them meet the same awkward steps.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from global_kd import GlobalKnowledgeLoss, Targets, losses
from global_kd.losses import DICOD, DistillLoss
from global_kd.step import Dense, Grid, Positives, Queries, RegionOutputs, Regions
from tests.detectors.methods import Crops, methods
from tests.strategies import random

CLASSES, CHANNELS, BINS, QUERIES = 3, 4, 5, 6
GRIDS = (Grid(8, 6, 8, 2), Grid(16, 3, 4, 2))
ONE = (Grid(8, 1, 1, 1),)
WIDTH, HEIGHT = 64, 48
METHODS = methods(CLASSES)
NORMAL = [[3.0, 2, 20, 30], [10, 6, 30, 20], [30, 12, 60, 40], [17, 9, 40, 30]]
AWKWARD = [[9.0, 9, 9, 9], [-40, -30, -10, -5], [60, 40, 500, 400], [64, 48, 64, 48]]


@dataclass(frozen=True)
class Scene:
    """How a step is made.

    Attributes:
        maps: ``"random"``, ``"zero"``, ``"constant"``, ``"identical"`` or ``"large"``.
        scale: Of all logits; 100 saturates them, with signs of their own in either detector.
        same: The teacher says what the student says.
        boxes: The ground truth, and what the heads predict where it is awkward.
        positives: Whether anything is assigned.
    """

    maps: str = "random"
    scale: float = 1.0
    same: bool = False
    boxes: tuple[Any, ...] = tuple(map(tuple, NORMAL))
    positives: bool = True
    classes: int = CLASSES
    grids: tuple[Grid, ...] = GRIDS
    batch: int = 2
    dtype: torch.dtype = torch.float32
    leaves: list[Tensor] = field(default_factory=list)

    def logits(self, *shape: int, seed: int) -> Tensor:
        x = random(shape, seed)
        return (x.sign() * self.scale if self.scale > 10 else x * self.scale).to(self.dtype)

    def learns(self, x: Tensor) -> Tensor:
        self.leaves.append(x.requires_grad_())
        return x


def pyramids(at: Scene) -> tuple[list[Tensor], list[Tensor]]:
    sides = []
    for side in range(2):
        shapes = [(at.batch, CHANNELS, g.height, g.width) for g in at.grids]
        maps = [random(s, 10 * (side and at.maps != "identical") + i) for i, s in enumerate(shapes)]
        if at.maps in ("zero", "constant"):
            maps = [torch.full_like(x, 0.0 if at.maps == "zero" else 3.0 + side) for x in maps]
        if at.maps == "large":
            maps = [x * 1e4 for x in maps]
        sides.append([x.to(at.dtype) for x in maps])
    return [at.learns(x) for x in sides[0]], sides[1]


def truth(at: Scene) -> Targets:
    count = len(at.boxes)
    boxes = torch.tensor(at.boxes, dtype=torch.float32).reshape(-1, 4)
    index = torch.arange(count) % at.batch
    return Targets(boxes, torch.arange(count) % at.classes, index, ids=torch.arange(count))


def around(at: Scene, count: int, seed: int) -> Tensor:
    """Boxes ``(B, count, 4)`` such as heads predict: those of the ground truth, moved a little."""
    given = torch.tensor(at.boxes or NORMAL, dtype=torch.float32)
    boxes = given[torch.arange(at.batch * count) % len(given)].view(at.batch, count, 4)
    shift = 2 * random((at.batch, count, 4), seed, torch.float32)
    return (boxes + (0 if list(map(list, at.boxes)) == AWKWARD else shift)).to(at.dtype)


def cells(grids) -> Tensor:
    rows = []
    for g in grids:
        for y in range(g.height):
            for x in range(g.width):
                rows += [[x, y, x + 1 + a, y + 1 + a] for a in range(g.anchors)]
                rows[-g.anchors :] = [[v * g.stride for v in row] for row in rows[-g.anchors :]]
    return torch.tensor(rows, dtype=torch.float32)


def facts(at: Scene, targets: Targets) -> dict[str, Any]:
    """All of them."""
    count, columns, boxes = sum(g.rows for g in at.grids), at.classes, len(targets)
    heads = []
    for side in range(2):
        seed = 0 if at.same else 50 * side
        parts = [
            at.logits(at.batch, count, columns, seed=seed + 1),
            around(at, count, seed + 2),
            at.logits(at.batch, count, 4, BINS, seed=seed + 3),
        ]
        logits, decoded, bins = map(at.learns, parts) if side == 0 else parts
        heads.append(Dense(logits, at.grids, boxes=decoded, bins=bins, priors=cells(at.grids)))
    assigned = torch.full((at.batch, count), -1)
    assigned[:, 0] = -2
    some = at.positives and boxes > 0
    if some:
        for row in range(min(boxes, count - 1)):
            assigned[row % at.batch, 1 + row] = row
    box = torch.arange(boxes) if some else torch.zeros(0, dtype=torch.int64)
    rows = torch.cat([box, torch.tensor([-1, -1, -2])])
    proposals = Targets(
        around(at, len(rows), 7)[0].float(),
        torch.cat([targets.labels[box] + 1, torch.zeros(3, dtype=torch.int64)]),
        torch.cat([targets.image_index[box], torch.zeros(3, dtype=torch.int64)]),
    )
    outputs = []
    for side in range(2):
        seed = 0 if at.same else 50 * side
        parts = [
            at.logits(len(rows), columns + 1, seed=seed + 4),
            around(at, len(rows), seed + 5)[0][:, None].repeat(1, columns, 1),
        ]
        outputs.append(RegionOutputs(*(map(at.learns, parts) if side == 0 else parts)))
    regions = Regions(proposals, rows, *outputs)
    student, teacher = (at.logits(len(box), columns, seed=s) for s in (8, 8 if at.same else 58))
    weight = 0.1 * random((columns + 4, CHANNELS, 1, 1), 9, torch.float32)
    weight[:columns] *= at.scale

    def head(maps) -> Dense:
        found = torch.cat(
            [
                nn.functional.conv2d(x.float(), weight)
                .flatten(2)
                .mT.repeat_interleave(g.anchors, dim=1)
                for x, g in zip(maps, at.grids)
            ],
            dim=1,
        )
        sides = found[..., -4:].clamp(-3, 3).exp() * torch.tensor([-1.0, -1, 1, 1])
        return Dense(found[..., :-4], at.grids, boxes=cells(at.grids) + sides)

    return {
        "positives": Positives(box, student=at.learns(student), teacher=teacher),
        "dense": tuple(heads),
        "student_dense": heads[0],
        "teacher_dense": heads[1],
        "assigned": assigned,
        "regions": regions,
        "teacher_regions": regions,
        "queries": Queries(
            random((at.batch, QUERIES, CHANNELS), 1, at.dtype),
            at.logits(at.batch, QUERIES, columns, seed=2),
            around(at, QUERIES, 3),
        ),
        "images": torch.rand(at.batch, 3, HEIGHT, WIDTH, generator=torch.Generator()),
        "teacher_head": head,
    }


def made(name: str, at: Scene, **options: Any) -> DistillLoss:
    """A method as it comes, without warm-up."""
    levels = {
        "student_channels": [CHANNELS] * len(at.grids),
        "teacher_channels": [CHANNELS] * len(at.grids),
        "strides": [g.stride for g in at.grids],
        "total_steps": 9,
    }
    if name == "GlobalKnowledgeLoss":
        loss = GlobalKnowledgeLoss(
            at.classes, relation=5, refresh_every=None, num_prototypes=2, **levels, **options
        )
        for rows in (loss.bank.student, loss.bank.teacher):
            rows.copy_(random(rows.shape, 3, torch.float32))
        loss.bank.valid.fill_(True)
        return loss
    if name == "DICOD":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            classifier = Crops(at.classes)
        return DICOD(classifier, size=16, **levels, **options)
    loss = getattr(losses, name)(**levels, **options)
    loss.warmup_steps = 0
    return loss


SCENES = {
    "plain": Scene(),
    "zero maps": Scene(maps="zero"),
    "constant maps": Scene(maps="constant"),
    "identical maps and heads": Scene(maps="identical", same=True),
    "large maps": Scene(maps="large"),
    "saturated logits": Scene(scale=100.0),
    "saturated and equal logits": Scene(scale=100.0, same=True),
    "logits of 0": Scene(scale=0.0),
    "no boxes": Scene(boxes=()),
    "no positives": Scene(positives=False),
    "one box": Scene(boxes=tuple(map(tuple, NORMAL[:1]))),
    "boxes of no size and over the border": Scene(boxes=tuple(map(tuple, AWKWARD))),
    "one class": Scene(classes=1),
    "one location": Scene(grids=ONE, batch=1),
    "one location without boxes": Scene(grids=ONE, batch=1, boxes=()),
    "everything at once": Scene(maps="zero", scale=100.0, grids=ONE, batch=1, classes=1, boxes=()),
}


def take(name: str, at: Scene, region=None, robust=None) -> dict[str, Tensor]:
    """One step: every term and every gradient is finite, and the terms are in float32."""
    at = replace(at, leaves=[])
    loss = made(name, at, **({} if robust is None else {"robust": True}))
    targets = truth(at)
    given = facts(at, targets)
    if robust is not None:
        given["omega"] = torch.full((len(at.grids), len(targets)), robust)
    student, teacher = pyramids(at)
    with region or contextlib.nullcontext():
        terms = loss(student, teacher, targets, **given)
    assert terms
    for part, value in terms.items():
        assert value.dtype == torch.float32 and value.dim() == 0, part
        assert value.isfinite(), part
    leaves = [*at.leaves, *loss.parameters()]
    total = torch.stack([*terms.values()]).sum()
    assert total.requires_grad
    slopes = torch.autograd.grad(total, leaves, allow_unused=True)
    assert any(x is not None for x in slopes)
    assert all(x is None or bool(x.isfinite().all()) for x in slopes)
    return {part: value.detach() for part, value in terms.items()}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("name", METHODS)
def test_finite(name, scene):
    take(name, SCENES[scene])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scene", ["plain", "saturated logits", "no boxes", "zero maps"])
@pytest.mark.parametrize("name", METHODS)
def test_finite_in_half_precision(name, scene, dtype):
    """Of tensors in half precision, inside and outside of an autocast region."""
    at = replace(SCENES[scene], dtype=dtype)
    take(name, at)
    take(name, at, torch.autocast("cpu", dtype))
    take(name, SCENES[scene], torch.autocast("cpu", dtype))


@pytest.mark.parametrize("name", [x for x in METHODS if x != "GlobalKnowledgeLoss"])
def test_robust_weights_of_one_change_nothing(name):
    plain, robust = take(name, Scene()), take(name, Scene(), robust=1.0)
    assert plain.keys() == robust.keys()
    for part, value in plain.items():
        torch.testing.assert_close(robust[part], value, msg=part)


@pytest.mark.parametrize("scene", ["no boxes", "boxes of no size and over the border"])
@pytest.mark.parametrize("name", [x for x in METHODS if x != "GlobalKnowledgeLoss"])
def test_robust_weights_of_zero_are_finite(name, scene):
    take(name, SCENES[scene], robust=0.0)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_images_is_of_no_account(name):
    """With their boxes and predictions; MGD's masks belong to places, not to images."""
    if name in ("MGD", "GlobalKnowledgeLoss"):
        pytest.skip("random masks" if name == "MGD" else "prototypes: its own tests")
    at = Scene()
    expected = take(name, at)
    at = replace(at, leaves=[])
    targets = truth(at)
    given, (student, teacher) = facts(at, targets), pyramids(at)
    turned = replace(targets, image_index=1 - targets.image_index)

    def turn(x: Dense) -> Dense:
        return replace(x, logits=x.logits.flip(0), boxes=x.boxes.flip(0), bins=x.bins.flip(0))

    heads = tuple(map(turn, given["dense"]))
    regions = given["regions"]
    proposals = replace(regions.proposals, image_index=1 - regions.proposals.image_index)
    queries = given["queries"]
    given |= {
        "dense": heads,
        "student_dense": heads[0],
        "teacher_dense": heads[1],
        "assigned": given["assigned"].flip(0),
        "regions": replace(regions, proposals=proposals),
        "teacher_regions": replace(regions, proposals=proposals),
        "queries": replace(
            queries,
            embeddings=queries.embeddings.flip(0),
            logits=queries.logits.flip(0),
            boxes=queries.boxes.flip(0),
        ),
        "images": given["images"].flip(0),
    }
    maps = [[x.flip(0) for x in side] for side in (student, teacher)]
    found = made(name, at)(*maps, turned, **given)
    for part, value in expected.items():
        torch.testing.assert_close(found[part].detach(), value, rtol=1e-4, atol=1e-6, msg=part)


def test_every_method_is_here():
    exported = {
        x
        for x, y in vars(losses).items()
        if isinstance(y, type) and issubclass(y, DistillLoss) and y is not DistillLoss
    }
    assert set(METHODS) == exported | {"GlobalKnowledgeLoss"}
