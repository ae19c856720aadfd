"""The whole method: adapters, prototypes from the training stream, RDM, schedule."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..instances import pool_levels
from ..prototypes.bank import PrototypeBank
from ..prototypes.generator import PrototypeGenerator
from ..prototypes.plain import moved
from ..ranks import Ranks
from ..robust import confidence_weights
from ..schedules import Schedule
from ..step import Positives, Step
from ..targets import Targets
from .base import DistillLoss, Levels
from .options import all_or_none
from .robust_distill import LabelOptions, RobustDistillLoss

_REFRESH_EVERY = 1000  # the default
_RELEASED_SIDE = 30.0  # pixels, where the finest level has stride 8
_NAMED = 10  # classes without prototypes that are listed by name


class GlobalKnowledgeLoss(DistillLoss):
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
        min_side: Smallest instance side, pixels of the network input. ``None``: 3.75 cells of the
            finest level, which is 30 pixels at stride 8; the released code takes 30 pixels of the
            original image.
        max_instances: Sample per class.
        seed: Of the sample and of the adapters' initial values.
        distributed: Under ``torch.distributed``, make prototypes from the instances of all ranks
            and average the adapters' gradients over them, whether or not this loss is wrapped in
            ``DistributedDataParallel``. Every rank must then call the loss equally often.
        boxes: On which boxes a two-stage student learns: ``"proposals"``, its own sampled
            positives (paper), or ``"ground_truth"``. Dense detectors use the ground truth.
        class_names: Of each class, the background included if it is counted; kept in the bank, so
            that it can be read and one for other classes is refused.
        **rdm: The terms' weights and options, see :class:`global_kd.RobustDistillLoss`; the
            paper's are ``**global_kd.PAPER``. With all weights 0 there are no terms, and what is
            left is omega for the losses beside it that ask for it with ``robust=True``. With
            ``weights="confidence"`` an instance weighs the teacher's probability of its class
            instead of omega (a box the largest of its positives); that needs class logits of the
            teacher on the student's positives, and prototypes are for the relation term only.

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

    name = "global_knowledge"
    needs = frozenset({"targets"})
    keeps_prototypes = True
    default_schedule = dict.fromkeys(("foreground", "background", "relation"), Schedule("linear"))

    rdm: RobustDistillLoss
    bank: PrototypeBank
    generator: PrototypeGenerator
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
        refresh_every: int | None = _REFRESH_EVERY,
        num_prototypes: int = 10,
        alpha: float = 10.0,
        min_side: float | None = None,
        max_instances: int = 800,
        seed: int = 0,
        distributed: bool = True,
        boxes: str = "proposals",
        class_names: Sequence[str] | None = None,
        **rdm: Any,
    ) -> None:
        if isinstance(num_classes, (list, tuple)):
            raise TypeError(
                f"num_classes: expected a whole number, but got {num_classes!r}; write "
                f"num_classes={len(num_classes)}, class_names={num_classes!r}"
            )
        _check.count("num_classes", num_classes, or_none=False)
        _check.count("refresh_every", refresh_every)
        _check.options(type(self).__name__, rdm, self._options())
        _check.one_of("boxes", boxes, ("proposals", "ground_truth"))
        probe = RobustDistillLoss((1.0,), **rdm)  # a wrong option is reported here
        weights: dict[str, float | None] = {**probe.weights}
        given = (student_channels, teacher_channels, strides)
        built = all_or_none(*given)
        super().__init__(
            weights,
            adapter=adapter,
            schedule=schedule,
            total_steps=total_steps,
            seed=seed,
            distributed=distributed,
        )
        self.boxes, self.refresh_every = boxes, refresh_every
        self.wishes = frozenset({"positives"} if probe.logits > 0 else ())
        if boxes == "proposals":
            self.wishes |= {"proposals"}
        if probe.robust_by == "confidence":
            self.needs = self.needs | {"positives"}
        self.generator = PrototypeGenerator(
            num_classes,
            num_prototypes,
            alpha=alpha,
            min_side=_RELEASED_SIDE if min_side is None else min_side,
            max_instances=max_instances,
            seed=seed,
            distributed=distributed,
        )
        _check.class_names(class_names, num_classes)
        late = refresh_every and total_steps and refresh_every >= total_steps
        # A default is nobody's mistake; the doctor tells of it, too.
        if late and refresh_every != _REFRESH_EVERY and probe.uses_prototypes:
            warnings.warn(
                f"refresh_every: expected less than total_steps={total_steps}, but got "
                f"{refresh_every}: no prototypes come from the training stream, so omega stays 1 "
                "and kd_relation 0; pass refresh_every=len(loader), or None and call "
                "kd.refresh(loader) before the first epoch",
                stacklevel=2,
            )
        self._class_names = class_names
        self._rdm_options, self._min_side = rdm, min_side
        if built:
            self.build(Levels(*map(tuple, given)))  # type: ignore[arg-type]

    @classmethod
    def _options(cls) -> set[str]:
        own = {"warmup_steps", "robust", "family"}  # of the base, not taken here
        return super()._options() - own | set(signature(RobustDistillLoss).parameters) - {"strides"}

    @property
    def prefix(self) -> str:
        return "kd"

    @property
    def adapts(self) -> bool:
        return self.wants("foreground") or self.wants("background")

    def make(self, levels: Levels) -> None:
        labels = self._rdm_options.get("label_options", LabelOptions())
        if labels.activation is None:
            labels = replace(labels, activation=levels.activation)
        options = self._rdm_options | {"label_options": labels}
        self.rdm = RobustDistillLoss(levels.strides, **options)
        self.rdm.weights = self.weights
        self.bank = PrototypeBank(
            len(levels.strides),
            self.generator.num_classes,
            self.generator.num_prototypes,
            max(levels.student_channels),
            max(levels.teacher_channels),
            strides=levels.strides,
            class_names=self._class_names,
        )
        # Sum and number of omegas by level and label since the last telemetry(). The outer columns
        # take labels outside [0, K), which nobody checks on an accelerator.
        # No buffer: float32 whatever `.to` says, since a count in bfloat16 ends at 256.
        shape = (2, len(levels.strides), self.generator.num_classes + 2)
        self._omega = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if self._min_side is None:
            self.generator.min_side = _RELEASED_SIDE / 8 * levels.strides[0]
        if self.refresh_every is not None:
            self._expect(levels)

    def _expect(self, levels: Levels) -> None:
        channels = max(levels.student_channels), max(levels.teacher_channels)
        self.generator.expect(len(levels.strides), *channels)

    def _apply(self, fn: Any, recurse: bool = True) -> "GlobalKnowledgeLoss":
        if self.built:
            self._omega = moved(fn, self._omega)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def terms(self, step: Step) -> dict[str, Tensor]:
        assert step.targets is not None
        targets, instances, box = self._on_which_boxes(step)
        rows = None
        if self.uses_prototypes:
            rows = self._rows(step.student, step.teacher, targets, instances)
        positives = step.positives
        confidence = None
        if self.rdm.robust_by == "confidence":
            confidence = self._confidence(positives, targets, box)
        terms, omega = self.rdm(
            step.student,
            step.teacher,
            targets,
            self.bank,
            adapted=self.adapted(step) if self.adapts else None,
            student_logits=None if positives is None else positives.student,
            teacher_logits=None if positives is None else positives.teacher,
            logit_box=box,
            rows=rows,
            confidence=confidence,
            weighted=False,
            return_weights=True,
        )
        if self.training and (self.rdm.uses_prototypes or self.rdm.weighs):
            self._tally(omega, targets.labels)
        return {name.removeprefix("kd_"): value for name, value in terms.items()}

    @torch.no_grad()
    def _confidence(
        self, positives: Positives | None, targets: Targets, box: Tensor | None
    ) -> Tensor:
        """Weights ``(R,)`` of the targets: of each the largest of its rows, 1 without any."""
        if positives is None or positives.teacher is None or box is None:
            raise ValueError(
                'positives: GlobalKnowledgeLoss with weights="confidence" expected class logits of '
                "the teacher, but got None"
            )
        labels = targets.labels[box]
        p = confidence_weights(positives.teacher, labels, activation=self.rdm.activation)
        # No probability is negative: what stays so has no row.
        best = p.new_full((len(targets),), -1.0).scatter_reduce(0, box, p, "amax")
        return torch.where(best < 0, 1.0, best)

    def _on_which_boxes(self, step: Step) -> tuple[Targets, Targets | None, Tensor | None]:
        """The boxes to learn on, those to make prototypes from, the box of each logit row."""
        assert step.targets is not None
        positives = step.positives
        if positives is None:
            return step.targets, None, None
        proposals = positives.proposals
        if self.boxes == "proposals" and proposals is not None:
            row = torch.arange(len(proposals), device=proposals.boxes.device)
            if positives.rows is not None:
                row = row[positives.rows]
            return proposals, step.targets, row
        return step.targets, None, positives.logit_box

    def _check_facts(self, step: Step) -> None:
        super()._check_facts(step)
        if torch.compiler.is_compiling() or step.targets is None:
            return
        proposals = None if step.positives is None else step.positives.proposals
        if step.targets.boxes.device.type == "cpu":
            self.check_values(step.targets, proposals, len(step.student[0]))

    def check_values(self, truth: Targets, proposals: Targets | None, images: int) -> None:
        for targets in (truth, proposals):
            if targets is not None:
                targets.validate(num_classes=self.generator.num_classes, num_images=images)

    @property
    def uses_maps(self) -> bool:
        return self.rdm.imitates or self.rdm.relation > 0

    @property
    def uses_prototypes(self) -> bool:
        for_others = self.weighs_for_others and self.rdm.robust_by == "omega"
        return self.rdm.uses_prototypes or for_others

    @property
    def finest_scale(self) -> float | None:
        return self.rdm.finest_scale

    @property
    def active(self) -> bool:
        return super().active or self.weighs_for_others

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the mathematics, ``self.rdm``; prototypes and counting stay outside."""
        self._require_built()
        self.rdm.compile(*args, **options)

    def _agree(self, ranks: Ranks) -> None:
        self.generator.seed = ranks.tell(self.generator.seed)[0]

    def _before_step(self) -> None:
        super()._before_step()
        if self.refresh_every and self.step and self.step % self.refresh_every == 0:
            self.refresh()

    @torch._compile._disable_dynamo
    @torch.no_grad()
    def _tally(self, omega: Tensor, labels: Tensor) -> None:
        """For :meth:`telemetry`: stays on the device, and nothing that trains reads it."""
        seen = omega.isfinite()  # not so in a step that overflowed
        rows = torch.stack([torch.where(seen, omega, 0).to(self._omega), seen.to(self._omega)])
        column = labels.clamp(-1, self.generator.num_classes) + 1
        self._omega.index_add_(2, column, rows)

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

    def collect(self) -> None:
        self.refresh_every = self.refresh_every or 1

    def refresh(self) -> None:
        """New prototypes from the rows collected since the last refresh, on all ranks.

        A (level, class) of which none was seen keeps its old ones. Without any rows nothing
        happens. Collective under ``torch.distributed``, see :class:`global_kd.PrototypeGenerator`.
        """
        self._require_built()
        bank = self.generator.generate_if_any()
        if bank is not None:
            first = not self.bank.valid.any()
            self.bank.update(bank)
            if first and (missing := self._without_prototypes()):
                warnings.warn(f"GlobalKnowledgeLoss: {missing}", stacklevel=2)
            self.generator.watching &= not self.bank.valid.any()
        self.generator.reset()

    def _without_prototypes(self) -> str | None:
        """Of which classes that were seen there are none, and why."""
        least, filled = self.generator.min_side, self.bank.counts().sum(dim=0).tolist()
        small = f"larger than min_side={least:g} pixels both ways; pass a smaller min_side"
        if not any(filled):
            return (
                "no prototypes, so omega stays 1 and kd_relation 0: of the instances seen so far "
                f"none is {small}"
            )
        names = self.bank.class_names or [str(label) for label in range(len(filled))]
        seen, largest = (x.tolist() for x in self.generator.offered())
        lost = [k for k, n in enumerate(seen) if n and not filled[k]]
        if not lost:
            return None
        told = [
            f"{names[k]} ({int(seen[k])} seen, "
            + (f"the largest {largest[k]:.3g} pixels)" if largest[k] <= least else "not finite)")
            for k in lost[:_NAMED]
        ]
        more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
        unseen = sum(not n for n in seen)
        return (
            f"no prototypes of {len(lost)} classes, whose omega stays 1: {', '.join(told)}{more}; "
            f"instances must be {small}"
            + (f". {unseen} of {len(seen)} classes were not seen so far" if unseen else "")
        )

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
        numbers = super().telemetry(detection_loss)
        # A copy: on the processor the conversion alone may be a view of what is cleared now.
        total, count = self._omega[:, :, 1:-1].cpu().to(torch.float64, copy=True)
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
        """Robust weights ``(L, R)`` of the boxes under the current prototypes; no side effects.

        Raises:
            ValueError: With ``weights="confidence"``, which a training step gives, not maps.
        """
        self._require_built()
        if self.rdm.robust_by == "confidence":
            raise ValueError(
                'weights: expected "omega" to weigh boxes by their maps, but got "confidence", '
                "which comes of the positives of a training step; kd.telemetry() has its means"
            )
        return self.rdm.weigh(student, teacher, targets, self.bank)

    def weights_of(self, step: Step) -> Tensor:
        """Robust weights ``(L, R)`` of the ground-truth boxes of a training step; no gradient."""
        assert step.targets is not None
        if self.rdm.robust_by == "omega":
            return self.weigh(step.student, step.teacher, step.targets)
        positives = step.positives
        box = None if positives is None else positives.logit_box
        found = self._confidence(positives, step.targets, box)
        return found.expand(len(step.strides), len(step.targets))

    def extra_repr(self) -> str:
        return f"step={self.step}, total_steps={self.total_steps}, refresh={self.refresh_every}"
