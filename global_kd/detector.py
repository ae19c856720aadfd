"""One detector as the :class:`global_kd.Distiller` sees it: pixels, maps, boxes, logits.

A framework's file in ``integrations/`` implements :class:`Detector`; :class:`ModuleDetector` serves
every other detector. Student and teacher need not be of one framework: what passes between them is
a :class:`View`, the batch as the student's network saw it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .hooks import FeatureTap, evaluating, feature_maps, find_pyramids, pyramid_maps
from .targets import Targets


@dataclass(frozen=True)
class Pixels:
    """How a network's input is made from RGB in [0, 1]: ``x = (rgb * scale - mean) / std``.

    Args:
        mean: Per channel, in the network's own channel order.
        std: Likewise.
        scale: 1, or 255 where ``mean`` and ``std`` speak of bytes.
        bgr: Whether the network takes blue first.
        pad: Value of the network input where an image is padded.

    Example:
        >>> from global_kd import Pixels
        >>> detectron2_default = Pixels(mean=(103.53, 116.28, 123.675), scale=255, bgr=True)
        >>> imagenet = Pixels(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        >>> zero_to_one = Pixels()
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 1.0
    bgr: bool = False
    pad: float = 0.0

    def same_values(self, other: "Pixels") -> bool:
        """Whether both put the same numbers where the images are."""
        return replace(self, pad=0.0) == replace(other, pad=0.0)

    def convert(self, x: Tensor, to: "Pixels") -> Tensor:
        """Network input ``(B, 3, H, W)`` in this format as one in another."""

        def column(values: Sequence[float]) -> Tensor:
            return x.new_tensor(values)[:, None, None]

        rgb = (x * column(self.std) + column(self.mean)) * (to.scale / self.scale)
        if self.bgr != to.bgr:
            rgb = rgb.flip(1)
        return (rgb - column(to.mean)) / column(to.std)


IMAGENET = Pixels(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class View:
    """A batch as a network saw it.

    Attributes:
        images: Network input ``(B, 3, H, W)``, padded at the right and bottom.
        sizes: ``(height, width)`` of each image without its padding, as a sequence of pairs or an
            int tensor ``(B, 2)``; ``None``: the whole canvas.
    """

    images: Any
    sizes: Sequence[tuple[int, int]] | Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the canvas in pixels."""
        height, width = self.images.shape[-2:]
        return height, width

    def inside(self) -> Tensor | None:
        """True where an image is, bool ``(B, H, W)``; ``None``: everywhere."""
        if self.sizes is None:
            return None
        (height, width), device = self.size, self.images.device
        sizes = torch.as_tensor(self.sizes, device=device)
        y = torch.arange(height, device=device) < sizes[:, :1]
        x = torch.arange(width, device=device) < sizes[:, 1:]
        return y[:, :, None] & x[:, None, :]


@dataclass(frozen=True)
class Look:
    """What a detector's backbone made of a view.

    Attributes:
        maps: All levels, ``(B, C, H, W)`` each.
        view: The network input they were made from.
        raw: Whatever the same detector needs to go on from here.
    """

    maps: Sequence[Tensor]
    view: View
    raw: Any = None


@dataclass(frozen=True)
class Positives:
    """The locations or proposals that the student's own loss trains as objects.

    Attributes:
        logits: Class logits ``(N, K)`` of the student, ``None`` where nobody asked for them.
        box: int64 ``(N,)``, the ground-truth box of each.
        proposals: Their boxes and labels, for two-stage detectors.
        raw: What a teacher of the same :attr:`Detector.kind` needs to find the same rows.
    """

    logits: Tensor | None
    box: Tensor
    proposals: Targets | None = None
    raw: Any = None


@dataclass(frozen=True)
class Seen:
    """A batch with its boxes as the student met it; boxes in pixels of ``look.view``."""

    look: Look
    truth: Targets
    positives: Positives | None = None


@dataclass(frozen=True)
class Detections:
    """What a detector finds in one image; boxes in pixels of the view, highest score first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Detector(Protocol):
    """A detector of one framework, in either role.

    Attributes:
        taps: Paths in the student to record while it trains, by name; the maps are ``"features"``,
            or ``"level 0"`` and so on where each is put out by a module of its own.
        inputs: Those of the names for which inputs are recorded.
        kind: Detectors of equal kind can compare class logits row by row; ``None``: never.
        activation: Of the class logits, ``"softmax"`` or ``"sigmoid"``.
        num_logits: Class logits per row, where known.
        num_classes: Labels lie below it, where known.
        first_label: The lowest label that is no background.
        pixels: Format of the network input; ``None``: unknown.
        divisor: The teacher's input is padded to multiples of this many pixels.
    """

    taps: dict[str, str]
    inputs: tuple[str, ...]
    kind: str | None
    activation: str
    num_logits: int | None
    num_classes: int | None
    first_label: int
    pixels: Pixels | None
    divisor: int

    def example(self) -> View:
        """Any network input, for a dry pass."""

    def look(self, view: View) -> Look:
        """Run the network on a view, no further than its maps."""

    def read(self, tapped: dict[str, Any], images: Any, targets: Any, soft: bool) -> Seen:
        """Read a training step of this student; ``soft``: class logits of positives are wanted."""

    def observe(self, images: Any, targets: Any) -> Seen:
        """Run this student on a batch in eval mode; targets are the ground truth."""

    def soft_labels(self, look: Look, positives: Positives) -> tuple[Tensor, Tensor | None]:
        """This teacher's class logits for the positives of a student of its kind.

        ``(M, K)`` and which ``M`` of the ``N`` positives they belong to, int64; ``None``: all.
        """

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        """Sum of the detector's own training losses on a batch, in train mode; ``None``: unknown.

        The call that a user's training loop makes: all taps fire.
        """

    def detections(self, view: View) -> list[Detections] | None:
        """What the detector finds in eval mode, one entry per image; ``None``: unknown."""

    def detach(self) -> None:
        """Take off hooks of its own, if any."""


Framework = tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Detector]]
_frameworks: list[Framework] = []


