"""What is kept of the prototypes: paired rows per level and class, and where they come from."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._version import __version__
from ..ops.cosine import unit_rows
from . import files
from .plain import moved, text_of, text_tensor

_ROWS = ("student", "teacher", "valid", "ids")
_KIND, _FORMAT = "global_kd.PrototypeBank", 1  # of files; a new layout takes the next number
_NAMED = 10  # classes without prototypes that are listed by name


class PrototypeBank(nn.Module):
    """Paired prototypes of every (level, class), and where they come from.

    Moved by ``.to``, saved by ``state_dict``, never narrower than float32, whatever ``.half()``
    says. They are no buffers of the modules around the bank, since there is no average of two banks
    (``AveragedModel``) and nothing to broadcast. All levels and classes have ``M`` slots, of which
    ``valid`` are filled: shapes never change, and a class without prototypes is nothing special.

    :meth:`save` writes a bank to a file of its own, ``print`` shows what it holds, and
    :meth:`global_kd.Distiller.adopt` uses it for the next student of the same teacher.

    Args:
        num_levels: ``L``.
        num_classes: ``K``.
        num_prototypes: ``M``, slots per level and class.
        student_channels: ``Cs``, the widest level's.
        teacher_channels: ``Ct``, the widest level's.
        strides: Of each level, pixels of the network input per cell.
        class_names: Of each class.
        teacher_fingerprint: Of the teacher whose features these are; a
            :class:`global_kd.Distiller` fills it in.

    Attributes:
        student: float32 ``(L, K, M, Cs)``, raw (not normalised) pooled student features.
        teacher: float32 ``(L, K, M, Ct)``, those of the same instances in the teacher.
        valid: bool ``(L, K, M)``.
        ids: int64 ``(L, K, M)``, the instance behind each slot
            (:class:`global_kd.Targets` ``ids``); -1 where unknown or empty.
        strides: As given; ``None`` where unknown, like the next two.
        class_names: As given.
        teacher_fingerprint: As given.
        version: Of the library that made it.

    Example:
        >>> from global_kd import PrototypeBank
        >>> bank = PrototypeBank(2, 3, 4, 8, 16, strides=[8, 16], class_names=["ant", "bee", "cow"])
        >>> bank.valid[:, 1, :3], bank.student[:, 1, :3] = True, 1.0
        >>> bank.save("bank.pt")
        >>> print(PrototypeBank.load("bank.pt"))
        PrototypeBank: levels 2, classes 3, slots 4; channels 8 (student), 16 (teacher)
        made with global_kd ...; teacher unknown; 0 of 6 prototypes with the id of their instance
        stride  prototypes  classes  cosine in student  in teacher
             8     3 of 12   1 of 3               1.00        0.00
            16     3 of 12   1 of 3               1.00        0.00
        classes without prototypes: ant, cow
    """

    student: Tensor
    teacher: Tensor
    valid: Tensor
    ids: Tensor

    def __init__(
        self,
        num_levels: int,
        num_classes: int,
        num_prototypes: int,
        student_channels: int,
        teacher_channels: int,
        *,
        strides: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        teacher_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        if strides is not None and len(strides) != num_levels:
            raise ValueError(
                f"strides: expected {num_levels} numbers, one per level, but got {list(strides)}"
            )
        _check.class_names(class_names, num_classes)
        slots = (num_levels, num_classes, num_prototypes)
        # Explicit: neither a default device nor a default dtype has a say.
        floats: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        self.student = torch.zeros(*slots, student_channels, **floats)
        self.teacher = torch.zeros(*slots, teacher_channels, **floats)
        self.valid = torch.zeros(slots, dtype=torch.bool, device="cpu")
        self.ids = torch.full(slots, -1, dtype=torch.int64, device="cpu")
        self.strides = None if strides is None else tuple(float(x) for x in strides)
        self.class_names = None if class_names is None else tuple(class_names)
        self.teacher_fingerprint = teacher_fingerprint
        self.version = __version__

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student ``(L, P, Cs)``, teacher ``(L, P, Ct)`` and labels ``(L, P)``, ``P = K * M``.

        The label of an empty slot is -1.
        """
        levels, classes, slots = self.valid.shape
        labels = torch.arange(classes, device=self.valid.device)[:, None]
        labels = torch.where(self.valid, labels, -1)
        return self.student.flatten(1, 2), self.teacher.flatten(1, 2), labels.flatten(1)

    def counts(self) -> Tensor:
        """Number of prototypes of each level and class, int64 ``(L, K)``."""
        return self.valid.sum(dim=2)

    @torch.no_grad()
    def update(self, other: "PrototypeBank") -> None:
        """Take the prototypes of ``other``; keep those of a (level, class) that it has none of."""
        fresh = other.valid.any(dim=2).to(self.valid.device)[:, :, None]
        for name in ("valid", "ids"):
            mine = getattr(self, name)
            mine.copy_(torch.where(fresh, getattr(other, name).to(mine.device), mine))
        for name in ("student", "teacher"):
            mine = getattr(self, name)
            mine.copy_(torch.where(fresh[..., None], getattr(other, name).to(mine), mine))

    @torch.no_grad()
    def clear(self) -> None:
        """Forget all prototypes and whose they were."""
        for name in ("student", "teacher", "valid"):
            getattr(self, name).zero_()
        self.ids.fill_(-1)
        self.teacher_fingerprint = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prototypes and where they come from to a file, complete or not at all.

        Args:
            path: With the suffix ``.safetensors`` in that format (``pip install safetensors``),
                strides and names as JSON in its header; any other by ``torch.save``, tensors and
                plain values only.

        Raises:
            ImportError: ``.safetensors`` without the package.
        """
        rows = {name: getattr(self, name) for name in _ROWS}
        files.write(path, rows, self.origin(), kind=_KIND, version=_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PrototypeBank":
        """A bank as :meth:`save` wrote it, on the CPU. Nothing in the file is run.

        Raises:
            OSError: No such file.
            ValueError: No bank, a damaged one, or one of a later format.
            ImportError: ``.safetensors`` without the package.
        """
        rows, metadata = files.read(path, kind=_KIND, version=_FORMAT)
        try:
            levels, classes, slots = rows["valid"].shape
            bank = cls(
                levels,
                classes,
                slots,
                rows["student"].shape[-1],
                rows["teacher"].shape[-1],
                strides=metadata["strides"],
                class_names=metadata["class_names"],
            )
            bank.load_state_dict({**rows, "_extra_state": metadata})
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path}: expected a whole prototype bank, but got one that does not fit together "
                f"({type(error).__name__}: {error})"
            ) from error
        return bank

    def origin(self) -> dict[str, Any]:
        """Where the prototypes come from: plain values."""
        return {
            "strides": None if self.strides is None else [float(x) for x in self.strides],
            "class_names": None if self.class_names is None else list(self.class_names),
            "teacher_fingerprint": self.teacher_fingerprint,
            "version": self.version,
        }

    def get_extra_state(self) -> Tensor:
        """:meth:`origin` for ``state_dict``: its JSON, uint8, of a size that does not change."""
        return text_tensor(self.origin(), self.valid.shape[1])

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Take over where loaded prototypes come from."""
        state = text_of(state)
        strides, names = state["strides"], state["class_names"]
        if strides is not None:
            self.strides = tuple(float(x) for x in strides)
        if names is not None:
            self.class_names = tuple(names)
        self.teacher_fingerprint = state["teacher_fingerprint"]
        self.version = state["version"]

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        for name in _ROWS:
            yield f"{prefix}.{name}" if prefix else name, getattr(self, name)

    def _apply(self, fn: Any, recurse: bool = True) -> "PrototypeBank":
        for name in _ROWS:
            x = getattr(self, name)
            setattr(self, name, moved(fn, x, widen=x.is_floating_point()))
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def _save_to_state_dict(  # type: ignore[no-untyped-def]
        self, destination, prefix, keep_vars
    ) -> None:
        for name in _ROWS:
            destination[prefix + name] = getattr(self, name)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, *args
    ) -> None:
        for name in _ROWS:
            saved, mine = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape != mine.shape:
                raise ValueError(
                    f"{prefix}{name}: expected a bank of (levels, classes, slots"
                    f"{', channels' if mine.dim() == 4 else ''}) {tuple(mine.shape)}, but the "
                    f"saved one has {tuple(saved.shape)}; it was made for other levels, classes "
                    "or channels"
                )
        key = prefix + "_extra_state"
        if key in state_dict:
            refuse_other(self.origin(), text_of(state_dict[key]), prefix)
        elif prefix + "valid" in state_dict:  # saved before banks knew where they come from
            self.teacher_fingerprint = None
        for name in _ROWS:
            if prefix + name not in state_dict:
                missing_keys.append(prefix + name)
            else:
                with torch.no_grad():
                    getattr(self, name).copy_(state_dict[prefix + name])
        if key in state_dict:
            self.set_extra_state(state_dict[key])
        known = {prefix + name for name in (*_ROWS, "_extra_state")}
        unexpected_keys += [x for x in state_dict if x.startswith(prefix) and x not in known]

    def extra_repr(self) -> str:
        levels, classes, slots = self.valid.shape
        return (
            f"levels={levels}, classes={classes}, slots={slots}, "
            f"student_channels={self.student.shape[-1]}, "
            f"teacher_channels={self.teacher.shape[-1]}, filled={int(self.valid.sum())}"
        )

    @torch.no_grad()
    def __str__(self) -> str:
        """The table that ``print`` shows; ``repr`` is the line within a larger module.

        The cosines are means over all pairs of a level's prototypes. Near 1, what prototypes tell
        apart is small beside what they share: ``RelationOptions(center=True)``
        of :class:`global_kd.RobustDistillLoss` takes cosines around their mean.
        """
        levels, classes, slots = self.valid.shape
        student, teacher, labels = self.flat()
        counts, filled = self.counts().cpu(), labels >= 0
        table = [["stride", "prototypes", "classes", "cosine in student", "in teacher"]]
        for level in range(levels):
            table.append(
                [
                    "?" if self.strides is None else f"{self.strides[level]:g}",
                    f"{int(counts[level].sum())} of {classes * slots}",
                    f"{int((counts[level] > 0).sum())} of {classes}",
                    *(_mean_cosine(x[level][filled[level]]) for x in (student, teacher)),
                ]
            )
        known = int((self.valid & (self.ids >= 0)).sum())
        lines = [
            f"PrototypeBank: levels {levels}, classes {classes}, slots {slots}; channels "
            f"{student.shape[-1]} (student), {teacher.shape[-1]} (teacher)",
            f"made with global_kd {self.version}; teacher {self.teacher_fingerprint or 'unknown'}; "
            f"{known} of {int(counts.sum())} prototypes with the id of their instance",
            *_right_aligned(table),
        ]
        empty = (counts.sum(dim=0) == 0).nonzero()[:, 0].tolist()
        if empty:
            names = self.class_names or [str(i) for i in range(classes)]
            more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
            listed = ", ".join(names[i] for i in empty[:_NAMED])
            lines.append(f"classes without prototypes: {listed}{more}")
        return "\n".join(lines)


def refuse_other(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> None:
    """Raise ``ValueError`` where both know their strides or class names, and they differ.

    Args:
        mine: :meth:`PrototypeBank.origin` of the bank in use.
        theirs: That of the one to be taken over.
        prefix: What the message begins with.
    """
    for name, of in (("strides", "levels"), ("class_names", "classes")):
        expected, came = mine[name], theirs[name]
        if expected is None or came is None or expected == came:
            continue
        if name == "class_names" and len(expected) == len(came):  # of 80, the first that differs
            at = next(i for i, x in enumerate(expected) if x != came[i])
            expected, came = (f"{x[at]!r} for class {at}" for x in (expected, came))
        raise ValueError(
            f"{prefix}{name}: expected a bank of {expected}, but the saved one is of {came}; it "
            f"was made for other {of}"
        )


def _mean_cosine(rows: Tensor) -> str:
    """Mean cosine of all pairs of rows ``(P, C)``, from the length of their sum."""
    count = len(rows)
    if count < 2:
        return "-"
    units = unit_rows(rows)
    own = units.square().sum()  # 1 a row, 0 where it is all zero
    return f"{float((units.sum(dim=0).square().sum() - own) / (count * (count - 1))):.2f}"


def _right_aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in table]
