"""What every distillation loss has: facts that it needs, adapters, a step, ranks.

A method's file holds its paper's sentences: :meth:`DistillLoss.terms` turns a
:class:`global_kd.step.Step` into raw named terms. All else is here, and weights, schedules and
telemetry of terms in ``weighted.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import _check
from ..prototypes.bank import PrototypeBank
from ..prototypes.generator import PrototypeGenerator
from ..pyramid import ADAPTERS, build_adapters, check_pyramids, default_dtype
from ..ranks import MeanGradients, Ranks
from ..schedules import Schedule
from ..step import FACTS, Dense, Step, field_of
from ..targets import Targets
from . import weighing
from .levels import Levels as Levels
from .options import Common as Common
from .options import all_or_none, options_of, strides_of
from .weighted import WeightedTerms

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack


def applied(module: nn.Module, x: Tensor) -> Tensor:
    """What a module of a loss makes of a map, which may be of another dtype."""
    own = list(module.parameters())  # torch 2.4 traces no next() with a default
    weight = own[0] if own else x
    # Maps of an autocast forward may arrive outside of it.
    cast = not torch.is_autocast_enabled(x.device.type) and x.dtype != weight.dtype
    return module(x.to(weight.dtype) if cast else x)  # type: ignore[no-any-return]


class DistillLoss(WeightedTerms):
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

    needs: frozenset[str] = frozenset()
    """Facts without which it cannot work, of :data:`global_kd.step.FACTS`."""
    wishes: frozenset[str] = frozenset()
    """Facts that it uses where they can be had."""
    keeps_prototypes: ClassVar[bool] = False
    """Whether it has a bank, a generator, :meth:`weights_of` boxes and :meth:`refresh`."""
    weighs_for_others: bool = False
    """Whether a loss beside it asks for its robust weights; a :class:`global_kd.Distiller` says."""

    __call__: Callable[..., dict[str, Tensor]]  # nn.Module says Any
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
        _check.options(type(self).__name__, unknown, self._options())
        _check.one_of("adapter", adapter, ADAPTERS)
        _check.count("seed", seed, or_none=False, least=-(2**63))
        super().__init__(
            weights,
            defaults,
            schedule=schedule,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        )
        self.adapter, self.seed, self.distributed = adapter, seed, distributed
        self.robust = robust
        if robust:
            self.needs = self.needs | {"omega", "targets"}
        self._strides_wanted = None if levels is None else strides_of(levels)
        self._family = family
        self._levels: Levels | None = None
        self._selected: list[int] = []
        self._mean_gradients: MeanGradients | None = None
        self._compiled: Callable[..., dict[str, Tensor]] | None = None
        given = student_channels, teacher_channels, strides
        if all_or_none(*given):
            self.build(Levels(*map(tuple, given)))  # type: ignore[arg-type]

    @classmethod
    def _options(cls) -> set[str]:
        """Names of what may be given to the constructor."""
        return options_of(cls, DistillLoss)

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

    def check_pair(self, dry: Callable[[frozenset[str]], Step]) -> None:
        """Once, when a Distiller is made: an error where the options do not fit the detectors.

        Args:
            dry: Gives the step of an example without ground truth, with the facts named; it runs
                both detectors.
        """

    def check_values(self, truth: Targets, proposals: Targets | None, images: int) -> None:
        """Look at the values of a step's boxes; makes an accelerator wait once."""
        for targets in (truth, proposals):
            if targets is not None:
                targets.validate(num_images=images)

    # What methods use -----------------------------------------------------------------------

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
        return weighing.of_cells(step, weights, level)

    def row_weights(self, step: Step, box: Tensor) -> Tensor | None:
        """Weights ``(N,)`` of rows: that of their box on the level it belongs to by its size.

        1 for rows without one, where ``box (N,)`` is negative. ``None`` where all weigh the same.
        """
        weights = self.box_weights(step)
        if weights is None or step.targets is None:
            return None
        return weighing.of_rows(step, weights, box)

    def location_weights(self, step: Step, dense: Dense) -> Tensor | None:
        """Weights ``(B, N)`` of a head's locations: those of their cells.

        Locations of levels that the maps lack weigh 1. ``None`` where all weigh the same.
        """
        weights = self.box_weights(step)
        return None if weights is None else weighing.of_locations(step, weights, dense)

    # What is the same for all ---------------------------------------------------------------

    @torch.inference_mode(False)  # what is made here is trained
    def build(self, levels: Levels) -> None:
        """Make what depends on the two detectors. A second call with the same changes nothing.

        Raises:
            ValueError: Levels other than those it was built for.
        """
        if self._levels is not None:
            self._levels.refuse_other(levels)
            return
        self._levels, self._selected = levels, levels.of_strides(self._strides_wanted)
        mine = levels.at(self._selected)
        self._resolve_weights(self._family or levels.family or "one-stage")
        self.adapters = nn.ModuleList()
        # On the processor whatever the default device is: a GPU's generator has no seed of ours,
        # and drawing from it would move the student's own randomness. Other dtypes draw other
        # values, and in half precision an optimizer's small steps would be lost.
        with torch.device("cpu"), default_dtype(torch.float32):
            if self.adapts:
                channels = mine.student_channels, mine.teacher_channels
                self.adapters = build_adapters(self.adapter, *channels, self.seed)
            self.make(mine)

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

    def _run(self, step: Step) -> dict[str, Tensor]:
        return self.terms(step) if self._compiled is None else self._compiled(self, step)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the mathematics, :meth:`terms`; schedules and counting stay outside."""
        # Unbound, so that a copy of this loss runs on the copy's parameters.
        self._compiled = torch.compile(type(self).terms, *args, **options)

    def _check_facts(self, step: Step) -> None:
        for fact in sorted(self.needs):
            if not step.has(fact):
                field = field_of(fact)
                what = FACTS[fact if fact == "priors" else field]
                raise ValueError(f"{field}: {type(self).__name__} expected {what}, but got None")

    def _join_ranks(self) -> None:
        """Average the gradients of this loss's parameters over the ranks, if there are several."""
        if not self.distributed:
            return
        # Sharded parameters are somebody else's to reduce.
        mine = [p for p in self.parameters() if not hasattr(p, "device_mesh")]
        joined = self._mean_gradients
        if joined is None or list(map(id, joined.parameters)) != list(map(id, mine)):
            ranks = Ranks()
            if ranks.size == 1:
                return
            self._agree(ranks)
            joined = self._mean_gradients = MeanGradients(mine, ranks)
        joined.begin()

    def _agree(self, ranks: Ranks) -> None:
        """Once, when several ranks meet: take over rank 0's choices."""

    def _before_step(self) -> None:
        self._join_ranks()
        self._check_pace()

    def weigh(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], targets: Targets
    ) -> Tensor:
        """Robust weights ``(L, R)``, in losses that have prototypes."""
        raise NotImplementedError(f"{type(self).__name__} keeps no prototypes")

    def weights_of(self, step: Step) -> Tensor:
        """Robust weights ``(L, R)`` of a step's ground truth, in losses that have prototypes."""
        raise NotImplementedError(f"{type(self).__name__} keeps no prototypes")
