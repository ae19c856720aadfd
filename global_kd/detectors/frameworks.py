"""Which file here reads a model; a framework is imported only when its model is in hand."""

from collections.abc import Callable
from importlib import import_module

from torch import nn

from .protocol import Detector

Framework = tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Detector]]
_frameworks: list[Framework] = []

# Module in which a framework keeps its detectors: (file here, class).
_READERS = {
    "torchvision.models.detection": ("torchvision", "TorchvisionDetector"),
    "detectron2.modeling": ("detectron2", "Detectron2Detector"),
    "transformers.models": ("transformers", "TransformersDetector"),
    "ultralytics": ("ultralytics", "UltralyticsDetector"),
    "mmdet.models": ("mmdet", "MMDetDetector"),
}


def register_framework(
    recognises: Callable[[nn.Module], bool], detector: Callable[[nn.Module], Detector]
) -> None:
    """Let the :class:`global_kd.Distiller` read detectors of another framework.

    Args:
        recognises: Whether a bare model belongs to it; must not import the framework.
        detector: Makes the reader; raises ``ValueError`` for a model of the framework that it
            cannot read.
    """
    _frameworks.append((recognises, detector))


def detector_of(model: nn.Module) -> Detector | None:
    """The reader of a bare model; ``None`` where no framework recognises it."""
    for recognises, detector in _frameworks:
        if recognises(model):
            return detector(model)
    return None


def _register(home: str, file: str, name: str) -> None:
    def recognises(model: nn.Module) -> bool:
        return any(f"{c.__module__}.".startswith(f"{home}.") for c in type(model).__mro__)

    def reader(model: nn.Module) -> Detector:
        detector: Detector = getattr(import_module(f".{file}", __package__), name)(model)
        return detector

    register_framework(recognises, reader)


for _home, (_file, _name) in _READERS.items():
    _register(_home, _file, _name)
