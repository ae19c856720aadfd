"""transformers' ``Trainer`` with a teacher beside the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..distiller import Distiller
from .losses import Losses, Share, losses_for

_FILE = "kd.pt"


class DistillationTrainer(Trainer):
    """Distil inside ``Trainer(...).train()``.

    Checkpoints hold the student alone, which is what you want to publish; adapters and prototypes
    are in ``kd.pt`` beside it, from which ``train(resume_from_checkpoint=...)`` goes on. Set
    ``remove_unused_columns=False`` in the ``TrainingArguments``, as for any detector.

    Args:
        *args: Of transformers' ``Trainer``.
        teacher: A detector, of any framework.
        losses: What to distil: one loss or several; ``None``: global knowledge with its defaults.
        share: Of the :class:`global_kd.Distiller`.
        **kwargs: Of transformers' ``Trainer``.

    Example:
        >>> trainer = DistillationTrainer(
        ...     student, arguments, teacher=teacher, share=0.3, train_dataset=data
        ... )  # doctest: +SKIP
    """

    model: Any

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        losses: Losses = None,
        share: Share = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        steps = max(1, len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)
        total = self.args.max_steps
        if total <= 0:
            total = int(steps * self.args.num_train_epochs)
        total *= self.args.gradient_accumulation_steps  # calls, not updates
        named = losses_for(losses, self.model.config.num_labels, total, min(steps, total))
        self.kd = Distiller(self.model, teacher.to(self.args.device), named, share=share)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        adapters = [p for p in self.kd.parameters() if id(p) not in held]
        if adapters:  # once, however often it is called
            optimizer.add_param_group({"params": adapters, "weight_decay": 0.0})
        return optimizer  # type: ignore[no-any-return]

    def compute_loss(  # type: ignore[override]  # its further arguments differ by version
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            loss = loss + sum(self.kd(inputs).values())
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=None))
            folder /= f"checkpoint-{self.state.global_step}"
            torch.save(self.kd.state_dict(), folder / _FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # transformers 5 renames parameters when it saves, and its Trainer does not rename them
        # back: without this, a resumed RT-DETR or DETR would go on with an untrained backbone.
        saved = type(self.model).from_pretrained(resume_from_checkpoint)
        self.model.load_state_dict(saved.state_dict())
        file = Path(resume_from_checkpoint) / _FILE
        state = torch.load(file, map_location=self.args.device, weights_only=True)
        self.kd.load_state_dict(state)
