"""Cosines of instances to prototypes in two spaces: how far they agree, how far they differ.

All levels at once. The cosines are matrix products, which every device has fast; what lies between
them (the best own-class cosine, omega, smooth L1, its slope) is the op.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import projection
from .cosine import cosines
from .dispatch import backend
from .precision import accumulate


def own_class(prototype_labels: Tensor, labels: Tensor) -> Tensor:
    """Whether a prototype ``(..., P)`` is of an instance's class ``(..., R)``: ``(..., R, P)``."""
    filled = prototype_labels[..., None, :] >= 0
    return (labels[..., :, None] == prototype_labels[..., None, :]) & filled


@torch.no_grad()
def agreement(q_s: Tensor, q_t: Tensor, own: Tensor | None) -> Tensor:
    """Robust weights ``(..., R)`` from cosines ``(..., R, P)`` and which of them are own-class."""
    if own is None or own.shape[-1] == 0:
        return torch.ones_like(q_s.sum(dim=-1))

    def best(cosine: Tensor) -> Tensor:
        # -2 lies below every cosine; where a class has no prototype both sides hold it and cancel.
        return torch.where(own, cosine, -2.0).amax(dim=-1)

    return (1 - (best(q_s) - best(q_t)).abs()).clamp(0, 1)


def relate(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    pairs: Tensor | None,
    beta: float,
    own: Tensor | None = None,
    weights: Tensor | None = None,
    robust: bool = False,
    labels: Tensor | None = None,
    project: bool = False,
) -> tuple[Tensor, Tensor]:
    """The relation loss, see ``losses/relation.py``, and the robust weights on the way.

    Args:
        student: ``(..., R, Cs)``; the only one that gets a gradient.
        teacher: ``(..., R, Ct)``.
        student_prototypes: ``(..., P, Cs)``.
        teacher_prototypes: ``(..., P, Ct)``.
        pairs: Bool, broadcastable to ``(..., R, P)``: which pairs count; all where ``None``.
        beta: Of the smooth L1.
        own: Bool ``(..., R, P)``, from :func:`own_class`; without it the robust weights are 1.
        weights: ``(..., R)``, given from outside.
        robust: Weigh by the robust weights.
        labels: int64 ``(..., P)`` of the prototypes, for ``project``.
        project: Take coefficients on the prototypes of each class in place of cosines; it has one
            form only.

    Returns:
        The mean over levels of the mean over counted pairs, 0-d; robust weights ``(..., R)``.
    """
    g_s, g_t = student_prototypes.detach(), teacher_prototypes.detach()
    weights = None if weights is None else accumulate(weights.detach())
    form = "definition" if project else backend(student)
    if form == "cpu":
        small = pairs, own, weights, robust, beta
        return _InOneGo.apply(student, teacher.detach(), g_s, g_t, *small)  # type: ignore[no-any-return]
    if project:
        q_s = projection.coefficients(student, g_s, labels)
        q_t = projection.coefficients(teacher.detach(), g_t, labels).to(q_s.dtype)
    else:
        q_s = cosines(student, g_s)
        q_t = cosines(teacher.detach(), g_t).to(q_s.dtype)
    if form == "triton":
        from ._triton.relation import relation_rows

        rows, omega = relation_rows(q_s, q_t, pairs, own, weights, robust, beta)
        return (rows.sum(dim=-1) / _counted(pairs, q_s)).mean(), omega
    omega = projection.agreement(q_s, q_t, own) if project else agreement(q_s, q_t, own)
    if robust:
        weights = omega
    gap = q_s - q_t
    if weights is not None:
        gap = weights[..., None].to(gap.dtype) * gap
    if pairs is not None:
        gap = torch.where(pairs, gap, 0)
    near = gap.clamp(-beta, beta)
    total = ((gap - near / 2) * near).sum(dim=(-2, -1)) / beta
    return (total / _counted(pairs, q_s)).mean(), omega


def _counted(pairs: Tensor | None, q: Tensor) -> Tensor:
    """How many pairs count on each level, at least 1."""
    if pairs is None:
        return q.new_full(q.shape[:-2], max(1, q.shape[-2] * q.shape[-1]))
    return pairs.expand_as(q).sum(dim=(-2, -1)).clamp(min=1).to(q.dtype)


class _InOneGo(torch.autograd.Function):
    """On the processor: the forward leaves the gradient of the rows behind, the backward scales."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        g_s: Tensor,
        g_t: Tensor,
        pairs: Tensor | None,
        own: Tensor | None,
        weights: Tensor | None,
        robust: bool,
        beta: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtype = student.dtype
        with torch.autocast(student.device.type, enabled=False):
            u, largest, length = _unit(student)
            v, shrink = _scaled(g_s, u.dtype)
            q_s = (u @ v.transpose(-1, -2)).mul_(shrink)
            u_t, _, _ = _unit(teacher)
            v_t, shrink_t = _scaled(g_t, u_t.dtype)
            q_t = (u_t @ v_t.transpose(-1, -2)).mul_(shrink_t)
            omega = agreement(q_s, q_t, own)
            if robust:
                weights = omega
            counted = _counted(pairs, q_s)
            gap = q_s.sub_(q_t)
            if weights is not None:
                gap *= weights[..., None]
            if pairs is not None:
                gap.masked_fill_(~pairs, 0)
            near = gap.clamp(-beta, beta)
            total = gap.sub_(near, alpha=0.5).mul_(near).sum(dim=(-2, -1)) / beta
            if ctx.needs_input_grad[0]:
                scale = (1 / (counted * (beta * max(1, counted.numel()))))[..., None, None]
                if weights is not None:
                    scale = scale * weights[..., None]
                towards = near.mul_(scale).mul_(shrink) @ v  # the gradient of the unit rows
                across = towards.sub_((towards * u).sum(dim=-1, keepdim=True) * u)
                ctx.save_for_backward(across.div_(length).div_(largest))
        ctx.mark_non_differentiable(omega)
        return (total / counted).mean(), omega

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * above).to(ctx.dtype), *(None,) * 8


def _scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows ``(..., P, C)`` and factors ``(..., 1, P)`` whose products are the unit rows.

    A bank is far larger than the cosines to it: it is not divided where its lengths are safe.
    """
    x = accumulate(x).to(dtype)
    length = torch.linalg.vector_norm(x, dim=-1)
    empty = length == 0  # a slot without prototype, or squares that underflowed
    safe = ((length > 1e-15) & (length < 1e15)) | empty
    if bool(safe.all()) and not bool(x[empty].any()):
        return x, torch.where(empty, 0, 1 / length)[..., None, :]
    return _unit(x)[0], torch.ones_like(length)[..., None, :]


def _unit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``unit_rows`` in fewer passes: rows, largest entry, length after division by that.

    For a zero row the last two are 1 and infinity, so that its gradient is zero, too.
    """
    x = accumulate(x)
    if x.shape[-1] == 0:
        one = x.new_ones(*x.shape[:-1], 1)
        return x, one, one
    lowest, highest = x.aminmax(dim=-1, keepdim=True)
    largest = torch.maximum(highest, -lowest)
    largest = torch.where(largest == 0, 1, largest)
    y = x / largest
    length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    length = torch.where(length == 0, torch.inf, length)
    return y.div_(length), largest, length
