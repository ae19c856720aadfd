"""What maps are attended for, and how two maps differ under it: one pass over both."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import backend
from .memory import empty
from .pieces import pieces, plain
from .precision import accumulate


def strengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute value of each cell ``(B, H, W)`` and channel ``(B, C)`` of ``(B, C, H, W)``."""
    if backend(x) == "cpu" and plain(x) and not x.requires_grad:
        where, what = x.new_zeros(len(x), *x.shape[2:]), x.new_empty(x.shape[:2])
        for b, image in enumerate(x.flatten(2)):
            for piece, (strength,) in pieces(image.shape, x.dtype, 1):
                _add_strengths(image[piece], strength, where[b].view(-1), what[b, piece])
        return where.div_(x.shape[1]), what.div_(where[0].numel())
    strength = accumulate(x).abs()
    return strength.mean(dim=1), strength.mean(dim=(2, 3))


def attended_errors(
    student: Tensor, teacher: Tensor, what: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How strong the student is, and how far from the teacher.

    Args:
        student: ``(B, C, H, W)``.
        teacher: ``(B, C, H, W)``, without a gradient.
        what: Factors of the channels' squared errors, ``(B, C)``, without a gradient.
        shift: Added to the difference of a channel in the last result, ``(B, C)``.

    Returns:
        The :func:`strengths` of the student; weighted squared error of each cell ``(B, H, W)``;
        sum of the shifted squared error, 0 without a shift.
    """
    teacher, what = teacher.detach(), what.detach()
    if backend(student) == "cpu" and plain(student, teacher):
        return _InOnePass.apply(student, teacher, what, shift)  # type: ignore[no-any-return]
    d = accumulate(student) - accumulate(teacher)
    squares = (d.square() * what[:, :, None, None]).sum(dim=1)
    error = d.new_zeros(()) if shift is None else (d + shift[:, :, None, None]).square().sum()
    return *strengths(student), squares, error


class _InOnePass(torch.autograd.Function):
    """On the processor: some channels at a time, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, what: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(student, teacher, what, shift)
        batch, channels, height, width = student.shape
        where, squares = student.new_zeros(2, batch, height * width).unbind()
        strength, error = student.new_empty(batch, channels), student.new_zeros(())
        with torch.autocast("cpu", enabled=False):
            for b, (s, t) in enumerate(zip(student.flatten(2), teacher.flatten(2), strict=True)):
                for piece, (d, square) in pieces(s.shape, s.dtype, 2):
                    _add_strengths(s[piece], d, where[b], strength[b, piece])
                    torch.sub(s[piece], t[piece], out=d)
                    squares[b].addmv_(torch.mul(d, d, out=square).T, what[b, piece])
                    if shift is not None:
                        lengths = torch.linalg.vector_norm(d.add_(shift[b, piece, None]), dim=1)
                        error += lengths.square().sum()
        where, strength = where.div_(channels), strength.div_(height * width)
        return where.view(batch, height, width), strength, squares.view_as(student[:, 0]), error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, what, shift = ctx.saved_tensors
        batch, channels, height, width = student.shape
        where, strength = above[0].flatten(1) / channels, above[1] / (height * width)
        squares, error, what = above[2].flatten(1), 2 * above[3], 2 * what
        gradient = empty(student.shape, student.dtype)
        along = torch.zeros_like(what)
        for b in range(batch):
            s, t, into = (x[b].flatten(1) for x in (student, teacher, gradient))
            for piece, (d, sign) in pieces(s.shape, s.dtype, 2):
                out = into[piece]
                torch.sub(s[piece], t[piece], out=d)
                torch.mul(d, squares[b], out=out).mul_(what[b, piece, None])
                if shift is not None:
                    out.add_(d.add_(shift[b, piece, None]).mul_(error))
                    along[b, piece] = d.sum(dim=1)
                torch.sign(s[piece], out=sign)
                out.addcmul_(sign, where[b]).addcmul_(sign, strength[b, piece, None])
        return gradient, None, None, None if shift is None else along


def _add_strengths(x: Tensor, room: Tensor, where: Tensor, what: Tensor) -> None:
    """Sums of ``(C, N)``, added to ``where (N,)`` and written to ``what (C,)``."""
    torch.abs(x, out=room)
    where += room.sum(dim=0)
    torch.sum(room, dim=1, out=what)


def attended_mean(x: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """Mean feature ``(B, C)`` of a map under a softmax over its cells of a linear key.

    Args:
        x: ``(B, C, H, W)``, in at least float32.
        key: ``(C,)``.
        bias: ``(1,)``, of no effect.
    """
    if backend(x) == "cpu" and plain(x):
        return _Mean.apply(x, key, bias)  # type: ignore[no-any-return]
    rows = x.flatten(2)
    with torch.autocast(x.device.type, enabled=False):
        logits = (key.to(x.dtype) @ rows) + bias
    return (rows * logits.softmax(dim=1)[:, None]).sum(dim=2)


class _Mean(torch.autograd.Function):
    """On the processor: products of matrices; the gradient of the map is written once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        rows = x.flatten(2)
        with torch.autocast("cpu", enabled=False):
            shares = (key @ rows).softmax(dim=1)
            ctx.save_for_backward(x, key, shares)
            return torch.bmm(rows, shares[:, :, None])[:, :, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, key, shares = ctx.saved_tensors
        rows = x.flatten(2)
        gradient = None
        with torch.autocast("cpu", enabled=False):
            towards = torch.bmm(above[:, None], rows)[:, 0]
            logits = shares * (towards - (shares * towards).sum(dim=1, keepdim=True))
            if ctx.needs_input_grad[0]:
                gradient = empty(x.shape, x.dtype)
                left = torch.stack([above, key.expand_as(above)], dim=2)
                torch.bmm(left, torch.stack([shares, logits], dim=1), out=gradient.flatten(2))
            by_key = torch.bmm(rows, logits[:, :, None]).sum(dim=0)[:, 0]
        return gradient, by_key, logits.sum()[None]
