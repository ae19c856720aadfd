"""What dense heads say, made up: small, random, on grids of any size."""

from __future__ import annotations

import torch

from global_kd import Targets
from global_kd.step import Dense, Grid, RegionOutputs, Regions
from tests.strategies import random


def grids(sizes, strides, anchors=1) -> tuple[Grid, ...]:
    return tuple(Grid(s, h, w, anchors) for s, (h, w) in zip(strides, sizes))


def dense(
    places, batch=2, classes=3, seed=0, scale=2.0, activation="sigmoid", background=None, **more
) -> Dense:
    rows = sum(grid.rows for grid in places)
    logits = scale * random((batch, rows, classes), seed, more.pop("dtype", torch.float64))
    return Dense(logits, places, activation, background, **more)


def maps(sizes, channels, batch=2, seed=0, dtype=torch.float64):
    return [random((batch, channels, h, w), seed + i, dtype) for i, (h, w) in enumerate(sizes)]


def anchors(grid: Grid, seed=0, dtype=torch.float64) -> torch.Tensor:
    """``(H * W * A, 4)`` around the centres of the cells, of random sides."""
    y, x, _ = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (grid.height, grid.width, grid.anchors)),
        indexing="ij",
    )
    centre = (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * grid.stride
    half = grid.stride * (0.3 + random((grid.rows, 2), seed).abs())
    return torch.cat([centre - half, centre + half], 1).to(dtype)


def regions(
    truth: Targets, box, classes=4, seed=0, boxes=True, background=0, batch=2, dtype=torch.float64
) -> Regions:
    """Both second stages on made-up proposals, one for each entry of ``box``, near its object."""
    box = torch.tensor(box, dtype=torch.int64)
    count = len(box)
    near = torch.cat([truth.boxes.to(torch.float64), torch.tensor([[5.0, 5, 25, 25]])])
    near = near[box.clamp(min=-1)]
    columns = classes if background is None else classes - 1

    def around(spread: float, seed: int, *shape: int) -> torch.Tensor:
        x = near.view(count, *[1] * (len(shape) - 2), 4) + spread * random(shape, seed)
        return torch.cat([x[..., :2], torch.maximum(x[..., 2:], x[..., :2] + 1)], -1).to(dtype)

    label = torch.cat([truth.labels, truth.labels.new_zeros(1)])[box.clamp(min=-1)]
    image = torch.cat([truth.image_index, truth.image_index.new_zeros(1)])[box.clamp(min=-1)]
    heads = [
        RegionOutputs(
            2 * random((count, classes), seed + i, dtype),
            around(4, seed + 2 + i, count, columns, 4) if boxes else None,
            background=background,
        )
        for i in range(2)
    ]
    return Regions(Targets(around(4, seed + 4, count, 4), label, image), box, *heads)
