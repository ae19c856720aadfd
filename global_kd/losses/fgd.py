"""FGD: focal and global knowledge (Yang et al., CVPR 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import _check
from ..ops.attention import attended_errors, attended_mean, strengths
from ..ops.cells import box_cells
from ..ops.imitation import paint_boxes
from ..ops.precision import accumulate
from ..pyramid import seeded
from ..step import Step
from .base import Common, DistillLoss, Levels, applied

if TYPE_CHECKING:
    from typing_extensions import Unpack


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    stride: float,
    weights: Tensor | None = None,
    *,
    temperature: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Squared error in and around the boxes under the teacher's attention; error of attention.

    .. math:: L_{fg} = \frac1B \sum M A^S_t A^C_t (s - t)^2,\quad
              L_{bg} = \frac1B \sum \frac{1[M = 0]}{N_{bg}} A^S_t A^C_t (s - t)^2,\quad
              L_{att} = \frac1B \sum |A^S_t - A^S_s| + \frac1B \sum |A^C_t - A^C_s|

    ``A^S = HW softmax_yx(mean_c |F| / T)``, ``A^C = C softmax_c(mean_yx |F| / T)``; ``M`` is 1 over
    the number of cells of the smallest box on a cell, 0 outside boxes; ``N_bg`` counts the cells
    outside boxes of an image (Yang et al. 2022, Eq. 3 to 8; sums over cells and channels, as
    released).

    Args:
        student: Map ``(B, C, H, W)``, adapted.
        teacher: Map of the same shape; gets no gradient.
        boxes: ``(R, 4)`` xyxy in pixels of the padded network input. A box covers every cell it
            touches and at least one.
        image_index: int64 ``(R,)``, the image of each box, in ``[0, B)``.
        stride: Pixels of the network input per cell of this level.
        weights: ``(R,)`` >= 0, usually robust weights: factors of each box's share of ``M``, of
            which a cell takes the largest. They make no background.
        temperature: Of the attention, > 0.

    Returns:
        Three scalars, foreground, background and attention, in at least float32. Without boxes the
        first is a zero that still back-propagates.

    Example:
        >>> import torch
        >>> from global_kd.functional import fgd_loss
        >>> student, teacher = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
        >>> box, image = torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.tensor([0])
        >>> [x.item() for x in fgd_loss(student, teacher, box, image, stride=8)]
        [2.0, 2.0, 0.0]
    """
    _check.same_maps(student, teacher)
    _check.boxes(boxes, image_index)
    _check.positive("stride", stride)
    _check.positive("temperature", temperature)
    _check.same_device(student=student, boxes=boxes, image_index=image_index, weights=weights)
    if weights is not None:
        _check.tensor("weights", weights, 1, "(R,)")
        _check.length("weights", weights, boxes.shape[0])
        weights = weights.detach()
    return _errors(student, teacher, boxes, image_index, stride, weights, temperature)[:3]


