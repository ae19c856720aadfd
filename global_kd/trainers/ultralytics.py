"""Ultralytics' trainer of detectors with a teacher beside it. Written for Ultralytics 8.4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from ..distiller import Distiller
from .losses import Losses, Share, losses_for


class DistillationTrainer(DetectionTrainer):
    """Distil inside ``YOLO(...).train(trainer=...)``.

    The student is trained, validated and saved by Ultralytics as always: its checkpoints hold the
    student alone and load without this package. Adapters and prototypes are in ``weights/kd.pt``,
    from which ``resume=True`` goes on. The terms appear in the progress line and in
    ``results.csv``. ``compile=True`` is refused: Ultralytics then computes the loss outside the
    forward call.

    On several GPUs Ultralytics starts processes that import the trainer by its name, so write a
    class of your own into a file that can be imported::

        class Trainer(DistillationTrainer):
            teacher = "teacher.pt"

    Attributes:
        teacher: Checkpoint or YAML of a detector, or a network.
        losses: What to distil: one loss or several, or a function that makes them (each training
            needs new ones; in the body of a class write ``@staticmethod``); ``None``: global
            knowledge with its defaults.
        share: Of the :class:`global_kd.Distiller`.

    Example:
        >>> trainer = DistillationTrainer.of("yolo11x.pt", share=0.3)  # doctest: +SKIP
        >>> YOLO("yolo11n.pt").train(trainer=trainer, data="coco.yaml")  # doctest: +SKIP
    """

    teacher: Any = None
    losses: Any = None
    share: Share = None
    kd: Distiller
    loss_names: Any
    _adding = False

    @classmethod
    def of(cls, teacher: Any, losses: Any = None, share: Share = None) -> type[DistillationTrainer]:
        """A trainer with this teacher and these losses, for ``train(trainer=...)``."""
        function = callable(losses) and not isinstance(losses, nn.Module)
        given = staticmethod(losses) if function else losses  # else it would become a method
        return type(cls.__name__, (cls,), {"teacher": teacher, "losses": given, "share": share})

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.args.compile:
            raise ValueError("compile: expected False, which keeps the loss in the forward call")
        if self.teacher is None:
            raise ValueError(
                "teacher: expected a checkpoint or a network, but got None; write "
                "train(trainer=DistillationTrainer.of('teacher.pt'), ...)"
            )
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        teacher: Any = self.teacher
        if not isinstance(teacher, nn.Module):
            teacher = YOLO(teacher).model
        steps = len(self.train_loader)
        make = self.losses
        losses: Losses = make() if callable(make) and not isinstance(make, nn.Module) else make
        named = losses_for(losses, self.data["nc"], self.epochs * steps, steps)
        self.kd = Distiller(model, teacher.to(self.device), named, share=self.share)
        if adapters := list(self.kd.parameters()):
            like = [g for g in optimizer.param_groups if g["param_group"] == "bn"][-1]
            optimizer.add_param_group({**like, "params": adapters})
        model.register_forward_hook(lambda *call: self._add_terms(*call))
        return optimizer

    def _add_terms(self, model: nn.Module, args: Any, output: Any) -> tuple[Tensor, Any] | None:
        """The loss of a batch and its items with the terms; both count per batch, not per image."""
        if not isinstance(args[0], dict) or self._adding:
            return None  # validation: the moving average has a copy of the hook; or kd's own pass
        loss, items = output
        self._adding = True
        try:
            terms = self.kd(args[0])
        finally:
            self._adding = False
        if isinstance(items, dict):
            items = items | {name: term.detach() for name, term in terms.items()}
        return loss.sum() + len(args[0]["img"]) * sum(terms.values()), items

    def progress_string(self) -> Any:
        names = self.loss_names
        self.loss_names = tuple(_heading(name) for name in names)
        try:
            return super().progress_string()
        finally:
            self.loss_names = names

    def save_model(self) -> Any:
        average: Any = self.ema
        for module in average.ema.modules():  # copied hooks would tie the file to this package
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        torch.save(self.kd.state_dict(), self.wdir / "kd.pt")
        return super().save_model()

    def _load_checkpoint_state(self, checkpoint: dict[str, Any]) -> None:
        super()._load_checkpoint_state(checkpoint)
        state = torch.load(self.wdir / "kd.pt", map_location=self.device, weights_only=True)
        self.kd.load_state_dict(state)


def _heading(name: str) -> str:
    """A term's name in a column of the progress lines, which is 11 characters wide."""
    return name if len(name) < 11 else name.removeprefix("kd_")[:10]