def register_framework(
    recognises: Callable[[nn.Module], bool], detector: Callable[[nn.Module], Detector]
) -> None:
    """Let the :class:`global_kd.Distiller` read detectors of another framework.

    Args:
        recognises: Whether a bare model belongs to it; must not import the framework.
        detector: Makes the reader; raises ``ValueError`` for a model of the framework that it
            cannot read.
    """
    _frameworks.append((recognises, detector))


def detector_of(model: nn.Module) -> Detector | None:
    """The reader of a bare model; ``None`` where no framework recognises it."""
    for recognises, detector in _frameworks:
        if recognises(model):
            return detector(model)
    return None


class ModuleDetector:
    """Any detector, by the module that puts out its pyramid; boxes in pixels of its images.

    Args:
        model: Called as ``model(images)``, or ``model(*example_inputs)`` in a dry pass.
        path: The module; ``None``: what :func:`global_kd.find_pyramids` finds.
        example_inputs: What its forward takes in eval mode, an image batch ``(B, C, H, W)`` among
            it.
        pixels: Format of its input; ``None``: unknown.
        argument: The name to use for the path in messages.
    """

    kind: str | None = None
    activation = "softmax"
    num_logits: int | None = None
    num_classes: int | None = None
    first_label = 0
    divisor = 1

    def __init__(
        self,
        model: nn.Module,
        path: str | None,
        example_inputs: Sequence[Any] = (),
        *,
        pixels: Pixels | None = None,
        argument: str = "path",
    ) -> None:
        self.model, self.pixels = model, pixels
        self._example = tuple(fitting(x, model) for x in example_inputs)
        image = next((x for x in self._example if isinstance(x, Tensor) and x.dim() == 4), None)
        if image is None:
            raise ValueError(
                "example_inputs: expected an image batch (B, C, H, W) among them, but got "
                f"{[type(x).__name__ for x in self._example]}"
            )
        self._view = View(image)
        found = find_pyramids(model, *self._example)
        if path is not None:
            found = [x for x in found if x.path == path]
            if found and found[0].source == "input" and self._puts_out_maps(path):
                found = []  # what a named module is fed counts only where it puts out no maps
        elif not found:
            raise ValueError(
                f"{argument}: no module of {type(model).__name__} puts out a feature "
                "pyramid by itself; name one"
            )
        self._pyramid = found[0] if found else None
        self.taps: dict[str, str] = {"features": found[0].path if path is None else path}
        fed = self._pyramid is not None and self._pyramid.source == "input"
        self.inputs: tuple[str, ...] = ("features",) if fed else ()
        self._tap = FeatureTap(model, self.taps, inputs=self.inputs)

    def _puts_out_maps(self, path: str) -> bool:
        tap = FeatureTap(self.model, {"features": path})
        with torch.no_grad(), evaluating(self.model):
            output = tap.run(*self._example)["features"]
        tap.remove()
        return bool(feature_maps(output))

    def example(self) -> View:
        return self._view

    def look(self, view: View) -> Look:
        arguments = self._example if view is self._view else (fitting(view.images, self.model),)
        return self._look(self._tap.run(*arguments), view)

    def _look(self, tapped: dict[str, Any], view: View) -> Look:
        if self._pyramid is None:
            return Look(feature_maps(tapped["features"]), view)
        size = view.size if self._pyramid.source == "tokens" else ()
        return Look(pyramid_maps(self._pyramid, tapped["features"], size), view)

    def read(self, tapped: dict[str, Any], images: Any, targets: Any, soft: bool) -> Seen:
        look = self._look(tapped, View(images))
        return Seen(look, as_targets(targets, look.maps[0].device))

    def observe(self, images: Any, targets: Any) -> Seen:
        look = self.look(View(images))
        return Seen(look, as_targets(targets, look.maps[0].device))

    def soft_labels(self, look: Look, positives: Positives) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        self.model(images)
        return None

    def detections(self, view: View) -> list[Detections] | None:
        return None

    def detach(self) -> None:
        self._tap.remove()


