"""The labelled boxes of a batch, packed."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check
from .ops.transfer import sent


@dataclass(frozen=True, eq=False)
class Targets:
    """Boxes of a batch in one table.

    Shapes, dtypes and devices are checked always. Values (finite boxes, ``x2 >= x1``, indices
    ``>= 0``) are checked for tensors on the CPU; on an accelerator that would make it wait, so call
    :meth:`validate` there when in doubt (the :class:`global_kd.Distiller` does on its first step).

    Args:
        boxes: Float ``(R, 4)``, ``(x1, y1, x2, y2)`` in pixels of the padded network input. Boxes
            may cross the border, lie outside, or have no area.
        labels: int64 ``(R,)``, class of each box in ``[0, num_classes)``.
        image_index: int64 ``(R,)``, which image of the batch each box belongs to.
        ids: Optional int64 ``(R,)`` >= 0: any number by which to find an instance again in the
            whole data set, such as its annotation id. Prototypes remember it; boxes of one id and
            class are taken for one instance.

    Example:
        >>> import torch
        >>> from global_kd import Targets
        >>> one = {"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]]), "labels": torch.tensor([3])}
        >>> none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        >>> Targets.from_list([none, one]).image_index
        tensor([1])
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    ids: Tensor | None = None

    def __post_init__(self) -> None:
        if type(self.boxes) is not Tensor:
            object.__setattr__(self, "boxes", _as_xyxy("boxes", self.boxes))
        _check.boxes(self.boxes, self.image_index)
        for name, x in (("labels", self.labels), ("ids", self.ids)):
            if x is not None:
                _check.tensor(name, x, 1, "(R,)")
                _check.integer(name, x)
                _check.length(name, x, self.boxes.shape[0])
        _check.same_device(
            boxes=self.boxes, labels=self.labels, image_index=self.image_index, ids=self.ids
        )
        if self.boxes.device.type == "cpu" and not torch.compiler.is_compiling():
            self.validate()

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def validate(self, *, num_classes: int | None = None, num_images: int | None = None) -> None:
        """Check the values; makes an accelerator wait once.

        Raises:
            ValueError: Boxes that are not finite or have ``x2 < x1`` or ``y2 < y1``; a negative
                index; with ``num_classes`` or ``num_images``, a label or image index beyond it.
        """
        bad = ~self.boxes.isfinite().all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"boxes: expected finite coordinates, but got {self.boxes[row].tolist()} in row "
                f"{row}"
            )
        bad = (self.boxes[:, 2:] < self.boxes[:, :2]).any(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                "boxes: expected xyxy with x2 >= x1 and y2 >= y1, but got "
                f"{self.boxes[row].tolist()} in row {row}; boxes in xywh must be converted first"
            )
        for name, x, end in (
            ("labels", self.labels, num_classes),
            ("image_index", self.image_index, num_images),
            ("ids", self.ids, None),
        ):
            if x is None or len(x) == 0:
                continue
            lowest, highest = int(x.min()), int(x.max())
            if lowest < 0:
                raise ValueError(f"{name}: expected values >= 0, but got {lowest}")
            if end is not None and highest >= end:
                raise ValueError(f"{name}: expected values below {end}, but got {highest}")

    def to(self, device: torch.device | str) -> "Targets":
        """The same targets on another device."""
        ids = None if self.ids is None else sent(self.ids, device)
        boxes, labels = sent(self.boxes, device), sent(self.labels, device)
        return Targets(boxes, labels, sent(self.image_index, device), ids)

    @classmethod
    def from_list(
        cls,
        targets: Sequence[Mapping[str, Tensor]],
        device: torch.device | str | None = None,
        *,
        num_images: int | None = None,
        canvas: Sequence[int] | None = None,
    ) -> "Targets":
        """Pack one mapping per image with ``boxes (r, 4)``, ``labels (r,)``, optional ``ids``.

        The boxes must already be in pixels of the padded network input. Those that say in which
        format they are (torchvision's ``tv_tensors.BoundingBoxes``) are converted. An image without
        boxes may have them of any dtype, and of shape ``(0,)``.

        Args:
            targets: One mapping per image.
            device: Of the result; ``None``: that of the first boxes.
            num_images: How many mappings there must be.
            canvas: ``(H, W)`` of the images, beyond which boxes cannot have been measured that say
                what canvas theirs is.

        Raises:
            ValueError, TypeError: What does not fit, naming the image.
        """
        if isinstance(targets, (Mapping, str)) or not isinstance(targets, Sequence):
            raise TypeError(
                "targets: expected a list of one dictionary per image with 'boxes' and 'labels', "
                f"but got {type(targets).__name__}; pass [{{'boxes': ..., 'labels': ...}}, ...]"
            )
        if num_images is not None and len(targets) != num_images:
            raise ValueError(
                f"targets: expected {num_images} dictionaries, one per image, but got "
                f"{len(targets)}; an image without boxes has boxes of shape (0, 4)"
            )
        rows = [_Image.read(i, target, canvas) for i, target in enumerate(targets)]
        full = {i: x for i, x in enumerate(rows) if len(x.boxes)}  # one without decides nothing
        if device is None:
            device = next((x.boxes.device for x in [*full.values(), *rows]), torch.device("cpu"))
        if not full:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            named = any(x.ids is not None for x in rows)
            boxes = torch.zeros(0, 4, device=device)
            return cls(boxes, none, none, none if named else None)
        # Joined where they are, and sent in two pieces.
        where = next(iter(full.values())).boxes.device
        index = [torch.full_like(x.labels, i, device=where) for i, x in full.items()]
        columns = [[x.labels for x in full.values()], index]
        ids = [x.ids for x in full.values() if x.ids is not None]
        if len(ids) == len(full):
            columns.append(ids)
        boxes = torch.cat([x.boxes.to(where) for x in full.values()])
        table = torch.stack([torch.cat([x.to(where) for x in column]) for column in columns])
        return cls(sent(boxes, device), *sent(table, device).unbind())


