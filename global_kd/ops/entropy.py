"""Cross-entropy of many two-point distributions, summed over classes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .dispatch import backend
from .memory import empty
from .pieces import pieces, plain
from .precision import accumulate


def binary_entropies(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum_k BCE(sigmoid(s_k), sigmoid(t_k))`` ``(...)`` of logits ``(..., K)``.

    The gradient is the student's alone.
    """
    teacher = teacher.detach()
    if backend(student) == "cpu" and plain(student, teacher):
        return _InPieces.apply(student, teacher)  # type: ignore[no-any-return]
    student, target = accumulate(student), accumulate(teacher).sigmoid()
    entropy = functional.binary_cross_entropy_with_logits
    return entropy(student, target.to(student.dtype), reduction="none").sum(dim=-1)


class _InPieces(torch.autograd.Function):
    """On the processor: some rows at a time; the backward reads the logits again."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        s, t = (x.flatten(0, -2) for x in (student, teacher))
        found = s.new_empty(len(s))
        for piece, (entropy, other) in pieces(s.shape, s.dtype, 2):
            torch.ops.aten.log_sigmoid_forward.output(s[piece], output=entropy, buffer=other)
            torch.neg(t[piece], out=other).sigmoid_().mul_(s[piece])
            found[piece] = other.sub_(entropy).sum(dim=1)
        return found.view(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        gradient = empty(student.shape, student.dtype)
        into, s, t = (x.flatten(0, -2) for x in (gradient, student, teacher))
        above = above.flatten()[:, None]
        for piece, (target,) in pieces(s.shape, s.dtype, 1):
            torch.sigmoid(t[piece], out=target)
            torch.sigmoid(s[piece], out=into[piece])
            into[piece].sub_(target).mul_(above[piece])
        return gradient, None
