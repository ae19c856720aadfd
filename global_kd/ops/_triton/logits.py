"""Divergence of class distributions: one pass per row gives it and the student's gradient."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ceil_div, device_of, power_of_two, require_dtype, require_first_derivative

_TILE = 1024  # logits of a program at a time


@triton.jit
def _load(logits, o_n, o_k, s_n, s_k, temperature, m, other):
    place = logits + o_n.to(tl.int64)[:, None] * s_n + o_k.to(tl.int64)[None, :] * s_k
    return tl.load(place, mask=m, other=other).to(tl.float32) / temperature


@triton.jit
def _log_sigmoid(z):
    # (log sigmoid(z), log sigmoid(-z)); e <= 1, and log(1 + e) keeps its digits where e is small
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    tail = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    return tl.minimum(z, 0.0) - tail, tl.minimum(-z, 0.0) - tail


@triton.jit
def _rows_kernel(
    student,  # (N, K), any strides
    teacher,  # (N, K), any strides
    divergence,  # (N,) float32, written
    grad,  # (N, K) float32 or empty, written
    rows,  # N
    classes,  # K
    temperature,
    s_n,
    s_k,
    t_n,
    t_k,
    SOFTMAX: tl.constexpr,
    GRAD: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # divergence[n] = sum_k KL(p_t || p_s), p = softmax or sigmoid of z / T
    # grad[n, k] = (p_s - p_t) / T
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < rows
    log_sum_s = tl.zeros([BN], tl.float32)
    log_sum_t = tl.zeros([BN], tl.float32)
    if SOFTMAX:
        top_s = tl.full([BN], float("-inf"), tl.float32)
        top_t = tl.full([BN], float("-inf"), tl.float32)
        sum_s, sum_t = log_sum_s, log_sum_t
        for k in range(0, classes, BK):
            o_k = k + tl.arange(0, BK)
            m = m_n[:, None] & (o_k < classes)[None, :]
            z_s = _load(student, o_n, o_k, s_n, s_k, temperature, m, float("-inf"))
            z_t = _load(teacher, o_n, o_k, t_n, t_k, temperature, m, float("-inf"))
            new_s = tl.maximum(top_s, tl.max(z_s, axis=1))
            new_t = tl.maximum(top_t, tl.max(z_t, axis=1))
            sum_s = sum_s * tl.exp(top_s - new_s) + tl.sum(tl.exp(z_s - new_s[:, None]), axis=1)
            sum_t = sum_t * tl.exp(top_t - new_t) + tl.sum(tl.exp(z_t - new_t[:, None]), axis=1)
            top_s, top_t = new_s, new_t
        log_sum_s, log_sum_t = top_s + tl.log(sum_s), top_t + tl.log(sum_t)
    total = tl.zeros([BN, BK], tl.float32)
    for k in range(0, classes, BK):
        o_k = k + tl.arange(0, BK)
        m = m_n[:, None] & (o_k < classes)[None, :]
        z_s = _load(student, o_n, o_k, s_n, s_k, temperature, m, 0)
        z_t = _load(teacher, o_n, o_k, t_n, t_k, temperature, m, 0)
        if SOFTMAX:
            log_s, log_t = z_s - log_sum_s[:, None], z_t - log_sum_t[:, None]
            p_s, p_t = tl.exp(log_s), tl.exp(log_t)
            each = p_t * (log_t - log_s)
        else:
            (log_s, log_not_s), (log_t, log_not_t) = _log_sigmoid(z_s), _log_sigmoid(z_t)
            p_s, p_t = tl.exp(log_s), tl.exp(log_t)
            each = p_t * (log_t - log_s) + tl.exp(log_not_t) * (log_not_t - log_not_s)
        total += tl.where(m, each, 0.0)
        if GRAD:
            place = o_n.to(tl.int64)[:, None] * classes + o_k[None, :]
            tl.store(grad + place, (p_s - p_t) / temperature, mask=m)
    tl.store(divergence + o_n, tl.sum(total, axis=1), mask=m_n)


@torch.library.custom_op("global_kd::logit_rows", mutates_args=())
def _rows(
    student: Tensor, teacher: Tensor, temperature: float, softmax: bool, with_grad: bool
) -> tuple[Tensor, Tensor]:
    require_dtype(student=student, teacher=teacher)
    rows, classes = student.shape
    divergence = student.new_zeros(rows, dtype=torch.float32)
    grad = student.new_empty((rows, classes) if with_grad else 0, dtype=torch.float32)
    if student.numel():
        block_k = power_of_two(classes, 1, _TILE)
        block_n = _TILE // block_k
        with device_of(student):
            _rows_kernel[(ceil_div(rows, block_n),)](
                student,
                teacher,
                divergence,
                grad,
                rows,
                classes,
                temperature,
                *student.stride(),
                *teacher.stride(),
                SOFTMAX=softmax,
                GRAD=with_grad,
                BN=block_n,
                BK=block_k,
            )
    return divergence, grad


@_rows.register_fake
def _(
    student: Tensor, teacher: Tensor, temperature: float, softmax: bool, with_grad: bool
) -> tuple[Tensor, Tensor]:
    grad = student.new_empty(student.shape if with_grad else 0, dtype=torch.float32)
    return student.new_empty(student.shape[0], dtype=torch.float32), grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, above: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if above is None:
        return (None,) * 5
    require_first_derivative("logit_rows")
    (grad,) = ctx.saved_tensors
    return (grad * above[:, None]).to(ctx.dtype), *(None,) * 4


_rows.register_autograd(_backward, setup_context=_setup_context)


def logit_rows(
    student: Tensor, teacher: Tensor, temperature: float, activation: str = "softmax"
) -> Tensor:
    """Kullback-Leibler divergence of each row, summed over classes, without the factor ``T**2``.

    Args:
        student: Logits ``(N, K)``; the only one that gets a gradient, and only a first one.
        teacher: Logits ``(N, K)``.
        temperature: ``T > 0``.
        activation: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        float32 ``(N,)``.
    """
    with_grad = torch.is_grad_enabled() and student.requires_grad
    softmax = activation == "softmax"
    out = _rows(student, teacher.detach(), float(temperature), softmax, with_grad)
    return out[0]  # type: ignore[no-any-return]
