"""Which reader a detector gets, and what to type where it cannot have one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import _check
from ..hooks import resolve
from .frameworks import detector_of
from .module import ModuleDetector, refuse_other_inputs
from .own_head import ReadHead
from .pixels import Pixels, in_colours, in_floating_point, telling_channels
from .protocol import Detector


def reader(
    role: str,
    model: nn.Module,
    path: Any,
    example_inputs: Any,
    layout: str,
    dense: tuple[str, ReadHead] | None,
    pixels: Any,
) -> Detector:
    """What reads a bare model in its role.

    Raises:
        TypeError, ValueError: Options that are not what they are called.
    """
    if pixels is not None and not isinstance(pixels, Pixels):
        raise TypeError(
            f"{role}_pixels: expected Pixels, but got {type(pixels).__name__}; write "
            f"{role}_pixels=Pixels(mean=..., std=...)"
        )
    _check_path(role, model, path)
    _check.one_of(f"{role}_layout", layout, ("BCHW", "BHWC"))
    known = detector_of(model) if path is None and dense is None else None
    if known is not None and layout != "BCHW":
        raise ValueError(
            f"{role}_layout: expected 'BCHW' for {type(model).__name__}, whose framework is known, "
            f"but got {layout!r}; name the module whose maps it is about with {role}_path"
        )
    if known is None:
        inputs = _example_inputs(role, model, path, example_inputs)
        argument = f"{role}_path"
        options: dict[str, Any] = {"argument": argument, "layout": layout, "dense": dense}
        if role == "student":
            known = ModuleDetector(model, path, inputs, **options)
        else:  # its example is the student's
            inputs = [in_colours(x, model) for x in inputs]
            if pixels is not None:  # bytes of the student are converted to this format
                inputs = [in_floating_point(x) if isinstance(x, Tensor) else x for x in inputs]
            with telling_channels(inputs[0], model):
                known = ModuleDetector(model, path, inputs, **options)
    if pixels is not None:
        known.pixels = pixels
    return known


def _check_path(role: str, model: nn.Module, path: Any) -> None:
    if path is None:
        return
    if not isinstance(path, str):
        name = next((n for n, m in model.named_modules() if m is path), None)
        write = f"write {role}_path={name!r}" if name else "write its name in named_modules()"
        raise TypeError(
            f"{role}_path: expected the name of a module, but got {type(path).__name__}; {write}"
        )
    try:
        resolve(model, path)
    except ValueError as error:
        raise ValueError(str(error).replace("path:", f"{role}_path:", 1)) from None


def _example_inputs(role: str, model: nn.Module, path: str | None, given: Any) -> Sequence[Any]:
    """What the forward of a model of no known framework is tried with."""
    kind = type(model).__name__
    if given is None:
        if path is not None and _recognised(model):
            raise ValueError(
                f"example_inputs: expected what {kind}.forward takes in eval mode, since "
                f"{role}_path={path!r} is to be read in place of what is known, but got None; "
                f"leave {role}_path out, or pass example_inputs=(images,) beside it"
            )
        for name, child in model.named_children():
            if _recognised(child):
                raise ValueError(
                    f"{role}: expected a detector of a framework known here, but got {kind}, which "
                    f"holds one; pass it, {role}.{name}"
                )
        raise ValueError(
            f"{role}: {kind} is not a detector of a framework known here; pass "
            "example_inputs=(images,), what its forward takes, an image batch (B, C, H, W) first; "
            f"and unless find_pyramids finds the module that puts out its maps, {role}_path"
        )
    expected = f"example_inputs: expected a tuple of what {kind}.forward takes in eval mode"
    if isinstance(given, Tensor):
        raise TypeError(f"{expected}, but got a tensor; write example_inputs=(images,)")
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise TypeError(
            f"{expected}, but got {type(given).__name__}; write example_inputs=(images,) with an "
            "image batch (B, C, H, W)"
        )
    if not any(isinstance(x, Tensor) and x.dim() == 4 for x in given):
        raise ValueError(
            f"example_inputs: expected an image batch (B, C, H, W) among them, but got "
            f"{[_check.shape_of(x) for x in given]}; {_batched(given)}"
        )
    try:
        inspect.signature(model.forward).bind(*given)
    except TypeError as error:
        if role == "teacher":
            refuse_other_inputs(role, model)
        raise TypeError(
            f"{expected}, {inspect.signature(model.forward)}, but got "
            f"{tuple(_check.shape_of(x) for x in given)} ({error}); write example_inputs=(images,)"
        ) from None
    return given


def _recognised(model: nn.Module) -> bool:
    try:
        return detector_of(model) is not None
    except Exception:  # of a framework, but not one of its detectors
        return False


def _batched(given: Sequence[Any]) -> str:
    """How to come to a batch from what was given in its place."""
    first = given[0] if given else None
    inside = first[0] if isinstance(first, (list, tuple)) and first else None
    if isinstance(first, Tensor) and first.dim() == 3:
        return "write example_inputs=(torch.stack([image, ...]),)"
    if isinstance(inside, Tensor) or hasattr(first, "tensors"):
        return (
            "a detector that takes a list of images or a nested tensor makes the batch inside: "
            "give the Distiller the module in it that takes the batch (docs/own_detector.md)"
        )
    if hasattr(first, "__array__"):
        return "write example_inputs=(torch.as_tensor(images),)"
    return "write example_inputs=(images,)"
