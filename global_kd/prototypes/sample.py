"""The sample that prototypes are made of: of each class the instances with the smallest keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ranks import Ranks
from .keys import NEVER
from .plain import device_after

_MIN_PENDING = 4096  # rows that may wait before the sample is cut back


class Rows(NamedTuple):
    """A table of instances."""

    student: Tensor  # float32 (R, L, Cs)
    teacher: Tensor  # float32 (R, L, Ct)
    labels: Tensor  # int64 (R,), as all below
    ids: Tensor  # -1 where unknown
    keys: Tensor
    calls: Tensor  # when it was seen; the later of two rows of one instance is kept
    ties: Tensor  # what decides between two rows of one call

    def take(self, index: Tensor) -> Rows:
        """Some of them."""
        return Rows(*(x[index] for x in self))

    def to(self, device: torch.device) -> Rows:
        """On a device; dtypes stay."""
        return Rows(*(x.to(device) for x in self))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Levels, student channels, teacher channels."""
        return self.student.shape[1], self.student.shape[2], self.teacher.shape[2]


def no_rows(shape: Sequence[int]) -> Rows:
    """Of (levels, student channels, teacher channels)."""
    levels, *channels = shape
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    student, teacher = (
        torch.zeros(0, levels, c, dtype=torch.float32, device="cpu") for c in channels
    )
    return Rows(student, teacher, none, none, none, none, none)


