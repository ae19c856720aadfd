"""MGD: the teacher's map generated from the student's masked one (Yang et al., ECCV 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.precision import accumulate
from ..pyramid import seeded
from ..ranks import Ranks
from ..step import Step
from .base import Common, DistillLoss, Levels, applied

if TYPE_CHECKING:
    from typing_extensions import Unpack


def squared_error(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum(w * (s - t)^2) / B`` of maps ``(B, C, H, W)``, weights ``(B, H, W)``."""
    squares = (accumulate(student) - accumulate(teacher)).square()
    if weights is not None:
        squares = squares * weights[:, None]
    return squares.sum() / max(student.shape[0], 1)


class MGD(DistillLoss):
    r"""Let the student's map, with cells left out at random, still say the teacher's whole map.

    "Masked Generative Distillation", ECCV 2022. Cells of the adapted map are set to 0, the same
    ones in all channels and anew at each step; two 3x3 convolutions with a ReLU between generate
    the teacher's map from the rest. It needs maps only, and serves any two detectors.

    .. math:: L = \frac{\alpha}{B} \sum_{b,c,y,x} \bigl(G(\varphi(S) \odot m) - T\bigr)^2,\qquad
              m_{byx} = 0 \text{ with probability } \lambda

    summed over levels, kept cells not rescaled, as released. The sum runs over cells and channels:
    the weight fits maps of about 800 x 1333 pixels.

    The masks of a step follow from ``seed``, the rank and the count of steps: the global random
    state is not touched, ranks draw unlike masks, and a resumed training goes on with those that
    would have come. Robust weights weigh the squares of the cells. The generators' parameters
    (:math:`18 C^2` each) belong into the optimizer.

    Args:
        weight: Default 5e-7 for two-stage detectors, 2e-5 for others.
        masked: Probability in [0, 1) that a cell is left out. ``None``: 0.45 for two-stage
            detectors, 0.65 for others.
        **common: See :class:`global_kd.losses.DistillLoss`. The paper distils
            ``levels=(4, 8, 16, 32)`` for Faster R-CNN, all five for RetinaNet.
    """

    name = "mgd"
    generators: nn.ModuleList

    def __init__(
        self,
        *,
        weight: float | None = None,
        masked: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        if masked is not None and not 0 <= masked < 1:
            raise ValueError(f"masked: expected a probability in [0, 1), but got {masked!r}")
        self.masked = masked
        self._masks: list[Tensor] = []  # of the step at hand
        usual = {"two-stage": {"": 5e-7}, "one-stage": {"": 2e-5}}
        super().__init__({"": weight}, usual, **common)

    def make(self, levels: Levels) -> None:
        if self.masked is None:
            self.masked = 0.45 if (self._family or levels.family) == "two-stage" else 0.65
        with seeded(self.seed + 1):
            self.generators = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1)
                )
                for c in levels.teacher_channels
            )

    def draw_masks(self, step: Step) -> list[Tensor]:
        """Which cells are kept, bool ``(B, 1, H, W)`` for each level, at the present step."""
        assert self.masked is not None
        # Two seeds side by side must not give streams side by side: mixed, not added.
        mixed = np.random.SeedSequence([abs(self.seed), Ranks().rank, self.step])
        device = step.student[0].device
        generator = torch.Generator(device).manual_seed(int(mixed.generate_state(1)[0]))
        sizes = [(len(x), 1, *x.shape[2:]) for x in step.student]
        # Of one dtype, since each draws other values.
        options: Any = {"generator": generator, "device": device, "dtype": torch.float32}
        return [torch.rand(size, **options) >= self.masked for size in sizes]

    def _run(self, step: Step) -> dict[str, Tensor]:
        self._masks = self.draw_masks(step)  # outside of what is compiled
        return super()._run(step)

    def terms(self, step: Step) -> dict[str, Tensor]:
        found = []
        for level, s in enumerate(self.adapted(step)):
            kept = s * self._masks[level]
            generated = applied(self.generators[level], kept)
            weights = self.cell_weights(step, level)
            found.append(squared_error(generated, step.teacher[level], weights))
        return {"": torch.stack(found).sum()}
