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
    prefix = torch.nn.functional.pad((x - centre).cumsum(dim=3), (1, 0))  # (B, C, H, W + 1)
    by_column = prefix.permute(0, 3, 1, 2)  # (B, W + 1, C, H)
    row_sums = by_column[image_index, cells[:, 2]] - by_column[image_index, cells[:, 0]]
    rows, _ = cell_members(cells, height, width)
    area = (cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])
    share = rows.to(x.dtype) / area.to(x.dtype)[:, None]
    # Multiply and add instead of a matrix product: autocast would take that to half precision.
    return (row_sums * share[:, None]).sum(dim=2) + centre[image_index, :, 0, 0]
