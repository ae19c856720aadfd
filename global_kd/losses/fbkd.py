"""FBKD: attention and non-local relations (Zhang and Ma, ICLR 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import _check
from ..ops.precision import accumulate
from ..pyramid import seeded
from ..step import Step
from .base import Common, DistillLoss, Levels, applied

if TYPE_CHECKING:
    from typing_extensions import Unpack


def attention_guided_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 0.5,
    channels: bool = True,
) -> Tensor:
    r"""Length of the difference of two maps under the attention of both.

    .. math:: L = \Bigl(\sum_{b,c,y,x} M^S_{byx} M^C_{bc} (s - t)^2\Bigr)^{1/2},\quad
              M^S = \tfrac{HW}{2} \sum_{F \in \{s, t\}}
              \operatorname{softmax}_{yx}(\operatorname{mean}_c |F| / T)

    and ``M^C`` likewise over the channels, of ``mean_yx |F|`` (Zhang and Ma 2021, as released). The
    masks get no gradient. The gradient of equal maps is 0.

    Args:
        student: Map ``(B, C, H, W)``, adapted.
        teacher: Map of the same shape; gets no gradient.
        weights: Of the squares of cells, ``(B, H, W)`` >= 0.
        temperature: > 0.
        channels: Whether there is ``M^C``; else it is 1.

    Returns:
        Scalar in at least float32.

    Example:
        >>> import torch
        >>> from global_kd.functional import attention_guided_loss
        >>> attention_guided_loss(torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)).item()
        4.0
    """
    _check.same_maps(student, teacher)
    _check.positive("temperature", temperature)
    if weights is not None:
        _check.shape("weights", weights, (student.shape[0], *student.shape[2:]))
    return _length(_masked_squares(student, teacher, weights, temperature, channels))


def _masked_squares(
    student: Tensor, teacher: Tensor, weights: Tensor | None, temperature: float, channels: bool
) -> Tensor:
    """The sums under the root, of each image: ``(B,)``."""
    student, teacher = accumulate(student), accumulate(teacher.detach())
    with torch.no_grad():
        (where_s, what_s), (where_t, what_t) = (
            _attention(x, temperature) for x in (student, teacher)
        )
        where = (where_s + where_t) / 2
        if weights is not None:
            where = where * weights
    squares = (student - teacher).square()
    if channels:
        squares = squares * ((what_s + what_t) / 2)[:, :, None, None]
    return (squares.sum(dim=1) * where).sum(dim=(1, 2))


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    _, channels, height, width = x.shape
    strength = x.abs()
    where = (strength.mean(dim=1).flatten(1) / temperature).softmax(dim=1)
    what = (strength.mean(dim=(2, 3)) / temperature).softmax(dim=1)
    return where.unflatten(1, (height, width)) * (height * width), what * channels


def _length(squares: Tensor, per_image: bool = False) -> Tensor:
    """Root of a sum over images ``(B,)``, or the mean of their roots; the gradient at 0 is 0."""
    if not per_image:
        squares = squares.sum()[None]
    nothing = squares <= 0
    roots = torch.where(nothing, 1.0, squares).sqrt()
    # Times 0, not a constant: a zero must still back-propagate.
    return torch.where(nothing, squares * 0, roots).sum() / max(len(squares), 1)


def _squares(difference: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums of squares of each image; weights ``(B, H, W)``."""
    squares = accumulate(difference).square()
    return (squares if weights is None else squares * weights[:, None]).flatten(1).sum(dim=1)


