"""Whole maps some rows at a time, on the processor: what is worked on stays in the cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .precision import accumulate

# Elements of a map that are worked on at a time: at most so many, and at most a quarter of it, but
# not less than the other. The processor's time is the same for pieces of 2^18 to 2^21; but each
# operation ends in a barrier of all threads, and where other jobs hold a core hundreds of those
# take seconds.
CHUNK, LEAST = 1 << 21, 1 << 18


def plain(*maps: Tensor) -> bool:
    """Whether maps can be cut into rows where they lie, and need no other dtype for sums."""
    one = accumulate(maps[0]).dtype
    return all(x.dtype == one and x.is_contiguous() and x.numel() > 0 for x in maps)


def pieces(
    shape: Sequence[int], dtype: torch.dtype, buffers: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Some rows of a table ``(R, N)`` at a time, with so many buffers of their size."""
    rows, width = shape
    quarter = max(-(-rows // 4), LEAST // max(1, width))
    step = max(1, min(rows, quarter, CHUNK // max(1, width)))
    room = torch.empty(buffers, step, width, dtype=dtype, device="cpu")
    for first in range(0, rows, step):
        piece = slice(first, min(first + step, rows))
        yield piece, list(room[:, : piece.stop - first])
