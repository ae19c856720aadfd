"""How often one `kd(images, targets)` of a real detector would make a GPU's host wait.

Counted on a CPU, where nothing waits: reading a number, and operations whose output has a shape
that depends on values. What looks at values on a CPU only is left out, and so is the first step, in
which a Distiller looks once on any device.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from global_kd import Distiller, GlobalKnowledgeLoss, Targets
from global_kd.doctor import Alarm
from global_kd.ops.dispatch import force
from global_kd.pair import pair

_PACKAGES = ("global_kd", "torchvision", "detectron2")
_ON_A_CPU = ((Targets, "validate"), (pair, "refuse_strangers"), (Alarm, "_look"))
_READING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}  # no operation on a CPU


def _place() -> str:
    """The file whose code is running, of this package or of the detector's."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        for package in _PACKAGES:
            if package in parts[:-1]:
                start = len(parts) - 1 - parts[::-1].index(package)
                return "/".join(parts[start:])
    return "elsewhere"


class _Reads(TorchFunctionMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING:
            self.seen[_place()] += 1
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Counter[str], waits: Callable[[Any, Any], bool]) -> None:
        super().__init__()
        self.seen, self.waits = seen, waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.waits(func, args):
            self.seen[_place()] += 1
        return func(*args, **(kwargs or {}))


def places(work: Callable[[], Any], waits: Callable[[Any, Any], bool]) -> Counter[str]:
    """How often work would make a host wait, by the file whose code does."""
    seen: Counter[str] = Counter()
    with ExitStack() as entered:
        for owner, name in _ON_A_CPU:
            entered.enter_context(patch.object(owner, name, lambda *_, **__: None))
        for mode in (force("definition"), _Reads(seen), _Operations(seen, waits)):
            entered.enter_context(mode)
        work()
    return seen


def detectors(side: int) -> dict[str, Callable[[], Any]]:
    """Pairs of torchvision's detectors by name: the kd call of a step that has its forward."""
    from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    g = torch.Generator().manual_seed(0)
    images = [torch.rand(3, side, side + 32, generator=g) for _ in range(2)]
    boxes = torch.tensor([[8.0, 8.0, 70.0, 60.0], [30.0, 20.0, side, side]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]

    def step(kind: Any) -> Any:
        models = []
        for layers in (18, 34):
            backbone = resnet_fpn_backbone(backbone_name=f"resnet{layers}", weights=None)
            models.append(kind(backbone, 4, min_size=side, max_size=side + 32))
        student, teacher = models
        loss = GlobalKnowledgeLoss(4, refresh_every=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is trained here
            kd = Distiller(student.train(), teacher, loss)
            student(images, targets)
            kd(images, targets)
            student(images, targets)
        return partial(kd, images, targets)

    makers = {"Faster R-CNN": FasterRCNN, "RetinaNet": RetinaNet, "FCOS": FCOS}
    torch.manual_seed(0)
    return {name: step(kind) for name, kind in makers.items()}
