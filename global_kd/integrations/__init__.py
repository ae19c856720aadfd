"""Thin readers of frameworks' detectors; a framework is imported only when its model is in hand."""

from torch import nn

from ..distiller import Pair, register_framework


def _is_torchvision(model: nn.Module) -> bool:
    return any(c.__module__.startswith("torchvision.models.detection") for c in type(model).__mro__)


def _torchvision(student: nn.Module, teacher: nn.Module, boxes: str) -> Pair:
    from .torchvision import TorchvisionPair

    return TorchvisionPair(student, teacher, boxes)


register_framework(_is_torchvision, _torchvision)
