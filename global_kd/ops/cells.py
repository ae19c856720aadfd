"""The one rule that turns boxes into cells of a feature map, shared by pooling and masks."""

import torch
from torch import Tensor


def box_cells(boxes: Tensor, stride: float, height: int, width: int) -> Tensor:
    """Half-open cell ranges ``(x1, y1, x2, y2)``, int64 ``(R, 4)``, of ``xyxy`` pixel boxes.

    The box is clipped to the map, then covers every cell it touches: columns
    ``floor(x1/s) .. max(ceil(x2/s), floor(x1/s) + 1) - 1``. Every box covers at least one cell: a
    zero-area box the cell it lies in, a box beyond the border the nearest border cell.
    """
    # Values are checked by ``Targets``; here a NaN must only not become an index outside the map.
    x1, y1, x2, y2 = (boxes / stride).nan_to_num(0).unbind(dim=1)
    (left, right), (top, bottom) = _cover(x1, x2, width), _cover(y1, y2, height)
    return torch.stack([left, top, right, bottom], dim=1).long()


def _cover(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    # A box at or past the far border would start at cell ``size``, which does not exist.
    start = low.clamp(0, size).floor().clamp(max=size - 1)
    return start, high.clamp(0, size).ceil().maximum(start + 1)


def cell_members(cells: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether each row ``(R, H)`` and each column ``(R, W)`` of the map lies in the box (bool)."""
    y = torch.arange(height, device=cells.device)
    x = torch.arange(width, device=cells.device)
    rows = (y >= cells[:, 1:2]) & (y < cells[:, 3:4])
    columns = (x >= cells[:, 0:1]) & (x < cells[:, 2:3])
    return rows, columns
