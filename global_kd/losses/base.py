"""What every distillation loss has: weights, schedules, adapters, a step, telemetry.

A method's file holds its paper's sentences: :meth:`DistillLoss.terms` turns a
:class:`global_kd.step.Step` into raw named terms. All else is here.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from .. import _check
from ..instances import assign_levels
from ..ops.cells import box_cells
from ..ops.imitation import paint_boxes
from ..prototypes.bank import PrototypeBank
from ..prototypes.generator import PrototypeGenerator
from ..pyramid import ADAPTERS, build_adapters, check_pyramids
from ..ranks import MeanGradients, Ranks
from ..schedules import Schedule
from ..step import FACTS, Dense, Step
from ..targets import Targets

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack


@dataclass(frozen=True)
class Levels:
    """What a loss is built for: the paired levels of two detectors, finest first.

    Attributes:
        student_channels: Of each level.
        teacher_channels: Of each level.
        strides: Pixels of the student's network input per cell.
        activation: Of the student's class logits, where known.
        family: ``"two-stage"``, ``"one-stage"`` or ``"query"``; ``None``: unknown.
    """

    student_channels: tuple[int, ...]
    teacher_channels: tuple[int, ...]
    strides: tuple[float, ...]
    activation: str | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        if not len(self.student_channels) == len(self.teacher_channels) == len(self.strides):
            raise ValueError(
                "student_channels, teacher_channels, strides: expected one entry per level each, "
                f"but got {self.student_channels}, {self.teacher_channels}, {self.strides}"
            )
        if not self.strides or list(self.strides) != sorted(set(self.strides)):
            raise ValueError(
                f"strides: expected increasing numbers > 0, but got {list(self.strides)}"
            )
        _check.positive("strides", self.strides[0])

    def at(self, levels: Sequence[int]) -> Levels:
        """Some of them."""
        return Levels(
            tuple(self.student_channels[i] for i in levels),
            tuple(self.teacher_channels[i] for i in levels),
            tuple(self.strides[i] for i in levels),
            self.activation,
            self.family,
        )


class Common(TypedDict, total=False):
    """Options of every method, see :class:`DistillLoss`."""

    adapter: str
    levels: Sequence[float] | None
    schedule: Schedule | Mapping[str, Schedule] | None
    warmup_steps: int
    total_steps: int | None
    robust: bool
    family: str | None
    seed: int
    distributed: bool
    student_channels: Sequence[int] | None
    teacher_channels: Sequence[int] | None
    strides: Sequence[float] | None


def applied(module: nn.Module, x: Tensor) -> Tensor:
    """What a module of a loss makes of a map, which may be of another dtype."""
    own = list(module.parameters())  # torch 2.4 traces no next() with a default
    weight = own[0] if own else x
    # Maps of an autocast forward may arrive outside of it.
    cast = not torch.is_autocast_enabled(x.device.type) and x.dtype != weight.dtype
    return module(x.to(weight.dtype) if cast else x)  # type: ignore[no-any-return]


def _strides(levels: Any) -> tuple[float, ...]:
    """The strides of the levels to distil."""
    try:
        strides = tuple(float(x) for x in levels if not isinstance(levels, str))
    except (TypeError, ValueError):
        strides = ()
    if not strides:
        raise TypeError(
            f"levels: expected the strides of the levels to distil, but got {levels!r}; write "
            "levels=[8, 16, 32], or leave it out for all"
        )
    return strides


class DistillLoss(nn.Module):
    """A distillation loss: a training step in, named terms out.

    A subclass sets :attr:`name`, says what it :attr:`needs`, and writes :meth:`terms`; where it has
    parameters beyond adapters, :meth:`make`.

    Args:
        weights: Of each part of the loss, in the order of its terms. ``None``: that of the paper
            for the detector's family. 0 leaves a term out. The one part of a loss that has no
            parts is ``""``.
        defaults: Weights by family, ``"two-stage"`` and ``"one-stage"``; other families take those
            of ``"one-stage"``.
        adapter: How the student's maps get the teacher's channels: ``"match"``, a 1x1 convolution
            where the channels differ and nothing where they do not; ``"conv1x1"``, ``"conv3x3"``,
            ``"projector"`` (1x1, ReLU, 1x1), ``"identity"``. Its parameters belong into the
            optimizer.
        levels: Strides of the levels to distil; ``None``: all paired levels.
        schedule: Factor of the terms over training, one for all or one by term name.
        warmup_steps: Training calls over which all weights rise linearly from 0.
        total_steps: Training calls in the whole run, from which progress is counted.
        robust: Weigh instances, or cells, by the robust weights of a
            :class:`global_kd.GlobalKnowledgeLoss` in the same list.
        family: Whose published weights to take; ``None``: a :class:`global_kd.Distiller` finds out.
        seed: Of initial values and of everything random.
        distributed: Under ``torch.distributed``, average the gradients of this loss's parameters
            over the ranks, whether or not it is wrapped in ``DistributedDataParallel``.
        student_channels: Of each level. Left out, a :class:`global_kd.Distiller` finds out.
        teacher_channels: Of each level.
        strides: Of each level, finest first.
    """

    name: ClassVar[str]
    """Of the method in term names: ``kd_<name>`` or ``kd_<name>_<part>``."""
    needs: frozenset[str] = frozenset()
    """Facts without which it cannot work, of :data:`global_kd.step.FACTS`."""
    wishes: frozenset[str] = frozenset()
    """Facts that it uses where they can be had."""
    default_schedule: ClassVar[Mapping[str, Schedule]] = {}
    """By part; constant where not named."""
    keeps_prototypes: ClassVar[bool] = False
    """Whether it has a bank, a generator, :meth:`weights_of` boxes and :meth:`refresh`."""
    weighs_for_others: bool = False
    """Whether a loss beside it asks for its robust weights; a :class:`global_kd.Distiller` says."""

    adapters: nn.ModuleList
    bank: PrototypeBank
    generator: PrototypeGenerator

    def __init__(
        self,
        weights: Mapping[str, float | None],
        defaults: Mapping[str, Mapping[str, float]] | None = None,
        *,
        adapter: str = "match",
        levels: Sequence[float] | None = None,
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        robust: bool = False,
        family: str | None = None,
        seed: int = 0,
        distributed: bool = True,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        strides: Sequence[float] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        _check.options(type(self).__name__, unknown, self._options())
        for name, weight in weights.items():
            if weight is not None:
                _check.not_negative(name or "weight", weight)
        _check.one_of("adapter", adapter, ADAPTERS)
        _check.count("total_steps", total_steps)
        _check.count("warmup_steps", warmup_steps, or_none=False, least=0)
        _check.count("seed", seed, or_none=False, least=-(2**63))
        self.parts = tuple(weights)
        self.weights: dict[str, float] = {}  # resolved when built
        self._given = dict(weights)
        self._defaults = {} if defaults is None else defaults
        self._calibrated: dict[str, float] = {}
        self.adapter, self.seed, self.distributed = adapter, seed, distributed
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.robust = robust
        if robust:
            self.needs = self.needs | {"omega", "targets"}
        self._strides_wanted = None if levels is None else _strides(levels)
        self._family = family
        self.schedules = self._schedules(schedule)
        self.step = 0
        self._levels: Levels | None = None
        self._selected: list[int] = []
        self._mean_gradients: MeanGradients | None = None
        self._compiled: Callable[..., dict[str, Tensor]] | None = None
        self._last: dict[str, tuple[Tensor, float]] = {}  # value and factor of each term
        given = (student_channels, teacher_channels, strides)
        if any(x is not None for x in given) and any(x is None for x in given):
            raise ValueError(
                "student_channels, teacher_channels, strides: expected all three or none"
            )
        if given[0] is not None:
            self.build(Levels(*map(tuple, given)))  # type: ignore[arg-type]

    @classmethod
    def _options(cls) -> set[str]:
        """Names of what may be given to the constructor."""
        names = {
            name
            for method in cls.__mro__
            if issubclass(method, DistillLoss) and "__init__" in vars(method)
            for name, x in inspect.signature(method.__init__).parameters.items()
            if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
        }
        return names - {"self", "weights", "defaults"}

    # What a method writes -------------------------------------------------------------------

    def terms(self, step: Step) -> dict[str, Tensor]:
        """The raw parts of the loss, without weights; those without a weight may be left out."""
        raise NotImplementedError

    def make(self, levels: Levels) -> None:
        """Make parameters beyond the adapters. Options must be set before this class's
        constructor runs, which may build.
        """  # noqa: D205

    @property
    def adapts(self) -> bool:
        """Whether :meth:`terms` takes adapted maps; without them there are no adapters."""
        return True

    @property
    def uses_maps(self) -> bool:
        """Whether some term needs a gradient on the student's maps."""
        return True

    @property
    def uses_prototypes(self) -> bool:
        """Whether some term depends on prototypes."""
        return False

    @property
    def finest_scale(self) -> float | None:
        """Side in pixels up to whose double a box lies on the finest level; ``None``: by stride."""
        return None

    def refresh(self) -> None:
        """New prototypes, in losses that keep some."""
        raise NotImplementedError(f"{type(self).__name__} keeps no prototypes")

    def collect(self) -> None:
        """Take instances from the training stream from now on, in losses that keep prototypes."""
        raise NotImplementedError(f"{type(self).__name__} keeps no prototypes")

    def check_values(self, truth: Targets, proposals: Targets | None, images: int) -> None:
        """Look at the values of a step's boxes; makes an accelerator wait once."""
        for targets in (truth, proposals):
            if targets is not None:
                targets.validate(num_images=images)

    # What methods use -----------------------------------------------------------------------

    def wants(self, part: str) -> bool:
        """Whether a part has a weight."""
        return self.weights.get(part, 0.0) > 0

    def adapted(self, step: Step) -> list[Tensor]:
        """The student's maps in the teacher's channels."""
        return [applied(f, x) for f, x in zip(self.adapters, step.student, strict=True)]

    def box_weights(self, step: Step) -> Tensor | None:
        """Weights ``(L, R)`` of the targets' boxes; ``None`` where all weigh the same."""
        if not self.robust:
            return None
        if step.omega is None:
            raise ValueError("omega: expected robust weights (L, R), since robust=True")
        return step.omega.detach()

    def cell_weights(self, step: Step, level: int) -> Tensor | None:
        """Weights ``(B, H, W)`` of the cells of a level: 1 outside boxes, inside the box's own.

        Where boxes overlap, the largest. ``None`` where all weigh the same.
        """
        weights = self.box_weights(step)
        if weights is None or step.targets is None:
            return None
        batch, _, height, width = step.student[level].shape
        cells = box_cells(step.targets.boxes.detach(), step.strides[level], height, width)
        # Painted from 1 to 2: what no box touches stays 0.
        painted = paint_boxes(
            1 + weights[level], cells, step.targets.image_index, (batch, height, width)
        )
        return torch.where(painted > 0, painted - 1, 1.0)

    def row_weights(self, step: Step, box: Tensor) -> Tensor | None:
        """Weights ``(N,)`` of rows: that of their box on the level it belongs to by its size.

        1 for rows without one, where ``box (N,)`` is negative. ``None`` where all weigh the same.
        """
        weights = self.box_weights(step)
        if weights is None or step.targets is None:
            return None
        level = assign_levels(step.targets.boxes.detach(), step.strides)
        own = weights.gather(0, level[None])[0]
        # A last entry, 1, for those without a box.
        own = torch.cat([own, own.new_ones(1)])
        return own[box.clamp(min=-1)]

    def location_weights(self, step: Step, dense: Dense) -> Tensor | None:
        """Weights ``(B, N)`` of a head's locations: those of their cells.

        Locations of levels that the maps lack weigh 1. ``None`` where all weigh the same.
        """
        if self.box_weights(step) is None:
            return None
        rows = []
        for grid in dense.grids:
            cells = None
            if grid.stride in step.strides:
                cells = self.cell_weights(step, step.strides.index(grid.stride))
            if cells is None:
                cells = step.student[0].new_ones(len(dense.logits), grid.height, grid.width)
            down, right = grid.height - cells.shape[1], grid.width - cells.shape[2]
            cells = nn.functional.pad(cells, (0, right, 0, down), value=1.0)  # < 0 cuts
            rows.append(cells[..., None].expand(*cells.shape, grid.anchors).flatten(1))
        return torch.cat([x.to(rows[0].dtype) for x in rows], dim=1)

    # What is the same for all ---------------------------------------------------------------

    @property
    def prefix(self) -> str:
        """What the names of the terms begin with."""
        return f"kd_{self.name}"

    def term_name(self, part: str) -> str:
        """``kd_<name>_<part>``."""
        return f"{self.prefix}_{part}" if part else self.prefix

    @property
    def term_names(self) -> list[str]:
        """Of all parts that have a weight."""
        self._require_built()
        return [self.term_name(part) for part in self.parts if self.wants(part)]

    def _schedules(self, given: Any) -> dict[str, Schedule]:
        names = {part: self.term_name(part) for part in self.parts}
        found = {n: self.default_schedule.get(p, Schedule("constant")) for p, n in names.items()}
        if isinstance(given, Schedule):
            return dict.fromkeys(found, given)
        if not isinstance(given, Mapping | None) or not all(
            isinstance(x, Schedule) for x in (given or {}).values()
        ):
            raise TypeError(
                "schedule: expected a Schedule, or one for each term in a dictionary, but got "
                f"{given!r}"
            )
        for term in given or {}:
            _check.one_of("schedule", term, found)
        return found | dict(given or {})

    @torch.inference_mode(False)  # what is made here is trained
    def build(self, levels: Levels) -> None:
        """Make what depends on the two detectors. A second call with the same changes nothing.

        Raises:
            ValueError: Levels other than those it was built for.
        """
        if self._levels is not None:
            built, wanted = self._levels, levels
            if (built.student_channels, built.teacher_channels, built.strides) != (
                wanted.student_channels,
                wanted.teacher_channels,
                wanted.strides,
            ):
                raise ValueError(
                    "build: expected the levels the loss was built for (student channels, teacher "
                    f"channels, strides) {built.student_channels, built.teacher_channels}, "
                    f"{built.strides}, but got {wanted.student_channels, wanted.teacher_channels}, "
                    f"{wanted.strides}"
                )
            return
        wanted_strides = self._strides_wanted
        missing = set(wanted_strides or ()) - set(levels.strides)
        if missing:
            raise ValueError(
                f"levels: expected strides among those that student and teacher share, "
                f"{list(levels.strides)}, but got {sorted(missing)}"
            )
        self._levels = levels
        self._selected = [
            i
            for i, stride in enumerate(levels.strides)
            if wanted_strides is None or stride in wanted_strides
        ]
        mine = levels.at(self._selected)
        self._resolve_weights(mine)
        self.adapters = nn.ModuleList()
        # On the processor whatever the default device is: a GPU's generator has no seed of ours,
        # and drawing from it would move the student's own randomness.
        with torch.device("cpu"):
            if self.adapts:
                channels = mine.student_channels, mine.teacher_channels
                self.adapters = build_adapters(self.adapter, *channels, self.seed)
            self.make(mine)

    def _resolve_weights(self, levels: Levels) -> None:
        family = self._family or levels.family or "one-stage"
        usual = self._defaults.get(family, self._defaults.get("one-stage", {}))
        for part, weight in self._given.items():
            self.weights[part] = float(usual.get(part, 1.0) if weight is None else weight)
        self.weights |= self._calibrated  # a state was loaded before it was built

    @property
    def built(self) -> bool:
        """Whether levels and channels are known."""
        return self._levels is not None

    @property
    def strides(self) -> tuple[float, ...]:
        """Of the levels that are distilled."""
        self._require_built()
        assert self._levels is not None
        return tuple(self._levels.strides[i] for i in self._selected)

    @property
    def active(self) -> bool:
        """Whether any term has a weight."""
        self._require_built()
        return any(weight > 0 for weight in self.weights.values())

    @property
    def progress(self) -> float:
        """Fraction of ``total_steps`` done, in [0, 1]."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    def _require_built(self) -> None:
        if not self.built:
            raise RuntimeError(
                f"{type(self).__name__}: levels and channels are unknown; pass student_channels, "
                "teacher_channels and strides, call build(Levels(...)), or give the loss to a "
                "Distiller"
            )

    # Under `torch.compile(loss)` the counting runs as it is, else every step were another program;
    # what it calls, the mathematics, is compiled.
    @torch._compile._disable_dynamo(recursive=False)  # importing torch.compiler.disable is heavy
    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Targets | None = None,
        **facts: Any,
    ) -> dict[str, Tensor]:
        """The weighted, scheduled terms of one batch; in training mode also one step.

        Args:
            student: Maps ``(B, Cs, H, W)`` of the student, one per level it was built for.
            teacher: Maps ``(B, Ct, H, W)`` of the teacher, paired with them.
            targets: Ground truth, in pixels of the student's network input.
            **facts: Whatever the loss :attr:`needs` or :attr:`wishes` besides, under the names of
                :class:`global_kd.step.Step`.

        Returns:
            Scalars by name, ready to add to the detector's own losses; ``{}`` where all weights
            are 0.

        Raises:
            ValueError: Maps that do not fit each other or the levels, a fact that is missing.
        """
        raw = self._run(self._begin(student, teacher, targets, facts))
        terms: dict[str, Tensor] = self._end(raw)
        return terms

    @torch._compile._disable_dynamo
    def _begin(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Targets | None,
        facts: Mapping[str, Any],
    ) -> Step:
        self._require_built()
        assert self._levels is not None
        check_pyramids(student, teacher, self._levels.strides)
        step = Step(student, [t.detach() for t in teacher], self._levels.strides, targets, **facts)
        self._check_facts(step)
        if self.training:
            self._before_step()
        return step.at(self._selected)

    @torch._compile._disable_dynamo
    def _end(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms, factors = {}, {}
        for part, value in raw.items():
            if self.wants(part):
                name = self.term_name(part)
                factors[name] = self.factor(name)
                terms[name] = factors[name] * (self.weights[part] * value)
        if self.training:
            self._last = {name: (x.detach(), factors[name]) for name, x in terms.items()}
        self.step += self.training
        return terms

    def _run(self, step: Step) -> dict[str, Tensor]:
        return self.terms(step) if self._compiled is None else self._compiled(self, step)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the mathematics, :meth:`terms`; schedules and counting stay outside."""
        # Unbound, so that a copy of this loss runs on the copy's parameters.
        self._compiled = torch.compile(type(self).terms, *args, **options)

    def _check_facts(self, step: Step) -> None:
        for fact in sorted(self.needs):
            fields = {"boxes": "dense", "bins": "dense", "teacher_boxes": "teacher_dense"}
            field = fields.get(fact, fact)
            if fact == "priors":
                head = step.student_head
                if head is None or head.priors is None:
                    raise ValueError(
                        f"student_dense: {type(self).__name__} expected {FACTS[fact]}, but got None"
                    )
            elif getattr(step, field, None) is None:
                raise ValueError(
                    f"{field}: {type(self).__name__} expected {FACTS[field]}, but got None"
                )

    def factor(self, name: str) -> float:
        """Of a term at this step: schedule and warm-up."""
        factor = self.schedules[name](self.progress)
        return factor * min(1.0, self.step / self.warmup_steps) if self.warmup_steps else factor

    def at_full_weight(self) -> None:
        """Without schedules and warm-up from now on."""
        self.schedules = dict.fromkeys(self.schedules, Schedule("constant"))
        self.warmup_steps = 0

    def _join_ranks(self) -> None:
        """Average the gradients of this loss's parameters over the ranks, if there are several."""
        # Sharded parameters are somebody else's to reduce.
        mine = [p for p in self.parameters() if not hasattr(p, "device_mesh")]
        joined = self._mean_gradients
        if joined is None or list(map(id, joined.parameters)) != list(map(id, mine)):
            ranks = Ranks(self.distributed)
            if ranks.size == 1:
                return
            self._agree(ranks)
            joined = self._mean_gradients = MeanGradients(mine, ranks)
        joined.begin()

    def _agree(self, ranks: Ranks) -> None:
        """Once, when several ranks meet: take over rank 0's choices."""

    def _before_step(self) -> None:
        self._join_ranks()
        name = type(self).__name__
        if self.step == 0 and self.total_steps is None:
            moving = {n: self.schedules[n] for n in self.term_names}
            late = [n for n, s in moving.items() if s.start or s.warmup]
            if late:
                raise ValueError(
                    f"total_steps: expected the number of training calls, since the schedule of "
                    f"{', '.join(late)} begins at 0 and would stay there, but got None"
                )
            decaying = [n for n, s in moving.items() if s != Schedule("constant")]
            if decaying:
                warnings.warn(
                    f"{name}: total_steps is not given, so the weights of "
                    f"{', '.join(decaying)} stay constant; pass total_steps=epochs * len(loader)",
                    stacklevel=3,
                )
        if self.step == self.total_steps:
            over = [n for n in self.term_names if self.schedules[n](1.0) == 0]
            if over:
                warnings.warn(
                    f"{name}: training goes on after total_steps={self.total_steps} "
                    f"calls, where the weights of {', '.join(over)} are 0; count the calls of the "
                    "whole run: epochs * len(loader)",
                    stacklevel=3,
                )

    def calibrate(self, weights: Mapping[str, float]) -> None:
        """Fix the weights of some parts, by part; they are kept in ``state_dict``."""
        for part, weight in weights.items():
            _check.one_of("weights", part, self.parts)
            _check.not_negative(part or "weight", weight)
        self._calibrated |= weights
        self.weights |= weights

    @torch.no_grad()
    def telemetry(self, detection_loss: Tensor | float | None = None) -> dict[str, float]:
        """Plain numbers about the training so far, for TensorBoard or a log.

        Calls in training mode leave them on the device; only reading them waits for it.

        Args:
            detection_loss: The detector's own loss at the last step, a scalar; gives the shares.

        Returns:
            By name: ``step``, calls in training mode so far; ``term/<name>``, each term of the last
            call, weighted and scheduled; ``schedule/<name>``, the factor in it; ``share/<name>``,
            the term divided by ``detection_loss``, NaN where that is 0.

        Raises:
            TypeError: A detection loss that is no number, such as a dictionary of losses.
            ValueError: A tensor of more than one number.
        """
        self._require_built()
        if detection_loss is not None:
            _check.scalar("detection_loss", detection_loss)
        numbers = {"step": float(self.step)}
        values = {name: float(x) for name, (x, _) in self._last.items()}
        numbers |= {f"term/{name}": x for name, x in values.items()}
        numbers |= {f"schedule/{name}": factor for name, (_, factor) in self._last.items()}
        if detection_loss is not None:
            given = detection_loss
            detection = given.item() if isinstance(given, Tensor) else float(given)
            numbers |= {
                f"share/{name}": x / detection if detection else math.nan
                for name, x in values.items()
            }
        return numbers

    def weigh(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], targets: Targets
    ) -> Tensor:
        """Robust weights ``(L, R)``, in losses that have prototypes."""
        raise NotImplementedError(f"{type(self).__name__} keeps no prototypes")

    def weights_of(self, step: Step) -> Tensor:
        """Robust weights ``(L, R)`` of a step's ground truth, in losses that have prototypes."""
        raise NotImplementedError(f"{type(self).__name__} keeps no prototypes")

    def get_extra_state(self) -> Tensor:
        """The step and the calibrated weights (-1: none), for ``state_dict``."""
        weights = [self._calibrated.get(part, -1.0) for part in self.parts]
        return torch.tensor([float(self.step), *weights], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Continue at the saved step, with the calibrated weights."""
        step, *weights = state.tolist()
        self.step = int(step)
        if len(weights) != len(self.parts):
            raise ValueError(
                f"state_dict: expected {len(self.parts)} weights ({', '.join(self.parts)}), but "
                f"got {len(weights)}"
            )
        known = {p: w for p, w in zip(self.parts, weights, strict=True) if w >= 0}
        self._calibrated = known
        if self.built:
            self.weights |= known

    def extra_repr(self) -> str:
        shown = {part or "weight": weight for part, weight in (self.weights or self._given).items()}
        return ", ".join(f"{name}={x}" for name, x in shown.items())
