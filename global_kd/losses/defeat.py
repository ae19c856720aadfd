"""DeFeat: objects and background imitated apart (Guo et al., CVPR 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _check
from ..instances import assign_levels
from ..ops.imitation import imitation
from ..ops.logits import divergences
from ..pyramid import start_small
from ..step import Regions, Step
from .base import Common, DistillLoss, Levels
from .imitation import NORMALIZERS

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DeFeat(DistillLoss):
    r"""Imitate objects and background apart, in the feature maps and in the box head.

    "Distilling Object Detectors via Decoupled Features", CVPR 2021. On each level, with ``M`` = 1
    on the cells of the boxes that lie on it by their size,

    .. math:: L = \frac{\alpha_{fg}}{2 C N_{fg}} \sum M d^2
              + \frac{\alpha_{bg}}{2 C N_{bg}} \sum (1 - M) d^2

    and the mean over levels: :func:`global_kd.functional.imitation_loss` on ground truth. It needs
    ground truth. In two-stage detectors both box heads also look at the teacher's proposals:

    .. math:: L = \frac{\beta_{fg}}{K_{fg}} \sum_{fg} T_{fg}^2 \mathrm{KL}(t \| s)
              + \frac{\beta_{bg}}{K_{bg}} \sum_{bg} T_{bg}^2 \mathrm{KL}(t \| s)

    where they can be had, or, with a weight that is given, always (fact ``teacher_regions``). The
    paper's ablation there: objects alone 38.1 AP, background alone 38.6, together 38.2, apart 38.9.

    Changed from the released code: boxes cover the cells they touch; ignored proposals belong to
    neither side (there the background was the largest label of a batch); an empty side is 0. The
    released configuration leaves the box head's part out: set both its weights to 0. The variant on
    the backbone is another ``DeFeat`` on a pyramid of its stages.

    With robust weights it is the local knowledge of Tang et al. 2022 with other factors.

    Args:
        foreground: Weight on the boxes. Default 3, with ``C`` in the normaliser as released; the
            paper seems to leave it out.
        background: Weight outside of them. Default 12.
        classes_foreground: Weight on proposals of objects. Default 2.
        classes_background: Weight on other proposals. Default 2.
        temperature: ``T``, on objects and on the background. Default 1 and 1.
        small_start: Adapters begin near 0, as released.
        normalizer: Of the foreground under robust weights: ``"weights"`` or ``"cells"``.
        **common: See :class:`global_kd.losses.DistillLoss`. As released, ``adapter="conv3x3"``; its
            optional decays are ``schedule=Schedule("linear")`` and ``Schedule("cosine")``.
    """

    name = "defeat"
    needs = frozenset({"targets"})

    def __init__(
        self,
        *,
        foreground: float | None = None,
        background: float | None = None,
        classes_foreground: float | None = None,
        classes_background: float | None = None,
        temperature: tuple[float, float] = (1.0, 1.0),
        small_start: bool = False,
        normalizer: str = "weights",
        **common: Unpack[Common],
    ) -> None:
        for value in temperature:
            _check.positive("temperature", value)
        _check.one_of("normalizer", normalizer, NORMALIZERS)
        self.temperature, self.small_start, self.normalizer = temperature, small_start, normalizer
        head = classes_foreground, classes_background
        if any(head):
            self.needs = self.needs | {"teacher_regions"}
        elif None in head:
            self.wishes = frozenset({"teacher_regions"})
        usual = {"foreground": 3.0, "background": 12.0}
        usual |= dict.fromkeys(("classes_foreground", "classes_background"), 2.0)
        common.setdefault("adapter", "conv3x3")
        weights = {"foreground": foreground, "background": background}
        weights |= {"classes_foreground": head[0], "classes_background": head[1]}
        super().__init__(weights, {"one-stage": usual}, **common)

    @property
    def adapts(self) -> bool:
        return self.wants("foreground") or self.wants("background")

    def make(self, levels: Levels) -> None:
        if self.small_start:
            start_small(self.adapters, self.seed)

    def terms(self, step: Step) -> dict[str, Tensor]:
        terms = self._imitate(step) if self.adapts else {}
        if step.teacher_regions is not None:
            terms |= self._follow(step, step.teacher_regions)
        return terms

    def _imitate(self, step: Step) -> dict[str, Tensor]:
        assert step.targets is not None
        boxes, index = step.targets.boxes.detach(), step.targets.image_index
        weights, own = self.box_weights(step), assign_levels(boxes, step.strides)
        found = []
        maps = zip(self.adapted(step), step.teacher, step.strides, strict=True)
        for level, (s, t, stride) in enumerate(maps):
            mine = None if weights is None else weights[level]
            pair = imitation(s, t, boxes, index, stride, mine, self.normalizer, own == level)
            found.append(torch.stack(pair))
        foreground, background = torch.stack(found).mean(dim=0)
        return {"foreground": foreground, "background": background}

    def _follow(self, step: Step, regions: Regions) -> dict[str, Tensor]:
        """The box heads' part: rows of objects, rows of background, the ignored in neither."""
        sides = {"foreground": regions.box >= 0, "background": regions.box == -1}
        weights = self.row_weights(step, regions.box)
        terms = {}
        for (side, rows), temperature in zip(sides.items(), self.temperature, strict=True):
            if not self.wants(f"classes_{side}"):
                continue
            logits = regions.student.logits, regions.teacher.logits
            each = divergences(*logits, temperature, regions.student.activation)
            mine = rows.to(each.dtype)
            share = temperature**2 * mine / mine.sum().clamp(min=1)
            if weights is not None:
                share = share * weights
            terms[f"classes_{side}"] = (share * each).sum()
        return terms
