"""Which knowledge the examples transfer, and the student that is trained with or without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from global_kd import Distiller, GlobalKnowledgeLoss
from global_kd.losses import LabelOptions, RelationOptions

from .coco_eval import evaluate
from .detection_data import DetectionData, first_batches, to_device
from .training import Recipe, Trainer

Log = Callable[[str, float, int], None]


class Transfer(Protocol):
    """What is distilled: makes a `Distiller`, and may want prototypes of so many images."""

    @property
    def prototype_images(self) -> int: ...

    def distiller(
        self, student: nn.Module, teacher: nn.Module, num_classes: int, steps: int, seed: int
    ) -> Distiller: ...


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """Settings of the distillation: the library's weights, sizes for digits of 12 to 56 px.

    The first four are the terms' weights, 0 leaves a term out. `robust` weights each instance by
    omega. `boxes` are those on which knowledge is transferred. `finest_scale`: boxes up to twice
    this side (px) lie on the finest level. `min_side`: smallest side (px) of a prototype.
    Prototypes come from the training stream and are renewed every `refresh_every` iterations;
    with `prototype_images` = n > 0 they are computed before each epoch in eval mode instead,
    from n training images.
    """

    foreground: float = 2.0
    background: float = 1.0
    relation: float = 0.0
    logits: float = 5.0
    robust: bool = True
    own_class: bool = False
    center: bool = False
    boxes: str = "proposals"
    levels: str = "assigned"
    finest_scale: float | None = 16.0
    min_side: float = 10.0
    num_prototypes: int = 10
    temperature: float = 2.0
    refresh_every: int = 100
    prototype_images: int = 0

    def distiller(
        self, student: nn.Module, teacher: nn.Module, num_classes: int, steps: int, seed: int
    ) -> Distiller:
        """A `Distiller` with these settings for a training of `steps` iterations."""
        loss = GlobalKnowledgeLoss(num_classes, total_steps=steps, seed=seed, **self.options())
        return Distiller(student, teacher, loss)

    def options(self) -> dict[str, Any]:
        """These settings as arguments of `GlobalKnowledgeLoss`."""
        return {
            "boxes": self.boxes,
            "foreground": self.foreground,
            "background": self.background,
            "relation": self.relation,
            "logits": self.logits,
            "robust": self.robust,
            "relation_options": RelationOptions(own_class=self.own_class, center=self.center),
            "label_options": LabelOptions(temperature=self.temperature),
            "levels": self.levels,
            "finest_scale": self.finest_scale,
            "min_side": self.min_side,
            "num_prototypes": self.num_prototypes,
            "refresh_every": None if self.prototype_images else self.refresh_every,
            "standardize": True,
        }


# With relations, and foreground on all levels: what the committed studies were made with.
STUDIED = Knowledge(relation=5.0, levels="all")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What every arm shares: the data, how a student starts, its teacher, how it is trained.

    `curve_images` is the number of validation images behind each point of the AP curve, `line`
    that of the progress bar on the screen.
    """

    data: DetectionData
    make_student: Callable[[], nn.Module]
    recipe: Recipe
    teacher: nn.Module | None = None
    device: str = "cpu"
    workers: int = 0
    curve_images: int = 200
    line: int = 0

    def prepare(
        self, knowledge: Transfer | None = None, start: dict[str, Tensor] | None = None
    ) -> Trainer:
        """One student before its first iteration; `start` are the weights to go on from."""
        torch.manual_seed(self.recipe.seed)
        student = self.make_student()
        if start is not None:
            student.load_state_dict(start)
        student.to(self.device)
        kd = None
        if knowledge is not None:
            if self.teacher is None:
                raise ValueError("teacher: expected a detector to distil from, but got None")
            recipe, classes = self.recipe, self.data.num_classes
            kd = knowledge.distiller(student, self.teacher, classes, recipe.iterations, recipe.seed)
        torch.manual_seed(self.recipe.seed)
        return Trainer(student, self.recipe, kd, self.workers)

    def train(
        self,
        label: str,
        knowledge: Transfer | None = None,
        *,
        start: dict[str, Tensor] | None = None,
        state: Path | None = None,
        resume: bool = False,
        log: Log | None = None,
        begin: Callable[[Distiller], None] | None = None,
    ) -> Trainer:
        """Train one student; arms of one recipe see the same initial weights and batches.

        `start` are the weights to go on from (a warm start). `state` is the file to resume from.
        `begin` is called before the first iteration.
        """
        trainer = self.prepare(knowledge, start)
        kd = trainer.kd
        if resume and state is not None and state.is_file():
            trainer.load(state)
        elif begin is not None and kd is not None:
            begin(kd)

        def renew_prototypes() -> None:
            if kd is not None and knowledge is not None and knowledge.prototype_images:
                images = first_batches(self.data.train, knowledge.prototype_images, 25)
                kd.refresh(to_device(images, self.device), progress=False)

        trainer.fit(
            self.data.train,
            label=label,
            line=self.line,
            state=state,
            evaluate=lambda model: evaluate(model, self.data, limit=self.curve_images, label=None),
            log=log,
            before_epoch=renew_prototypes,
        )
        return trainer
