"""Distil inside Ultralytics' own trainer.

    python examples/ultralytics_trainer.py --data data.yaml --student yolo11n.yaml --teacher best.pt

The student is trained, validated and saved by Ultralytics as always; its checkpoints load without
this package. Written for Ultralytics 8.4.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, distributed, nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from global_kd import Distiller, GlobalKnowledgeLoss


class DistillationTrainer(DetectionTrainer):
    """Ultralytics' trainer of detectors with a teacher beside it. Subclass it to name the teacher.

    Attributes:
        teacher: Checkpoint (or YAML) of a detector.
        options: For the loss; ``{"logits": 0}`` for a teacher with other classes.
    """

    teacher: str
    options: dict[str, Any] = {}

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.args.compile:
            raise ValueError("compile: expected False, which keeps the loss in the forward call")
        optimizer = super().build_optimizer(model, *args, **kwargs)
        teacher: Any = YOLO(self.teacher).model
        steps = len(self.train_loader)
        loss = GlobalKnowledgeLoss(
            self.data["nc"],
            **{"total_steps": self.epochs * steps, "refresh_every": steps} | self.options,
        )
        self.kd = Distiller(model, teacher.to(self.device), loss)
        if adapters := list(self.kd.parameters()):
            like = [g for g in optimizer.param_groups if g["param_group"] == "bn"][-1]
            optimizer.add_param_group({**like, "params": adapters})
        model.register_forward_hook(lambda *call: self.add_terms(*call))
        return optimizer

    def add_terms(self, model: nn.Module, args: Any, output: Any) -> tuple[Tensor, Any] | None:
        """The loss of a batch and its items with the terms; both count per batch, not per image."""
        if not isinstance(args[0], dict):
            return None  # validation: the moving average has a copy of the hook
        loss, items = output
        terms = self.kd(args[0])
        if isinstance(items, dict):
            items = items | {name: term.detach() for name, term in terms.items()}
        return loss.sum() + len(args[0]["img"]) * sum(terms.values()), items

    def optimizer_step(self) -> None:
        if distributed.is_initialized():  # the adapters are not inside the wrapped student
            for gradient in [p.grad for p in self.kd.parameters() if p.grad is not None]:
                distributed.all_reduce(gradient)
                gradient /= distributed.get_world_size()
        super().optimizer_step()

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


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="Ultralytics data set, a YAML file")
    parser.add_argument("--student", default="yolo11n.yaml", help="YAML or checkpoint")
    parser.add_argument("--teacher", required=True, help="checkpoint, trained on the same classes")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default=None)
    given = parser.parse_args(arguments)

    class Trainer(DistillationTrainer):
        teacher = given.teacher

    YOLO(given.student).train(
        trainer=Trainer,
        data=given.data,
        epochs=given.epochs,
        imgsz=given.imgsz,
        batch=given.batch,
        device=given.device,
    )


if __name__ == "__main__":
    main()