class NonLocal(nn.Module):
    r"""A non-local block (Wang et al. 2018): to each cell, what all others say, by their likeness.

    .. math:: r(F)_i = F_i + \operatorname{BN}\Bigl(W \frac1N \sum_j
              (\theta F_i \cdot \phi F_j)\, g F_j\Bigr)

    with keys ``φ`` and values ``g`` max-pooled to ``N`` cells. Without a softmax the sum can be
    taken first: ``θ F_i`` times one matrix of ``hidden x hidden``, the same result without the
    ``HW x N`` affinities. The normalisation begins at 0: the block gives its input back.

    Args:
        channels: Of the map.
        hidden: Of keys, queries and values.
        pool: Cells on a side that a key stands for; a rest at the border counts, too.
    """

    def __init__(self, channels: int, hidden: int, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.query, self.key, self.value = (nn.Conv2d(channels, hidden, 1) for _ in range(3))
        self.out = nn.Conv2d(hidden, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        query = accumulate(self.query(x)).flatten(2)
        key, value = (
            accumulate(functional.max_pool2d(f(x), self.pool, ceil_mode=True)).flatten(2)
            for f in (self.key, self.value)
        )
        with torch.autocast(x.device.type, enabled=False):
            # Divided first: halves were left behind, but a large map sums many products.
            mixed = value @ (key / key.shape[2]).transpose(1, 2)
            said = (mixed @ query).unflatten(2, x.shape[2:])
        said = self.out(said.to(self.out.weight.dtype))
        return accumulate(x) + accumulate(self._normalised(said))

    def _normalised(self, x: Tensor) -> Tensor:
        # A single value of a channel has no variance: the running statistics stand in.
        if self.training and x.numel() > x.shape[1]:
            return self.norm(x)  # type: ignore[no-any-return]
        n = self.norm
        return functional.batch_norm(
            x, n.running_mean, n.running_var, n.weight, n.bias, training=False, eps=n.eps
        )


class FBKD(DistillLoss):
    r"""Imitate maps under the attention of both detectors, their attention, and their relations.

    "Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and
    Efficient Detectors", ICLR 2021. It needs maps only, and serves any two detectors. Sum over
    levels of

    .. math:: L_{features} &= \text{attention\_guided\_loss}(\varphi(S), T) \\
              L_{channels} &= \lVert \operatorname{mean}_{yx} T
                              - \operatorname{Lin}(\operatorname{mean}_{yx} S) \rVert_2 \\
              L_{cells} &= \lVert \operatorname{mean}_c T
                           - \operatorname{Conv}_{3 \times 3}(\operatorname{mean}_c S) \rVert_2 \\
              L_{relation} &= \lVert r_t(T) - \operatorname{Conv}_{1 \times 1}(r_s(S)) \rVert_2

    with non-local blocks ``r``, both trained, the teacher's, too. All their parameters belong into
    the optimizer.

    Defaults and masks are those of the released code, whose two masks are an average of two
    softmaxes where the paper takes one of the sum. It takes no mask of channels for two-stage
    detectors. Changed: roots whose gradient at 0 is 0 (there NaN); the blocks never make the
    matrix of affinities; a rest of cells at the border is pooled, too. Robust weights weigh the
    squares of cells; the term ``channels`` has none.

    Args:
        features: Weight. Default 7e-5 for two-stage detectors, 4.2e-4 for others.
        channels: Default 4e-3, or 2.4e-2.
        cells: Default 4e-3, or 2.4e-2.
        relation: Default 7e-5, or 4.2e-4.
        temperature: Of the attention. ``None``: 0.5 for two-stage detectors, 0.1 for others.
        channel_mask: Whether ``features`` has a mask of channels. ``None``: not for two-stage
            detectors.
        per_image: Take a root for each image and their mean. The released norms run over the whole
            batch, so that the loss grows with the root of its size.
        **common: See :class:`global_kd.losses.DistillLoss`. As released,
            ``adapter="conv1x1"``; all five levels.
    """

    name = "fbkd"
    channel_adapters: nn.ModuleList
    cell_adapters: nn.ModuleList
    relation_adapters: nn.ModuleList
    student_relation: nn.ModuleList
    teacher_relation: nn.ModuleList

    def __init__(
        self,
        *,
        features: float | None = None,
        channels: float | None = None,
        cells: float | None = None,
        relation: float | None = None,
        temperature: float | None = None,
        channel_mask: bool | None = None,
        per_image: bool = False,
        **common: Unpack[Common],
    ) -> None:
        if temperature is not None:
            _check.positive("temperature", temperature)
        self.temperature, self.channel_mask = temperature, channel_mask
        self.per_image = per_image
        weights = {
            "features": features,
            "channels": channels,
            "cells": cells,
            "relation": relation,
        }
        usual = {
            "two-stage": dict(zip(weights, (7e-5, 4e-3, 4e-3, 7e-5), strict=True)),
            "one-stage": dict(zip(weights, (4.2e-4, 2.4e-2, 2.4e-2, 4.2e-4), strict=True)),
        }
        common.setdefault("adapter", "conv1x1")
        super().__init__(weights, usual, **common)

    def make(self, levels: Levels) -> None:
        two_stage = (self._family or levels.family) == "two-stage"
        if self.temperature is None:
            self.temperature = 0.5 if two_stage else 0.1
        if self.channel_mask is None:
            self.channel_mask = not two_stage
        sizes = [(64, 8), (64, 4)]  # hidden channels and pooling of the finest levels
        student, teacher = levels.student_channels, levels.teacher_channels

        def blocks(channels: tuple[int, ...]) -> nn.ModuleList:
            return nn.ModuleList(
                NonLocal(c, *(sizes[i] if i < len(sizes) else (128, 2)))
                for i, c in enumerate(channels)
            )

        pairs = list(zip(student, teacher, strict=True))
        with seeded(self.seed + 1):
            self.channel_adapters = nn.ModuleList(nn.Linear(cs, ct) for cs, ct in pairs)
            self.cell_adapters = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in pairs)
            self.relation_adapters = nn.ModuleList(nn.Conv2d(cs, ct, 1) for cs, ct in pairs)
            self.student_relation, self.teacher_relation = blocks(student), blocks(teacher)

    def terms(self, step: Step) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {part: [] for part in self.parts if self.wants(part)}
        adapted = self.adapted(step) if "features" in found else list(step.student)
        for level, (s, t) in enumerate(zip(step.student, step.teacher, strict=True)):
            weights = self.cell_weights(step, level)
            for part, values in found.items():
                if part == "features":
                    assert self.temperature is not None and self.channel_mask is not None
                    squares = _masked_squares(
                        adapted[level], t, weights, self.temperature, self.channel_mask
                    )
                elif part == "channels":
                    mine, theirs = (accumulate(x).mean(dim=(2, 3)) for x in (s, t))
                    squares = _squares(theirs - applied(self.channel_adapters[level], mine))
                elif part == "cells":
                    mine, theirs = (accumulate(x).mean(dim=1, keepdim=True) for x in (s, t))
                    squares = _squares(theirs - applied(self.cell_adapters[level], mine), weights)
                else:
                    mine = applied(self.student_relation[level], s)
                    mine = applied(self.relation_adapters[level], mine)
                    theirs = applied(self.teacher_relation[level], t)
                    squares = _squares(theirs - mine, weights)
                values.append(_length(squares, self.per_image))
        return {part: torch.stack(values).sum() for part, values in found.items()}
