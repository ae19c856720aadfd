"""The whole method: adapters, prototypes from the training stream, RDM, schedule."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..instances import pool_levels
from ..prototypes.bank import PrototypeBank
from ..prototypes.generator import PrototypeGenerator
from ..pyramid import ADAPTERS, build_adapters, check_pyramids
from ..ranks import MeanGradients, Ranks
from ..schedules import Schedule
from ..targets import Targets
from .robust_distill import RobustDistillLoss

TERMS = ("kd_foreground", "kd_background", "kd_relation", "kd_logits")


class GlobalKnowledgeLoss(nn.Module):
    """Distilling object detectors with global knowledge (Tang et al., ECCV 2022).

    Call it on paired feature maps in any training loop, or let a :class:`global_kd.Distiller` do
    so. It counts its calls in training mode (:attr:`step`), collects the instances that pass, and
    every ``refresh_every`` calls makes new prototypes of those seen since; until the first
    refresh, omega is 1 and the relation term 0.

    Args:
        num_classes: ``K``; labels lie in ``[0, K)`` (torchvision and its background class: 91 for
            COCO).
        student_channels: Of each level. Left out, a :class:`global_kd.Distiller` finds out.
        teacher_channels: Of each level.
        strides: Of each level, finest first.
        adapter: ``"conv3x3"`` (paper), ``"conv1x1"`` or ``"identity"``; its parameters belong into
            the optimizer.
        schedule: Factor of the terms over training, one :class:`global_kd.Schedule` for all or one
            per term name. Default, as in the paper: linear decay of imitation and relation, soft
            labels constant.
        total_steps: Training calls in the whole run, from which progress is counted. Without it
            progress stays 0: nothing decays.
        refresh_every: Training calls between refreshes, usually one epoch; ``None``: only
            :meth:`refresh` and :meth:`global_kd.Distiller.refresh` make prototypes.
        num_prototypes: Per level and class, see :class:`global_kd.PrototypeGenerator` for this and
            the next four.
        alpha: Agreement of the two spaces in the pursuit.
        min_side: Smallest instance side, pixels of the network input.
        max_instances: Sample per class.
        seed: Of the sample and of the adapters' initial values.
        distributed: Under ``torch.distributed``, make prototypes from the instances of all ranks
            and average the adapters' gradients over them, whether or not this loss is wrapped in
            ``DistributedDataParallel``. Every rank must then call the loss equally often.
        class_names: Of each class, the background included if it is counted; kept in the bank, so
            that it can be read and one for other classes is refused.
        **rdm: The terms' weights and switches, see :class:`global_kd.RobustDistillLoss`; the
            paper's are ``**global_kd.PAPER``.

    Example:
        >>> import torch
        >>> from global_kd import GlobalKnowledgeLoss, Targets
        >>> loss = GlobalKnowledgeLoss(
        ...     3,
        ...     student_channels=[8],
        ...     teacher_channels=[16],
        ...     strides=[8],
        ...     total_steps=100,
        ...     refresh_every=10,
        ... )
        >>> student, teacher = [torch.randn(2, 8, 12, 12)], [torch.randn(2, 16, 12, 12)]
        >>> targets = Targets.from_list(
        ...     [
        ...         {"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0]]), "labels": torch.tensor([1])},
        ...         {"boxes": torch.tensor([[0.0, 0.0, 40.0, 90.0]]), "labels": torch.tensor([2])},
        ...     ]
        ... )
        >>> sorted(loss(student, teacher, targets))
        ['kd_background', 'kd_foreground']
    """

    rdm: RobustDistillLoss
    bank: PrototypeBank
    adapters: nn.ModuleList
    _omega: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        strides: Sequence[float] | None = None,
        adapter: str = "conv3x3",
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        total_steps: int | None = None,
        refresh_every: int | None = 1000,
        num_prototypes: int = 10,
        alpha: float = 10.0,
        min_side: float = 30.0,
        max_instances: int = 800,
        seed: int = 0,
        distributed: bool = True,
        class_names: Sequence[str] | None = None,
        **rdm: Any,
    ) -> None:
        super().__init__()
        for name, value in (("total_steps", total_steps), ("refresh_every", refresh_every)):
            if value is not None:
                _check.positive(name, value)
        _check.one_of("adapter", adapter, ADAPTERS)
        if isinstance(schedule, Schedule):
            schedule = dict.fromkeys(TERMS, schedule)
        if not isinstance(schedule, Mapping | None) or not all(
            isinstance(x, Schedule) for x in (schedule or {}).values()
        ):
            raise TypeError(
                "schedule: expected a Schedule, or one for each term in a dictionary, but got "
                f"{schedule!r}"
            )
        for term in schedule or {}:
            _check.one_of("schedule", term, TERMS)
        defaults = dict.fromkeys(TERMS, Schedule("linear")) | {"kd_logits": Schedule("constant")}
        self.schedules: dict[str, Schedule] = defaults | dict(schedule or {})
        self.adapter, self.seed = adapter, seed
        self.total_steps, self.refresh_every = total_steps, refresh_every
        self.step = 0
        self.generator = PrototypeGenerator(
            num_classes,
            num_prototypes,
            alpha=alpha,
            min_side=min_side,
            max_instances=max_instances,
            seed=seed,
            distributed=distributed,
        )
        self._mean_gradients: MeanGradients | None = None
        _check.class_names(class_names, num_classes)
        self._class_names = class_names
        self._rdm_options = rdm
        RobustDistillLoss((1.0,), **rdm)  # a wrong option is reported here, not at build time
        self._levels: tuple[tuple[float, ...], ...] | None = None
        self._last: dict[str, tuple[Tensor, float]] = {}  # value and factor of each term
        given = (student_channels, teacher_channels, strides)
        if all(x is not None for x in given):
            self.build(*given)  # type: ignore[arg-type]
        elif any(x is not None for x in given):
            raise ValueError(
                "student_channels, teacher_channels, strides: expected all three or none"
            )

    def build(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        strides: Sequence[float],
        *,
        activation: str | None = None,
    ) -> None:
        """Make what depends on the two detectors: adapters, an empty bank, the RDM.

        A second call with the same levels changes nothing. ``activation`` is used unless one was
        given to the constructor.

        Raises:
            ValueError: Levels other than those it was built for.
        """
        levels = (tuple(student_channels), tuple(teacher_channels), tuple(map(float, strides)))
        if len({len(x) for x in levels}) != 1:
            raise ValueError(
                "student_channels, teacher_channels, strides: expected one entry per level each, "
                f"but got {levels}"
            )
        if self._levels is not None:
            if levels != self._levels:
                raise ValueError(
                    "build: expected the levels the loss was built for (student channels, teacher "
                    f"channels, strides) {self._levels}, but got {levels}"
                )
            return
        self._levels = levels
        options = {"activation": activation} if activation is not None else {}
        self.rdm = RobustDistillLoss(strides, **(options | self._rdm_options))
        self.adapters = nn.ModuleList()  # none where nothing is imitated
        if self.rdm.imitates:
            channels = student_channels, teacher_channels
            self.adapters = build_adapters(self.adapter, *channels, self.seed)
        self.bank = PrototypeBank(
            len(strides),
            self.generator.num_classes,
            self.generator.num_prototypes,
            max(student_channels),
            max(teacher_channels),
            strides=strides,
            class_names=self._class_names,
        )
        # Sum and number of omegas by level and label since the last telemetry(). The outer columns
        # take labels outside [0, K), which nobody checks on an accelerator.
        tally = torch.zeros(2, len(strides), self.generator.num_classes + 2)
        self.register_buffer("_omega", tally, persistent=False)

    @property
    def built(self) -> bool:
        """Whether levels and channels are known."""
        return self._levels is not None

    @property
    def active(self) -> bool:
        """Whether any term has a weight."""
        self._require_built()
        return bool(self._weighted())

    @property
    def progress(self) -> float:
        """Fraction of ``total_steps`` done, in [0, 1]."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    def _weighted(self) -> list[str]:
        """Terms with a weight."""
        rdm = self.rdm
        weights = (rdm.foreground, rdm.background, rdm.relation, rdm.logits)
        return [name for name, weight in zip(TERMS, weights, strict=True) if weight > 0]

    def _require_built(self) -> None:
        if not self.built:
            raise RuntimeError(
                "GlobalKnowledgeLoss: levels and channels are unknown; pass student_channels, "
                "teacher_channels and strides, call build(...), or give the loss to a Distiller"
            )

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Targets,
        *,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        logit_box: Tensor | None = None,
        instances: Targets | None = None,
    ) -> dict[str, Tensor]:
        """The scheduled terms of one batch; in training mode also one step of the bookkeeping.

        Args:
            student: Maps ``(B, Cs, H, W)`` of the student, one per level.
            teacher: Maps ``(B, Ct, H, W)`` of the teacher, paired with them.
            targets: Boxes on which knowledge is transferred.
            student_logits: See :class:`global_kd.RobustDistillLoss` for this and the next two.
            teacher_logits: Of the same rows.
            logit_box: Index into ``targets`` of each row.
            instances: Boxes from which prototypes are made, where they differ from ``targets``
                (ground truth beside proposals).

        Returns:
            Scalars by name, ready to add to the detector's own losses.
        """
        self._require_built()
        check_pyramids(student, teacher, self.rdm.strides)
        if targets.boxes.device.type == "cpu" and not torch.compiler.is_compiling():
            targets.validate(num_classes=self.generator.num_classes, num_images=len(student[0]))
        if self.training:
            self._before_step()
        rows = None
        if self.rdm.uses_prototypes:
            rows = self._rows(student, teacher, targets, instances)
        terms, omega = self.rdm(
            student,
            teacher,
            targets,
            self.bank,
            adapted=self._adapt(student),
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            logit_box=logit_box,
            rows=rows,
            return_weights=True,
        )
        factors = {name: self.schedules[name](self.progress) for name in terms}
        terms = {name: factors[name] * x for name, x in terms.items()}
        if self.training:
            self._last = {name: (x.detach(), factors[name]) for name, x in terms.items()}
            if self.rdm.uses_prototypes:
                self._tally(omega, targets.labels)
        self.step += self.training
        return terms

    @torch.no_grad()
    def _tally(self, omega: Tensor, labels: Tensor) -> None:
        """For :meth:`telemetry`: stays on the device, and nothing that trains reads it."""
        seen = omega.isfinite()  # not so in a step that overflowed
        rows = torch.stack([torch.where(seen, omega, 0).to(self._omega), seen.to(self._omega)])
        column = labels.clamp(-1, self.generator.num_classes) + 1
        self._omega.index_add_(2, column, rows)

    def _adapt(self, student: Sequence[Tensor]) -> list[Tensor] | None:
        """The student's maps in the teacher's channels; ``None`` where nothing is imitated."""
        if not self.rdm.imitates:
            return None
        adapted = []
        for adapt, x in zip(self.adapters, student, strict=True):
            weight = next(adapt.parameters(), x)
            # Maps of an autocast forward may arrive outside of it.
            cast = not torch.is_autocast_enabled(x.device.type) and x.dtype != weight.dtype
            adapted.append(adapt(x.to(weight.dtype) if cast else x))
        return adapted

    def _join_ranks(self) -> None:
        """Average the adapters' gradients over the ranks, where there are several."""
        # Sharded parameters are somebody else's to reduce.
        mine = [p for p in self.parameters() if not hasattr(p, "device_mesh")]
        joined = self._mean_gradients
        if joined is None or list(map(id, joined.parameters)) != list(map(id, mine)):
            ranks = Ranks(self.generator.distributed)
            if ranks.size == 1:
                return
            self.generator.seed = ranks.tell(self.generator.seed)[0]
            joined = self._mean_gradients = MeanGradients(mine, ranks)
        joined.begin()

    def _before_step(self) -> None:
        self._join_ranks()
        if self.step == 0 and self.total_steps is None:
            moving = {n: s for n, s in self.schedules.items() if n in self._weighted()}
            late = [n for n, s in moving.items() if s.start or s.warmup]
            if late:
                raise ValueError(
                    f"total_steps: expected the number of training calls, since the schedule of "
                    f"{', '.join(late)} begins at 0 and would stay there, but got None"
                )
            decaying = [n for n, s in moving.items() if s != Schedule("constant")]
            if decaying:
                warnings.warn(
                    f"GlobalKnowledgeLoss: total_steps is not given, so the weights of "
                    f"{', '.join(decaying)} stay constant; pass total_steps=epochs * len(loader)",
                    stacklevel=3,
                )
        if self.step == self.total_steps:
            over = [n for n in self._weighted() if self.schedules[n](1.0) == 0]
            if over:
                warnings.warn(
                    f"GlobalKnowledgeLoss: training goes on after total_steps={self.total_steps} "
                    f"calls, where the weights of {', '.join(over)} are 0; count the calls of the "
                    "whole run: epochs * len(loader)",
                    stacklevel=3,
                )
        if self.refresh_every and self.step and self.step % self.refresh_every == 0:
            self.refresh()

    def _rows(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Targets,
        instances: Targets | None,
    ) -> tuple[Tensor, Tensor]:
        """Pooled rows of the targets; those of the instances go to the generator."""
        strides, count = self.rdm.strides, len(targets)
        collect = self.training and self.refresh_every is not None
        everything = targets
        if collect and instances is not None:
            everything = Targets(
                torch.cat([targets.boxes, instances.boxes.to(targets.boxes)]),
                torch.cat([targets.labels, instances.labels]),
                torch.cat([targets.image_index, instances.image_index]),
            )
        with torch.set_grad_enabled(self.rdm.relation > 0 and torch.is_grad_enabled()):
            s = pool_levels(student, everything, strides)
        with torch.no_grad():
            t = pool_levels(teacher, everything, strides)
        if collect and instances is not None:
            self.generator.add(s[:, count:], t[:, count:], instances)
        elif collect:
            self.generator.add(s, t, targets)
        return s[:, :count], t[:, :count]

    def refresh(self) -> None:
        """New prototypes from the rows collected since the last refresh, on all ranks.

        A (level, class) of which none was seen keeps its old ones. Without any rows nothing
        happens. Collective under ``torch.distributed``, see :class:`global_kd.PrototypeGenerator`.
        """
        self._require_built()
        bank = self.generator.generate_if_any()
        if bank is not None:
            self.bank.update(bank)
            if not self.bank.valid.any():
                warnings.warn(
                    "GlobalKnowledgeLoss: no prototypes, so omega stays 1 and kd_relation 0: of "
                    "the instances seen so far none is larger than "
                    f"min_side={self.generator.min_side:g} pixels both ways; pass a smaller "
                    "min_side",
                    stacklevel=2,
                )
        self.generator.reset()

    @torch.no_grad()
    def telemetry(self, detection_loss: Tensor | float | None = None) -> dict[str, float]:
        """Plain numbers about the training so far, for TensorBoard or a log.

        Calls in training mode leave them on the device; only reading them waits for it. Read every
        fifty steps or so. Nothing of this is in ``state_dict``, and training does not depend on it.

        Args:
            detection_loss: The detector's own loss at the last step, a scalar; gives the shares.

        Returns:
            By name, ready for a writer:

            - ``step``: calls in training mode so far;
            - ``term/<name>``: each term of the last call, scheduled;
            - ``schedule/<name>``: the factor in it;
            - ``share/<name>``: the term divided by ``detection_loss``; NaN where that is 0;
            - ``omega/stride_<s>``, ``omega/class_<k>``: mean robust weight of the boxes since the
              last reading, on a level, and of a class over all levels; without the levels and
              classes that had none. Read, they start anew;
            - ``prototypes``: in the bank, over all levels and classes;
            - ``sample``: instances collected for the next refresh.

        Raises:
            TypeError: A detection loss that is no number, such as a dictionary of losses.
            ValueError: A tensor of more than one number.

        Example:
            >>> import torch
            >>> from global_kd import GlobalKnowledgeLoss, Targets
            >>> loss = GlobalKnowledgeLoss(
            ...     3, student_channels=[8], teacher_channels=[8], strides=[8], total_steps=4
            ... )
            >>> maps = [torch.rand(1, 8, 12, 12)]
            >>> boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0]])
            >>> _ = loss(maps, maps, Targets(boxes, torch.tensor([2]), torch.tensor([0])))
            >>> numbers = loss.telemetry()
            >>> list(numbers)[-4:]
            ['omega/stride_8', 'omega/class_2', 'prototypes', 'sample']
            >>> numbers["step"], numbers["omega/class_2"], numbers["prototypes"], numbers["sample"]
            (1.0, 1.0, 0.0, 1.0)
        """
        self._require_built()
        if detection_loss is not None:
            _check.scalar("detection_loss", detection_loss)
        numbers = {"step": float(self.step)}
        values = {name: float(x) for name, (x, _) in self._last.items()}
        numbers |= {f"term/{name}": x for name, x in values.items()}
        numbers |= {f"schedule/{name}": factor for name, (_, factor) in self._last.items()}
        if detection_loss is not None:
            detection = torch.as_tensor(detection_loss).detach().item()
            numbers |= {
                f"share/{name}": x / detection if detection else math.nan
                for name, x in values.items()
            }
        total, count = self._omega[:, :, 1:-1].cpu().double()
        self._omega.zero_()
        strides = [f"stride_{stride:g}" for stride in self.rdm.strides]
        classes = [f"class_{label}" for label in range(self.generator.num_classes)]
        for dim, names in ((1, strides), (0, classes)):
            sums, counts = total.sum(dim).tolist(), count.sum(dim).tolist()
            for name, x, n in zip(names, sums, counts, strict=True):
                if n:
                    numbers[f"omega/{name}"] = x / n
        numbers["prototypes"] = float(self.bank.valid.sum())
        numbers["sample"] = float(len(self.generator))
        return numbers

    def weigh(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], targets: Targets
    ) -> Tensor:
        """Robust weights ``(L, R)`` of the boxes under the current prototypes; no side effects."""
        self._require_built()
        return self.rdm.weigh(student, teacher, targets, self.bank)

    def get_extra_state(self) -> dict[str, Any]:
        """The step, for ``state_dict``."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue at the saved step."""
        self.step = int(state["step"])

    def extra_repr(self) -> str:
        return f"step={self.step}, total_steps={self.total_steps}, refresh={self.refresh_every}"
