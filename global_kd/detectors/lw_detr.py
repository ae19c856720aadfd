"""The proposals of LW-DETR, RF-DETR and the two-stage Deformable DETR as a dense head.

They choose their queries from the cells that padding leaves out, by scores and a box at each (Zhu
et al. 2021, "Deformable DETR", appendix A.4). In training of LW-DETR and RF-DETR several groups of
queries choose for themselves; the first is the one that is left in use.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..hooks import infer_strides
from ..step import Dense, Grid
from .locations import cells_of, rows_of
from .pixels import View

KIND = "lw-detr encoder"
_MEMORY = "encoder memory"
_DENSE = frozenset({"positives", "dense", "boxes", "priors"})
_FIRST_SIDE, _EDGE = 0.05, 0.01  # as in RT-DETR


class ProposalHead:
    """The first of ``enc_output``, ``enc_output_norm``, ``enc_out_class_embed``, and so on.

    Args:
        owner: The module that has them.
        path: Its path in the detector.
    """

    norm = "enc_output_norm.0"
    """The module whose output is scored."""

    def __init__(self, owner: Any, path: str) -> None:
        self._owner, self._path = owner, path

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        """Modules to record while a student trains."""
        return {_MEMORY: f"{self._path}.{self.norm}"} if facts & _DENSE else {}

    def dense(
        self,
        maps: Sequence[Tensor],
        view: View,
        facts: frozenset[str],
        tapped: Mapping[str, Any] | None = None,
    ) -> Dense:
        """Of the projector's maps. Boxes are relative to the images without their padding."""
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        strides = infer_strides(view.size, sizes)
        grids = tuple(Grid(s, h, w) for s, (h, w) in zip(strides, sizes, strict=True))
        anchors, valid = _anchors(grids, view, maps[0])
        memory = (tapped or {}).get(_MEMORY)
        if memory is None:
            rows = rows_of(maps).masked_fill(~valid[:, :, None], 0)
            memory = self._memory(rows)
        boxes = None
        if "boxes" in facts:
            centre, half = self._regressed(memory, anchors)
            sides = view.extents().to(anchors.dtype)
            boxes = torch.cat([centre - half, centre + half], dim=2)
            boxes = boxes * sides.flip(1).repeat(1, 2)[:, None]
        priors = cells_of(grids, maps[0]) if "priors" in facts else None
        return Dense(self._logits(memory), grids, boxes=boxes, priors=priors, valid=valid)

    def _memory(self, rows: Tensor) -> Tensor:
        memory: Tensor = self._owner.enc_output_norm[0](self._owner.enc_output[0](rows))
        return memory

    def _logits(self, memory: Tensor) -> Tensor:
        logits: Tensor = self._owner.enc_out_class_embed[0](memory)
        return logits

    def _regressed(self, memory: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Centres and half sides ``(B, N, 2)`` in units of the images."""
        deltas = self._owner.enc_out_bbox_embed[0](memory).to(anchors.dtype)
        centre = deltas[..., :2] * anchors[..., 2:] + anchors[..., :2]
        return centre, deltas[..., 2:].exp() * anchors[..., 2:] / 2


class TwoStageHead(ProposalHead):
    """That of a two-stage Deformable DETR: how much a cell looks like any object, and its box.

    The last of the decoder's heads speaks of the cells. They are ranked by its first column alone,
    which stands for all classes.
    """

    norm = "enc_output_norm"

    def _memory(self, rows: Tensor) -> Tensor:
        memory: Tensor = self._owner.enc_output_norm(self._owner.enc_output(rows))
        return memory

    def _logits(self, memory: Tensor) -> Tensor:
        logits: Tensor = self._owner.decoder.class_embed[-1](memory)
        return logits[..., :1]

    def _regressed(self, memory: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        offsets = self._owner.decoder.bbox_embed[-1](memory).to(anchors.dtype)
        boxes = (offsets + anchors.clamp(_EDGE, 1 - _EDGE).logit()).sigmoid()
        return boxes[..., :2], boxes[..., 2:] / 2


def _anchors(grids: tuple[Grid, ...], view: View, like: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and size ``(B, N, 4)`` in units of the images, 0 where not valid; bool ``(B, N)``."""
    inside = view.inside()
    if inside is None:
        inside = like.new_ones((len(like), *view.size), dtype=torch.bool)
    dtype = torch.promote_types(like.dtype, torch.float32)
    anchors, masks = [], []
    for level, (grid, cells) in enumerate(
        zip(grids, cells_of(grids, like).split([g.rows for g in grids]), strict=True)
    ):
        size = grid.height, grid.width
        mask = functional.interpolate(inside[None].to(dtype), size=size)[0] > 0
        extent = torch.stack([mask[:, 0].sum(dim=1), mask[:, :, 0].sum(dim=1)], dim=1)
        centre = (cells[:, :2] + cells[:, 2:]) / 2 / grid.stride / extent[:, None].to(dtype)
        side = torch.full_like(centre, _FIRST_SIDE * 2**level)
        anchors.append(torch.cat([centre, side], dim=2))
        masks.append(mask.flatten(1))
    together = torch.cat(anchors, dim=1)
    valid = ((together > _EDGE) & (together < 1 - _EDGE)).all(dim=2) & torch.cat(masks, dim=1)
    return together.masked_fill(~valid[:, :, None], 0), valid
