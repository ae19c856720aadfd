"""Checks at the public door: the argument, what was expected, what came.

Only shapes, dtypes and devices are looked at here; they cost nothing on any device and under
``torch.compile``. Checks of *values* (NaN boxes, labels out of range) would make an accelerator
wait, so they are done once, by :class:`global_kd.Targets`.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def shape_of(x: object) -> str:
    """``(2, 3)`` for a tensor, the type's name for anything else."""
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def tensor(name: str, x: object, dims: int | None, meaning: str) -> None:
    """``x`` is a tensor with ``dims`` dimensions; ``meaning`` names them, like ``(R, 4)``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {meaning}, but got {type(x).__name__}")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name}: expected shape {meaning}, but got {tuple(x.shape)}")


def floating(name: str, x: Tensor) -> None:
    """``x`` has a floating-point dtype."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, but got {x.dtype}")


def integer(name: str, x: Tensor) -> None:
    """``x`` is an int64 tensor."""
    tensor(name, x, None, "of int64")
    if x.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, but got {x.dtype}")


def shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    """``x`` has exactly this shape."""
    if x.shape != expected:
        raise ValueError(f"{name}: expected shape {tuple(expected)}, but got {tuple(x.shape)}")


def length(name: str, x: Tensor, expected: int) -> None:
    """The last dimension of ``x`` has this many entries."""
    if x.dim() == 0 or x.shape[-1] != expected:
        raise ValueError(
            f"{name}: expected {expected} entries in the last dimension, but got {tuple(x.shape)}"
        )


def same_device(**tensors: Tensor | None) -> None:
    """All given tensors lie on the device of the first."""
    given = {name: x for name, x in tensors.items() if x is not None}
    (first, reference), *rest = given.items()
    for name, x in rest:
        if x.device != reference.device:
            raise ValueError(
                f"{name}: expected device {reference.device} (that of {first}), but got {x.device}"
            )


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """``value`` is one of the named choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(repr, choices))}, but got {value!r}"
        )


def scalar(name: str, x: object) -> None:
    """A number, or a tensor of one."""
    if isinstance(x, Tensor):
        if x.numel() != 1:
            raise ValueError(f"{name}: expected a scalar, but got shape {tuple(x.shape)}")
    elif not isinstance(x, Real):
        raise TypeError(f"{name}: expected a scalar, but got {type(x).__name__}")


def _number(name: str, value: Any, meaning: str) -> None:
    """A number of any kind, or a tensor of one."""
    one = isinstance(value, Tensor) and value.numel() == 1
    if not isinstance(value, Real) and not one:
        raise TypeError(f"{name}: expected {meaning}, but got {value!r}{_as_number(name, value)}")


def _as_number(name: str, value: object, kind: type = float) -> str:
    """The next thing to type, where a text or a fraction was meant as a number."""
    if not isinstance(value, (str, float)):
        return ""
    try:
        return f"; write {name}={kind(float(value))!r}"
    except (ValueError, OverflowError):
        return ""


def positive(name: str, value: float) -> None:
    """A number > 0."""
    _number(name, value, "a number > 0")
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0, but got {value!r}")


def not_negative(name: str, value: float) -> None:
    """A finite number >= 0."""
    _number(name, value, "a finite number >= 0")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number >= 0, but got {value!r}")


def count(name: str, value: object, *, or_none: bool = True, least: int = 1) -> None:
    """A whole number of at least 1 (or another least one), or ``None`` where that is allowed."""
    if value is None and or_none:
        return
    meaning = "a whole number or None" if or_none else "a whole number"
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(
            f"{name}: expected {meaning}, but got {value!r}{_as_number(name, value, int)}"
        )
    if value < least:
        bound = "> 0" if least == 1 else f">= {least}"
        raise ValueError(f"{name}: expected a number {bound}, but got {value!r}")


def options(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Names of options of the class that the user called; unknown ones with the nearest known."""
    known = sorted(known)
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.65)
            listed = f"write {' or '.join(near)}" if near else f"it has {', '.join(known)}"
            raise TypeError(f"{name}: expected an option of {kind}, but got {name!r}; {listed}")


def class_names(names: Sequence[str] | None, num_classes: int) -> None:
    """One string per class, or ``None``."""
    if names is None:
        return
    if isinstance(names, str) or not all(isinstance(x, str) for x in names):
        raise TypeError(f"class_names: expected a sequence of strings, but got {names!r}")
    if len(names) != num_classes:
        raise ValueError(
            f"class_names: expected {num_classes} names, one per class, but got {len(names)}"
        )


def boxes(boxes: Tensor, image_index: Tensor) -> None:
    """Float boxes ``(R, 4)`` and the int64 image ``(R,)`` of each."""
    tensor("boxes", boxes, 2, "(R, 4)")
    if boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected shape (R, 4), but got {tuple(boxes.shape)}")
    floating("boxes", boxes)
    tensor("image_index", image_index, 1, "(R,)")
    integer("image_index", image_index)
    length("image_index", image_index, boxes.shape[0])


def same_maps(student: Tensor, teacher: Tensor) -> None:
    """Maps ``(B, C, H, W)`` of one shape."""
    for name, x in (("student", student), ("teacher", teacher)):
        tensor(name, x, 4, "(B, C, H, W)")
        floating(name, x)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student: expected the teacher's shape {tuple(teacher.shape)}, but got "
            f"{tuple(student.shape)}; give the loss an adapter"
        )
    same_device(student=student, teacher=teacher)


def paired_rows(student: Tensor, teacher: Tensor, last: str = "C") -> None:
    """Rows ``(..., R, C)`` of the same instances in both spaces."""
    for name, x in (("student", student), ("teacher", teacher)):
        tensor(name, x, None, f"(..., R, {last})")
        floating(name, x)
        if x.dim() < 2:
            raise ValueError(f"{name}: expected shape (..., R, {last}), but got {tuple(x.shape)}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: expected the instances of student, shape {tuple(student.shape[:-1])} + "
            f"({last},), but got {tuple(teacher.shape)}"
        )
    same_device(student=student, teacher=teacher)


def paired_prototypes(
    student: Tensor, teacher: Tensor, student_prototypes: Tensor, teacher_prototypes: Tensor
) -> None:
    """Prototype rows that fit the instance rows of their space and each other."""
    for name, rows, prototypes in (
        ("student_prototypes", student, student_prototypes),
        ("teacher_prototypes", teacher, teacher_prototypes),
    ):
        tensor(name, prototypes, None, "(..., P, C)")
        floating(name, prototypes)
        lead, channels = tuple(rows.shape[:-2]), rows.shape[-1]
        if (
            prototypes.shape[:-2] != lead
            or prototypes.dim() < 2
            or prototypes.shape[-1] != channels
        ):
            expected = ", ".join(map(str, (*lead, "P", channels)))
            raise ValueError(
                f"{name}: expected shape ({expected}), but got {tuple(prototypes.shape)}"
            )
    if student_prototypes.shape[:-1] != teacher_prototypes.shape[:-1]:
        raise ValueError(
            "teacher_prototypes: expected the prototypes of student_prototypes, shape "
            f"{tuple(student_prototypes.shape[:-1])} + (C,), but got "
            f"{tuple(teacher_prototypes.shape)}"
        )
    same_device(
        student=student,
        student_prototypes=student_prototypes,
        teacher_prototypes=teacher_prototypes,
    )
