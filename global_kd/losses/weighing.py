"""What the weights of boxes mean for cells, rows and locations.

Weights of boxes are ``(L, R)``, of each of the targets' boxes on each level.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..instances import assign_levels
from ..ops.cells import box_cells
from ..ops.imitation import paint_boxes
from ..step import Dense, Step


def of_cells(step: Step, weights: Tensor, level: int) -> Tensor:
    """``(B, H, W)`` of a level: 1 outside boxes, inside the box's own; of several the largest."""
    assert step.targets is not None
    batch, _, height, width = step.student[level].shape
    cells = box_cells(step.targets.boxes.detach(), step.strides[level], height, width)
    # Painted from 1 to 2: what no box touches stays 0.
    painted = paint_boxes(
        1 + weights[level], cells, step.targets.image_index, (batch, height, width)
    )
    return torch.where(painted > 0, painted - 1, 1.0)


def of_rows(step: Step, weights: Tensor, box: Tensor) -> Tensor:
    """``(N,)``: that of a row's box on the level of its size; 1 where ``box (N,)`` is negative."""
    assert step.targets is not None
    level = assign_levels(step.targets.boxes.detach(), step.strides)
    own = weights.gather(0, level[None])[0]
    # A last entry, 1, for those without a box.
    own = torch.cat([own, own.new_ones(1)])
    return own[box.clamp(min=-1)]


def of_locations(step: Step, weights: Tensor, dense: Dense) -> Tensor:
    """``(B, N)`` of a head's locations: those of their cells; 1 on levels that the maps lack."""
    rows = []
    for grid in dense.grids:
        if grid.stride in step.strides and step.targets is not None:
            cells = of_cells(step, weights, step.strides.index(grid.stride))
        else:
            cells = step.student[0].new_ones(len(dense.logits), grid.height, grid.width)
        down, right = grid.height - cells.shape[1], grid.width - cells.shape[2]
        cells = nn.functional.pad(cells, (0, right, 0, down), value=1.0)  # < 0 cuts
        rows.append(cells[..., None].expand(*cells.shape, grid.anchors).flatten(1))
    return torch.cat([x.to(rows[0].dtype) for x in rows], dim=1)
