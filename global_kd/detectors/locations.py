"""Locations of dense heads: maps as rows, their cells, and the rows of another head beside them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..step import Grid, shared_locations


def rows_of(maps: Sequence[Tensor]) -> Tensor:
    """Maps ``(B, C, H, W)`` as rows ``(B, N, C)``: level by level, row by row of cells."""
    return torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


def cells_of(grids: Sequence[Grid], like: Tensor) -> Tensor:
    """The cells ``(N, 4)`` of heads with one anchor a cell, xyxy in pixels of the network input.

    In at least float32, on the device of ``like``.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    cells = []
    for grid in grids:
        y = torch.arange(grid.height, device=like.device, dtype=dtype)
        x = torch.arange(grid.width, device=like.device, dtype=dtype)
        corner = torch.stack([x.expand(grid.height, -1), y[:, None].expand(-1, grid.width)], dim=2)
        cells.append(torch.cat([corner, corner + 1], dim=2).view(-1, 4) * grid.stride)
    return torch.cat(cells)


def beside(
    student: tuple[Grid, ...],
    teacher: tuple[Grid, ...],
    image: Tensor,
    location: Tensor,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The teacher's rows at the places of the student's.

    Levels belong together by stride, and cells count from the top left: a teacher may be padded to
    other multiples.

    Args:
        student: Levels of the student's head.
        teacher: Of the teacher's.
        image: int64 ``(M,)``.
        location: int64 ``(M,)``, of the student's.
        valid: bool ``(N,)`` or ``(B, N)``, whether the teacher's locations stand for something.

    Returns:
        Locations of the teacher's, int64 ``(P,)``, and which ``P`` of the ``M`` they belong to,
        int64; ``None``: all.

    Raises:
        ValueError: No level of equal stride.
    """
    if student == teacher:
        return location, None
    mine, theirs, grids = shared_locations(student, teacher, image.device)
    count = sum(grid.rows for grid in (grids if theirs is None else teacher))
    if theirs is None:
        theirs = torch.arange(count, device=image.device)
    if mine is None and valid is None:
        return theirs[location], None
    partner = theirs if mine is None else theirs.new_full((sum(g.rows for g in student),), -1)
    if mine is not None:
        partner[mine] = theirs
    found = partner[location]
    known = found >= 0
    if valid is not None:
        at = found.clamp(min=0)
        known = known & (valid[at] if valid.dim() == 1 else valid[image, at])
    rows = known.nonzero()[:, 0]
    return found[rows], rows
