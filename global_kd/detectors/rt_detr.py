"""The encoder of RT-DETR and its kin as a dense head: scores and a box at every cell.

Before it chooses its queries, RT-DETR scores every cell of its encoder's maps and regresses a box
there (Zhao et al. 2024, "DETRs beat YOLOs on real-time object detection", section 4.3). Two of them
say something of the same cells, whatever their depth, width, and number of queries.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hooks import infer_strides
from ..ops.boxes import iou
from ..step import Dense, Grid
from ..targets import Targets
from .locations import beside, cells_of, rows_of
from .pixels import View
from .protocol import Sampled

KIND = "rt-detr encoder"
GIVES = frozenset({"positives", "dense", "boxes", "priors", "teacher_head"})
_MEMORY, _LOGITS, _OFFSETS = "encoder memory", "encoder logits", "encoder boxes"
_DENSE = frozenset({"positives", "dense", "boxes", "priors"})
_BOXES = frozenset({"positives", "boxes"})
_PER_BOX = 9  # locations that stand for a box, as many as a 3 x 3 neighbourhood has
_FIRST_SIDE = 0.05  # of an anchor on the finest level, in units of the image; doubles with each
_EDGE = 0.01  # anchors this near to 0 or 1 stand for nothing


class EncoderHead:
    """The modules ``enc_output``, ``enc_score_head`` and ``enc_bbox_head``.

    Args:
        owner: The module that has them.
        path: Its path in the detector.
        project: From the encoder's maps to the levels that the modules take.
        every_box: Whether the training forward regresses the boxes of all cells, and not only of
            those with the best scores.
    """

    def __init__(
        self,
        owner: Any,
        path: str,
        project: Callable[[Sequence[Tensor]], list[Tensor]],
        *,
        every_box: bool,
    ) -> None:
        self._owner, self._path, self._project = owner, path, project
        self._every_box = every_box

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        """Modules to record while a student trains."""
        if not facts & _DENSE:
            return {}
        taps = {_LOGITS: f"{self._path}.enc_score_head"}
        if facts & _BOXES and self._every_box:
            taps[_OFFSETS] = f"{self._path}.enc_bbox_head"
        elif facts & _BOXES:
            taps[_MEMORY] = f"{self._path}.enc_output"
        return taps

    def dense(
        self,
        maps: Sequence[Tensor],
        view: View,
        facts: frozenset[str],
        tapped: Mapping[str, Any] | None = None,
    ) -> Dense:
        """Of the encoder's maps.

        Boxes of cells whose anchor is not valid are finite and mean nothing: see ``Dense.valid``.
        """
        tapped = tapped or {}
        logits: Tensor
        if _LOGITS in tapped:
            logits, memory = tapped[_LOGITS], tapped.get(_MEMORY)
            grids = _grids([(x.shape[2], x.shape[3]) for x in maps], view.size, logits.shape[1])
            anchors, valid = _anchors(grids, maps[0])
        else:
            levels = self._project(maps)
            grids = _grids([(x.shape[2], x.shape[3]) for x in levels], view.size)
            anchors, valid = _anchors(grids, maps[0])
            memory = self._owner.enc_output(rows_of(levels) * valid[:, None])
            logits = self._owner.enc_score_head(memory)
        boxes = None
        if "boxes" in facts:
            offsets = tapped.get(_OFFSETS)
            if offsets is None:
                offsets = self._owner.enc_bbox_head(memory)
            relative = (offsets.to(anchors.dtype) + anchors.logit()).sigmoid()
            boxes = corners(relative, view.size)
        priors = cells_of(grids, maps[0]) if "priors" in facts else None
        return Dense(logits, grids, boxes=boxes, priors=priors, valid=valid)


def sample(dense: Dense, truth: Targets) -> Sampled:
    """The cells of a student's encoder that stand for each ground-truth box.

    Nine of each: those valid ones with their centre in the box whose decoded boxes have the highest
    IoU with it. Where fewer lie in it, the best of them counts several times, so that all boxes
    weigh the same; where none does, the valid one with the nearest centre stands in. A box of the
    encoder's own loss goes to the best-matching of its queries, which another detector does not
    have; these cells it does.

    Args:
        dense: With boxes.
        truth: In pixels of the same view.
    """
    assert dense.boxes is not None
    image, boxes = truth.image_index, truth.boxes.to(dense.boxes.dtype)
    cells = cells_of(dense.grids, dense.boxes)
    centre = (cells[:, :2] + cells[:, 2:]) / 2
    inside = ((centre > boxes[:, None, :2]) & (centre < boxes[:, None, 2:])).all(dim=2)
    away = (centre - (boxes[:, None, :2] + boxes[:, None, 2:]) / 2).square().sum(dim=2)
    rank = torch.where(inside, iou(boxes[:, None], dense.boxes.detach()[image]), -1 - away)
    if dense.valid is not None:
        valid = dense.valid if dense.valid.dim() == 1 else dense.valid[image]
        rank = rank.masked_fill(~valid, -torch.inf)
    best, location = rank.topk(min(_PER_BOX, rank.shape[1]), dim=1)
    location = torch.where(best >= 0, location, location[:, :1])
    count = location.shape[1]
    location, image = location.flatten(), image.repeat_interleave(count)
    box = torch.arange(len(boxes), device=image.device).repeat_interleave(count)
    return Sampled(dense.logits[image, location], box, raw=(image, location, dense.grids))


def soft_labels(dense: Dense, sampled: Sampled) -> tuple[Tensor, Tensor | None]:
    """A teacher's logits in the cells of :func:`sample`."""
    image, location, grids = sampled.raw
    location, rows = beside(grids, dense.grids, image, location, dense.valid)
    return dense.logits[image if rows is None else image[rows], location], rows


def _grids(
    sizes: list[tuple[int, int]], canvas: tuple[int, int], rows: int | None = None
) -> tuple[Grid, ...]:
    """Of the encoder's maps, and of further levels made of the last until there are ``rows`` cells.

    A further level has half its side; or all of it, where the projection is none.
    """
    missing = 0 if rows is None else rows - sum(height * width for height, width in sizes)
    if missing > 0:
        height, width = sizes[-1]
        if missing % (height * width):
            height, width = (height + 1) // 2, (width + 1) // 2
        sizes = [*sizes, *[(height, width)] * (missing // (height * width))]
    strides = infer_strides(canvas, sizes)
    return tuple(Grid(s, h, w) for s, (h, w) in zip(strides, sizes, strict=True))


def _anchors(grids: tuple[Grid, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and size ``(N, 4)`` in units of the image, and which are valid, bool ``(N,)``."""
    anchors = []
    for level, (grid, cells) in enumerate(
        zip(grids, cells_of(grids, like).split([g.rows for g in grids]), strict=True)
    ):
        x, y = ((cells[:, :2] + cells[:, 2:]) / 2 / grid.stride).unbind(dim=1)
        centre = torch.stack([x / grid.width, y / grid.height], dim=1)
        anchors.append(torch.cat([centre, torch.full_like(centre, _FIRST_SIDE * 2**level)], dim=1))
    together = torch.cat(anchors)
    valid = ((together > _EDGE) & (together < 1 - _EDGE)).all(dim=1)
    return together.clamp(1e-4, 1 - 1e-4), valid


def corners(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Two corners ``(..., 4)`` in pixels from centre, width and height in units of the image."""
    x, y, w, h = boxes.unbind(dim=-1)
    sides = [(x - w / 2) * size[1], (y - h / 2) * size[0]]
    return torch.stack([*sides, (x + w / 2) * size[1], (y + h / 2) * size[0]], dim=-1)
