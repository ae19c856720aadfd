"""Two detectors and the losses between them: named terms at every step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import _check, arguments
from .asked import OF_TRUTH, Asked
from .detectors import Look, ModuleDetector, Pixels, ReadHead, Seen, reader
from .doctor import Alarm, Calibration, FindObjects, HeldShares, Report, Setup, Watch, examine
from .hooks import FeatureTap, evaluating
from .losses.base import DistillLoss, Levels
from .pair import Observed, Pair
from .prototypes.bank import PrototypeBank
from .prototypes.passes import Passes
from .targets import Targets, warn_of_shared_ids


class Distiller(nn.Module):
    """Distils a teacher into a student inside your own training loop.

    The student is not wrapped: hooks read its features while your code trains it, and
    :meth:`detach` takes them off. The teacher is no submodule; it is put in eval mode at every
    step and runs without gradient, no further than needed. This module owns only what the losses
    own: adapters (``kd.parameters()`` belong into the optimizer), prototypes, and the step.

    Args:
        student: The detector in training, bare, in DDP or compiled later.
        teacher: The trained detector, of the same framework or another. Compile in place what runs
            of it (``teacher.backbone.compile()``): the wrapper of ``torch.compile`` is taken off.
        losses: What to distil: one loss or several; levels and channels are found in one dry pass.
        share: The first training call sets the weights, so that each term pulls with this share of
            the detection loss's gradient, as :meth:`calibrate` does: one for all terms, or by term.
            ``None``: the losses' own weights, which were chosen for other data. A term that is
            calibrated otherwise, or was resumed, keeps its weight. Not for students of no known
            framework, nor for FSDP2.
        student_path: Module that puts out the student's pyramid; not needed for detectors of a
            framework known here (docs/detectors.md lists them).
        teacher_path: Likewise.
        example_inputs: For a student of no known framework: what its forward takes in eval mode,
            an image batch ``(B, C, H, W)`` first.
        student_pixels: Format of the network input, where it is not known or not the usual one.
        teacher_pixels: Likewise. The teacher sees the student's images in its own format.
        teacher_scale: Side of the teacher's input in units of the student's: 2 shows the teacher
            twice the resolution. Levels are paired by their stride in the student's pixels. There
            are no soft labels on positives unless it is 1.
        moving_teacher: The teacher's weights change during training on purpose, as those of an
            average of the student do. Its prototypes are then known by its structure, so that a run
            can be resumed, and every :meth:`refresh` runs it anew.
        student_layout: ``"BHWC"`` where the module named by ``student_path`` puts out maps with
            channels last, as Swin's stages do.
        teacher_layout: Likewise.
        student_dense: The dense head of a detector of no known framework, for losses that look at
            heads: the path of its module, and a function that turns what it puts out, and ``(H,
            W)`` of the network input, into a :class:`global_kd.step.Dense` (docs/own_detector.md).
        teacher_dense: Likewise.

    Raises:
        ValueError: A fact that a loss needs and this pair of detectors cannot give; levels that do
            not pair; two losses of one name; a share of a term that there is not, or for a student
            whose own loss is not known.

    Example:
        >>> import torch
        >>> from global_kd import Distiller, GlobalKnowledgeLoss, Targets
        >>> def detector(width):
        ...     return torch.nn.Sequential(
        ...         torch.nn.Conv2d(3, width, 8, stride=8), torch.nn.Conv2d(width, 5, 1)
        ...     )
        >>> student, teacher, images = detector(4), detector(16), torch.rand(2, 3, 64, 64)
        >>> kd = Distiller(
        ...     student,
        ...     teacher,
        ...     GlobalKnowledgeLoss(num_classes=3, total_steps=9),
        ...     student_path="0",
        ...     teacher_path="0",
        ...     example_inputs=(images,),
        ... )
        >>> _ = student(images)  # the detector's own training step
        >>> boxes, labels = torch.tensor([[4.0, 4.0, 40.0, 60.0]]), torch.tensor([2])
        >>> terms = kd(images, Targets(boxes, labels, torch.tensor([1])))
        >>> sum(terms.values()).backward()
    """

    losses: nn.ModuleDict
    __call__: Callable[..., dict[str, Tensor]]  # nn.Module says Any

    @torch.inference_mode(False)  # what is made here is trained
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        losses: DistillLoss | Iterable[DistillLoss],
        *,
        share: float | Mapping[str, float] | None = None,
        student_path: str | None = None,
        teacher_path: str | None = None,
        example_inputs: Sequence[Any] | None = None,
        student_pixels: Pixels | None = None,
        teacher_pixels: Pixels | None = None,
        teacher_scale: float = 1.0,
        moving_teacher: bool = False,
        student_layout: str = "BCHW",
        teacher_layout: str = "BCHW",
        student_dense: tuple[str, ReadHead] | None = None,
        teacher_dense: tuple[str, ReadHead] | None = None,
    ) -> None:
        super().__init__()
        _check.positive("teacher_scale", teacher_scale)
        # In a tuple, so that neither becomes a submodule of this one.
        self._models = arguments.detectors(student, teacher)
        named = arguments.named_losses(losses)
        with ExitStack() as undo:  # no hook stays where this fails
            mine = reader(
                "student",
                self._models[0],
                student_path,
                example_inputs,
                student_layout,
                student_dense,
                student_pixels,
            )
            undo.callback(mine.detach)
            theirs = reader(
                "teacher",
                self._models[1],
                teacher_path,
                (mine.example().images,),
                teacher_layout,
                teacher_dense,
                teacher_pixels,
            )
            undo.callback(theirs.detach)
            self._pair = Pair(mine, theirs, self._models, teacher_scale, moving_teacher)
            self._asked = Asked(named, self._pair)
            for loss in named.values():
                loss.check_pair(self._pair.dry)
            strides = tuple(self._pair.strides[0][i] for i in self._pair.levels[0])
            for loss in named.values():
                loss.build(Levels(*self._pair.channels, strides, mine.activation, mine.family))
            self._held = HeldShares()
            if share is not None:
                self._held.set_at_first(share, named, known=not isinstance(mine, ModuleDetector))
            undo.pop_all()
        others = any(loss.active and "omega" in self._asked[name] for name, loss in named.items())
        for loss in named.values():
            loss.weighs_for_others = others and loss.keeps_prototypes
        self.losses = nn.ModuleDict(named).to(next(self._models[0].parameters()).device)
        arguments.own(named.values(), self)
        self._passes: Passes | None = None
        if (keeper := self._keeper) is not None:
            bank, refresh = keeper.bank, keeper.refresh
            moving = moving_teacher
            self._passes = Passes(keeper.generator, bank, strides, refresh, moving=moving)
        self._tap = FeatureTap(student, self._pair.taps(self._asked.by_all), inputs=mine.inputs)
        self._alarm, self._watch = Alarm(), Watch(self._models[0], named, [*mine.taps.values()])

    @property
    def _keeper(self) -> DistillLoss | None:
        """The loss that keeps prototypes."""
        each: Iterable[Any] = self.losses.values()
        return next((loss for loss in each if loss.keeps_prototypes), None)

    @property
    def loss(self) -> Any:
        """The loss, where there is one; of several the one that keeps prototypes."""
        if len(self.losses) == 1:
            return next(iter(self.losses.values()))
        if self._keeper is not None:
            return self._keeper
        raise ValueError(  # an AttributeError would be taken for a name that does not exist
            f"loss: expected one loss, but there are {len(self.losses)}; take one of "
            f"kd.losses: {', '.join(self.losses)}"
        )

    def forward(self, images: Any, targets: Any = None) -> dict[str, Tensor]:
        """The terms of this step, after the student's own forward ran in training mode.

        Args:
            images: What the student was called with: images, or the whole batch where a framework
                puts images and targets in one (Detectron2, transformers, Ultralytics).
            targets: Likewise; for detectors that are not recognised a
                :class:`global_kd.Targets` or a list of dictionaries with ``boxes`` and ``labels``,
                in pixels of the images.

        Returns:
            Scalars by name, ``{}`` where all weights are 0.

        Raises:
            ValueError: A tap that did not fire exactly once since the student's forward began, in
                the first step a bank with another teacher's prototypes, and whatever does not fit.
        """
        active = [name for name, loss in self._each() if loss.active]
        if not active:
            self._tap.clear()
            return {}
        facts, call = self._asked.by(active), self._tap.call
        with self._pair.teaching():
            seen = self._pair.read(self._tap, images, targets, facts)
            if self.training:
                self._held.before_step(self._setup(), images, targets)
            with torch.no_grad():
                looked = self._pair.look(seen.look.view)
            if self._watch.steps == 0:
                self._check_values(seen, looked)
            if self.training:
                self._watch.gradients(seen.look.maps)
            terms = self._pass_on(dict(self._each()), seen, looked)
        if self._watch.steps == 0 and not terms:
            warnings.warn(f"Distiller: {self.nothing_distilled()}", stacklevel=2)
        if self.training:
            self._alarm.hear(terms, None if call is None else call.loss)
            self._watch.step()
        return terms

    def distil(self, images: Any) -> dict[str, Tensor]:
        """The terms of images without ground truth: both detectors are run here.

        For losses that need no ground truth (docs/methods.md lists them). Not for students in
        ``DistributedDataParallel``: their own forward does not run.

        Args:
            images: As the student takes them in eval mode, or a batch as for :meth:`forward`, whose
                ground truth is not looked at.

        Returns:
            Scalars by name; add them up and call ``backward``.

        Raises:
            ValueError: A loss that needs ground truth.

        Example:
            >>> sum(kd.distil(images).values()).backward()  # doctest: +SKIP
        """
        for _, loss in self._each():
            if loss.active and (truth := loss.needs & OF_TRUTH):
                raise ValueError(
                    f"losses: expected only such that need no ground truth, but "
                    f"{type(loss).__name__} needs {', '.join(sorted(truth))}; make a Distiller of "
                    "the others for unlabelled images"
                )
        if self._held.missing(dict(self._each())):
            raise ValueError(
                "share: expected None with distil, since without ground truth there is no "
                "detection loss to measure, but got a share; call kd.calibrate(images, targets) "
                "on a batch with it"
            )
        active = {name: loss for name, loss in self._each() if loss.active}
        if not active:
            return {}
        facts = self._asked.by_all - OF_TRUTH - {"proposals"}
        with self._pair.teaching():
            step = self._pair.unlabelled(images, facts)
        if self.training:
            self._watch.gradients(step.student)
        terms: dict[str, Tensor] = {}
        for name, loss in active.items():
            terms |= loss(step.student, step.teacher, None, **self._asked.given(step, name))
        if self.training:
            self._alarm.hear(terms, None)
            self._watch.step()
        return terms

    def _each(self) -> list[tuple[str, DistillLoss]]:
        """By name; the one that keeps prototypes first, since others may ask for its weights."""
        each: list[tuple[str, Any]] = sorted(
            self.losses.items(), key=lambda item: item[1] is not self._keeper
        )
        return each

    def _pass_on(
        self, losses: Mapping[str, DistillLoss], seen: Seen, looked: Look
    ) -> dict[str, Tensor]:
        """One batch through losses of these names, the keeper of prototypes first."""
        active = {name: loss for name, loss in losses.items() if loss.active}
        step = self._pair.step(seen, looked, self._asked.by(active))
        terms: dict[str, Tensor] = {}
        keeper = next((loss for loss in losses.values() if loss.keeps_prototypes), None)
        for name, loss in active.items():
            if "omega" in self._asked[name] and step.omega is None and keeper is not None:
                step = replace(step, omega=keeper.weights_of(step))
            terms |= loss(step.student, step.teacher, step.targets, **self._asked.given(step, name))
        return terms

    def nothing_distilled(self) -> str:
        """Why there was no term, as a sentence."""
        why = self._asked.missed() or "all weights are 0"
        return (
            f"no loss put out a term, so nothing is distilled ({why}); give "
            "a weight to a term that needs feature maps only, such as foreground or background"
        )

    def _check_values(self, seen: Seen, looked: Look) -> None:
        """Once, on any device: later steps on an accelerator only look at shapes."""
        proposals = seen.sampled.proposals if seen.sampled is not None else None
        for _, loss in self._each():
            loss.check_values(seen.truth, proposals, len(seen.look.maps[0]))
        if (truth := seen.truth).ids is not None:
            looks = torch.cat([truth.boxes, truth.labels[:, None]], dim=1)
            warn_of_shared_ids(truth.ids, looks, stacklevel=3)
        keeper = self._keeper
        if self.training and self._passes and keeper is not None and keeper.uses_prototypes:
            self._passes.sign(self._pair.signature())

    def check(
        self,
        images: Any,
        targets: Any = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        detection_loss: Callable[[nn.Module], Tensor] | None = None,
        detections: FindObjects | None = None,
        verbose: bool = True,
    ) -> Report:
        """The doctor before the first epoch: one step on a batch, looked at from all sides.

        Levels and adapters, the size and the gradient of each term beside the detection loss, what
        the optimizer holds, whether the teacher detects anything and whether the boxes lie where it
        finds them; every problem with the sentence that mends it. Nothing is changed: parameters,
        gradients, buffers, modes, random state and the loss's own state stay as they are.

        Args:
            images: A training batch, as for :meth:`forward`.
            targets: Likewise.
            optimizer: The one that will train; without it that part is left out.
            detection_loss: For detectors of no known framework: ``model -> scalar``, the detector's
                own training loss on this batch. Called with the student, and with the teacher.
            detections: Likewise, ``teacher -> [{"boxes", "scores", "labels"}, ...]``: what it finds
                in the images of this batch, in their pixels, one dictionary per image.
            verbose: Print the report.

        Example:
            >>> kd.check(images, targets, optimizer=optimizer)  # doctest: +SKIP
        """
        setup = self._setup()
        with self._held.as_in_the_first_step(setup, images, targets):
            report = examine(
                setup,
                images,
                targets,
                nothing_distilled=self.nothing_distilled,
                optimizer=optimizer,
                detection_loss=detection_loss,
                detections=detections,
            )
        if self._held.missing(setup.losses):
            report.facts.append("weights: as share= would set them on this batch")
        if verbose:
            print(report)
        return report

    def calibrate(
        self,
        images: Any = None,
        targets: Any = None,
        *,
        share: float | Mapping[str, float] = 0.3,
        loader: Iterable[Any] | None = None,
        batches: int = 4,
        every: int | None = None,
        band: float = 0.1,
        detection_loss: Callable[[nn.Module], Tensor] | None = None,
        verbose: bool = True,
    ) -> Calibration:
        """Set the weights so that each term pulls with a share of the detection loss's gradient.

        Published weights are tied to a detector, a resolution and a normaliser; a share is not. On
        one batch, or several of a loader, the gradient of each term and of the detector's own loss
        on the student's maps is measured, and the weights are set once. They are kept in
        ``state_dict``. Terms without a weight stay off. Nothing else is changed.

        A share drifts while the student learns. ``every=n`` holds it: each ``n`` calls of
        :meth:`forward` in training mode it is measured anew on that batch, and where it has left a
        band around the share, the weight is brought back, by a factor of 10 at most (RT-DETRv4
        steers its one term so). Such a call runs the student once more, and goes backward to the
        maps for each term. Shares are those before schedules, which go on as they are.

        Args:
            images: A training batch, as for :meth:`forward`.
            targets: Likewise.
            share: Norm of a term's gradient in units of the detection loss's: one for all terms,
                or by term (``{"kd_pkd": 0.2}``; those not named keep their weights).
            loader: Batches to take instead of one.
            batches: How many of them.
            every: Training calls after which to measure again, from now to the end; ``None``:
                never. Kept in ``state_dict``. Not for detectors of no known framework, and not for
                FSDP2; call this method every so often instead.
            band: Part of a share by which it may be off without a change: 0.1 leaves 0.27 to 0.33
                of a share of 0.3 alone.
            detection_loss: For detectors of no known framework: ``model -> scalar``, the
                detector's own training loss on the batch given.
            verbose: Print the table.

        Returns:
            Weights and shares before and after.

        Raises:
            ValueError: A share of a term that there is not, a detection loss that is not known.

        Example:
            >>> kd.calibrate(images, targets, share=0.3)  # doctest: +SKIP
        """
        calibration = self._held.calibrate(
            self._setup(),
            images,
            targets,
            share=share,
            loader=loader,
            batches=batches,
            every=every,
            band=band,
            detection_loss=detection_loss,
        )
        if verbose:
            print(calibration)
        return calibration

    def _setup(self) -> Setup:
        """What the doctor tries out."""
        return Setup(self._pair, dict(self._each()), self._tap, self._pass_on, self._asked.by_all)

    def get_extra_state(self) -> Tensor:
        """The shares that are held, for ``state_dict``."""
        return self._held.state(dict(self._each()))

    def set_extra_state(self, state: Tensor) -> None:
        """Go on holding them."""
        self._held.load(state, dict(self._each()))

    def telemetry(self, detection_loss: Tensor | float | None = None) -> dict[str, float]:
        """Plain numbers for TensorBoard: see :meth:`global_kd.GlobalKnowledgeLoss.telemetry`.

        Where shares are set or held, also ``weight/<name>`` of the terms.
        """
        numbers: dict[str, float] = {}
        for _, loss in self._each():
            numbers |= loss.telemetry(detection_loss)
            for part, weight in loss.weights.items():
                if (name := loss.term_name(part)) in self._held.first | self._held.wanted:
                    numbers[f"weight/{name}"] = weight
        return numbers

    @torch.no_grad()
    def weigh(self, images: Any, targets: Any = None) -> tuple[Targets, Tensor]:
        """Robust weights of the ground-truth boxes of a batch, in eval mode, without side effects.

        Returns:
            The boxes in pixels of the network input, and omega ``(L, R)`` for them.
        """
        self._with_prototypes()
        assert self._keeper is not None
        with evaluating(*self._models):
            seen = self._observe(images, targets)
            pair = seen.both()
        return seen.truth, self._keeper.weigh(*pair, seen.truth)

    @torch.no_grad()
    def refresh(self, loader: Iterable[Any], *, progress: bool = True) -> None:
        """New prototypes from one pass over the batches of a loader: the paper's protocol.

        A batch is a pair of images and targets, or whatever else the student is called with.

        Every image is read once, in eval mode. Where targets have ids, the teacher's rows of the
        sample are kept, at most ``num_classes * max_instances`` rows of ``L * Ct`` float32 numbers
        in main memory; later passes take the same sample and run the student alone. That needs a
        loader without random augmentation: every instance is compared, its box and its colours,
        and where one looks otherwise now, or is new, the teacher runs again.

        Rows collected from the training stream so far are dropped, and so are prototypes in the
        bank that are not this teacher's. Collective under ``torch.distributed``: each rank reads
        its share, all end with the prototypes of the whole.
        """
        passes = self._with_prototypes()
        with evaluating(*self._models):
            passes.refresh(loader, self._observe, self._pair.signature(), progress=progress)

    @torch.no_grad()
    def adopt(self, bank: PrototypeBank, loader: Iterable[Any], *, progress: bool = True) -> None:
        """Use the prototypes that another student of this teacher was distilled with.

        Their teacher rows stay as they are, so the teacher does not run. The student's rows are
        pooled anew: the student, in eval mode, reads the batches of a loader until every instance
        behind a prototype has turned up, known by its id (:class:`global_kd.Targets` ``ids``) and
        class. The bank of the loss is replaced; ``bank`` stays as it is.

        An id must mean the same pixels as when the prototypes were made: best a bank that
        :meth:`refresh` made, and the same loader, without random augmentation. A loader of the
        images that hold ``bank.ids`` is enough. On several ranks every one reads them all.

        Args:
            bank: Such as :meth:`global_kd.PrototypeBank.load` reads it.
            loader: Batches as for :meth:`refresh`, their targets with ids.
            progress: Show a bar, where tqdm is installed.

        Raises:
            ValueError: A bank of another teacher, other levels, classes or teacher channels, an
                empty one, or one without ids; targets without ids; no instance found. The loss then
                keeps the bank it had.

        Warns:
            UserWarning: Some instances were not found: their prototypes are dropped.

        Example:
            >>> kd.adopt(PrototypeBank.load("bank.safetensors"), loader)  # doctest: +SKIP
        """
        passes = self._with_prototypes()
        with evaluating(self._models[0]):
            passes.adopt(bank, loader, self._observe, self._pair.signature(), progress=progress)

    def _with_prototypes(self) -> Passes:
        if self._passes is None:
            raise ValueError(
                "losses: expected one that keeps prototypes (GlobalKnowledgeLoss), but got "
                f"{', '.join(self.losses)}"
            )
        return self._passes

    def _observe(self, images: Any, targets: Any) -> Observed:
        return self._pair.observe(images, targets)

    def detach(self) -> None:
        """Take all hooks off both detectors; nothing else was changed."""
        if isinstance(self._pair, arguments.Gone):
            return
        self._tap.remove()
        self._pair.detach()
        arguments.disown(self.losses.values())
        vars(self).update(arguments.gone("one after detach()"))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep what the losses own; detectors and hooks stay with this one."""
        return vars(self) | arguments.gone("a copy of one")
