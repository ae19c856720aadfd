"""Divergence of two class distributions, row by row."""

from torch import Tensor
from torch.nn import functional

from .dispatch import backend
from .precision import accumulate


def divergences(student: Tensor, teacher: Tensor, temperature: float, activation: str) -> Tensor:
    """``(N,)`` Kullback-Leibler divergences of logits ``(N, K)``, summed over classes.

    ``KL(teacher || student)`` of ``activation(z / temperature)``: of one softmax, or of ``K``
    two-point distributions. The gradient is the student's alone.
    """
    if backend(student) == "triton":
        from ._triton.logits import logit_rows

        return logit_rows(student, teacher, temperature, activation)
    z_s = accumulate(student) / temperature
    z_t = (accumulate(teacher.detach()) / temperature).to(z_s.dtype)
    if activation == "softmax":
        log_s, log_t = z_s.log_softmax(dim=1), z_t.log_softmax(dim=1)
        return (log_t.exp() * (log_t - log_s)).sum(dim=1)
    log_sigmoid = functional.logsigmoid
    p_t, log_s, log_t = z_t.sigmoid(), log_sigmoid(z_s), log_sigmoid(z_t)
    there, not_there = log_t - log_s, log_sigmoid(-z_t) - log_sigmoid(-z_s)
    return (p_t * there + (1 - p_t) * not_there).sum(dim=1)
