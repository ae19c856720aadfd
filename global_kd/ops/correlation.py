"""Squared error of maps whose channels are standardised."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import backend
from .memory import empty
from .pieces import pieces, plain
from .precision import accumulate

_ROUND = 1e-6  # added to a standard deviation


def standardised_error(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Sum of the squared differences of two maps, each standardised by :func:`standardised`.

    Args:
        student: ``(B, C, H, W)``; the only one that gets a gradient.
        teacher: ``(B, C, H, W)``.
        weights: Of the squares of the cells, ``(B, H, W)``.
        total: See there.
    """
    teacher = teacher.detach()
    alone = weights is None and total is None
    if alone and backend(student) == "cpu" and plain(student, teacher):
        return _InPieces.apply(student, teacher)  # type: ignore[no-any-return]
    squares = (standardised(student, total) - standardised(teacher, total)).square()
    if weights is not None:
        squares = squares * weights[:, None]
    return squares.sum()


def standardised(x: Tensor, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Each channel of ``(B, C, H, W)`` with mean 0 and standard deviation 1.

    Args:
        x: Map.
        total: Sums a tensor over everybody whose values count; ``None``: these alone.
    """
    x = accumulate(x)
    if total is None:
        total = _own
    count = total(x.new_full((), x.numel() // max(x.shape[1], 1)))
    mean = total(x.sum(dim=(0, 2, 3))) / count.clamp(min=1)
    centred = x - mean[:, None, None]
    variance = total(centred.square().sum(dim=(0, 2, 3))) / (count - 1).clamp(min=1)
    std = torch.where(_constant(variance, mean), 1.0, variance).sqrt()
    return centred / (std + _ROUND)[:, None, None]


def _constant(variance: Tensor, mean: Tensor) -> Tensor:
    """Its variance is one of rounding errors; the root's gradient at 0 is infinite."""
    return variance <= (8 * torch.finfo(variance.dtype).eps * mean.detach()).square()


def _own(x: Tensor) -> Tensor:
    return x


class _InPieces(torch.autograd.Function):
    r"""On the processor: some channels at a time; the backward is one pass.

    With ``a`` the centred student of a channel, ``u = a / (\sigma + \epsilon)`` and
    ``d = u - v``, the gradient of ``\sum d^2 / 2`` is ``(d - a \sum d u / ((n - 1) \sigma)) /
    (\sigma + \epsilon)``: both centred maps, each by a factor of the channel.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        batch, channels = student.shape[:2]
        count = batch * student[0, 0].numel()
        errors, along, *small = student.new_empty(6, channels).unbind()
        maps = [x.flatten(2).transpose(0, 1) for x in (student, teacher)]  # (C, B, H W)
        for piece, room in pieces((channels, count), student.dtype, 2):
            flat = [
                _standardise(
                    whole[piece], x.view(-1, batch, count // batch), mean[piece], std[piece]
                )
                for whole, x, mean, std in zip(maps, room, small[:2], small[2:], strict=True)
            ]
            s, t = room
            errors[piece] = _squares(t.sub_(s))
            # Where a channel is constant the deviation is not that of its values.
            along[piece] = torch.where(flat[0], 0, -s.mul_(t).sum(dim=1))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(student, teacher, along, *small)
        return errors.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, along, *small = ctx.saved_tensors
        batch, channels, height, width = student.shape
        rest = max(batch * height * width - 1, 1)
        mean_s, mean_t, std_s, std_t = small
        scale_s, scale_t = 1 / (std_s + _ROUND), 1 / (std_t + _ROUND)
        by_student = 2 * above * scale_s * (scale_s - along / (rest * std_s))
        by_teacher = -2 * above * scale_s * scale_t
        gradient = empty(student.shape, student.dtype)
        into, s, t = (x.flatten(0, 1).flatten(1) for x in (gradient, student, teacher))
        mean_s, mean_t, by_student, by_teacher = (
            x.repeat(batch)[:, None] for x in (mean_s, mean_t, by_student, by_teacher)
        )
        for piece, (centred,) in pieces(s.shape, student.dtype, 1):
            torch.sub(t[piece], mean_t[piece], out=centred)
            torch.sub(s[piece], mean_s[piece], out=into[piece])
            into[piece].mul_(by_student[piece]).addcmul_(centred, by_teacher[piece])
        return gradient, None


def _standardise(x: Tensor, out: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Channels ``(C, B, N)``, with their mean and deviation ``(C,)``; which are constant."""
    count = x[0].numel()
    torch.div(x.sum(dim=(1, 2)), count, out=mean)
    torch.sub(x, mean[:, None, None], out=out)
    variance = _squares(out.flatten(1)) / max(count - 1, 1)
    flat = _constant(variance, mean)
    std.copy_(torch.where(flat, 1, variance).sqrt())
    out.mul_((1 / (std + _ROUND))[:, None, None])
    return flat


def _squares(x: Tensor) -> Tensor:
    """Of each row, summed."""
    length: Tensor = torch.linalg.vector_norm(x, dim=1)
    return length.square()
