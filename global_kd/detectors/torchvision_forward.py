"""A torchvision detector's own forward pass on images that are transformed already."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import evaluating
from .pixels import View, fitting


class StandIn:
    """Everything of a detector but what a subclass replaces."""

    def __init__(self, detector: nn.Module) -> None:
        self._detector = detector

    def __getattr__(self, name: str) -> Any:
        return getattr(self._detector, name)


class _InNetworkPixels(StandIn):
    """Stands in for a detector whose images are transformed already."""

    def __init__(self, detector: nn.Module, view: View) -> None:
        super().__init__(detector)
        self.transform, self._view = self, view

    def __call__(self, images: Any, targets: Any) -> Any:
        from torchvision.models.detection.image_list import ImageList

        return ImageList(fitting(self._view.images, self._detector), sizes_of(self._view)), targets

    def postprocess(self, found: Any, *sizes: Any) -> Any:
        return found


@torch.no_grad()
def detect(model: Any, view: View) -> list[dict[str, Tensor]]:
    """What a model finds in eval mode, in pixels of the view."""
    with evaluating(model), _boxes_in_full(model):
        stand_in = _InNetworkPixels(model, view)
        found: list[dict[str, Tensor]] = type(model).forward(stand_in, list(view.images))
        return found


def own_losses(model: Any, view: View, targets: list[dict[str, Tensor]]) -> Tensor:
    """Sum of a model's training losses in train mode, boxes in pixels of the view."""
    with _boxes_in_full(model):
        stand_in = _InNetworkPixels(model, view)
        terms: dict[str, Tensor] = type(model).forward(stand_in, list(view.images), targets)
    return torch.stack([x.float() for x in terms.values()]).sum()


def sizes_of(view: View) -> list[tuple[int, int]]:
    """``(height, width)`` of each image without its padding."""
    sizes = [view.size] * len(view.images) if view.sizes is None else view.sizes
    return [(int(height), int(width)) for height, width in sizes]


@contextmanager
def _boxes_in_full(model: Any) -> Iterator[None]:
    """A model in half precision decodes, suppresses and pools boxes in float32.

    Half precision knows no fractions of large coordinates, and suppression on CPUs not at all.
    """
    own = next(model.parameters()).dtype
    if own not in (torch.float16, torch.bfloat16):
        yield
        return
    heads = [model.rpn.head] if hasattr(model, "rpn") else [model.head]
    pools = []
    for name, module in getattr(model, "roi_heads", nn.Module()).named_children():
        if name.endswith("_predictor"):
            heads.append(module)
        elif name.endswith("_roi_pool"):
            pools.append(module)
    handles = [
        *(m.register_forward_hook(lambda *x: _cast(x[2], torch.float32)) for m in heads),
        *(m.register_forward_pre_hook(lambda *x: _cast(x[1], torch.float32)) for m in pools),
        *(m.register_forward_hook(lambda *x: _cast(x[2], own)) for m in pools),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """All floating-point tensors in containers in another number type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(x, dtype) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(x, dtype) for x in value)
    return value
