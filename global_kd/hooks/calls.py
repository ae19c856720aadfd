"""What a model was called with: to know its last call again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .maps import tensors_in
from .record import snapshot, version_of


class Call:
    """The arguments of one forward call.

    Attributes:
        arguments: Positional and named ones; containers copied, tensors the same ones.
        loss: What a training forward put out as its own loss, a scalar without graph, if it did.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = snapshot((args, kwargs))
        self._tensors = tensors_in(self.arguments)
        self._versions: list[int | None] = []
        self.loss: Tensor | None = None

    def ended(self, output: Any = None) -> None:
        """The forward is over; what it wrote into its own arguments does not count."""
        if not torch.compiler.is_compiling():
            self.loss = loss_in(output)
        self._versions = [version_of(x) for x in self._tensors]

    def had(self, value: Any) -> bool | None:
        """See :meth:`global_kd.FeatureTap.saw`."""
        verdicts = [self._had(x) for x in tensors_in(value)]
        if False in verdicts:
            return False
        return True if True in verdicts else None

    def same(self, x: Tensor, argument: Tensor) -> bool:
        """Whether a tensor of an argument's shape holds what the call was given.

        An accelerator waits only where they are not the same tensor. Of another dtype: up to a
        cast of one to the other. Of another device: yes, since nothing is known.
        """
        if _same_memory(x, argument):
            return self._untouched(argument)
        if x.device != argument.device:
            return True
        if x.dtype != argument.dtype and torch.equal(x, argument.to(x.dtype)):
            return True
        return torch.equal(x.to(argument.dtype), argument)

    def _untouched(self, argument: Tensor) -> bool:
        for y, version in zip(self._tensors, self._versions, strict=False):
            if y is argument:
                return version is None or version_of(y) == version
        return True

    def _had(self, x: Tensor) -> bool | None:
        alike = [
            y
            for y in self._tensors
            if y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
        ]
        for y in alike:
            if _same_memory(x, y):
                return self._untouched(y)
        if not alike:
            return None
        return any(torch.equal(x, y) for y in alike)


def loss_in(output: Any) -> Tensor | None:
    """The loss that a detector's training forward puts out, without its graph.

    An entry ``"loss"`` (transformers), else all scalars with a gradient in a dictionary
    (torchvision, Detectron2, MMDetection), a first vector of losses (Ultralytics), a scalar.
    """
    if isinstance(output, Mapping):
        whole = output.get("loss")
        found = [whole] if isinstance(whole, Tensor) else tensors_in(list(output.values()))
    elif isinstance(output, (tuple, list)):
        found = [x for x in output[:1] if isinstance(x, Tensor) and x.dim() < 2]
    else:
        found = [output] if isinstance(output, Tensor) else []
    found = [x.detach().float().sum() for x in found if x.requires_grad and x.dim() < 2]
    return torch.stack(found).sum() if found else None


def _same_memory(x: Tensor, y: Tensor) -> bool:
    if x is y:
        return True
    try:
        return (
            bool(x.numel())
            and x.data_ptr() == y.data_ptr()
            and x.stride() == y.stride()
            and x.dtype == y.dtype
        )
    except RuntimeError:  # of tensors without storage
        return False
