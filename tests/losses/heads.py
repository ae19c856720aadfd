"""What dense heads say, made up: small, random, on grids of any size."""

from __future__ import annotations

import torch

from global_kd.step import Dense, Grid
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
