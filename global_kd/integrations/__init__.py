"""Thin readers of frameworks' detectors; a framework is imported only when its model is in hand."""

from importlib import import_module

from torch import nn

from ..detector import Detector, register_framework

# Module in which a framework keeps its detectors: (file here, class).
_READERS = {
    "torchvision.models.detection": ("torchvision", "TorchvisionDetector"),
    "detectron2.modeling": ("detectron2", "Detectron2Detector"),
    "transformers.models": ("transformers", "TransformersDetector"),
    "ultralytics": ("ultralytics", "UltralyticsDetector"),
    "mmdet.models": ("mmdet", "MMDetDetector"),
}


def _register(home: str, file: str, name: str) -> None:
    def recognises(model: nn.Module) -> bool:
        return any(f"{c.__module__}.".startswith(f"{home}.") for c in type(model).__mro__)

    def reader(model: nn.Module) -> Detector:
        detector: Detector = getattr(import_module(f".{file}", __name__), name)(model)
        return detector

    register_framework(recognises, reader)


for _home, (_file, _name) in _READERS.items():
    _register(_home, _file, _name)
