"""What a model was called with: to know its last call again."""

from typing import Any

import torch
from torch import Tensor

from .maps import tensors_in
from .record import version_of


class Call:
    """The tensors among the arguments of one forward call."""

    def __init__(self, arguments: Any) -> None:
        self._tensors = tensors_in(arguments)
        self._versions: list[int | None] = []

    def ended(self) -> None:
        """The forward is over; what it wrote into its own arguments does not count."""
        self._versions = [version_of(x) for x in self._tensors]

    def had(self, value: Any) -> bool | None:
        """See :meth:`global_kd.FeatureTap.saw`."""
        verdicts = [self._had(x) for x in tensors_in(value)]
        if False in verdicts:
            return False
        return True if True in verdicts else None

    def _had(self, x: Tensor) -> bool | None:
        alike = [
            (y, version)
            for y, version in zip(self._tensors, self._versions, strict=False)
            if y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
        ]
        for y, version in alike:
            if _same_memory(x, y):
                return version is None or version_of(y) == version
        if not alike:
            return None
        return any(torch.equal(x, y) for y, _ in alike)


def _same_memory(x: Tensor, y: Tensor) -> bool:
    if x is y:
        return True
    try:
        return bool(x.numel()) and x.data_ptr() == y.data_ptr() and x.stride() == y.stride()
    except RuntimeError:  # of tensors without storage
        return False
