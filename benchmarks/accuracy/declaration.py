"""What one training is: plain values from which everything in it follows, and their identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss
from global_kd.losses import DistillLoss
from workshop.digit_scenes import CLASS_NAMES, SceneSettings
from workshop.distillation import STUDIED, Knowledge
from workshop.methods import known_methods
from workshop.small_detectors import SIZES, Size

from ..digits.disturbances import Disturbance
from .dense import Dense
from .pretrained import Pretrained
from .variants import OtherLoss, Sparse, Variant

# Where a split's trainings and its validation scenes get their seeds from. Tuning looks at the
# scenes on which the examples' defaults were chosen; what is reported was seen by no choice.
SEEDS = {"teaching": 0, "tuning": 1000, "reporting": 2000}
VALIDATION_SEEDS = {"teaching": 2000, "tuning": 0, "reporting": 2000}
SEEDS_PER_SPLIT = 1000
CLASSES = {  # of real pictures, by data set
    "bccd": ("background", "Platelets", "RBC", "WBC"),
    "cards": ("background", "ace", "jack", "king", "nine", "queen", "ten"),
    "deeppcb": ("background", "open", "short", "mousebite", "spur", "copper", "pin-hole"),
}
TRAINING_SCENES_SEED = 0  # one training set for all: that of the teachers


def later(neutral: Any) -> Any:
    """A field that older declarations did not have: at its neutral value it changes no identity."""
    return dataclasses.field(default=neutral, metadata={"neutral": neutral})


@dataclasses.dataclass(frozen=True)
class Data:
    """The scenes: how many, how large, and what is wrong with those that are trained on.

    `share` of the training scenes are used, the first ones. `side` and `height` (of a digit, the
    range it is drawn from) are pixels. Validation scenes are never disturbed.
    """

    scenes: int = 8000
    share: float = 1.0
    validation: int = 600
    side: int = 96
    height: tuple[float, float] = (12.0, 56.0)
    disturbance: Disturbance = Disturbance()

    def settings(self, seed: int) -> SceneSettings:
        """Of the scenes before anything is done to them."""
        return SceneSettings(
            self.scenes, self.validation, side=self.side, height=self.height, seed=seed
        )

    def quick(self) -> Data:
        """The same with next to no scenes."""
        return dataclasses.replace(self, scenes=80, validation=10)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Real pictures by the name of their data set, one of `CLASSES`, `side` px at the longer.

    `share` of the training pictures are used, and `wrong_labels` is the share of their boxes that
    have another class. With `held_out` every fourth training picture is scored on instead of
    trained on, and those that a report is scored on are not touched: what tuning looks at.
    """

    source: str
    side: int = 160
    share: float = 1.0
    wrong_labels: float = 0.0
    held_out: bool = False

    def __post_init__(self) -> None:
        if self.source not in CLASSES:
            raise ValueError(f"source: expected one of {tuple(CLASSES)}, but got {self.source!r}")

    def alike(self, other: Pictures) -> bool:
        """Whether nothing that one trains on is held out by the other."""
        whole = {"share": 1.0, "wrong_labels": 0.0}
        return dataclasses.replace(self, **whole) == dataclasses.replace(other, **whole)  # type: ignore[arg-type]

    def quick(self) -> Pictures:
        """The same with few pictures."""
        return dataclasses.replace(self, share=0.05)


