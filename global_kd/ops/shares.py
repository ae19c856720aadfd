"""Divergence of the channels of two maps, each a distribution over its cells."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import backend
from .memory import empty
from .pieces import pieces, plain
from .precision import accumulate


def share_divergence(
    student: Tensor, teacher: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """Sum over images and channels of ``KL(teacher || student)`` of softmaxes over the cells.

    Args:
        student: ``(B, C, H, W)``; the only one that gets a gradient.
        teacher: ``(B, C, H, W)``.
        temperature: Both maps are divided by it.
        weights: ``(B, H, W)`` >= 0, factors of the cells' shares, each of which is kept from being
            negative.
    """
    teacher = teacher.detach()
    if weights is None and backend(student) == "cpu" and plain(student, teacher):
        learns = student.requires_grad and torch.is_grad_enabled()
        return _InPieces.apply(student, teacher, temperature, learns)  # type: ignore[no-any-return]
    s, t = (accumulate(x).flatten(2) / temperature for x in (student, teacher))
    s, t = s.log_softmax(dim=2), t.log_softmax(dim=2)
    cells = t.exp() * (t - s)
    if weights is not None:
        # Both distributions sum to 1, so that q - p adds nothing to their divergence; with it no
        # cell's own share is negative, and weights may be laid over the cells.
        cells = (cells + s.exp() - t.exp()) * weights.flatten(1)[:, None]
    return cells.sum()


class _InPieces(torch.autograd.Function):
    """On the processor: some channels at a time, the gradient with the value.

    It is the difference of the two distributions, which are at hand in the forward; the backward
    scales it in place and gives it away.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, learns: bool
    ) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        value, ctx.gradient = _divergence(student, teacher, temperature, learns)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # asked for once more: the first is no longer ours
            student, teacher = ctx.saved_tensors
            _, gradient = _divergence(student, teacher, ctx.temperature, True)
        return gradient.mul_(above / ctx.temperature), None, None, None


def _divergence(
    student: Tensor, teacher: Tensor, temperature: float, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """With it its gradient, but for the temperature's factor."""
    total = student.new_zeros(())
    gradient = empty(student.shape, student.dtype) if learns else None
    rows = [x.flatten(0, 1).flatten(1) for x in (student, teacher)]
    into = None if gradient is None else gradient.flatten(0, 1).flatten(1)
    for piece, (p, d, *more) in pieces(rows[0].shape, student.dtype, 2 if learns else 3):
        s, t = (x[piece] for x in rows)
        if temperature != 1:
            s, t = s / temperature, t / temperature
        q = more[0] if into is None else into[piece]
        torch.softmax(s, 1, out=q)
        torch.softmax(t, 1, out=p)
        # log p - log q without a logarithm of each cell: of the largest of a row the softmax is
        # known, and with it what was subtracted from all.
        shift = t.amax(1) - s.amax(1) - (p.amax(1) / q.amax(1)).log()
        total += torch.sub(t, s, out=d).sub_(shift[:, None]).mul_(p).sum()
        if into is not None:
            q.sub_(p)
    return total, gradient
