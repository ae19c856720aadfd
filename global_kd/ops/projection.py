"""Coefficients of instances on the prototypes of each class, and how far two spaces' lie apart."""

import torch
from torch import Tensor

from .cosine import unit_rows

RIDGE = 1e-2
"""Added to the squares of unit prototypes: two that nearly coincide share what is theirs."""


@torch.no_grad()
def dual_rows(prototypes: Tensor, labels: Tensor | None) -> Tensor:
    """Rows ``(..., P, C)`` whose products with a unit row are its coefficients.

    ``(G G^T + RIDGE I)^-1 G`` of the unit prototypes ``G`` of one class: the minimiser of
    ``|f - w G|^2 + RIDGE |w|^2``. Empty slots have zero rows.

    Args:
        prototypes: ``(..., P, C)``.
        labels: int64 ``(..., P)``, the class of each, -1 an empty slot; ``None``: one basis.
    """
    g = unit_rows(prototypes)
    together = None
    if labels is not None:
        g = torch.where((labels >= 0)[..., None], g, 0)
        together = labels[..., :, None] == labels[..., None, :]
    with torch.autocast(device_type=g.device.type, enabled=False):
        gram = g @ g.transpose(-1, -2)
        if together is not None:
            gram = torch.where(together, gram, 0)
        gram = gram + RIDGE * torch.eye(g.shape[-2], dtype=g.dtype, device=g.device)
        factor, _ = torch.linalg.cholesky_ex(gram)  # positive by the ridge; a check would wait
        return torch.cholesky_solve(g, factor)


def coefficients(rows: Tensor, prototypes: Tensor, labels: Tensor | None) -> Tensor:
    """``(..., R, P)`` of unit rows on the unit prototypes of each class by itself."""
    dual, u = dual_rows(prototypes, labels), unit_rows(rows)
    with torch.autocast(device_type=rows.device.type, enabled=False):
        return u @ dual.to(u.dtype).transpose(-1, -2)


@torch.no_grad()
def agreement(a_s: Tensor, a_t: Tensor, own: Tensor | None) -> Tensor:
    """Robust weights ``(..., R)`` from coefficients ``(..., R, P)`` and which are own-class."""
    if own is None or own.shape[-1] == 0:
        return torch.ones_like(a_s.sum(dim=-1))
    square = torch.where(own, a_s - a_t, 0).square().sum(dim=-1)
    number = own.sum(dim=-1).clamp(min=1)
    return (1 - (square / number).sqrt()).clamp(0, 1)