@dataclasses.dataclass(frozen=True)
class Method(Knowledge):
    """What is transferred: the example's settings, and more of the library's and of `Variant`.

    Like `STUDIED` where nothing else is said: the identities of the results depend on it.
    """

    relation: float = STUDIED.relation
    levels: str = STUDIED.levels
    alpha: float = 10.0
    standardize: bool = later(True)
    adapter: str = later("conv3x3")
    form: str = later("cosine")
    space: str = later("pooled")
    pick: str = later("pursuit")
    weights: str = later("omega")
    every: int = later(1)  # distil in every so many steps only

    @property
    def variant(self) -> Variant:
        """What differs from the library."""
        return Variant(self.form, self.space, self.pick)

    def options(self) -> dict[str, Any]:
        """These settings as arguments of `GlobalKnowledgeLoss`."""
        return super().options() | {
            "alpha": self.alpha,
            "standardize": self.standardize,
            "adapter": self.adapter,
            "weights": self.weights,
        }

    def distiller(
        self, student: nn.Module, teacher: nn.Module, num_classes: int, steps: int, seed: int
    ) -> Distiller:
        """A `Distiller` with these settings for a training of `steps` iterations."""
        if self.every > 1:
            options = self.options() | {"total_steps": steps // self.every, "seed": seed}
            loss: GlobalKnowledgeLoss = GlobalKnowledgeLoss(num_classes, **options)
            return Sparse(student, teacher, loss, self.every)
        if self.variant == Variant():
            return super().distiller(student, teacher, num_classes, steps, seed)
        loss = OtherLoss(
            num_classes,
            self.variant,
            (student, teacher),
            total_steps=steps,
            seed=seed,
            **self.options(),
        )
        return Distiller(student, teacher, loss)


@dataclasses.dataclass(frozen=True)
class Others:
    """Other methods of `global_kd.losses`, with or without global knowledge beside them.

    `names`: one or several joined by "+", each at the defaults of its paper. `share`: the weights
    are set on the first training batches, so that the terms of each method pull together with this
    share of the detection loss's gradient (`Distiller.calibrate`); `None`: the paper's weights.
    `robust`: they weigh boxes by the robust weights of `beside`. `tuned`: `beside` gets a share of
    its own, too, instead of its weights. `options` are more arguments of the methods.
    """

    names: str
    share: float | None = None
    robust: bool = False
    beside: Method | None = None
    tuned: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    prototype_images = 0  # `beside` takes them from the training stream

    def distiller(
        self, student: nn.Module, teacher: nn.Module, num_classes: int, steps: int, seed: int
    ) -> Distiller:
        """A `Distiller` with these methods for a training of `steps` iterations."""
        options: dict[str, Any] = {"total_steps": steps, "seed": seed}
        known = known_methods()
        losses = [
            known[name](robust=self.robust, **options, **dict(self.options))  # type: ignore[call-arg]
            for name in filter(None, self.names.split("+"))
        ]
        if self.beside is not None:
            losses.append(GlobalKnowledgeLoss(num_classes, **options, **self.beside.options()))
        return Distiller(student, teacher, losses)

    def begin(self, kd: Distiller, batches: Iterable[Any]) -> None:
        """Set the weights before the first iteration."""
        if self.share is None:
            return
        wanted: dict[str, float] = {}
        for loss in (cast(DistillLoss, x) for x in kd.losses.values()):
            if self.tuned or not isinstance(loss, GlobalKnowledgeLoss):
                wanted |= dict.fromkeys(loss.term_names, self.share / len(loss.term_names))
        kd.calibrate(loader=batches, share=wanted, verbose=False)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training. Trials that agree in all but `method` and `teacher` are a pair of one seed.

    Args:
        method: `None` is training without distillation.
        teacher: A trial of the split "teaching"; with a method only.
        start: Go on from the weights that this trial ended with (a warm start), which all arms of
            a comparison share. Has the same split and seed.
        time_of: Train as many iterations as take the time of this trial, whose number of them is
            given: equal time instead of equal iterations.
        split: "tuning" or "reporting", which share neither validation scenes nor seeds; "teaching"
            for teachers.
        seed: Counted within the split, from 0; decides initial weights and order of the batches.
    """

    data: Data | Pictures = Data()
    student: Size | Pretrained | Dense = SIZES["small-student"]
    method: Method | Others | None = None
    teacher: Trial | None = None
    iterations: int = 1000
    lr: float = 3e-3
    batch_size: int = 16
    start: Trial | None = None
    time_of: Trial | None = None
    split: str = "reporting"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SEEDS:
            raise ValueError(f"split: expected one of {tuple(SEEDS)}, but got {self.split!r}")
        if not 0 <= self.seed < SEEDS_PER_SPLIT:
            raise ValueError(
                f"seed: expected 0 <= seed < {SEEDS_PER_SPLIT}, so that splits share none, but "
                f"got {self.seed}"
            )
        if isinstance(self.data, Pictures) and self.split != "teaching":
            if self.data.held_out != (self.split == "tuning"):
                raise ValueError(
                    f"held_out: expected {self.split == 'tuning'} on the split {self.split!r}, but "
                    f"got {self.data.held_out}"
                )
            if self.teacher is not None and not (
                isinstance(self.teacher.data, Pictures) and self.data.alike(self.teacher.data)
            ):
                raise ValueError(
                    "teacher: expected one of the same pictures, so that it saw none that is "
                    f"scored on, but got {self.teacher.data}"
                )
        if (self.method is None) != (self.teacher is None):
            raise ValueError("method, teacher: expected both or neither")
        if self.teacher is not None and self.teacher.split != "teaching":
            raise ValueError(
                f"teacher: expected a trial of the split 'teaching', but got {self.teacher.split!r}"
            )
        for name in ("start", "time_of"):
            other = getattr(self, name)
            if other is not None and (other.split, other.seed) != (self.split, self.seed):
                raise ValueError(
                    f"{name}: expected a trial of split {self.split!r} and seed {self.seed}, but "
                    f"got {other.split!r} and {other.seed}"
                )
        if self.time_of is not None and self.time_of.iterations != self.iterations:
            raise ValueError(
                f"time_of: expected a trial of {self.iterations} iterations, but got "
                f"{self.time_of.iterations}"
            )

    @property
    def training_seed(self) -> int:
        """Of initial weights and batches; no other split's trainings have it."""
        return SEEDS[self.split] + self.seed

    @property
    def validation_seed(self) -> int:
        """Of the scenes it is scored on."""
        return VALIDATION_SEEDS[self.split]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of what is detected, the background first."""
        if isinstance(self.data, Data):
            return CLASS_NAMES
        return CLASSES[self.data.source]

    @property
    def identity(self) -> str:
        """Twelve hex digits of a hash of the declaration."""
        text = json.dumps(declared(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def at(self, seed: int) -> Trial:
        """The same with another seed, its start and whose time it takes included."""
        start, time_of = (None if x is None else x.at(seed) for x in (self.start, self.time_of))
        return dataclasses.replace(self, seed=seed, start=start, time_of=time_of)

    def plain(self) -> Trial:
        """Its partner without distillation, for equally many iterations."""
        return dataclasses.replace(self, method=None, teacher=None, time_of=None)

    @property
    def needs(self) -> list[Trial]:
        """Those that must be trained before, since it starts, learns or is timed with them."""
        first = [self.teacher, self.start]
        if self.time_of is not None:
            first += [self.plain(), self.time_of.teacher]
        return [trial for trial in first if trial is not None]


def declared(value: Any) -> Any:
    """A declaration as JSON; a trial within another stands there by its identity."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return list(value) if isinstance(value, tuple) else value
    content = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if "neutral" in field.metadata and part == field.metadata["neutral"]:
            continue
        if field.type == "float":
            part = float(part)  # 0 and 0.0 are one weight
        content[field.name] = part.identity if isinstance(part, Trial) else declared(part)
    return content


@dataclasses.dataclass(frozen=True)
class Arm:
    """A row of a table: a trial at seed 0, and the arms it is compared with.

    In a table of curves arms with the same `line` are joined, each at its `x`.
    """

    name: str
    trial: Trial
    against: tuple[str, ...] = ("none",)
    line: str = ""
    x: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Arms that are compared seed by seed.

    `rank` orders the work: all tables of rank 1 come first, seed by seed. `axis` names the x axis
    where the arms lie on curves. `seeds` is how many seeds are trained at most.
    """

    name: str
    title: str
    rank: int
    arms: tuple[Arm, ...]
    axis: str = ""
    seeds: int = SEEDS_PER_SPLIT

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"{self.name}: expected arms of different names, but got {names}")
        if len({arm.trial.split for arm in self.arms}) > 1:
            raise ValueError(f"{self.name}: expected arms of one split")
        for arm in self.arms:
            for other in arm.against:
                if other not in names:
                    raise ValueError(f"{self.name}: {arm.name} is compared with unknown {other!r}")
