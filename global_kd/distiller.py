"""Two detectors and one loss: named terms at every step."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _check
from .detector import (
    Detector,
    Look,
    ModuleDetector,
    Pixels,
    Seen,
    View,
    detector_of,
    fingerprint,
    translate,
)
from .doctor import NOTHING_DISTILLED, Report, examine
from .hooks import FeatureTap, evaluating, infer_strides, sharded_modules, unwrap
from .instances import pool_levels
from .losses.global_knowledge import GlobalKnowledgeLoss
from .prototypes.adoption import Adoption
from .prototypes.bank import PrototypeBank, refuse_other
from .prototypes.teacher_rows import TeacherRows
from .pyramid import align_levels, pair_levels
from .targets import Targets

_STEPS_UNTIL_WARNING = 64


class Distiller(nn.Module):
    """Distils a teacher into a student inside your own training loop.

    The student is not wrapped: hooks read its features while your code trains it, and
    :meth:`detach` takes them off. The teacher is no submodule; it is put in eval mode at every
    step and runs without gradient, no further than needed. This module owns only what the loss
    owns: adapters (``kd.parameters()`` belong into the optimizer), prototypes, and the step.

    Args:
        student: The detector in training, bare, in DDP or compiled later.
        teacher: The trained detector, of the same framework or another. Compile in place what runs
            of it (``teacher.backbone.compile()``): the wrapper of ``torch.compile`` is taken off.
        loss: What to distil; its levels and channels are found in one dry pass.
        boxes: On which boxes a two-stage student learns: ``"proposals"``, its own sampled
            positives (paper), or ``"ground_truth"``. Dense detectors use the ground truth.
        student_path: Module that puts out the student's pyramid; not needed for detectors of a
            framework known here (docs/detectors.md lists them).
        teacher_path: Likewise.
        example_inputs: For a student of no known framework: what its forward takes in eval mode,
            an image batch ``(B, C, H, W)`` first.
        student_pixels: Format of the network input, where it is not known or not the usual one.
        teacher_pixels: Likewise. The teacher sees the student's images in its own format.
        teacher_scale: Side of the teacher's input in units of the student's: 2 shows the teacher
            twice the resolution. Levels are paired by their stride in the student's pixels. There
            are no soft labels unless it is 1.

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

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: GlobalKnowledgeLoss,
        *,
        boxes: str = "proposals",
        student_path: str | None = None,
        teacher_path: str | None = None,
        example_inputs: Sequence[Any] | None = None,
        student_pixels: Pixels | None = None,
        teacher_pixels: Pixels | None = None,
        teacher_scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check.one_of("boxes", boxes, ("proposals", "ground_truth"))
        _check.positive("teacher_scale", teacher_scale)
        self._boxes, self._scale = boxes, teacher_scale
        # In a tuple, so that neither becomes a submodule of this one.
        self._models = (unwrap(student), unwrap(teacher))
        where = [next((p.device for p in m.parameters()), None) for m in self._models]
        if where[0] != where[1]:
            raise ValueError(
                f"teacher: expected the student's device {where[0]}, but got {where[1]}"
            )
        self._student = _reader("student", self._models[0], student_path, example_inputs)
        if student_pixels is not None:
            self._student.pixels = student_pixels
        with torch.no_grad(), evaluating(self._models[0]):
            seen = self._student.look(self._student.example())
        # FSDP2 keeps its root's parameters whole until a backward, which does not come here; an
        # optimizer made now would be given those, and they do not stay.
        for module in sharded_modules(self._models[0]):
            module.reshard()
        images = (seen.view.images,)
        self._teacher = _reader("teacher", self._models[1], teacher_path, images)
        if teacher_pixels is not None:
            self._teacher.pixels = teacher_pixels
        with torch.no_grad(), evaluating(self._models[1]):
            looked = self._look(seen.view)
        self._strides = (
            _strides(seen),
            [stride / teacher_scale for stride in _strides(looked)],
        )
        pairs = pair_levels(*self._strides)
        self._levels = [i for i, _ in pairs], [j for _, j in pairs]
        loss.build(
            [seen.maps[i].shape[1] for i in self._levels[0]],
            [looked.maps[j].shape[1] for j in self._levels[1]],
            [self._strides[0][i] for i in self._levels[0]],
            activation=self._student.activation,
        )
        self.loss = loss.to(where[0])
        self._tap = FeatureTap(student, self._student.taps, inputs=self._student.inputs)
        self._adapter_versions: dict[str, int] = {}
        self._teacher_rows: TeacherRows | None = None
        self._calls = 0
        self._told_of_gradients = False

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
        if not self.loss.active:
            return {}
        self._models[1].eval()
        seen = self._student.read(self._tap.read(), images, targets, self.shares_logits)
        with torch.no_grad():
            looked = self._look(seen.look.view)
        if self._calls == 0:
            self._check_values(seen)
            if self.training and self.loss.rdm.uses_prototypes:
                self._sign_bank()
        self._watch_gradients(seen.look.maps)
        terms = self._pass_on(self.loss, seen, looked)
        if self._calls == 0 and not terms:
            warnings.warn(f"Distiller: {NOTHING_DISTILLED}", stacklevel=2)
        self._watch_adapters()
        return terms

    @property
    def shares_logits(self) -> bool:
        """Whether there are soft labels: a weight, heads of one kind, images of one scale.

        Raises:
            ValueError: Heads of one kind with unlike numbers of classes.
        """
        student, teacher = self._student, self._teacher
        if self.loss.rdm.logits == 0 or self._scale != 1 or student.kind is None:
            return False
        if student.kind != teacher.kind:
            return False
        mine, theirs = student.num_logits, teacher.num_logits
        if mine is not None and theirs is not None and mine != theirs:
            raise ValueError(
                f"teacher: expected {mine} class logits like the student's, but got {theirs}; soft "
                "labels need the same classes, or switch them off with logits=0"
            )
        return True

    def _look(self, view: View) -> Look:
        """The teacher's maps of what the student saw."""
        view = translate(view, self._student.pixels, self._teacher, scale=self._scale)
        return self._teacher.look(view)

    def _pass_on(self, loss: GlobalKnowledgeLoss, seen: Seen, looked: Look) -> dict[str, Tensor]:
        positives, targets, instances = seen.positives, seen.truth, None
        soft: dict[str, Tensor | None] = {}
        if positives is not None:
            box = positives.box
            if self._boxes == "proposals" and positives.proposals is not None:
                targets, instances = positives.proposals, seen.truth
                box = torch.arange(len(targets), device=box.device)
            if positives.logits is not None and self.shares_logits:
                with torch.no_grad():
                    theirs, rows = self._teacher.soft_labels(looked, positives)
                mine = positives.logits
                if rows is not None:
                    mine, box = mine[rows], box[rows]
                soft = {"student_logits": mine, "teacher_logits": theirs, "logit_box": box}
        return loss(  # type: ignore[no-any-return]
            *self._paired(seen.look, looked), targets, instances=instances, **soft
        )

    def _paired(self, seen: Look, looked: Look) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [
            align_levels(seen.maps[i], looked.maps[j], self._strides[0][i], self._strides[1][j])
            for i, j in zip(*self._levels, strict=True)
        ]
        return [s for s, _ in pairs], [t for _, t in pairs]

    def _check_values(self, seen: Seen) -> None:
        """Once, on any device: later steps on an accelerator only look at shapes."""
        proposals = seen.positives.proposals if seen.positives is not None else None
        for targets in (seen.truth, proposals):
            if targets is not None:
                targets.validate(
                    num_classes=self.loss.generator.num_classes, num_images=len(seen.look.maps[0])
                )

    def _watch_gradients(self, maps: Sequence[Tensor]) -> None:
        """Once: terms from which the student learns nothing."""
        rdm = self.loss.rdm
        if self._told_of_gradients or not (self.training and torch.is_grad_enabled()):
            return
        if any(x.requires_grad for x in maps) or not (rdm.imitates or rdm.relation > 0):
            return
        if not any(p.requires_grad for p in self._models[0].parameters()):
            return
        self._told_of_gradients = True
        warnings.warn(
            "Distiller: the student's feature maps carry no gradient, so imitation and relation "
            "teach it nothing. Run its training forward outside torch.no_grad(), and checkpoint "
            f"what puts out {', '.join(self._student.taps.values())} with use_reentrant=False. "
            "If these layers are frozen on purpose, ignore this",
            stacklevel=3,
        )

    def _watch_adapters(self) -> None:
        self._calls += self.training
        if self._calls not in (1, _STEPS_UNTIL_WARNING):
            return
        versions = {n: p._version for n, p in self.loss.named_parameters()}
        if self._calls == 1:
            self._adapter_versions = versions
        elif versions and versions == self._adapter_versions:
            warnings.warn(
                f"Distiller: the adapters were not updated in {self._calls} steps; give "
                "kd.parameters() to the optimizer beside student.parameters()",
                stacklevel=3,
            )

    def check(
        self,
        images: Any,
        targets: Any = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        detection_loss: Callable[[nn.Module], Tensor] | None = None,
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
            verbose: Print the report.

        Example:
            >>> kd.check(images, targets, optimizer=optimizer)  # doctest: +SKIP
        """
        report = examine(
            self._models,
            (self._student, self._teacher),
            self.loss,
            self._tap,
            self._look,
            self._pass_on,
            self._levels,
            images,
            targets,
            soft=self.shares_logits,
            scale=self._scale,
            optimizer=optimizer,
            detection_loss=detection_loss,
        )
        if verbose:
            print(report)
        return report

    def telemetry(self, detection_loss: Tensor | float | None = None) -> dict[str, float]:
        """Plain numbers for TensorBoard: see :meth:`global_kd.GlobalKnowledgeLoss.telemetry`."""
        return self.loss.telemetry(detection_loss)

    @torch.no_grad()
    def weigh(self, images: Any, targets: Any = None) -> tuple[Targets, Tensor]:
        """Robust weights of the ground-truth boxes of a batch, in eval mode, without side effects.

        Returns:
            The boxes in pixels of the network input, and omega ``(L, R)`` for them.
        """
        with evaluating(*self._models):
            seen = self._student.observe(images, targets)
            pair = self._paired(seen.look, self._look(seen.look.view))
        return seen.truth, self.loss.weigh(*pair, seen.truth)

    @torch.no_grad()
    def refresh(self, loader: Iterable[Any], *, progress: bool = True) -> None:
        """New prototypes from one pass over the batches of a loader: the paper's protocol.

        A batch is a pair of images and targets, or whatever else the student is called with.

        Every image is read once, in eval mode. Where targets have ids, the teacher's rows of the
        sample are kept, at most ``num_classes * max_instances`` rows of ``L * Ct`` float32 numbers
        in main memory; later passes take the same sample and run the student alone. That needs a
        loader without random augmentation: the first batch is compared, and if the teacher sees
        something else now, or an instance is new, it runs again.

        Rows collected from the training stream so far are dropped, and so are prototypes in the
        bank that are not this teacher's. Collective under ``torch.distributed``: each rank reads
        its share, all end with the prototypes of the whole.
        """
        generator, strides = self.loss.generator, self.loss.rdm.strides
        signature = self._signature()
        kept = self._teacher_rows
        if kept is not None and kept.signature != signature:
            kept = None
        generator.reset(None if kept is None else kept.turn)
        compared, device = False, self.loss.bank.student.device
        with evaluating(*self._models):
            for batch in _with_progress(loader) if progress else loader:
                seen = self._student.observe(*_arguments(batch, device))
                rows = kept.of(seen.truth, generator) if kept is not None else None
                if rows is not None and compared:
                    maps = [seen.look.maps[i] for i in self._levels[0]]
                    generator.add(pool_levels(maps, seen.truth, strides), rows, seen.truth)
                    continue
                mine, theirs = (
                    pool_levels(maps, seen.truth, strides)
                    for maps in self._paired(seen.look, self._look(seen.look.view))
                )
                if rows is not None and rows.isfinite().any():
                    compared = True
                    if not _alike(rows, theirs):
                        kept = None
                        warnings.warn(
                            "refresh: the teacher sees the first batch otherwise than in the last "
                            "pass, so its rows of that pass are not used; a loader without random "
                            "augmentation saves the teacher's work",
                            stacklevel=2,
                        )
                generator.add(mine, theirs, seen.truth)
        self._teacher_rows = TeacherRows(generator, signature)
        if self.loss.bank.teacher_fingerprint != signature:  # no mixture of two teachers
            self.loss.bank.clear()
            self.loss.bank.teacher_fingerprint = signature
        self.loss.refresh()

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
        self._refuse_stranger(bank)
        adoption, device = Adoption(bank, self.loss.bank), self.loss.bank.student.device
        with evaluating(self._models[0]):
            for batch in _with_progress(loader) if progress else loader:
                seen = self._student.observe(*_arguments(batch, device))
                if not len(seen.truth):
                    continue
                if seen.truth.ids is None:
                    raise ValueError(
                        "loader: expected targets with ids, by which the instances behind the "
                        "prototypes are found, but got some without"
                    )
                # The student's whole grids: where the teacher's are a cell smaller, only a box that
                # reaches into that last cell is pooled otherwise than in training.
                maps = [seen.look.maps[i] for i in self._levels[0]]
                adoption.offer(maps, seen.truth, seen.truth.ids, self.loss.rdm.strides)
                if not adoption.missing:
                    break
        wanted, missing = len(adoption), adoption.missing
        if missing == wanted:
            ids = bank.ids[bank.valid]
            raise ValueError(
                f"loader: expected instances of the bank (ids between {int(ids.min())} and "
                f"{int(ids.max())}, with the class of their prototype), but got none"
            )
        if missing:
            warnings.warn(
                f"adopt: {missing} of {wanted} prototypes of the bank are dropped, since the "
                "loader did not bring their instances",
                stacklevel=2,
            )
        adoption.fill()

    def _signature(self) -> str:
        """What the teacher's features depend on: its weights, where they are read, its scale."""
        parts = [fingerprint(self._models[1])]
        if isinstance(self._teacher, ModuleDetector):
            parts.append(f"at {self._teacher.taps['features']}")
        if self._scale != 1:
            parts.append(f"scale {self._scale:g}")
        return ", ".join(parts)

    def _sign_bank(self) -> None:
        """Before training: prototypes to come are this teacher's, and so must those there be."""
        bank, signature = self.loss.bank, self._signature()
        if not bank.valid.any():
            bank.teacher_fingerprint = signature
        elif bank.teacher_fingerprint not in (None, signature):
            raise ValueError(
                f"teacher: expected that of the prototypes in the bank, "
                f"{bank.teacher_fingerprint!r}, but got {signature!r}; kd.loss.bank.clear() "
                "forgets them, kd.refresh(loader) makes new ones"
            )

    def _refuse_stranger(self, bank: PrototypeBank) -> None:
        """Raise where the teacher rows of a bank would mean something else here."""
        own = self.loss.bank
        if not isinstance(bank, PrototypeBank):
            raise TypeError(f"bank: expected a PrototypeBank, but got {type(bank).__name__}")
        mine, theirs = own.get_extra_state(), bank.get_extra_state()
        for name, expected, came in (
            ("teacher", self._signature(), bank.teacher_fingerprint),
            ("strides", mine["strides"], theirs["strides"]),
            ("levels", own.valid.shape[0], bank.valid.shape[0]),
            ("classes", own.valid.shape[1], bank.valid.shape[1]),
            ("teacher channels", own.teacher.shape[-1], bank.teacher.shape[-1]),
        ):
            if came != expected:
                raise ValueError(f"bank: expected {name} {expected!r}, but got {came!r}")
        refuse_other(mine, theirs, "bank: ")
        without = int((bank.valid & (bank.ids < 0)).sum())
        if without or not bank.valid.any():
            raise ValueError(
                "bank: expected prototypes with the ids of their instances (Targets(ids=...), or "
                f"'ids' beside 'boxes'), but got {int(bank.valid.sum())}, {without} without"
            )

    def detach(self) -> None:
        """Take all hooks off both detectors; nothing else was changed."""
        self._tap.remove()
        self._student.detach()
        self._teacher.detach()


def _reader(
    name: str, model: nn.Module, path: str | None, example_inputs: Sequence[Any] | None
) -> Detector:
    if path is None and (detector := detector_of(model)) is not None:
        return detector
    if example_inputs is None:
        raise ValueError(
            f"{name}: {type(model).__name__} is not a detector of a framework known here; pass "
            "example_inputs (what its forward takes, an image batch first) and, unless "
            f"find_pyramids finds the module that puts out its feature maps, {name}_path"
        )
    return ModuleDetector(model, path, example_inputs, argument=f"{name}_path")


def _alike(rows: Tensor, others: Tensor) -> bool:
    """Whether rows ``(L, R, C)`` are the same up to rounding; rows of NaN are not compared."""
    known = rows.isfinite().all(dim=2)
    a, b = rows[known], others[known].to(rows)
    return bool(((a - b).norm(dim=1) <= 0.01 * a.norm(dim=1)).all())


def _strides(look: Look) -> list[float]:
    sizes = [(x.shape[2], x.shape[3]) for x in look.maps]
    return list(infer_strides(look.view.size, sizes))


def _arguments(batch: Any, device: torch.device) -> tuple[Any, Any]:
    """Images and targets of a loader's batch; ``None`` for the latter where it is all in one."""
    batch = _moved(batch, device)
    if isinstance(batch, (list, tuple)) and not all(isinstance(x, Mapping) for x in batch):
        images, targets = batch
        return images, targets
    return batch, None


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors in containers on a device, as a loader of worker processes does not have them."""
    if isinstance(value, (Tensor, Targets)):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(x, device) for key, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(x, device) for x in value)
    return value


def _with_progress(loader: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:  # a bar is a comfort, not a dependency
        return loader
    return tqdm(loader, desc="prototypes", leave=False)  # type: ignore[no-any-return]