class Sample:
    """At most so many instances of each class, those with the smallest keys; each once.

    Rows wait until there are enough of them that a cut pays, so adding makes no device wait.

    Args:
        num_classes: ``K``.
        size: Instances of each class.
    """

    def __init__(self, num_classes: int, size: int) -> None:
        self.num_classes, self.size = num_classes, size
        self.calls = 0  # of whoever adds, on which later rows replace earlier ones
        self.parts: list[Rows] = []
        self._kept = self._pending = 0

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Levels, student channels, teacher channels, once there are rows."""
        return self.parts[0].shape if self.parts else None

    def follow(self, device: torch.device) -> None:
        """Go where new rows come from: those of a checkpoint lie where it was loaded to."""
        if self.parts and self.parts[0].student.device != device:
            self.parts = [rows.to(device) for rows in self.parts]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow ``module._apply(fn)`` to its device; dtypes stay."""
        self.parts = [Rows(*(x.to(device_after(fn, x)) for x in rows)) for rows in self.parts]

    def add(self, rows: Rows) -> None:
        """Offer rows; those with the key ``NEVER`` are not kept."""
        self.parts.append(rows)
        self._pending += len(rows.labels)
        if self._pending > max(_MIN_PENDING, self._kept // 4):
            self.cut()

    def put(self, rows: Rows | None) -> None:
        """Hold these instead, which are a sample already."""
        self.parts = [] if rows is None else [rows]
        self._kept, self._pending = (0 if rows is None else len(rows.labels)), 0

    def clear(self) -> None:
        """Forget the rows and the calls."""
        self.put(None)
        self.calls = 0

    def cut(self) -> Rows | None:
        """The rows that stay, by class and key, if any."""
        if self._pending:
            columns = list(zip(*self.parts, strict=True))
            small = [torch.cat(x) for x in columns[2:]]
            order = self._smallest(Rows(small[0], small[0], *small))
            # One large column after the other: each is there twice only for a moment.
            large = [torch.cat(x)[order] for x in columns[:2]]
            self.parts = [Rows(*large, *(x[order] for x in small))]
            self._kept, self._pending = len(self.parts[0].labels), 0
        return self.parts[0] if self.parts else None

    def _smallest(self, rows: Rows) -> Tensor:
        """Index of the rows that stay, by class and key: each instance once, as last seen."""
        order = rows.ties.argsort(stable=True)
        for column in (-rows.calls, rows.keys, rows.labels):
            order = order[column[order].argsort(stable=True)]
        labels, key = rows.labels[order], rows.keys[order]
        fresh = torch.ones_like(labels, dtype=torch.bool)
        fresh[1:] = (labels[1:] != labels[:-1]) | (key[1:] != key[:-1])
        fresh &= key != NEVER
        order, labels = order[fresh], labels[fresh]
        counts = torch.bincount(labels, minlength=self.num_classes)
        rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels]
        return order[rank < self.size]

    def __len__(self) -> int:
        """Number of instances kept on this rank."""
        self.cut()
        return self._kept

    def counts(self) -> Tensor:
        """Instances of each class kept on this rank, int64 ``(K,)``."""
        rows = self.cut()
        if rows is None:
            return torch.zeros(self.num_classes, dtype=torch.int64, device="cpu")
        return torch.bincount(rows.labels, minlength=self.num_classes)

    def limits(self, labels: Tensor, key: Tensor) -> Tensor:
        """Largest key of each class that a full sample kept, int64 ``(K,)``; else any but never."""
        counts = torch.bincount(labels, minlength=self.num_classes)
        largest = torch.zeros(self.num_classes, dtype=torch.int64, device=labels.device)
        largest.scatter_reduce_(0, labels, key, "amax")
        return torch.where(counts >= self.size, largest, NEVER - 1)

    def shared(
        self, ranks: Ranks, drawn: Mapping[str, Any], owner: int | None = None
    ) -> Rows | None:
        """The sample of all ranks: here the rows of the classes that this rank is to work on.

        Args:
            ranks: Of the job.
            drawn: What keys are made of, by name: it must be the same on all ranks.
            owner: The rank that gets all classes; without it they are divided.

        Raises:
            RuntimeError: Another rank failed.
            ValueError: Ranks that sample otherwise, or rows of unlike shapes.
        """
        rows, counts, problem = None, [0] * self.num_classes, None
        try:
            rows, counts = self.cut(), self.counts().tolist()
        except Exception as error:
            problem = error
        same = {**drawn, "max_instances": self.size, "num_classes": self.num_classes}
        kind = None if rows is None else rows.labels.device.type
        told = ranks.tell((same, None if rows is None else rows.shape, counts, kind), problem)
        shape = _common_shape(told)
        if ranks.size == 1 or shape is None:
            return rows
        # Rows of a checkpoint may lie elsewhere than those of the other ranks.
        there = ranks.common(kind for *_, kind in told)
        rows = (no_rows(shape) if rows is None else rows).to(there)
        # The largest classes first, so that no rank gets many of them.
        totals = torch.tensor([counts for _, _, counts, _ in told], device="cpu").sum(dim=0)
        owners = torch.zeros(self.num_classes, dtype=torch.int64, device="cpu")
        owners[totals.argsort(descending=True, stable=True)] = (
            torch.arange(self.num_classes, device="cpu") % ranks.size if owner is None else owner
        )
        to = owners.to(rows.labels.device)[rows.labels]
        order = to.argsort(stable=True)
        rows, to = rows.take(order), to[order]
        # First the columns that decide, then only the rows that stay.
        columns, source = ranks.deal(rows[2:], to)
        sampled = self._smallest(Rows(columns[0], columns[0], *columns))
        stays = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        stays[sampled] = True
        (stays,), _ = ranks.deal([stays], source)
        arrived, _ = ranks.deal(rows.take(stays), to[stays])
        merged = Rows(*arrived)
        return merged.take(self._smallest(merged))


def _common_shape(told: Sequence[tuple[Any, ...]]) -> tuple[int, int, int] | None:
    """Of the rows of all ranks, by what each told; ``None``: no rank has any."""
    for rank, (facts, *_) in enumerate(told):
        if facts != told[0][0]:
            raise ValueError(
                f"generate: expected {told[0][0]} as on rank 0, but rank {rank} has {facts}"
            )
    shapes = {shape for _, shape, *_ in told if shape is not None}
    if len(shapes) > 1:
        raise ValueError(
            "generate: expected rows of one (levels, student channels, teacher channels) on "
            f"all ranks, but got {shapes}"
        )
    return shapes.pop() if shapes else None
