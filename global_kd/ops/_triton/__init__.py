"""Triton twins of the ops under the same names. Importing one needs Triton: ``ops`` does so late.

In every kernel ``i_`` is a program's index, ``o_`` an offset, ``m_`` a mask; ``cells`` numbers the
positions of one map row by row. Tile sizes are fixed rather than tuned at run time: the order of a
sum, and so its last bit, depends on shapes only.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_dtype(**tensors: Tensor) -> None:
    """Complain about a dtype that the kernels do not serve."""
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name}: the triton form takes float32, bfloat16 or float16, but got {x.dtype}; "
                "the definition takes any"
            )


def require_first_derivative(op: str) -> None:
    """Complain, in a backward that is a constant, when a derivative of it would be asked for."""
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            f"{op}: the triton form has no second derivative; use "
            'global_kd.ops.dispatch.force("definition")'
        )


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest one not below ``n``, between two others."""
    return min(max(1 << max(0, n - 1).bit_length(), low), high)


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def channels_first(x: Tensor) -> bool:
    """Whether neighbours in memory are neighbours on the map ``(B, C, H, W)``, not channels."""
    return x.stride(3) <= x.stride(1)


def flat(*maps: Tensor) -> bool:
    """Whether the cells of all maps lie at one distance: no division is needed to find them."""
    return all(x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3) for x in maps)


@triton.jit
def cell_offset(o_n, width, stride_y, stride_x, FLAT: tl.constexpr):
    """Where cells lie in a channel of a map."""
    o_n = o_n.to(tl.int64)
    if FLAT:
        return o_n * stride_x
    return o_n // width * stride_y + o_n % width * stride_x


@triton.jit
def load_boxes(boxes, image_index, o_r, m_r):
    """Image, first column and row, width and height of a block of boxes, int32.

    What lies past the end of the table is in no image and has no cells.
    """
    image = tl.load(image_index + o_r, mask=m_r, other=-1).to(tl.int32)
    p_r = boxes + o_r * 4
    x1 = tl.load(p_r, mask=m_r, other=0).to(tl.int32)
    y1 = tl.load(p_r + 1, mask=m_r, other=0).to(tl.int32)
    x2 = tl.load(p_r + 2, mask=m_r, other=0).to(tl.int32)
    y2 = tl.load(p_r + 3, mask=m_r, other=0).to(tl.int32)
    return image, x1, y1, x2 - x1, y2 - y1


@triton.jit
def covers(x, y, x1, y1, w, h):
    """Whether a cell lies in a box: what is left or above of it is a large unsigned number."""
    column, row = (x - x1).to(tl.uint32, bitcast=True), (y - y1).to(tl.uint32, bitcast=True)
    return (column < w.to(tl.uint32, bitcast=True)) & (row < h.to(tl.uint32, bitcast=True))