def _errors(
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    stride: float,
    weights: Tensor | None,
    temperature: float,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of :func:`fgd_loss`, and ``1 / B sum (s - t + shift)^2`` with a shift ``(B, C)``."""
    batch, _, height, width = student.shape
    images = max(batch, 1)
    where_t, what_t = _attention(*strengths(teacher.detach()), temperature)
    where, what, squares, error = attended_errors(student, teacher, what_t, shift)
    where_s, what_s = _attention(where, what, temperature)
    attention = (where_t - where_s).abs().sum() + (what_t - what_s).abs().sum()
    squares = squares * where_t
    size, cells = (batch, height, width), box_cells(boxes.detach(), stride, height, width)
    foreground, background = _masks(cells, image_index, size, weights, squares.dtype)
    return (
        (squares * foreground).sum() / images,
        (squares * background).sum() / images,
        attention / images,
        error / images,
    )


def _attention(where: Tensor, what: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of cells ``(B, H, W)``, and of channels ``(B, C)``; each averages 1."""
    cells = (where.flatten(1) / temperature).softmax(dim=1) * where[:1].numel()
    return cells.view_as(where), (what / temperature).softmax(dim=1) * what.shape[1]


def _masks(
    cells: Tensor,
    image_index: Tensor,
    size: tuple[int, int, int],
    weights: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What the squared error of each cell counts as foreground and as background."""
    sides = (cells[:, 2:] - cells[:, :2]).to(dtype)
    share = sides.prod(dim=1).reciprocal()
    member = foreground = paint_boxes(share, cells, image_index, size)
    if weights is not None:  # a box without weight is no background
        foreground = paint_boxes(share * weights.to(dtype), cells, image_index, size)
    outside = (member == 0).to(dtype)
    return foreground, outside / outside.sum(dim=(1, 2), keepdim=True).clamp(min=1)


class GlobalContext(nn.Module):
    r"""A global context block (Cao et al. 2019): what all cells say together, added to each.

    .. math:: R(F) = F + W_2 \operatorname{ReLU}(\operatorname{LN}(W_1 \textstyle\sum_j a_j F_j)),
              \qquad a = \operatorname{softmax}_j(w F_j)

    with ``C / 2`` hidden channels; the module gives what is added. Its last layer begins at 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.key = nn.Conv2d(channels, 1, 1)
        nn.init.kaiming_normal_(self.key.weight, nonlinearity="relu")
        nn.init.zeros_(self.key.bias)  # type: ignore[arg-type]
        self.first = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.last = nn.Linear(hidden, channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to each cell of a map ``(B, C, H, W)``: ``(B, C)``."""
        x = accumulate(x)
        key, bias = (p.flatten().to(x.dtype) for p in self.key.parameters())
        context = attended_mean(x, key, bias)
        hidden = self.norm(self.first(context.to(self.first.weight.dtype))).relu()
        return accumulate(self.last(hidden))


class FGD(DistillLoss):
    r"""Imitate objects, their surroundings and the relation of all cells, each by its own weight.

    "Focal and Global Knowledge Distillation for Detectors", CVPR 2022. The focal terms,
    :func:`global_kd.functional.fgd_loss`, weigh every object alike, whatever its size, and by the
    teacher's attention; the global term compares both maps after a trained global context block on
    each side. It needs ground-truth boxes, and serves any two detectors.

    .. math:: L = \alpha L_{fg} + \beta L_{bg} + \gamma L_{att}
              + \frac{\lambda}{B} \sum (R_t(T) - R_s(\varphi(S)))^2

    summed over levels. Sums run over cells and channels, as released: the weights fit maps of about
    800 x 1333 pixels and 256 channels. As released, both blocks are trained, the teacher's, too:
    their parameters belong into the optimizer.

    Changed from the released code: boxes are counted in cells of the padded input (there they are
    stretched where an image is smaller than its batch) and end with their last cell (there one
    later); no loop over boxes; robust weights weigh each box's share of the foreground.

    Args:
        foreground: α. Default 5e-5 for two-stage detectors, 1e-3 for others.
        background: β. Default 2.5e-5, or 5e-4.
        attention: γ. Default 5e-5, or 5e-4 (the released RetinaNet; 1e-3 in print).
        relation: λ. Default 5e-7, or 5e-6.
        temperature: Of the attention, > 0.
        **common: See :class:`global_kd.losses.DistillLoss`. The paper distils
            ``levels=(4, 8, 16, 32)`` for Faster R-CNN, all five for others. For FCOS and RepPoints
            it takes (1.6e-3, 8e-4, 8e-4, 8e-6), for FCOS with temperature 0.8.
    """

    name = "fgd"
    needs = frozenset({"targets"})
    student_context: nn.ModuleList
    teacher_context: nn.ModuleList

    def __init__(
        self,
        *,
        foreground: float | None = None,
        background: float | None = None,
        attention: float | None = None,
        relation: float | None = None,
        temperature: float = 0.5,
        **common: Unpack[Common],
    ) -> None:
        _check.positive("temperature", temperature)
        self.temperature = temperature
        weights = {
            "foreground": foreground,
            "background": background,
            "attention": attention,
            "relation": relation,
        }
        usual = {
            "two-stage": dict(zip(weights, (5e-5, 2.5e-5, 5e-5, 5e-7), strict=True)),
            "one-stage": dict(zip(weights, (1e-3, 5e-4, 5e-4, 5e-6), strict=True)),
        }
        super().__init__(weights, usual, **common)

    def make(self, levels: Levels) -> None:
        with seeded(self.seed + 1):
            self.student_context, self.teacher_context = (
                nn.ModuleList(GlobalContext(c) for c in levels.teacher_channels) for _ in range(2)
            )

    def terms(self, step: Step) -> dict[str, Tensor]:
        assert step.targets is not None
        found: dict[str, list[Tensor]] = {part: [] for part in self.parts if self.wants(part)}
        where = step.targets.boxes, step.targets.image_index
        weights = self.box_weights(step)
        maps = zip(self.adapted(step), step.teacher, step.strides, strict=True)
        for level, (s, t, stride) in enumerate(maps):
            shift = None
            if "relation" in found:
                shift = applied(self.student_context[level], s)
                shift = shift - applied(self.teacher_context[level], t)
            mine = None if weights is None else weights[level]
            errors = _errors(s, t, *where, stride, mine, self.temperature, shift)
            for part, values in found.items():
                values.append(errors[self.parts.index(part)])
        return {part: torch.stack(values).sum() for part, values in found.items()}
