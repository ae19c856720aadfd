"""What lies between the cosines and the loss: omega, smooth L1 and its slope, one pass per row."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device_of, power_of_two, require_dtype, require_first_derivative

_TILE = 1024  # cosines of a row at a time


@triton.jit
def _relation_kernel(
    student,  # (L, R, P) cosines
    teacher,  # (L, R, P)
    pairs,  # (L, R, P) bool of any strides, or empty
    own,  # likewise
    weights,  # (L, R) float32, or empty
    total,  # (L, R) float32, written
    omega,  # (L, R) float32, written
    slope,  # (L, R, P) float32 or empty, written
    rows,  # R
    prototypes,  # P
    beta,
    a_l,
    a_r,
    a_p,
    o_l,
    o_r,
    o_p,
    PAIRS: tl.constexpr,
    OWN: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROBUST: tl.constexpr,
    GRAD: tl.constexpr,
    BP: tl.constexpr,
):
    # omega = clamp(1 - |max_own q_s - max_own q_t|, 0, 1)
    # total = sum_p smoothL1(w q_s, w q_t), slope[p] = d total / d q_s[p]
    i_row = tl.program_id(0).to(tl.int64)
    i_l, i_r = i_row // rows, i_row % rows
    start = i_row * prototypes
    weight = 1.0
    if OWN:
        best_s = tl.full([BP], -2.0, tl.float32)  # below every cosine
        best_t = best_s
        for p in range(0, prototypes, BP):
            o = p + tl.arange(0, BP)
            m = o < prototypes
            place = own + i_l * o_l + i_r * o_r + o.to(tl.int64) * o_p
            mine = tl.load(place, mask=m, other=0).to(tl.int1)
            q_s = tl.load(student + start + o, mask=m, other=0)
            q_t = tl.load(teacher + start + o, mask=m, other=0)
            best_s = tl.maximum(best_s, tl.where(mine, q_s, -2.0))
            best_t = tl.maximum(best_t, tl.where(mine, q_t, -2.0))
        apart = tl.abs(tl.max(best_s, axis=0) - tl.max(best_t, axis=0))
        agreed = tl.minimum(tl.maximum(1 - apart, 0.0), 1.0)
        tl.store(omega + i_row, agreed)
        if ROBUST:
            weight = agreed
    else:
        tl.store(omega + i_row, 1.0)
    if WEIGHTS:
        weight = tl.load(weights + i_row)
    sums = tl.zeros([BP], tl.float32)
    for p in range(0, prototypes, BP):
        o = p + tl.arange(0, BP)
        m = o < prototypes
        q_s = tl.load(student + start + o, mask=m, other=0)
        q_t = tl.load(teacher + start + o, mask=m, other=0)
        gap = weight * (q_s - q_t)
        if PAIRS:
            place = pairs + i_l * a_l + i_r * a_r + o.to(tl.int64) * a_p
            counted = tl.load(place, mask=m, other=0).to(tl.int1)
            gap = tl.where(counted, gap, 0.0)
        near = tl.minimum(tl.maximum(gap, -beta), beta)
        sums += (gap - near * 0.5) * near
        if GRAD:
            tl.store(slope + start + o, near * (weight / beta), mask=m)
    tl.store(total + i_row, tl.sum(sums, axis=0) / beta)


@torch.library.custom_op("global_kd::relation_rows", mutates_args=())
def _rows(
    student: Tensor,
    teacher: Tensor,
    pairs: Tensor | None,
    own: Tensor | None,
    weights: Tensor | None,
    robust: bool,
    beta: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    require_dtype(student=student, teacher=teacher)
    levels, rows, prototypes = student.shape
    student, teacher = student.float().contiguous(), teacher.float().contiguous()
    total = student.new_empty(levels, rows)
    omega = torch.empty_like(total)
    slope = torch.empty_like(student) if with_grad else student.new_empty(0)
    if weights is not None:
        weights = weights.float().contiguous()
    if total.numel():
        with device_of(student):
            _relation_kernel[(levels * rows,)](
                student,
                teacher,
                total if pairs is None else pairs,
                total if own is None else own,
                total if weights is None else weights,
                total,
                omega,
                slope,
                rows,
                prototypes,
                beta,
                *((0, 0, 0) if pairs is None else pairs.stride()),
                *((0, 0, 0) if own is None else own.stride()),
                PAIRS=pairs is not None,
                OWN=own is not None,
                WEIGHTS=weights is not None,
                ROBUST=robust,
                GRAD=with_grad,
                BP=power_of_two(prototypes, 16, _TILE),
            )
    return total, omega, slope


@_rows.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    pairs: Tensor | None,
    own: Tensor | None,
    weights: Tensor | None,
    robust: bool,
    beta: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = student.new_empty(student.shape[:2], dtype=torch.float32)
    slope = student.new_empty(student.shape if with_grad else 0, dtype=torch.float32)
    return total, torch.empty_like(total), slope


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, above: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if above is None:
        return (None,) * 8
    require_first_derivative("relation_rows")
    (slope,) = ctx.saved_tensors
    return (slope * above[..., None]).to(ctx.dtype), *(None,) * 7


_rows.register_autograd(_backward, setup_context=_setup_context)


def relation_rows(
    student: Tensor,
    teacher: Tensor,
    pairs: Tensor | None,
    own: Tensor | None,
    weights: Tensor | None,
    robust: bool,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Sum over pairs of the smooth L1 of each row, and the robust weights of the rows.

    Args:
        student: Cosines ``(..., R, P)``; the only one that gets a gradient, and only a first one.
        teacher: ``(..., R, P)``.
        pairs: Bool, broadcastable to ``(..., R, P)``: which count; all where ``None``.
        own: Bool, likewise: which prototypes are of the row's class; ``None``: weights are 1.
        weights: ``(..., R)``, from outside.
        robust: Weigh by the robust weights.
        beta: Difference at which the square turns linear.

    Returns:
        float32 ``(..., R)`` twice.
    """
    lead, (rows, prototypes) = student.shape[:-2], student.shape[-2:]
    levels = math.prod(lead)

    def mask(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand_as(student).reshape(levels, rows, prototypes)

    total, omega, _ = _rows(
        student.reshape(levels, rows, prototypes),
        teacher.detach().reshape(levels, rows, prototypes),
        mask(pairs),
        mask(own),
        None if weights is None else weights.expand(*lead, rows).reshape(levels, rows),
        robust,
        float(beta),
        torch.is_grad_enabled() and student.requires_grad,
    )
    return total.view(*lead, rows), omega.detach().view(*lead, rows)
