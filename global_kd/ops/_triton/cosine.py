"""Rows divided by their length, one pass each way."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device_of, power_of_two, require_dtype, require_first_derivative

_TILE = 1024  # entries of a row at a time


@triton.jit
def _length(x, channels, s_c, BC: tl.constexpr):
    # The largest entry, and the length of the row after division by it; both 1 for a zero row.
    top = tl.zeros([BC], tl.float32)
    for c in range(0, channels, BC):
        o = c + tl.arange(0, BC)
        entries = tl.load(x + o.to(tl.int64) * s_c, mask=o < channels, other=0).to(tl.float32)
        top = tl.maximum(top, tl.abs(entries))
    # A maximum may drop a nan; the sum of squares below keeps it.
    largest = tl.max(top, axis=0)
    largest = tl.where(largest == 0, 1.0, largest)
    squares = tl.zeros([BC], tl.float32)
    for c in range(0, channels, BC):
        o = c + tl.arange(0, BC)
        entries = tl.load(x + o.to(tl.int64) * s_c, mask=o < channels, other=0).to(tl.float32)
        squares += (entries / largest) * (entries / largest)
    length = tl.sqrt(tl.sum(squares, axis=0))
    return largest, tl.where(length == 0, 1.0, length)


@triton.jit
def _unit_kernel(x, unit, channels, s_n, s_c, BC: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    row = x + i_n * s_n
    largest, length = _length(row, channels, s_c, BC)
    for c in range(0, channels, BC):
        o = c + tl.arange(0, BC)
        m = o < channels
        entries = tl.load(row + o.to(tl.int64) * s_c, mask=m, other=0).to(tl.float32)
        tl.store(unit + i_n * channels + o, entries / largest / length, mask=m)


@triton.jit
def _unit_backward_kernel(x, above, grad, channels, s_n, s_c, BC: tl.constexpr):
    # grad = (above - (above . u) u) / |x|, zero for a zero row
    i_n = tl.program_id(0).to(tl.int64)
    row, above_row = x + i_n * s_n, above + i_n * channels
    largest, length = _length(row, channels, s_c, BC)
    along = tl.zeros([BC], tl.float32)
    any_entry = tl.zeros([BC], tl.float32)
    for c in range(0, channels, BC):
        o = c + tl.arange(0, BC)
        m = o < channels
        entries = tl.load(row + o.to(tl.int64) * s_c, mask=m, other=0).to(tl.float32)
        any_entry += tl.where(entries == 0, 0.0, 1.0)
        along += entries / largest / length * tl.load(above_row + o, mask=m, other=0)
    dot = tl.sum(along, axis=0)
    alive = tl.where(tl.sum(any_entry, axis=0) > 0, 1.0, 0.0)
    for c in range(0, channels, BC):
        o = c + tl.arange(0, BC)
        m = o < channels
        entries = tl.load(row + o.to(tl.int64) * s_c, mask=m, other=0).to(tl.float32)
        across = tl.load(above_row + o, mask=m, other=0) - dot * (entries / largest / length)
        out = alive * (across / length / largest)
        tl.store(grad + i_n * channels + o, out.to(grad.dtype.element_ty), mask=m)


@torch.library.custom_op("global_kd::unit_rows", mutates_args=())
def _unit(x: Tensor) -> Tensor:
    require_dtype(x=x)
    rows, channels = x.shape
    unit = x.new_empty(rows, channels, dtype=torch.float32)
    if x.numel():
        with device_of(x):
            block = power_of_two(channels, 16, _TILE)
            _unit_kernel[(rows,)](x, unit, channels, *x.stride(), BC=block)
    return unit


@_unit.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("global_kd::unit_rows_backward", mutates_args=())
def _unit_backward(x: Tensor, above: Tensor) -> Tensor:
    rows, channels = x.shape
    above = above.float().contiguous()
    grad = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    if x.numel():
        with device_of(x):
            block = power_of_two(channels, 16, _TILE)
            _unit_backward_kernel[(rows,)](x, above, grad, channels, *x.stride(), BC=block)
    return grad


@_unit_backward.register_fake
def _(x: Tensor, above: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, above: Tensor) -> Tensor:
    require_first_derivative("unit_rows")
    (x,) = ctx.saved_tensors
    return _unit_backward(x, above)  # type: ignore[no-any-return]


_unit.register_autograd(_backward, setup_context=_setup_context)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of ``x (..., C)`` divided by their length, float32; a zero row stays zero."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _unit(rows).view(x.shape)  # type: ignore[no-any-return]
