"""Divergence of two class distributions, row by row."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .dispatch import backend
from .precision import accumulate


def divergences(student: Tensor, teacher: Tensor, temperature: float, activation: str) -> Tensor:
    """``(N,)`` Kullback-Leibler divergences of logits ``(N, K)``, summed over classes.

    ``KL(teacher || student)`` of ``activation(z / temperature)``: of one softmax, or of ``K``
    two-point distributions. The gradient is the student's alone.
    """
    form = backend(student)
    if form == "triton":
        from ._triton.logits import logit_rows

        return logit_rows(student, teacher, temperature, activation)
    if form == "cpu" and torch.is_grad_enabled() and student.requires_grad:
        return _InOneGo.apply(student, teacher, temperature, activation)  # type: ignore[no-any-return]
    return _rows(student, teacher, temperature, activation)[0]


def _rows(
    student: Tensor, teacher: Tensor, temperature: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergences and the logarithms of both sides' probabilities."""
    z_s = accumulate(student) / temperature
    z_t = (accumulate(teacher.detach()) / temperature).to(z_s.dtype)
    if activation == "softmax":
        log_s, log_t = z_s.log_softmax(dim=1), z_t.log_softmax(dim=1)
        return (log_t.exp() * (log_t - log_s)).sum(dim=1), log_s, log_t
    log_sigmoid = functional.logsigmoid
    p_t, log_s, log_t = z_t.sigmoid(), log_sigmoid(z_s), log_sigmoid(z_t)
    there, not_there = log_t - log_s, log_sigmoid(-z_t) - log_sigmoid(-z_s)
    return (p_t * there + (1 - p_t) * not_there).sum(dim=1), log_s, log_t


class _InOneGo(torch.autograd.Function):
    """On the processor: of both sides only the difference of the probabilities is kept."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, activation: str
    ) -> Tensor:
        rows, log_s, log_t = _rows(student, teacher, temperature, activation)
        ctx.dtype = student.dtype
        ctx.save_for_backward(log_s.exp_().sub_(log_t.exp_()).div_(temperature))
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * above[:, None]).to(ctx.dtype), None, None, None
