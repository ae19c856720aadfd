"""Dense heads on small grids, the maps beside them, and what a step holds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from global_kd import Targets
from global_kd.step import Dense, Grid, Step
from tests.strategies import random

GRIDS = (Grid(8, 3, 4, 2), Grid(16, 2, 2, 2))
CANVAS = (24.0, 32.0)  # height and width in pixels


def boxes_of(shape, seed: int, dtype=torch.float64) -> Tensor:
    """Boxes ``(*shape, 4)`` of 2 to 30 pixels, some across the canvas's border."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand((*shape, 4), generator=generator, dtype=torch.float64)
    span = torch.tensor([CANVAS[1], CANVAS[0]], dtype=torch.float64)
    corner = x[..., :2] * span - 4
    return torch.cat([corner, corner + 2 + 28 * x[..., 2:]], -1).to(dtype)


def head(
    seed=0, *, grids=GRIDS, batch=2, classes=3, bins=0, dtype=torch.float64, scale=2.0, **options
) -> Dense:
    """Random logits and boxes, with gradients."""
    n = sum(g.rows for g in grids)
    logits = (scale * random((batch, n, classes), seed)).to(dtype).requires_grad_()
    boxes = boxes_of((batch, n), seed + 100, dtype).requires_grad_()
    sides = None
    if bins:
        sides = random((batch, n, 4, bins), seed + 200, dtype).requires_grad_()
    priors = boxes_of((n,), 7, dtype)  # the same for both heads
    return Dense(logits, grids, boxes=boxes, bins=sides, priors=priors, **options)


def both(seed=0, **options) -> tuple[Dense, Dense]:
    return head(seed, **options), head(seed + 1, **options)


def cast(dense: Dense, dtype) -> Dense:
    """In another dtype, as fresh leaves."""

    def to(x):
        return None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)

    return replace(
        dense,
        logits=to(dense.logits),
        boxes=to(dense.boxes),
        bins=to(dense.bins),
        priors=to(dense.priors),
    )


def maps(seed=0, *, grids=GRIDS, batch=2, channels=3, dtype=torch.float64) -> list[Tensor]:
    return [
        random((batch, channels, g.height, g.width), seed + i, dtype).requires_grad_()
        for i, g in enumerate(grids)
    ]


def assigned(seed=0, *, grids=GRIDS, batch=2, count=4) -> Tensor:
    """Ground truth of every location: boxes ``i, i + batch, ...`` lie on image ``i``."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(g.rows for g in grids)
    image = torch.arange(batch)[:, None]
    drawn = torch.randint(-4, max(count // batch, 1), (batch, n), generator=generator)
    found = drawn * batch + image
    if count == 0:
        found = found.clamp(max=-1)
    return torch.where(drawn >= 0, found, torch.where(drawn == -4, -2, -1))


def truth(seed=0, *, count=4, batch=2, classes=3) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Targets(
        boxes_of((count,), seed + 300, torch.float32), labels, torch.arange(count) % batch
    )


def strides(grids=GRIDS) -> list[float]:
    return [g.stride for g in grids]


def built(kind, *, student=3, teacher=3, grids=GRIDS, **options):
    """A loss for the maps of these grids."""
    n = len(grids)
    return kind(
        student_channels=[student] * n,
        teacher_channels=[teacher] * n,
        strides=strides(grids),
        **options,
    )


def leaves(*heads: Dense) -> list[Tensor]:
    """What the heads' gradients arrive at."""
    return [x for h in heads for x in (h.logits, h.boxes, h.bins) if x is not None]


def row_weights(loss, targets, omega, dense: Dense) -> Tensor:
    """Those that a robust loss gives each location; tested in test_rows.py."""
    features = maps(grids=GRIDS)
    return loss.location_weights(Step(features, features, (8.0, 16.0), targets, omega=omega), dense)


def finite(terms, *inputs) -> None:
    """Every term and every gradient is finite."""
    assert terms
    for name, value in terms.items():
        assert value.isfinite(), name
        for slope in torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True):
            assert slope is None or slope.isfinite().all(), name
