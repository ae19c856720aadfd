"""Small tensors on their way from the processor to a device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device | str | None) -> Tensor:
    """A tensor on a device (``None``: where it is), without a wait for a GPU.

    Through pinned memory: a plain copy from the processor makes the host wait until the GPU has
    done all that was asked of it before.
    """
    there = x.device if device is None else torch.device(device)
    if x.device.type == "cpu" and there.type == "cuda":
        return x.pin_memory().to(there, non_blocking=True)
    return x.to(there)


def numbers(values: Sequence[Any], like: Tensor) -> Tensor:
    """Plain numbers, nested or not, in the dtype and on the device of another tensor."""
    return sent(torch.tensor(values, dtype=like.dtype, device="cpu"), like.device)
