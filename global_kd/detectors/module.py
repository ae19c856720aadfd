"""Any detector, by the module that puts out its pyramid."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..hooks import (
    FeatureTap,
    evaluating,
    explaining_stride,
    feature_maps,
    find_pyramids,
    pyramid_maps,
)
from ..step import Dense
from ..targets import Targets
from .own_head import OwnHead, ReadHead
from .pixels import Pixels, View, fitting
from .protocol import Detections, Look, MapsOnly, Seen


class ModuleDetector(MapsOnly):
    """Any detector, by the module that puts out its pyramid; boxes in pixels of its images.

    Args:
        model: Called as ``model(images)``, or ``model(*example_inputs)`` in a dry pass.
        path: The module; ``None``: what :func:`global_kd.find_pyramids` finds.
        example_inputs: What its forward takes in eval mode, an image batch ``(B, C, H, W)`` among
            it.
        pixels: Format of its input; ``None``: unknown.
        argument: The name to use for the path in messages.
        layout: Of the maps at a named path: ``"BCHW"``, or ``"BHWC"`` of a Swin backbone, which
            keeps channels last; they are read as ``(B, C, H, W)``.
        dense: The dense head, as the path of its module and a function that reads what it puts out
            (see :class:`OwnHead`); ``None``: no facts of a head.

    Raises:
        ValueError: No pyramid is found and none named, or maps that look like another layout.
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
        layout: str = "BCHW",
        dense: tuple[str, ReadHead] | None = None,
    ) -> None:
        _check.one_of("layout", layout, ("BCHW", "BHWC"))
        if layout == "BHWC" and path is None:
            raise ValueError(
                f"layout: expected a named module beside 'BHWC', but got {argument}=None; name the "
                "one that puts out maps (B, H, W, C)"
            )
        self._layout = layout
        self.model, self.pixels = model, pixels
        self._role = argument.removesuffix("_path")
        self._example = tuple(fitting(x, model) for x in example_inputs)
        image = next((x for x in self._example if isinstance(x, Tensor) and x.dim() == 4), None)
        if image is None:
            raise ValueError(
                "example_inputs: expected an image batch (B, C, H, W) among them, but got "
                f"{[type(x).__name__ for x in self._example]}"
            )
        self._view = View(image)
        found = find_pyramids(model, *self._example) if layout == "BCHW" else []
        if path is not None:
            found = [x for x in found if x.path == path]
            if found and found[0].source == "input" and self._puts_out_maps(path):
                found = []  # what a named module is fed counts only where it puts out no maps
        elif not found:
            whole = f"; {type(model).__name__} itself puts out maps: if these are its features, "
            raise ValueError(
                f"{argument}: no module of {type(model).__name__} puts out a feature "
                "pyramid by itself; name one"
                + (whole + f'write {argument}=""' if self._puts_out_maps("") else "")
            )
        self._pyramid = found[0] if found else None
        self.taps: dict[str, str] = {"features": found[0].path if path is None else path}
        fed = self._pyramid is not None and self._pyramid.source == "input"
        self.inputs: tuple[str, ...] = ("features",) if fed else ()
        self._head: OwnHead | None = None
        self._tap = FeatureTap(model, self.taps, inputs=self.inputs)
        if dense is not None:
            self._tap_head(dense, argument.replace("path", "dense"))
        if layout == "BCHW":
            try:
                with torch.no_grad(), evaluating(model):
                    self._refuse_permuted(self.look(self._view), argument)
            except BaseException:
                self._tap.remove()  # who catches the error holds this object by its traceback
                raise

    def _tap_head(self, dense: tuple[str, ReadHead], argument: str) -> None:
        """From here on a look goes on to the head, and takes along what it puts out."""
        if not isinstance(dense, tuple) or len(dense) != 2 or not callable(dense[1]):
            raise TypeError(
                f"{argument}: expected a pair of the head's module and a function that reads its "
                f'output, ("head", read), but got {dense!r}'
            )
        with torch.no_grad(), evaluating(self.model):
            look = self.look(self._view)
        self._head = OwnHead(self.model, *dense, self._example, look.view.size, look.maps, argument)
        self.gives = self.gives | self._head.gives
        self.activation, self.family = self._head.activation, "one-stage"
        self._tap.remove()
        self._tap = FeatureTap(
            self.model, self.taps | {"head": self._head.path}, inputs=self.inputs
        )

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        wanted = facts & {"dense", "boxes", "bins", "priors"}
        return {} if self._head is None or not wanted else {"head": self._head.path}

    def dense(self, look: Look, facts: frozenset[str] = frozenset()) -> Dense:
        if self._head is None or look.tapped is None:
            raise self._without("dense")
        return self._head.read(look.tapped["head"], look.view.size)

    def head(
        self, maps: Sequence[Tensor], look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        if self._head is None:
            raise self._without("teacher_head")
        return self._head.run(maps, look.view.size)

    def _refuse_permuted(self, look: Look, argument: str) -> None:
        """Once: a grid of channels, as maps (B, H, W, C) have that are taken for (B, C, H, W)."""
        if not look.maps:
            output = self._tap.run(*self._example)["features"]
            once = "; let it return a list" if isinstance(output, Iterator) else ""
            raise ValueError(
                f"{argument}: expected a module that puts out maps (B, C, H, W), but "
                f"{self.taps['features']!r} puts out a {type(output).__name__} without any{once}; "
                "find_pyramids(model, *example_inputs) lists modules that do"
            )
        for x in look.maps:
            _, first, second, third = x.shape
            if not x.numel() or explaining_stride(look.view.size, (second, third)) is not None:
                continue
            ratios = [side / cells for side, cells in zip(look.view.size, x.shape[2:], strict=True)]
            permuted = explaining_stride(look.view.size, (first, second)) is not None
            if permuted or max(ratios) > 1.25 * min(ratios):
                height, width = look.view.size
                option = argument.replace("path", "layout")
                raise ValueError(
                    f"{argument}: expected maps (B, C, H, W), but got {tuple(x.shape)} at "
                    f"{self.taps['features']!r} for an input of {height} x {width} pixels, and no "
                    f"stride gives a grid of {second} x {third} cells. Is this (B, H, W, C)? Then "
                    f'pass {option}="BHWC"; does the model resize its images inside? Then resize '
                    "them before it; else name another module"
                )

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
        if view is not self._view:
            refuse_other_inputs(self._role, self.model)
        return self._look(self._tap.run(*arguments), view)

    def _look(self, tapped: dict[str, Any], view: View) -> Look:
        if self._layout == "BHWC":
            maps = [x.permute(0, 3, 1, 2) for x in feature_maps(tapped["features"])]
        elif self._pyramid is None:
            maps = feature_maps(tapped["features"])
        else:
            size = view.size if self._pyramid.source == "tokens" else ()
            maps = pyramid_maps(self._pyramid, tapped["features"], size)
        return Look(maps, view, tapped=tapped if "head" in tapped else None)

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        look = self._look(tapped, self.see(images))
        return Seen(look, _truth(targets, images, look))

    def see(self, images: Any) -> View:
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise TypeError(_no_batch(images))
        return View(images)

    def observe(self, images: Any, targets: Any) -> Seen:
        look = self.look(self.see(images))
        return Seen(look, _truth(targets, images, look))

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        self.model(self.see(images).images)
        return None

    def detections(self, view: View) -> list[Detections] | None:
        return None

    def detach(self) -> None:
        self._tap.remove()


def refuse_other_inputs(role: str, model: nn.Module) -> None:
    """A detector that cannot be called with one batch of images, such as RGB and thermal ones.

    Raises:
        ValueError: It needs more.
    """
    needed = [
        name
        for name, x in inspect.signature(model.forward).parameters.items()
        if x.default is x.empty and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        kind = type(model).__name__
        raise ValueError(
            f"{role}: expected a detector that is called with one image batch, but {kind}.forward "
            f"needs {', '.join(needed)}; wrap it in a module whose forward(x) splits the channels "
            "of one batch, as in self.net(x[:, :3], x[:, 3:]) (docs/own_detector.md)"
        )


def as_targets(
    targets: Any,
    device: torch.device,
    *,
    num_images: int | None = None,
    canvas: Sequence[int] | None = None,
) -> Targets:
    """A :class:`Targets` as it is, or packed from one mapping per image.

    Args:
        targets: Either.
        device: For what is packed.
        num_images: How many images there are; a list must be as long.
        canvas: Their ``(H, W)``; see :meth:`Targets.from_list`.
    """
    if isinstance(targets, Targets):
        return targets
    return Targets.from_list(targets, device, num_images=num_images, canvas=canvas)


def _no_batch(images: Any) -> str:
    """What came in place of an image batch, and how to make one of it."""
    expected = "images: expected a batch (B, C, H, W)"
    if isinstance(images, Mapping):
        keys = ", ".join(sorted(map(str, images)))
        return (
            f"{expected}, but got a dictionary with {keys}; pass its "
            'images and targets: kd(batch["images"], ...), and to passes over a loader pairs: '
            '((b["images"], [{"boxes": ..., "labels": ...}, ...]) for b in loader)'
        )
    came = f"{expected}, but got {_check.shape_of(images)}"
    if isinstance(images, Tensor):
        return f"{came}; pass images[None] for one image"
    if isinstance(images, (list, tuple)) and images:
        if all(isinstance(x, Tensor) and x.dim() == 3 for x in images):
            return f"{came} of images; pass torch.stack(images), as the network is given them"
        return (
            f"{came} of {', '.join(_check.shape_of(x) for x in images[:4])}; pass images, targets"
        )
    if hasattr(images, "tensors"):
        return f"{came}; pass images.tensors, the batch that it holds"
    if hasattr(images, "__array__"):
        return f"{came}; pass torch.as_tensor(images), as the network is given it"
    return f"{came}; pass what the student was called with"


def _truth(targets: Any, images: Any, look: Look) -> Targets:
    batch = isinstance(images, Tensor) and images.dim() == 4
    number = len(look.maps[0])
    if batch and len(images) != number:
        raise ValueError(
            f"images: expected the {number} images of the student's last forward, but got "
            f"{len(images)}; call kd once after each forward, with its images"
        )
    canvas = tuple(images.shape[-2:]) if batch else None
    return as_targets(targets, look.maps[0].device, num_images=number, canvas=canvas)
