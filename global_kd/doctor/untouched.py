"""A model that is run and looked at, and is afterwards as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..hooks import set_mode

_BY_CHANCE = ("DropPath", "DropBlock2d", "StochasticDepth")  # of torchvision, timm, transformers


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Modes, counters, buffers and the random state come back as they were."""
    numbers = [(m, _numbers(m)) for model in models for m in model.modules()]
    buffers = [(b, x) for m in models for b in m.buffers() if (x := _copy(b)) is not None]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for module, kept in numbers:
                for name in _numbers(module).keys() - kept.keys():
                    delattr(module, name)
                vars(module).update(kept)
            with torch.no_grad():
                for buffer, value in buffers:
                    # Through data: autograd would take a write for a change of what a graph that is
                    # under way has kept, but the value is again the one that it kept.
                    buffer.data.copy_(value)


def _copy(buffer: Tensor) -> Tensor | None:
    """``None`` of what holds no numbers that a forward could change."""
    try:
        return None if is_lazy(buffer) else buffer.clone()
    except NotImplementedError:  # of a dtype that can only be stored, such as uint4
        return None


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Its mode, and running means that are plain attributes, as Detectron2's RetinaNet has one."""
    return {name: x for name, x in vars(module).items() if isinstance(x, (bool, int, float))}


def train_all_but_statistics(model: nn.Module) -> None:
    """Train mode, so that a detector computes its losses, with nothing random or moving in it."""
    set_mode(model, True)
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            module.eval()
        elif type(module).__name__.endswith(_BY_CHANCE):
            module.training = False


def wait_for_no_rank(model: nn.Module) -> None:
    """Synchronised batch norm, of any framework, uses its running means: one rank looks alone."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    own = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in own:
            module.eval()
