"""One feature row per box and level."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from . import _check
from .ops import pool_boxes as definition
from .targets import Targets


def pool_boxes(features: Tensor, boxes: Tensor, image_index: Tensor, stride: float) -> Tensor:
    """Mean feature of each box over the cells it touches.

    A box is clipped to the map and covers columns ``floor(x1/s) .. max(ceil(x2/s),
    floor(x1/s) + 1) - 1``, rows likewise: at least one cell, the same cells that
    :func:`global_kd.functional.imitation_loss` marks. Padding the canvas to the right or bottom
    moves no box's cells.

    Args:
        features: Map ``(B, C, H, W)`` of one level.
        boxes: ``(R, 4)`` xyxy in pixels of the padded network input, anywhere, of any size.
        image_index: int64 ``(R,)``, the image of each box, in ``[0, B)``.
        stride: Pixels of the network input per cell, > 0.

    Returns:
        ``(R, C)`` in at least float32, differentiable in ``features``.

    Raises:
        ValueError: Shapes or devices that do not fit, a stride that is not positive.
        TypeError: Integer features or boxes, an index that is not int64.

    Example:
        >>> import torch
        >>> from global_kd.functional import pool_boxes
        >>> ramp = torch.arange(4.0).expand(1, 1, 4, 4)
        >>> box, image = torch.tensor([[8.0, 0.0, 31.0, 8.0]]), torch.tensor([0])
        >>> pool_boxes(ramp, box, image, stride=8)  # columns 1, 2 and 3
        tensor([[2.]])
    """
    _check.tensor("features", features, 4, "(B, C, H, W)")
    _check.floating("features", features)
    _check.boxes(boxes, image_index)
    _check.positive("stride", stride)
    _check.same_device(features=features, boxes=boxes, image_index=image_index)
    return definition.pool_boxes(features, boxes.detach(), image_index, stride)


def pool_levels(levels: Sequence[Tensor], targets: Targets, strides: Sequence[float]) -> Tensor:
    """Rows ``(L, R, C)`` of every box on every level.

    Where levels differ in channels, narrower rows are filled with zeros: cosines and the pursuit
    do not see them.
    """
    rows = [
        pool_boxes(x, targets.boxes, targets.image_index, s)
        for x, s in zip(levels, strides, strict=True)
    ]
    widest = max(x.shape[1] for x in rows)
    return torch.stack([functional.pad(x, (0, widest - x.shape[1])) for x in rows])


def assign_levels(
    boxes: Tensor, strides: Sequence[float], finest_scale: float | None = None
) -> Tensor:
    """The level (index into ``strides``, int64 ``(R,)``) on which each box is imitated.

    ``clamp(floor(log2(sqrt((w + 1)(h + 1)) / finest_scale)), 0, L - 1)``, as released. Boxes up to
    twice ``finest_scale`` pixels lie on the first level, up to four times on the second, and so
    on. ``None`` is 14 cells of the first level: the released 56 pixels at stride 4.
    """
    scale = 14 * strides[0] if finest_scale is None else finest_scale
    # An area overflows half precision.
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    side = ((boxes[:, 2:] - boxes[:, :2]) + 1).prod(dim=1).clamp(min=1e-12).sqrt()
    octave = (side / scale + 1e-6).log2().floor()
    # Counting the levels passed keeps the rule right where a pyramid leaves out a stride.
    level = torch.zeros_like(octave, dtype=torch.int64)
    for stride in strides[1:]:
        level += octave >= math.log2(stride / strides[0])
    return level
