"""Any detector, by the module that puts out its pyramid."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import FeatureTap, evaluating, feature_maps, find_pyramids, pyramid_maps
from ..targets import Targets
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

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        look = self._look(tapped, View(images))
        return Seen(look, as_targets(targets, look.maps[0].device))

    def see(self, images: Any) -> View:
        return View(images)

    def observe(self, images: Any, targets: Any) -> Seen:
        look = self.look(self.see(images))
        return Seen(look, as_targets(targets, look.maps[0].device))

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        self.model(images)
        return None

    def detections(self, view: View) -> list[Detections] | None:
        return None

    def detach(self) -> None:
        self._tap.remove()


def as_targets(targets: Any, device: torch.device) -> Targets:
    """A :class:`Targets` as it is, or packed from one mapping per image."""
    return targets if isinstance(targets, Targets) else Targets.from_list(targets, device)
