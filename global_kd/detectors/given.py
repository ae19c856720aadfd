"""Is what ``kd`` is given what the student was called with? One rule for every reader.

The facts of a step come from the student's own forward. So the images must be those of that
forward, in the same order and number; and ground truth that the forward was given, too, must be the
same. Ground truth that it was not given is taken as it comes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..hooks import Call, tensors_in
from ..targets import Targets

_CURE = "call kd once after each forward of the student, with what that forward was given"


class Called(Protocol):
    """What a reader knows of its framework's forward: see :class:`global_kd.detectors.Detector`."""

    def parts(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """The images and the ground truth among the arguments of a forward call."""

    def as_call(self, images: Any, targets: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of the forward call that ``kd(images, targets)`` speaks of."""


def refuse_other(student: Called, call: Call | None, images: Any, targets: Any) -> None:
    """Compare what is given with what the student was called with.

    Nothing waits for an accelerator where tensors are the same ones. Copies are compared by value,
    those of another dtype up to a cast, and those on another device by their shape alone.

    Raises:
        ValueError: Other images or boxes, another order or number, or tensors that were written in
            place since.
    """
    if call is None:
        return
    args, kwargs = student.as_call(images, targets)
    given = student.parts(*args, **kwargs)
    if not given:  # the reader says itself what form it expects
        refuse_other_images(call, images)
        return
    args, kwargs = call.arguments
    called = student.parts(*args, **kwargs)
    for name, value in called.items():
        if value is None:
            continue
        if given.get(name) is None:
            if name == "targets":  # those of the forward
                continue
            raise ValueError(
                f"{name}: expected {_kind(value)} that the student's last forward was given, but "
                f"got none; {_CURE}"
            )
        if reason := _difference(name, given[name], value, call):
            raise ValueError(f"{reason}; {_CURE}")


def refuse_other_images(call: Call, images: Any) -> None:
    """The same for a detector of unknown form: a batch must be one that the student was given."""
    if not (isinstance(images, Tensor) and images.dim() == 4):
        return
    batches = [x for x in tensors_in(call.arguments) if x.dim() == 4]
    reasons = [_difference("images", images, x, call) for x in batches]
    if reasons and all(reasons):
        raise ValueError(f"{reasons[0]}; {_CURE}")


def refuse_strangers(truth: Targets, images: int) -> None:
    """Boxes of images that there are not; on a processor, where looking costs nothing."""
    index = truth.image_index
    if index.device.type == "cpu" and len(index) and int(index.max()) >= images:
        raise ValueError(
            f"targets: expected boxes of the {images} images that the student saw, but got some of "
            f"image {int(index.max())} (counted from 0); {_CURE}"
        )


def one_each(targets: Sequence[Any], images: int, name: str = "targets") -> None:
    """As many entries of ground truth as images."""
    if len(targets) != images:
        raise ValueError(
            f"{name}: expected {images} entries, one per image, but got {len(targets)}; an image "
            "without objects has an entry with boxes of shape (0, 4)"
        )


def refuse_other_format(name: str, boxes: Any, takes: str) -> None:
    """Boxes that say their format (``tv_tensors.BoundingBoxes``) to a model that does not ask.

    Raises:
        ValueError: It is another than the one that the model takes them for.
    """
    kind = getattr(boxes, "format", takes)
    kind = getattr(kind, "value", kind)
    if kind != takes:
        raise ValueError(
            f"{name}: expected boxes in the format {takes}, for which the student takes the "
            f"numbers, but got {kind}; convert them before its forward, with "
            f"torchvision.transforms.v2.ConvertBoundingBoxFormat({takes!r})"
        )


def unpacked(truth: Targets, images: int) -> list[dict[str, Tensor]]:
    """One dictionary of ``boxes`` and ``labels`` per image."""
    masks = [truth.image_index == i for i in range(images)]
    return [{"boxes": truth.boxes[mask], "labels": truth.labels[mask]} for mask in masks]


def taken(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of a forward's parameters; ``None`` where one was not given."""
    found = dict(zip(names, args, strict=False))
    return {name: found.get(name, kwargs.get(name)) for name in names}


def _difference(path: str, given: Any, called: Any, call: Call) -> str | None:
    """The first place where two nested containers of tensors differ, as the start of a message."""
    if isinstance(called, Tensor):
        if not isinstance(given, Tensor):
            return f"{path}: expected a tensor, but got {type(given).__name__}"
        if given.shape != called.shape:
            return (
                f"{path}: expected shape {tuple(called.shape)}, as the student's last forward was "
                f"given, but got {tuple(given.shape)}"
            )
        if call.same(given, called):
            return None
        return (
            f"{path}: expected what the student's last forward was given, but got other values, or "
            "they were written in place since"
        )
    if isinstance(called, Mapping):
        if not isinstance(given, Mapping):
            return f"{path}: expected a mapping, but got {type(given).__name__}"
        for key, value in called.items():
            if value is None:
                continue
            if given.get(key) is None:
                return f"{path}: expected {key!r}, but got the keys {sorted(map(str, given))}"
            if reason := _difference(f"{path}[{key!r}]", given[key], value, call):
                return reason
        return None
    if isinstance(called, (list, tuple)):
        if not isinstance(given, (list, tuple)):
            return f"{path}: expected a list, but got {type(given).__name__}"
        if len(given) != len(called):
            return (
                f"{path}: expected {len(called)} entries, as the student's last forward was given, "
                f"but got {len(given)}"
            )
        for i, pair in enumerate(zip(given, called, strict=True)):
            if reason := _difference(f"{path}[{i}]", *pair, call):
                return reason
    return None


def _kind(value: Any) -> str:
    return f"the {len(value)} entries" if isinstance(value, (list, tuple)) else "those"
