"""Unit rows and cosines that stay finite, with finite gradients, for every input."""

import torch
from torch import Tensor

from .dispatch import backend
from .precision import accumulate


def unit_rows(x: Tensor) -> Tensor:
    """Rows of ``x (..., C)`` divided by their length; a zero row stays zero with zero gradient."""
    if backend(x) == "triton":
        from ._triton.cosine import unit_rows as twin

        return twin(x)
    x = accumulate(x)
    # Scaling by the largest entry first keeps the squares from over- and underflowing. It needs no
    # gradient: the result does not depend on the scale.
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    zero = largest == 0
    scaled = x / torch.where(zero, torch.ones_like(largest), largest)
    length = torch.where(zero, 1, scaled.square().sum(dim=-1, keepdim=True)).sqrt()
    return torch.where(zero, torch.zeros_like(x), scaled / length)


def cosines(rows: Tensor, prototypes: Tensor) -> Tensor:
    """``(..., R, P)`` cosines of ``rows (..., R, C)`` to ``prototypes (..., P, C)``."""
    u, v = unit_rows(rows), unit_rows(prototypes)
    with torch.autocast(device_type=rows.device.type, enabled=False):
        return u @ v.to(u.dtype).transpose(-1, -2)