def warn_of_shared_ids(ids: Tensor, looks: Tensor, *, stacklevel: int) -> None:
    """Warn where one id stands for instances that look unlike; makes an accelerator wait.

    Args:
        ids: int64 ``(R,)``.
        looks: A row ``(R, F)`` each: its box, and whatever else is known of it.
        stacklevel: As in ``warnings.warn``, seen from the caller.
    """
    order = ids.argsort(stable=True)
    ids, looks = ids[order], looks[order]
    unlike = ~torch.isclose(looks[1:], looks[:-1], rtol=1e-5, atol=1e-3).all(dim=1)
    shared = ids[1:][(ids[1:] == ids[:-1]) & unlike]
    if len(shared):
        warnings.warn(
            "targets: expected ids that name one instance of the whole data set each, but some "
            f"stand for boxes that differ, such as {int(shared[0])}: their instances are taken for "
            "one. Pass annotation ids, no numbers that begin anew with each image or name the "
            "image, or leave ids out",
            stacklevel=stacklevel + 1,
        )


@dataclass(frozen=True)
class _Image:
    """What one image's mapping holds, checked."""

    boxes: Tensor
    labels: Tensor
    ids: Tensor | None

    @classmethod
    def read(cls, i: int, target: Any, canvas: Sequence[int] | None) -> "_Image":
        if not isinstance(target, Mapping):
            raise TypeError(
                f"targets[{i}]: expected a dictionary with 'boxes' and 'labels', but got "
                f"{type(target).__name__}; write {{'boxes': boxes, 'labels': labels}} for each "
                "image"
            )
        if {"boxes", "labels"} - set(target):
            raise ValueError(
                f"targets[{i}]: expected the keys 'boxes' and 'labels', but got "
                f"{sorted(map(str, target))}; write {{'boxes': xyxy in pixels, 'labels': classes}}"
            )
        for key in ("boxes", "labels", "ids"):
            if (key in target) and not isinstance(target[key], Tensor):
                kind = "float32" if key == "boxes" else "int64"
                raise TypeError(
                    f"targets[{i}][{key!r}]: expected a tensor, but got "
                    f"{type(target[key]).__name__}; pass torch.as_tensor(..., dtype=torch.{kind})"
                )
        boxes, name = target["boxes"], f"targets[{i}]['boxes']"
        if boxes.shape == (0,):
            boxes = boxes.reshape(0, 4)
        boxes = _as_xyxy(name, boxes, canvas)
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name}: expected shape (r, 4), but got {tuple(boxes.shape)}")
        if len(boxes) and not boxes.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating-point tensor, but got {boxes.dtype}; pass "
                "boxes.float()"
            )
        numbers = {}
        for key in ("labels", "ids"):
            if key not in target:
                continue
            x, name = target[key], f"targets[{i}][{key!r}]"
            if x.dim() != 1 or len(x) != len(boxes):
                raise ValueError(
                    f"{name}: expected shape ({len(boxes)},), one for each of this image's boxes, "
                    f"but got {tuple(x.shape)}"
                )
            if len(x) and (x.is_floating_point() or x.dtype == torch.bool):
                raise TypeError(
                    f"{name}: expected an int64 tensor, but got {x.dtype}; pass .to(torch.int64) "
                    "if these are whole numbers"
                )
            numbers[key] = x.to(torch.int64)
        return cls(boxes, numbers["labels"], numbers.get("ids"))


def _as_xyxy(name: str, boxes: Tensor, canvas: Sequence[int] | None = None) -> Tensor:
    """Boxes that carry a ``format`` and a ``canvas_size`` as a plain tensor of corners."""
    if not isinstance(boxes, Tensor) or not hasattr(boxes, "format"):
        return boxes
    kind = getattr(boxes.format, "value", boxes.format)
    size = getattr(boxes, "canvas_size", None)
    if canvas is not None and size is not None and (size[0] > canvas[0] or size[1] > canvas[1]):
        raise ValueError(
            f"{name}: expected boxes on the canvas of the images, {tuple(canvas)}, but got a "
            f"canvas_size of {tuple(size)}; resize boxes together with their image"
        )
    plain = boxes.as_subclass(Tensor)
    if kind == "XYXY":
        return plain
    first, second = plain[..., :2], plain[..., 2:]
    if kind == "XYWH":
        return torch.cat([first, first + second], dim=-1)
    if kind == "CXCYWH":
        return torch.cat([first - second / 2, first + second / 2], dim=-1)
    raise ValueError(
        f"{name}: expected the format XYXY, XYWH or CXCYWH, but got {kind}; pass the upright box "
        "around each"
    )
