"""Mean feature of each box."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cells import box_cells, cell_members
from .dispatch import backend
from .memory import empty
from .precision import accumulate

_FEW = 128  # boxes of an image up to which a matrix product beats prefix sums on the processor


def pool_boxes(features: Tensor, boxes: Tensor, image_index: Tensor, stride: float) -> Tensor:
    """See :func:`global_kd.functional.pool_boxes`."""
    batch, channels, height, width = features.shape
    if batch == 0 or features.numel() == 0:
        x = accumulate(features)
        return x.new_zeros(boxes.shape[0], channels) + x.sum()
    cells = box_cells(boxes, stride, height, width)
    form = backend(features)
    if form == "triton":
        from ._triton.pool_boxes import pool_cells as twin

        return twin(features, cells, image_index)
    if form == "cpu" and boxes.shape[0] <= _FEW * batch:
        return _Products.apply(features, cells, image_index)  # type: ignore[no-any-return]
    return _prefix_sums(features, cells, image_index)


def _prefix_sums(features: Tensor, cells: Tensor, image_index: Tensor) -> Tensor:
    """The definition.

    Sums along x are differences of two prefix sums of one map row, sums along y are explicit: the
    cost does not depend on the boxes' width and nothing of size ``R * H * W * C`` is made. The
    prefix sums run over the *centred* map: prefix sums of a map whose mean is large beside its
    spread would lose the spread to rounding.
    """
    x = accumulate(features)
    height, width = x.shape[2:]
    centre = x.detach().mean(dim=(2, 3), keepdim=True)
    prefix = (x - centre).cumsum(dim=3).permute(0, 3, 1, 2)
    columns = torch.nn.functional.pad(prefix, (0, 0, 0, 0, 1, 0)).flatten(0, 1)  # (B (W + 1), C, H)
    first = image_index * (width + 1)
    row_sums = _take(columns, first + cells[:, 2]) - _take(columns, first + cells[:, 0])
    rows, _ = cell_members(cells, height, width)
    share = rows.to(x.dtype) / _areas(cells).to(x.dtype)[:, None]
    # Multiply and add instead of a matrix product: autocast would take that to half precision.
    return (row_sums * share[:, None]).sum(dim=2) + centre[image_index, :, 0, 0]


def _areas(cells: Tensor) -> Tensor:
    return (cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])


def _take(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` whose backward adds in a fixed order: boxes share columns.

    Of the two ways to say it, each is deterministic on one kind of device only.
    """
    return table.index_select(0, index) if table.device.type == "cpu" else table[index]


class _Products(torch.autograd.Function):
    """Sums along y as one matrix product per image and channel: a map is read or written once."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, cells: Tensor, image_index: Tensor) -> Tensor:
        ctx.save_for_backward(cells, image_index)
        ctx.features = features.shape, features.dtype
        dtype = torch.promote_types(features.dtype, torch.float32)
        pooled = torch.zeros(len(cells), features.shape[1], dtype=dtype, device=features.device)
        with torch.autocast("cpu", enabled=False):
            for b, mine, rows, columns in _shares(cells, image_index, features.shape, dtype):
                stripes = rows @ features[b].to(dtype)  # (C, r, W)
                pooled[mine] = (stripes * columns).sum(dim=2).T
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        cells, image_index = ctx.saved_tensors
        (shape, dtype), (above_rows,) = ctx.features, above
        if not ctx.needs_input_grad[0]:
            return None, None, None
        gradient = empty(shape, above_rows.dtype)
        seen = set()
        with torch.autocast("cpu", enabled=False):
            for b, mine, rows, columns in _shares(cells, image_index, shape, above_rows.dtype):
                stripes = above_rows[mine].T[:, :, None] * columns  # (C, r, W)
                torch.matmul(rows.T, stripes, out=gradient[b])
                seen.add(b)
        for b in set(range(shape[0])) - seen:
            gradient[b] = 0
        return gradient.to(dtype), None, None


def _shares(
    cells: Tensor, image_index: Tensor, shape: torch.Size, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each image with boxes: which boxes, their rows ``(r, H)``, their columns ``(r, W)``.

    A box's mean is the sum over the map of row times column: the columns are divided by its area.
    """
    rows, columns = cell_members(cells, *shape[2:])
    share = columns.to(dtype) / _areas(cells)[:, None].to(dtype)
    for b in range(shape[0]):
        mine = (image_index == b).nonzero()[:, 0]
        if len(mine):
            yield b, mine, rows[mine].to(dtype), share[mine]
