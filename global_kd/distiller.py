"""Two detectors and one loss: named terms at every step."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .hooks import FeatureTap, evaluating, feature_maps, find_pyramids, infer_stride, unwrap
from .losses.global_knowledge import GlobalKnowledgeLoss
from .pyramid import pair_levels
from .targets import Targets

_STEPS_UNTIL_WARNING = 64


@dataclass(frozen=True)
class Step:
    """What a framework's reader finds in one batch.

    Attributes:
        student: Maps of the student, all its levels.
        teacher: Maps of the teacher, all its levels, without gradient.
        targets: Boxes on which knowledge is transferred.
        instances: Ground-truth boxes, for prototypes; ``None`` where ``targets`` are those.
        student_logits: Class logits ``(N, K)`` of the student.
        teacher_logits: Class logits ``(N, K)`` of the teacher on the same rows.
        logit_box: int64 ``(N,)``, index into ``targets`` of each row.
    """

    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    targets: Targets
    instances: Targets | None = None
    student_logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    logit_box: Tensor | None = None


class Pair(Protocol):
    """A student and a teacher of one framework, as the :class:`Distiller` uses them.

    Attributes:
        taps: Paths in the student to record, by name.
        inputs: Those of the names for which inputs are recorded.
        activation: Of the class logits, ``"softmax"`` or ``"sigmoid"``.
    """

    taps: dict[str, str]
    inputs: tuple[str, ...]
    activation: str

    def probe(self) -> tuple[Sequence[Tensor], Sequence[Tensor], tuple[int, int]]:
        """Student maps, teacher maps and network-input size of a dry pass in eval mode."""

    def step(self, tapped: dict[str, Any], images: Any, targets: Any, logits: bool) -> Step:
        """Read a training step of the student and run the teacher beside it."""

    def observe(self, images: Any, targets: Any) -> Step:
        """Run both detectors in eval mode on a batch; targets are the ground truth."""


Framework = tuple[Callable[[nn.Module], bool], Callable[[nn.Module, nn.Module, str], Pair]]
_frameworks: list[Framework] = []


def register_framework(
    recognises: Callable[[nn.Module], bool],
    pair: Callable[[nn.Module, nn.Module, str], Pair],
) -> None:
    """Let the :class:`Distiller` read detectors of another framework.

    Args:
        recognises: Whether a bare detector belongs to it; must not import the framework.
        pair: ``(student, teacher, boxes) -> Pair``.
    """
    _frameworks.append((recognises, pair))


class ModulePair:
    """Any two detectors, by the modules that put out their pyramids.

    Both are called with the same images, and boxes are in pixels of them.
    """

    inputs: tuple[str, ...] = ()
    activation = "softmax"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_path: str | None,
        teacher_path: str | None,
        example_inputs: tuple[Any, ...],
    ) -> None:
        self._student, self._example = student, example_inputs
        paths = []
        for name, model, path in (
            ("student", student, student_path),
            ("teacher", teacher, teacher_path),
        ):
            if path is None:
                pyramids = find_pyramids(model, *example_inputs)
                if not pyramids:
                    raise ValueError(
                        f"{name}_path: no module of {type(model).__name__} puts out a feature "
                        "pyramid by itself; name one"
                    )
                path = pyramids[0].path
            paths.append(path)
        self.taps = {"features": paths[0]}
        self._teacher_tap = FeatureTap(teacher, {"features": paths[1]})

    def probe(self) -> tuple[Sequence[Tensor], Sequence[Tensor], tuple[int, int]]:
        image = next((x for x in self._example if isinstance(x, Tensor) and x.dim() == 4), None)
        if image is None:
            raise ValueError(
                "example_inputs: expected an image batch (B, C, H, W) among them, but got "
                f"{[type(x).__name__ for x in self._example]}"
            )
        height, width = image.shape[-2:]
        with FeatureTap(self._student, self.taps) as tap:
            student = feature_maps(tap.run(*self._example)["features"])
        teacher = feature_maps(self._teacher_tap.run(*self._example)["features"])
        return student, teacher, (height, width)

    def step(self, tapped: dict[str, Any], images: Any, targets: Any, logits: bool) -> Step:
        with torch.no_grad():
            teacher = feature_maps(self._teacher_tap.run(images)["features"])
        student = feature_maps(tapped["features"])
        return Step(student, teacher, _as_targets(targets, student[0].device))

    def observe(self, images: Any, targets: Any) -> Step:
        with FeatureTap(self._student, self.taps) as tap:
            tapped = tap.run(images)
        return self.step(tapped, images, targets, logits=False)


def _as_targets(targets: Any, device: torch.device) -> Targets:
    if isinstance(targets, Targets):
        return targets
    return Targets.from_list(targets, device)


class Distiller(nn.Module):
    """Distils a teacher into a student inside your own training loop.

    The student is not wrapped: hooks read its features while your code trains it, and
    :meth:`detach` takes them off. The teacher is no submodule; it is put in eval mode at every
    step and runs without gradient, no further than needed. This module owns only what the loss
    owns: adapters (``kd.parameters()`` belong into the optimizer), prototypes, and the step.

    Args:
        student: The detector in training, bare, in DDP or compiled later.
        teacher: The trained detector.
        loss: What to distil; its levels and channels are found in one dry pass.
        boxes: On which boxes a two-stage student learns: ``"proposals"``, its own sampled
            positives (paper), or ``"ground_truth"``. Dense detectors use the ground truth.
        student_path: Module that puts out the student's pyramid; not needed for detectors that
            are recognised (torchvision's Faster R-CNN, RetinaNet, FCOS).
        teacher_path: Likewise.
        example_inputs: For other detectors: what their forward takes in eval mode, an image batch
            ``(B, C, H, W)`` first.

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
    ) -> None:
        super().__init__()
        if boxes not in ("proposals", "ground_truth"):
            raise ValueError(f"boxes: expected 'proposals' or 'ground_truth', but got {boxes!r}")
        # In a tuple, so that neither becomes a submodule of this one.
        self._models = (unwrap(student), unwrap(teacher))
        where = [next((p.device for p in m.parameters()), None) for m in self._models]
        if where[0] != where[1]:
            raise ValueError(
                f"teacher: expected the student's device {where[0]}, but got {where[1]}"
            )
        self._pair = self._make_pair(boxes, student_path, teacher_path, example_inputs)
        with torch.no_grad(), evaluating(*self._models):
            student_maps, teacher_maps, size = self._pair.probe()
        strides = [
            [infer_stride(size, x.shape[-2:]) for x in maps]
            for maps in (student_maps, teacher_maps)
        ]
        pairs = pair_levels(*strides)
        self._levels = [i for i, _ in pairs], [j for _, j in pairs]
        loss.build(
            [student_maps[i].shape[1] for i in self._levels[0]],
            [teacher_maps[j].shape[1] for j in self._levels[1]],
            [strides[0][i] for i in self._levels[0]],
            activation=self._pair.activation,
        )
        self.loss = loss.to(where[0])
        self._tap = FeatureTap(student, self._pair.taps, inputs=self._pair.inputs)
        self._adapter_versions = {n: p._version for n, p in loss.named_parameters()}
        self._calls = 0

    def _make_pair(
        self,
        boxes: str,
        student_path: str | None,
        teacher_path: str | None,
        example_inputs: Sequence[Any] | None,
    ) -> Pair:
        student, teacher = self._models
        if student_path is None and teacher_path is None and example_inputs is None:
            for recognises, pair in _frameworks:
                if recognises(student) and recognises(teacher):
                    return pair(student, teacher, boxes)
            raise ValueError(
                f"student, teacher: {type(student).__name__} and {type(teacher).__name__} are not "
                "both detectors of a framework known here; pass student_path, teacher_path (the "
                "modules that put out the feature maps) and example_inputs"
            )
        if example_inputs is None:
            raise ValueError("example_inputs: expected with student_path or teacher_path")
        return ModulePair(student, teacher, student_path, teacher_path, tuple(example_inputs))

    def forward(self, images: Any, targets: Any) -> dict[str, Tensor]:
        """The terms of this step, after ``student(images, targets)`` ran in training mode.

        Args:
            images: What the student was called with.
            targets: Likewise; for detectors that are not recognised a
                :class:`global_kd.Targets` or a list of dictionaries with ``boxes`` and ``labels``,
                in pixels of the images.

        Returns:
            Scalars by name, ``{}`` where all weights are 0.

        Raises:
            ValueError: A tap that did not fire exactly once since the student's forward began, and
                whatever does not fit.
        """
        if not self.loss.active:
            return {}
        self._models[1].eval()
        tapped = self._tap.read()
        step = self._pair.step(tapped, images, targets, self.loss.rdm.logits > 0)
        if self._calls == 0:
            self._check_values(step)
        terms = self._pass_on(step)
        self._watch_adapters()
        return terms

    def _pass_on(self, step: Step) -> dict[str, Tensor]:
        student, teacher = self._paired(step)
        return self.loss(  # type: ignore[no-any-return]
            student,
            teacher,
            step.targets,
            student_logits=step.student_logits,
            teacher_logits=step.teacher_logits,
            logit_box=step.logit_box,
            instances=step.instances,
        )

    def _paired(self, step: Step) -> tuple[list[Tensor], list[Tensor]]:
        students, teachers = self._levels
        return [step.student[i] for i in students], [step.teacher[j] for j in teachers]

    def _check_values(self, step: Step) -> None:
        """Once, on any device: later steps on an accelerator only look at shapes."""
        for targets in (step.targets, step.instances):
            if targets is not None:
                targets.validate(
                    num_classes=self.loss.generator.num_classes, num_images=len(step.student[0])
                )

    def _watch_adapters(self) -> None:
        self._calls += self.training
        if self._calls != _STEPS_UNTIL_WARNING:
            return
        parameters = dict(self.loss.named_parameters())
        if parameters and all(
            p._version == self._adapter_versions.get(n) for n, p in parameters.items()
        ):
            warnings.warn(
                f"Distiller: the adapters were not updated in {self._calls} steps; give "
                "kd.parameters() to the optimizer beside student.parameters()",
                stacklevel=3,
            )

    @torch.no_grad()
    def weigh(self, images: Any, targets: Any) -> tuple[Targets, Tensor]:
        """Robust weights of the ground-truth boxes of a batch, in eval mode, without side effects.

        Returns:
            The boxes in pixels of the network input, and omega ``(L, R)`` for them.
        """
        with evaluating(*self._models):
            step = self._pair.observe(images, targets)
        return step.targets, self.loss.weigh(*self._paired(step), step.targets)

    @torch.no_grad()
    def refresh(self, loader: Iterable[tuple[Any, Any]], *, progress: bool = True) -> None:
        """New prototypes from one pass over ``(images, targets)`` batches: the paper's protocol.

        Every image is read once, by both detectors in eval mode. Rows collected from the training
        stream so far are dropped.
        """
        self.loss.generator.reset()
        with evaluating(*self._models):
            for images, targets in _with_progress(loader) if progress else loader:
                step = self._pair.observe(images, targets)
                self.loss.generator.add_features(
                    *self._paired(step), step.targets, self.loss.rdm.strides
                )
        self.loss.refresh()

    def detach(self) -> None:
        """Take all hooks off both detectors; nothing else was changed."""
        self._tap.remove()
        if isinstance(self._pair, ModulePair):
            self._pair._teacher_tap.remove()


def _with_progress(loader: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:  # a bar is a comfort, not a dependency
        return loader
    return tqdm(loader, desc="prototypes", leave=False)  # type: ignore[no-any-return]
