"""A callback for Lightning: a teacher beside the student of a ``LightningModule``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from ..distiller import Distiller
from .losses import Losses, losses_for


class Distillation(Callback):
    """Distil inside ``Trainer(callbacks=[Distillation(...)]).fit(module)``.

    Your module stays as it is, and so do its checkpoints' ``state_dict``: adapters and prototypes
    are kept in the callback's part of the checkpoint. The student's forward must have run in
    ``training_step``; the terms are added to the loss that it returns, and logged.

    Args:
        student: Name of the module's attribute that is the detector.
        teacher: A detector, of any framework.
        num_classes: Labels lie below it; needed where no loss is given.
        losses: What to distil: one loss or several; ``None``: global knowledge with its defaults.
        batch: Turns a batch into what :meth:`global_kd.Distiller.forward` takes, a tuple; by
            default a pair is taken apart and anything else passed on whole.
        **options: Of the :class:`global_kd.Distiller`, such as ``share=0.3``.

    Example:
        >>> callback = Distillation("model", teacher, losses=[FGD()])  # doctest: +SKIP
        >>> Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
    """

    def __init__(
        self,
        student: str,
        teacher: nn.Module,
        *,
        num_classes: int | None = None,
        losses: Losses = None,
        batch: Callable[[Any], Sequence[Any]] | None = None,
        **options: Any,
    ) -> None:
        if losses is None and num_classes is None:
            raise ValueError(
                "num_classes: expected the number of classes, since no loss is given, but got None"
            )
        self._student, self._teacher, self._losses = student, teacher, losses
        self._num_classes, self._options = num_classes or 0, options
        self._arguments = _pair if batch is None else batch
        self._state: dict[str, Any] | None = None
        self.kd: Distiller | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.estimated_stepping_batches  # updates
        total = int(total) if total != float("inf") else 0
        total *= int(trainer.accumulate_grad_batches)  # calls
        steps = int(trainer.num_training_batches) if total else 0
        named = losses_for(self._losses, self._num_classes, total or 1, steps or 1)
        student = getattr(pl_module, self._student)
        teacher = self._teacher.to(pl_module.device)
        self.kd = Distiller(student, teacher, named, **self._options)
        if self._state is not None:
            self.kd.load_state_dict(self._state)
        self._give_to(trainer.optimizers)
        step = pl_module.training_step

        def with_terms(batch: Any, *args: Any, **kwargs: Any) -> Any:
            output = step(batch, *args, **kwargs)
            assert self.kd is not None
            terms = self.kd(*self._arguments(batch))
            pl_module.log_dict({name: x.detach() for name, x in terms.items()})
            added = sum(terms.values())
            if isinstance(output, dict):
                return {**output, "loss": output["loss"] + added}
            return output + added

        pl_module.training_step = with_terms

    def _give_to(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        assert self.kd is not None
        if adapters := list(self.kd.parameters()):
            # A group of their own would be one that a learning rate schedule does not know.
            optimizers[0].param_groups[-1]["params"].extend(adapters)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.__dict__.pop("training_step", None)
        if self.kd is not None:
            self.kd.detach()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.kd is None else {"kd": self.kd.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict.get("kd")


def _pair(batch: Any) -> Sequence[Any]:
    return batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch,)
