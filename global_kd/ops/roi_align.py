"""Maps under boxes, resampled to one size: differentiable in the maps.

What an instance looks like, cell for cell, where ``pool_boxes`` keeps only its mean.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .precision import accumulate


def roi_align(
    features: Tensor, boxes: Tensor, stride: float, size: int, samples: int = 2
) -> Tensor:
    """Each box as ``size x size`` means of ``samples x samples`` bilinear samples.

    Boxes are clipped to the map. Cell ``i`` has its centre at ``(i + 0.5) * stride`` pixels, and
    what lies between the last centre and the border is the last cell: RoIAlign (He et al. 2017) in
    its aligned form. The boxes of an image stand together, so that no map is copied for a box; a
    GPU adds up the gradient in no fixed order.

    Args:
        features: ``(B, C, H, W)``; gets the gradient.
        boxes: ``(B, K, 4)`` xyxy in pixels of the padded network input; no gradient.
        stride: Pixels of the network input per cell.
        size: Side of the result.
        samples: Per side of one of its entries.

    Returns:
        ``(B, K, C, size, size)`` in at least float32.
    """
    features = accumulate(features)
    batch, channels, height, width = features.shape
    count, side = boxes.shape[1], size * samples
    cells = (boxes.detach().to(features.dtype) / stride).nan_to_num(0)
    x1, y1, x2, y2 = cells.unbind(dim=2)
    x, y = _places(x1, x2, width, side), _places(y1, y2, height, side)
    shape = batch, count, side, side
    grid = torch.stack([x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape)], dim=-1)
    taken = functional.grid_sample(
        features,
        grid.view(batch, count * side, side, 2),
        padding_mode="border",
        align_corners=False,
    )
    taken = taken.view(batch, channels, count, size, samples, size, samples)
    return taken.mean(dim=(4, 6)).transpose(1, 2)


def _places(low: Tensor, high: Tensor, cells: int, count: int) -> Tensor:
    """``(B, K, count)`` between two ends in cells, as parts of the map from -1 to 1."""
    low, high = low.clamp(0, cells), high.clamp(0, cells)
    steps = (torch.arange(count, device=low.device, dtype=low.dtype) + 0.5) / count
    return 2 * (low[..., None] + steps * (high - low)[..., None]) / cells - 1
