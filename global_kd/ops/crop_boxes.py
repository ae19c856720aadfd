"""Pieces of images under boxes, resized: differentiable in the boxes."""

import torch
from torch import Tensor


def crop_boxes(images: Tensor, boxes: Tensor, image_index: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear samples of each box on a regular grid.

    The same as ``grid_sample(images[image_index], affine_grid(...), padding_mode="border")``
    without a copy of the image for each box: what lies beyond an image is its border.

    Args:
        images: ``(B, C, H, W)``; no gradient.
        boxes: ``(R, 4)`` xyxy in pixels; gets the gradient.
        image_index: int64 ``(R,)``.
        size: ``(h, w)`` of the crops.

    Returns:
        ``(R, C, h, w)`` in at least float32.
    """
    images = images.detach()
    dtype = torch.promote_types(torch.promote_types(images.dtype, boxes.dtype), torch.float32)
    boxes = boxes.to(dtype)
    x1, y1, x2, y2 = boxes.nan_to_num(0).unbind(dim=1)
    left, right, across = _samples(x1, x2, size[1], images.shape[3])
    top, bottom, down = _samples(y1, y2, size[0], images.shape[2])

    def pixels(y: Tensor, x: Tensor) -> Tensor:
        """``(R, h, w, C)``."""
        at = images[image_index[:, None, None], :, y[:, :, None], x[:, None, :]]
        return at.to(dtype)

    def line(y: Tensor) -> Tensor:
        return pixels(y, left).lerp(pixels(y, right), across[:, None, :, None])

    return line(top).lerp(line(bottom), down[:, :, None, None]).movedim(3, 1)


def _samples(low: Tensor, high: Tensor, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample the pixels around it and how far it is from the first: ``(R, n)``."""
    steps = (torch.arange(count, device=low.device, dtype=low.dtype) + 0.5) / count
    at = low[:, None] + steps * (high - low)[:, None] - 0.5  # pixel i has its centre at i + 0.5
    at = at.clamp(0, size - 1)
    first = at.detach().floor()
    return first.long(), (first + 1).clamp(max=size - 1).long(), at - first