def fingerprint(model: nn.Module) -> str:
    """What tells one trained detector from another: 16 hexadecimal digits.

    SHA-256 over names, dtypes, shapes and bytes of all tensors in the ``state_dict``: the same on
    every device and in every process, compiled or not; another number type is another detector. For
    Faster R-CNN with a ResNet-50 (44 million parameters) 0.1 to 0.2 s on one core of a CPU.
    """
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        if isinstance(x, Tensor):
            name = name.replace("_orig_mod.", "")  # of submodules that are compiled
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
            flat = x.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fitting(images: Any, model: nn.Module) -> Any:
    """A tensor of images in the number type of a model's first parameter; all else as it is."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None or not isinstance(images, Tensor) or not images.is_floating_point():
        return images
    return images.to(like.dtype)


def as_targets(targets: Any, device: torch.device) -> Targets:
    """A :class:`Targets` as it is, or packed from one mapping per image."""
    return targets if isinstance(targets, Targets) else Targets.from_list(targets, device)


def translate(view: View, source: Pixels | None, target: Detector, *, scale: float = 1.0) -> View:
    """A student's view as its teacher takes it.

    The values are converted from the student's pixel format to the teacher's, the canvas is resized
    by ``scale``, and padded at the right and bottom to the teacher's ``divisor``; no box moves, but
    by the scale.

    Raises:
        ValueError: One side's pixel format is known and the other's is not.
    """
    convert = False
    if (source is None) != (target.pixels is None):
        unknown = "student" if source is None else "teacher"
        raise ValueError(
            f"{unknown}_pixels: expected the pixel format of the {unknown}'s input, since that of "
            f"the other detector is known ({source or target.pixels}); pass {unknown}_pixels="
            "Pixels(mean=..., std=...), or the other's if they are the same"
        )
    if source is not None and target.pixels is not None:
        convert = not source.same_values(target.pixels)
    x = view.images
    tensor = isinstance(x, Tensor) and x.dim() == 4
    if not tensor:
        if convert or scale != 1:
            raise ValueError(
                "images: expected a batch (B, 3, H, W) to feed to a teacher with another pixel "
                f"format or scale, but got {type(x).__name__}"
            )
        return view
    pad = target.pixels.pad if target.pixels is not None else 0.0
    repaint = convert or (source is not None and source.pad != pad)
    if convert and source is not None and target.pixels is not None:
        x = source.convert(x, target.pixels)
    if repaint and (inside := view.inside()) is not None:
        x = torch.where(inside[:, None], x, pad)
    sizes = view.sizes
    if scale != 1:
        height, width = (round(side * scale) for side in view.size)
        x = functional.interpolate(
            x, (height, width), mode="bilinear", align_corners=False, antialias=scale < 1
        )
        if isinstance(sizes, Tensor):
            sizes = (sizes * scale).round().to(sizes.dtype)
        elif sizes is not None:
            sizes = [(round(h * scale), round(w * scale)) for h, w in sizes]
    down, right = (-side % target.divisor for side in x.shape[-2:])
    if down or right:
        if sizes is None:
            sizes = [tuple(x.shape[-2:])] * len(x)
        x = functional.pad(x, (0, right, 0, down), value=pad)
    return view if x is view.images else View(x, sizes)
