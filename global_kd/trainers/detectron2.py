"""Detectron2's ``DefaultTrainer`` with a teacher beside the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import DefaultTrainer
from torch import nn

from ..distiller import Distiller
from .losses import Losses, Share, losses_for


class DistillationTrainer(DefaultTrainer):
    """Distil with a config: ``DistillationTrainer(cfg, teacher, losses).train()``.

    The terms are part of the loss dictionary, so they show up among the metrics of Detectron2's
    event storage as ``kd_foreground`` and so on. Checkpoints hold the student alone under
    ``"model"``, as without distillation; adapters, prototypes and the step lie beside it under
    ``"kd"``, so ``resume_or_load`` continues with them and everybody else ignores them.

    Args:
        cfg: Of the student.
        teacher: A detector, of any framework; ``None``: no distillation.
        losses: What to distil: one loss or several; ``None``: global knowledge with its defaults,
            with new prototypes every ``refresh_every`` iterations.
        refresh_every: See above.
        share: Of the :class:`global_kd.Distiller`.
        distiller: Makes the :class:`global_kd.Distiller` of a student, in place of the four above.
    """

    model: Any  # Detectron2's property

    def __init__(
        self,
        cfg: Any,
        teacher: nn.Module | None = None,
        losses: Losses = None,
        *,
        refresh_every: int = 1000,
        share: Share = None,
        distiller: Callable[[nn.Module], Distiller] | None = None,
    ) -> None:
        self._teacher, self._losses, self._refresh_every = teacher, losses, refresh_every
        self._share, self._make = share, distiller
        self.kd: Distiller | None = None
        super().__init__(cfg)
        if self.kd is not None:
            self.checkpointer.add_checkpointable("kd", self.kd)

    def _distiller(self, cfg: Any, model: nn.Module) -> Distiller | None:
        if self._make is not None:
            return self._make(model)
        if self._teacher is None:
            return None
        steps, classes = cfg.SOLVER.MAX_ITER, num_classes(cfg)
        named = losses_for(self._losses, classes, steps, self._refresh_every)
        device = next(model.parameters()).device
        return Distiller(model, self._teacher.to(device), named, share=self._share)

    def build_optimizer(self, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().build_optimizer(cfg, model)
        self.kd = self._distiller(cfg, model)
        if self.kd is not None and (adapters := list(self.kd.parameters())):
            optimizer.add_param_group({"params": adapters})
        return optimizer

    def run_step(self) -> None:
        """A step of the config's trainer (plain or mixed precision), with the teacher's terms."""
        student = self.model
        if self.kd is not None:
            self.model = _WithTerms(student, self.kd)
        try:
            super().run_step()
        finally:
            self.model = student


class _WithTerms:
    """A student whose losses hold the terms; it is in no module tree."""

    def __init__(self, student: nn.Module, kd: Distiller) -> None:
        self._student, self._kd = student, kd

    @property
    def training(self) -> bool:
        return self._student.training

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        losses: dict[str, torch.Tensor] = self._student(batch)
        return losses | self._kd(batch)


def num_classes(cfg: Any) -> int:
    """Detectron2's count: no background."""
    dense = {"RetinaNet": cfg.MODEL.RETINANET, "FCOS": getattr(cfg.MODEL, "FCOS", None)}
    owner = dense.get(cfg.MODEL.META_ARCHITECTURE) or cfg.MODEL.ROI_HEADS
    return int(owner.NUM_CLASSES)
