"""PKD: Pearson correlation of the maps (Cao et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _check
from ..step import Step
from .base import Common, DistillLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Half the squared error of maps standardised per channel over the batch.

    .. math:: L = \tfrac12 \operatorname{mean}_{b,c,y,x} (\hat s - \hat t)^2
              = \tfrac{n-1}{n} \operatorname{mean}_c (1 - r_c),\quad
              \hat z = \frac{z - \operatorname{mean}_c}{\operatorname{std}_c + 10^{-6}}

    with ``r_c`` the Pearson correlation of a channel over its ``n = B H W`` values. The student's
    standardisation is differentiated through. A constant channel counts as zeros.

    Args:
        student: Map ``(B, C, H, W)``, adapted.
        teacher: Map of the same shape, detached inside.

    Returns:
        Scalar in at least float32.

    Example:
        >>> import torch
        >>> from global_kd.functional import pkd_loss
        >>> x = torch.arange(8.0).view(2, 1, 2, 2)
        >>> round(float(pkd_loss(3 * x + 1, x)), 6)  # any positive affine map
        0.0
    """
    _check.same_maps(student, teacher)
    return (_standardised(student) - _standardised(teacher.detach())).square().mean() / 2


def _standardised(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = x - x.mean(dim=(0, 2, 3), keepdim=True)
    n = max(x.numel() // x.shape[1], 1)
    variance = centred.square().sum(dim=(0, 2, 3), keepdim=True) / max(n - 1, 1)
    # The root's gradient at 0 is infinite; there the channel is all zeros.
    flat = variance <= 0
    std = torch.where(flat, 1.0, variance).sqrt()
    return centred / (std + 1e-6)


class PKD(DistillLoss):
    """Imitate the correlation of features instead of their values.

    "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
    NeurIPS 2022. It needs maps only, and serves any two detectors. Sum over levels of
    :func:`global_kd.functional.pkd_loss`.

    The paper has no adapter, since its pairs have equal channels; here a 1x1 convolution stands in
    where they do not (``adapter="match"``). Statistics are those of a process's own batch, as
    released. The released code resizes where heights differ; here levels are cut to the shared
    cells.

    Args:
        weight: Default 6 for two-stage detectors, 10 for others.
        **common: See :class:`global_kd.losses.DistillLoss`. The paper distils four levels:
            ``levels=(4, 8, 16, 32)`` for Faster R-CNN, ``(8, 16, 32, 64)`` for RetinaNet.
    """

    name = "pkd"

    def __init__(self, *, weight: float | None = None, **common: Unpack[Common]) -> None:
        usual = {"two-stage": {"": 6.0}, "one-stage": {"": 10.0}}
        super().__init__({"": weight}, usual, **common)

    def terms(self, step: Step) -> dict[str, Tensor]:
        pairs = zip(self.adapted(step), step.teacher, strict=True)
        return {"": torch.stack([pkd_loss(s, t) for s, t in pairs]).sum()}
