"""The labelled boxes of a batch, packed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check


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
        ids: Optional int64 ``(R,)`` >= 0: any number by which to find an instance again, such as
            its annotation id. Prototypes remember it.

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
        ids = None if self.ids is None else self.ids.to(device)
        return Targets(
            self.boxes.to(device), self.labels.to(device), self.image_index.to(device), ids
        )

    @classmethod
    def from_list(
        cls, targets: Sequence[Mapping[str, Tensor]], device: torch.device | str | None = None
    ) -> "Targets":
        """Pack one mapping per image with ``boxes (r, 4)``, ``labels (r,)``, optional ``ids``.

        The boxes must already be in pixels of the padded network input.
        """
        for i, target in enumerate(targets):
            missing = {"boxes", "labels"} - set(target)
            if missing:
                raise ValueError(
                    f"targets[{i}]: expected the keys 'boxes' and 'labels', but got "
                    f"{sorted(target)}"
                )
            boxes = target["boxes"]
            if boxes.dim() != 2 or boxes.shape[1] != 4:
                raise ValueError(
                    f"targets[{i}]['boxes']: expected shape (r, 4), but got {tuple(boxes.shape)}"
                )
        if device is None:
            device = targets[0]["boxes"].device if targets else "cpu"
        counts = torch.tensor([len(t["boxes"]) for t in targets], dtype=torch.int64)
        image_index = torch.arange(len(targets)).repeat_interleave(counts)

        def packed(key: str, like: Tensor) -> Tensor:
            given = [t[key].to(like.dtype) for t in targets if key in t]
            return torch.cat([like, *given]).to(device)

        where = targets[0]["boxes"].device if targets else torch.device("cpu")
        whole = torch.zeros(0, dtype=torch.int64, device=where)
        dtype = targets[0]["boxes"].dtype if targets else torch.float32
        boxes = packed("boxes", torch.zeros(0, 4, dtype=dtype, device=where))
        named = [t for t in targets if "ids" in t]
        lacking = any("ids" not in t and len(t["boxes"]) for t in targets)
        ids = packed("ids", whole) if named and not lacking else None
        return cls(boxes, packed("labels", whole), image_index.to(device), ids)
