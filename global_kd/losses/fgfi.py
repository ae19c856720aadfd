"""FGFI: imitation where anchors come near an object (Wang et al., CVPR 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import _check
from ..instances import assign_levels
from ..ops.imitation import masked_error, paint_values
from ..ops.precision import accumulate
from ..pyramid import start_small
from ..step import Step
from .base import Common, DistillLoss, Levels

if TYPE_CHECKING:
    from typing_extensions import Unpack

NORMALIZERS = ("cells", "channels")
JOINT = ("level", "levels")


def anchor_mask(
    anchors: Tensor, boxes: Tensor, image_index: Tensor, batch: int, *, threshold: float = 0.5
) -> Tensor:
    r"""The cells with an anchor that overlaps a box nearly as well as the best anchor does.

    .. math:: I_{yx} = \bigvee_k \bigvee_a
              \bigl[\mathrm{IoU}_{k,yxa} > \psi \max_{y'x'a'} \mathrm{IoU}_{k,y'x'a'}\bigr]

    (Wang et al. 2019, section 3.1). A box that no anchor touches marks nothing.

    Args:
        anchors: ``(H, W, A, 4)`` xyxy of one level, in the pixels of the boxes.
        boxes: ``(R, 4)`` xyxy.
        image_index: int64 ``(R,)``, the image of each box, in ``[0, B)``.
        batch: ``B``.
        threshold: psi in [0, 1]. The larger, the fewer cells; 1 leaves none.

    Returns:
        bool ``(B, H, W)``.

    Example:
        >>> import torch
        >>> from global_kd.functional import anchor_mask
        >>> anchors = torch.tensor([[0.0, 0, 8, 8], [4, 0, 12, 8], [8, 0, 16, 8]]).view(1, 3, 1, 4)
        >>> box, image = torch.tensor([[0.0, 0.0, 9.0, 8.0]]), torch.tensor([0])
        >>> anchor_mask(anchors, box, image, 1)  # IoU 0.89, 0.42, 0.06
        tensor([[[ True, False, False]]])
    """
    _check.tensor("anchors", anchors, 4, "(H, W, A, 4)")
    _check.length("anchors", anchors, 4)
    _check.boxes(boxes, image_index)
    _check_threshold(threshold)
    _check.same_device(anchors=anchors, boxes=boxes, image_index=image_index)
    members = _members(anchors, boxes, threshold * _best(anchors, boxes))
    return paint_values(members.float(), image_index, batch) > 0


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], but got {threshold!r}")


def _overlaps(anchors: Tensor, boxes: Tensor) -> Tensor:
    """IoU ``(R, N)`` of boxes ``(R, 4)`` and anchors ``(N, 4)``."""
    boxes = accumulate(boxes.detach())
    x1, y1, x2, y2 = boxes[:, :, None].unbind(dim=1)
    left, top, right, bottom = anchors.detach().to(boxes.dtype).unbind(dim=1)
    width = (x2.minimum(right) - x1.maximum(left)).clamp(min=0)
    shared = width * (y2.minimum(bottom) - y1.maximum(top)).clamp(min=0)
    union = (x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - shared
    return torch.where(shared > 0, shared / union, 0)


# One anchor of each cell at a time: with all of them a batch's overlaps would outgrow its maps.


def _best(anchors: Tensor, boxes: Tensor) -> Tensor:
    """The largest overlap of each box, ``(R,)``."""
    each = [_overlaps(x.flatten(0, 1), boxes).amax(dim=1) for x in anchors.unbind(dim=2)]
    return torch.stack(each).amax(dim=0)


def _members(anchors: Tensor, boxes: Tensor, limit: Tensor) -> Tensor:
    """Which cells have an anchor that overlaps more than the limit ``(R,)``: bool ``(R, H, W)``."""
    height, width, count, _ = anchors.shape
    near = torch.zeros(len(boxes), height * width, dtype=torch.bool, device=boxes.device)
    for a in range(count):
        near = near | (_overlaps(anchors[:, :, a].flatten(0, 1), boxes) > limit[:, None])
    return near.view(len(boxes), height, width)


class FGFI(DistillLoss):
    r"""Imitate the teacher's features near objects, as the detector's own anchors see them.

    "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019. On each level

    .. math:: L = \frac{1}{2 N_p C} \sum I \sum_c d^2, \qquad N_p = \sum I

    with ``I`` of :func:`global_kd.functional.anchor_mask`; the mean over levels. It needs ground
    truth and the student's anchors; heads without anchors give their cells. A level that the
    head lacks contributes nothing.

    The paper has one map. For pyramids the settings are those of the re-implementation in
    DeFeat's repository (third-hand): a box counts on one level, by its size, weight 3, ``C`` in
    the normaliser, and no ReLU behind the adapter. The paper's single map is ``FGFI(weight=0.01,
    normalizer="cells", small_start=True, relu=True, delay=400)``.

    Changed from the released code: areas without the +1 pixel; a batch without any cell gives 0,
    not NaN; at ``threshold=0`` cells that no anchor links to a box stay out. Robust weights lower
    the numerator only; where boxes share a cell, the largest counts.

    Args:
        weight: Default 3.
        threshold: psi, the share of a box's best overlap that makes a cell imitate.
        joint: The best overlap is sought among the anchors of the box's own ``"level"``, and the
            box counts there only (default; so says the first author for pyramids); or of all
            ``"levels"``, and the overlaps choose the levels.
        normalizer: ``"channels"`` as above, or ``"cells"`` (paper): without ``C``.
        delay: Training calls before imitation starts.
        small_start: Adapters begin near 0, as released.
        relu: Adapters end in a ReLU, as released, for maps that do, too.
        **common: See :class:`global_kd.losses.DistillLoss`. As released, ``adapter="conv3x3"``.
    """

    name = "fgfi"
    needs = frozenset({"targets", "priors"})

    def __init__(
        self,
        *,
        weight: float | None = None,
        threshold: float = 0.5,
        joint: str = "level",
        normalizer: str = "channels",
        delay: int = 0,
        small_start: bool = False,
        relu: bool = False,
        **common: Unpack[Common],
    ) -> None:
        _check_threshold(threshold)
        _check.one_of("joint", joint, JOINT)
        _check.one_of("normalizer", normalizer, NORMALIZERS)
        _check.not_negative("delay", delay)
        self.threshold, self.joint, self.normalizer = threshold, joint, normalizer
        self.delay, self.small_start, self.relu = delay, small_start, relu
        common.setdefault("adapter", "conv3x3")
        super().__init__({"": weight}, {"one-stage": {"": 3.0}}, **common)

    def make(self, levels: Levels) -> None:
        if self.small_start:
            start_small(self.adapters, self.seed)
        if self.relu:
            self.adapters = nn.ModuleList(nn.Sequential(x, nn.ReLU()) for x in self.adapters)

    def factor(self, name: str) -> float:
        return super().factor(name) if self.step >= self.delay else 0.0

    def terms(self, step: Step) -> dict[str, Tensor]:
        assert step.targets is not None
        boxes = step.targets.boxes
        anchors = self._anchors(step)
        best = [None if x is None else _best(x, boxes) for x in anchors]
        if self.joint == "levels":
            top = torch.stack([x for x in best if x is not None]).amax(dim=0)
            best = [None if x is None else top for x in best]
        own = assign_levels(boxes, step.strides)
        errors = []
        for level, student in enumerate(self.adapted(step)):
            here, limit = anchors[level], best[level]
            if here is None or limit is None:
                errors.append(accumulate(student[:0]).sum())  # keeps the adapter in the graph
                continue
            members = _members(here, boxes, self.threshold * limit)
            if self.joint == "level":
                members = members & (own == level)[:, None, None]
            errors.append(self._error(step, level, student, members))
        return {"": torch.stack(errors).mean()}

    def _error(self, step: Step, level: int, student: Tensor, members: Tensor) -> Tensor:
        assert step.targets is not None
        batch, channels = student.shape[:2]
        index, weights = step.targets.image_index, self.box_weights(step)
        values = members.to(torch.promote_types(student.dtype, torch.float32))
        mask = paint_values(values, index, batch)
        count = mask.sum().clamp(min=1) * (channels if self.normalizer == "channels" else 1)
        if weights is not None:
            values = values * weights[level].to(values.dtype)[:, None, None]
            mask = paint_values(values, index, batch)
        return masked_error(student, step.teacher[level], mask / (2 * count))

    def _anchors(self, step: Step) -> list[Tensor | None]:
        """Of each level ``(H, W, A, 4)``; ``None``: the head has no such level."""
        head = step.student_head
        assert head is not None
        sizes = [(x.shape[2], x.shape[3]) for x in step.teacher]
        found = [head.prior_map(s, size) for s, size in zip(step.strides, sizes, strict=True)]
        if all(x is None for x in found):
            raise ValueError(
                f"student_dense: expected anchors at stride {list(step.strides)}, but got "
                f"{[grid.stride for grid in head.grids]}; pass levels=... that the head has, or a "
                "method that needs no anchors, such as DeFeat"
            )
        return found
