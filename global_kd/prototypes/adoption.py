"""Prototypes of one student, found again for the next student of the same teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..instances import pool_levels
from ..targets import Targets
from .bank import PrototypeBank


class Adoption:
    """Looks for a bank's instances among targets and takes another student's rows of them.

    An instance is known by its id and class; the first that turns up is taken.

    Args:
        bank: Its teacher rows stay. Of more prototypes than ``own`` has slots, those are used that
            the pursuit picked first.
        own: The bank of the new student, which :meth:`fill` fills; of the same levels, classes and
            teacher channels.
    """

    def __init__(self, bank: PrototypeBank, own: PrototypeBank) -> None:
        slot = bank.valid.cumsum(dim=2) - 1  # its place in ``own``, which has no gaps
        taken = bank.valid & (slot < own.valid.shape[2])
        self._own, self._origin = own, bank.origin()
        levels, labels, _ = taken.nonzero().to(own.valid.device).unbind(dim=1)
        self._at = levels, labels, slot[taken].to(own.valid.device)  # (P,) each
        # Copies, so that a bank may be its own successor.
        self._ids = bank.ids[taken].to(own.ids)
        self._teacher = bank.teacher[taken].to(own.teacher)
        self._student = own.student.new_zeros(len(self), own.student.shape[-1])
        self._found = torch.zeros_like(self._ids, dtype=torch.bool)

    def __len__(self) -> int:
        """Number of prototypes wanted, ``P``."""
        return len(self._ids)

    @property
    def missing(self) -> int:
        """Number of prototypes not found yet."""
        return int((~self._found).sum())

    def offer(
        self, student: Sequence[Tensor], targets: Targets, ids: Tensor, strides: Sequence[float]
    ) -> None:
        """Take the rows of the wanted among ``targets`` from the student's maps ``(B, C, H, W)``.

        Rows that are not finite are left for another time.
        """
        levels, labels, _ = self._at
        match = (self._ids[:, None] == ids) & (labels[:, None] == targets.labels)
        match &= ~self._found[:, None]
        boxes = match.any(dim=0).nonzero()[:, 0]  # most are none: only these are pooled
        if not len(boxes):
            return
        wanted = Targets(targets.boxes[boxes], targets.labels[boxes], targets.image_index[boxes])
        match = match[:, boxes]
        rows = pool_levels(student, wanted, strides)[levels, match.int().argmax(dim=1)]
        hit = match.any(dim=1) & rows.isfinite().all(dim=1)
        self._student = torch.where(hit[:, None], rows.to(self._student), self._student)
        self._found |= hit

    def fill(self) -> None:
        """Replace the prototypes of the student's own bank by those found."""
        own, found = self._own, self._found
        at = tuple(x[found] for x in self._at)
        own.clear()
        for name, rows in (
            ("student", self._student),
            ("teacher", self._teacher),
            ("ids", self._ids),
            ("valid", found),
        ):
            getattr(own, name)[at] = rows[found]
        own.set_extra_state(self._origin)
