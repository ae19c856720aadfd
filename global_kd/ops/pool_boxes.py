"""Mean feature of each box: definition in plain torch."""

import torch
from torch import Tensor

from .cells import box_cells, cell_members
from .precision import accumulate


def pool_boxes(features: Tensor, boxes: Tensor, image_index: Tensor, stride: float) -> Tensor:
    """See :func:`global_kd.functional.pool_boxes`.

    Sums along x are differences of two prefix sums of one map row, sums along y are explicit: the
    cost does not depend on the boxes' width and nothing of size ``R * H * W * C`` is made. The
    prefix sums run over the *centred* map: prefix sums of a map whose mean is large beside its
    spread would lose the spread to rounding.
    """
    x = accumulate(features)
    batch, channels, height, width = x.shape
    cells = box_cells(boxes, stride, height, width)
    if batch == 0 or x.numel() == 0:
        return x.new_zeros(boxes.shape[0], channels) + x.sum()
    centre = x.detach().mean(dim=(2, 3), keepdim=True)
    prefix = (x - centre).cumsum(dim=3).permute(0, 3, 1, 2)
    columns = torch.nn.functional.pad(prefix, (0, 0, 0, 0, 1, 0)).flatten(0, 1)  # (B (W + 1), C, H)
    first = image_index * (width + 1)
    row_sums = _take(columns, first + cells[:, 2]) - _take(columns, first + cells[:, 0])
    rows, _ = cell_members(cells, height, width)
    area = (cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])
    share = rows.to(x.dtype) / area.to(x.dtype)[:, None]
    # Multiply and add instead of a matrix product: autocast would take that to half precision.
    return (row_sums * share[:, None]).sum(dim=2) + centre[image_index, :, 0, 0]


def _take(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` whose backward adds in a fixed order: boxes share columns.

    Of the two ways to say it, each is deterministic on one kind of device only.
    """
    return table.index_select(0, index) if table.device.type == "cpu" else table[index]
