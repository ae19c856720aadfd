"""Passes over a loader: prototypes of a whole data set, or those of another student found again."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..instances import pool_levels
from ..ranks import Ranks
from ..targets import Targets
from .adoption import Adoption
from .bank import PrototypeBank, refuse_other
from .generator import PrototypeGenerator
from .keys import NEVER
from .teacher_rows import Sights, TeacherRows, network_input, sight_of


class Observation(Protocol):
    """A batch of a loader in eval mode."""

    @property
    def truth(self) -> Targets:
        """Its ground truth."""

    @property
    def student(self) -> Sequence[Tensor]:
        """The student's maps, uncut."""

    def both(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Maps of student and teacher on one grid; runs the teacher."""


Observe = Callable[[Any, Any], Observation]


class Passes:
    """What fills a bank from the batches of a loader.

    Args:
        generator: Makes the prototypes.
        bank: Keeps them.
        strides: Of the bank's levels.
        finish: New prototypes from the generator into the bank.
        moving: Whether the teacher changes, so that its rows are of no use to a later pass.
    """

    def __init__(
        self,
        generator: PrototypeGenerator,
        bank: PrototypeBank,
        strides: Sequence[float],
        finish: Callable[[], None],
        *,
        moving: bool = False,
    ) -> None:
        self.moving = moving
        self.generator, self.bank, self.strides = generator, bank, strides
        self._finish = finish
        self._kept: TeacherRows | None = None

    def refresh(
        self, loader: Iterable[Any], observe: Observe, signature: str, *, progress: bool
    ) -> None:
        """See :meth:`global_kd.Distiller.refresh`."""
        generator, kept = self.generator, self._kept
        # Every pass takes one sample, in a run that was resumed between two of them, too.
        generator.reset(None if generator.pass_turn < 0 else generator.pass_turn)
        if kept is not None and not kept.fits(signature, generator):
            kept = None
        sights, passed = self._collect(loader, observe, kept, progress)
        if self._lacks(passed):
            again = not isinstance(loader, Iterator)
            warnings.warn(
                "refresh: the loader lacks instances of the last pass, and others may take their "
                "place; "
                + (
                    "so it is read once more, with the teacher"
                    if again
                    else "an iterator cannot be read once more, so there are fewer; pass the "
                    "DataLoader itself, or the same images each time"
                ),
                stacklevel=3,
            )
            if again:
                generator.reset(generator.turn)
                sights, _ = self._collect(loader, observe, None, progress)
        if several := sights.ambiguous():
            warnings.warn(
                f"refresh: {several} ids stand for several boxes each, of which one of a class is "
                "used; give every box of the data a number of its own, such as its annotation id",
                stacklevel=3,
            )
        self._kept = None if self.moving else TeacherRows(generator, signature, sights)
        generator.pass_turn = generator.turn
        if self.bank.teacher_fingerprint != signature:  # no mixture of two teachers
            self.bank.clear()
            self.bank.teacher_fingerprint = signature
        self._finish()

    def _collect(
        self, loader: Iterable[Any], observe: Observe, kept: TeacherRows | None, progress: bool
    ) -> tuple[Sights, Tensor]:
        """Rows of all batches into the sample; with the teacher's rows of an earlier pass.

        Returns:
            The sights, and of each class the smallest key of an instance that was passed over.
        """
        generator, device = self.generator, self.bank.student.device
        compared = told = False
        sights = Sights()
        passed = torch.full((generator.num_classes,), NEVER, device="cpu")
        number = -1
        for number, batch in enumerate(batches_of(loader, progress=progress)):
            seen = observe(*batch_arguments(batch, device))
            sight = sight_of(seen.truth, network_input(seen))
            sights.add(seen.truth.ids, sight)
            rows, otherwise = None, False
            if kept is not None:
                rows, otherwise = kept.of(seen.truth, sight, generator)
            if rows is not None and compared:
                mine = pool_levels(seen.student, seen.truth, self.strides)
                generator.add(mine, rows, seen.truth)
                keys = torch.where(
                    rows.isnan().all(dim=2).all(dim=0), generator.keys(seen.truth), NEVER
                )
                passed.scatter_reduce_(0, seen.truth.labels.cpu(), keys.cpu(), "amin")
                continue
            mine, theirs = (pool_levels(maps, seen.truth, self.strides) for maps in seen.both())
            if rows is not None and rows.isfinite().any():
                compared = True
                if not _alike(rows, theirs):
                    kept, otherwise = None, True
            if otherwise and not told:
                told = True
                which = f"batch {number}" if number else "the first batch"
                warnings.warn(
                    f"refresh: the teacher sees {which} otherwise than in the last pass, so its "
                    "rows of that pass are not used there; a loader without random augmentation "
                    "saves the teacher's work",
                    stacklevel=4,
                )
            generator.add(mine, theirs, seen.truth)
        if number < 0:
            warnings.warn(
                "refresh: the loader gave no batch, so there is nothing to make prototypes of; an "
                "iterator can be read once, a DataLoader as often as you like",
                stacklevel=4,
            )
        return sights, passed

    def _lacks(self, passed: Tensor) -> bool:
        """Whether the sample has room for an instance that was passed over.

        The earlier sample had none, since others came before it; of those some are gone.
        """
        generator = self.generator
        ranks = Ranks(generator.distributed)
        first = torch.tensor(ranks.tell(passed.tolist()), device="cpu").amin(dim=0)
        _, labels, _, keys = (x.cpu() for x in generator.sample())
        before = torch.bincount(labels[keys < first[labels]], minlength=len(first))
        ranks.add(before)
        return bool(((first < NEVER) & (before < generator.max_instances)).any())

    def adopt(
        self,
        bank: PrototypeBank,
        loader: Iterable[Any],
        observe: Observe,
        signature: str,
        *,
        progress: bool,
    ) -> None:
        """See :meth:`global_kd.Distiller.adopt`."""
        self._refuse_stranger(bank, signature)
        adoption, device = Adoption(bank, self.bank), self.bank.student.device
        for batch in batches_of(loader, progress=progress):
            seen = observe(*batch_arguments(batch, device))
            if not len(seen.truth):
                continue
            if seen.truth.ids is None:
                raise ValueError(
                    "loader: expected targets with ids, by which the instances behind the "
                    "prototypes are found, but got some without"
                )
            # The student's whole grids: where the teacher's are a cell smaller, only a box that
            # reaches into that last cell is pooled otherwise than in training.
            adoption.offer(seen.student, seen.truth, seen.truth.ids, self.strides)
            if not adoption.missing:
                break
        wanted, missing = len(adoption), adoption.missing
        if missing == wanted:
            ids = bank.ids[bank.valid]
            raise ValueError(
                f"loader: expected instances of the bank (ids between {int(ids.min())} and "
                f"{int(ids.max())}, with the class of their prototype), but got none"
            )
        if missing:
            warnings.warn(
                f"adopt: {missing} of {wanted} prototypes of the bank are dropped, since the "
                "loader did not bring their instances",
                stacklevel=3,
            )
        adoption.fill()

    def sign(self, signature: str) -> None:
        """Before training: prototypes to come are this teacher's, and so must those there be."""
        if not self.bank.valid.any():
            self.bank.teacher_fingerprint = signature
        elif self.bank.teacher_fingerprint not in (None, signature):
            raise ValueError(
                f"teacher: expected that of the prototypes in the bank, "
                f"{self.bank.teacher_fingerprint!r}, but got {signature!r}; kd.loss.bank.clear() "
                "forgets them, kd.refresh(loader) makes new ones; for a teacher that moves on "
                "purpose, such as an average of the student, Distiller(..., moving_teacher=True)"
            )

    def _refuse_stranger(self, bank: PrototypeBank, signature: str) -> None:
        """Raise where the teacher rows of a bank would mean something else here."""
        own = self.bank
        if not isinstance(bank, PrototypeBank):
            raise TypeError(f"bank: expected a PrototypeBank, but got {type(bank).__name__}")
        mine, theirs = own.origin(), bank.origin()
        for name, expected, came in (
            ("teacher", signature, bank.teacher_fingerprint),
            ("strides", mine["strides"], theirs["strides"]),
            ("levels", own.valid.shape[0], bank.valid.shape[0]),
            ("classes", own.valid.shape[1], bank.valid.shape[1]),
            ("teacher channels", own.teacher.shape[-1], bank.teacher.shape[-1]),
        ):
            if came != expected:
                raise ValueError(f"bank: expected {name} {expected!r}, but got {came!r}")
        refuse_other(mine, theirs, "bank: ")
        without = int((bank.valid & (bank.ids < 0)).sum())
        if without or not bank.valid.any():
            raise ValueError(
                "bank: expected prototypes with the ids of their instances (Targets(ids=...), or "
                f"'ids' beside 'boxes'), but got {int(bank.valid.sum())}, {without} without"
            )


def _alike(rows: Tensor, others: Tensor) -> bool:
    """Whether rows ``(L, R, C)`` are the same up to rounding; rows of NaN are not compared."""
    known = rows.isfinite().all(dim=2)
    a, b = rows[known], others[known].to(rows)
    return bool(((a - b).norm(dim=1) <= 0.01 * a.norm(dim=1)).all())


def batch_arguments(batch: Any, device: torch.device) -> tuple[Any, Any]:
    """Images and targets of a loader's batch; ``None`` for the latter where it is all in one."""
    batch = _moved(batch, device)
    if not isinstance(batch, (list, tuple)) or all(isinstance(x, Mapping) for x in batch):
        return batch, None
    if len(batch) != 2:
        kinds = ", ".join(type(x).__name__ for x in batch[:4])
        more = "images, targets, *_" if len(batch) > 2 else "images, targets"
        raise ValueError(
            f"loader: expected batches (images, targets), but got a {type(batch).__name__} of "
            f"{len(batch)} ({kinds}); pass ((images, targets) for {more} in loader)"
        )
    if isinstance(batch[0], (list, tuple)) and len(batch[0]) == 2:
        first, second = batch[0]
        if isinstance(first, Tensor) and isinstance(second, Mapping):
            raise ValueError(
                "loader: expected batches (images, targets), but got a list of pairs, one per "
                "image; collate them: DataLoader(..., collate_fn=lambda pairs: tuple(zip(*pairs)))"
            )
    return batch[0], batch[1]


def first_batches(loader: Any, number: int, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Images and targets of the first batches of a loader, which must have one."""
    batch = None
    for batch in islice(batches_of(loader), number):
        yield batch_arguments(batch, device)
    if batch is None:
        raise ValueError(
            "loader: expected at least one batch, but got none; an iterator can be read once"
        )


def batches_of(loader: Any, *, progress: bool = False) -> Iterable[Any]:
    """A loader, if it is one; with a bar, where tqdm is installed.

    Raises:
        TypeError: What gives no batches.
    """
    expected = "loader: expected an iterable of batches (images, targets), such as a DataLoader"
    if isinstance(loader, Dataset):
        raise TypeError(
            f"{expected}, but got {type(loader).__name__}, a data set of single images; pass "
            "DataLoader(dataset, batch_size=..., collate_fn=...)"
        )
    if isinstance(loader, (str, bytes, Mapping, Tensor)) or not (
        isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    ):
        raise TypeError(
            f"{expected}, but got {type(loader).__name__}; pass the loader of your training set, "
            "without random augmentation"
        )
    return _with_progress(loader) if progress else loader


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors in containers on a device, as a loader of worker processes does not have them."""
    if isinstance(value, (Tensor, Targets)):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(x, device) for key, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(x, device) for x in value)
    return value


def _with_progress(loader: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:  # a bar is a comfort, not a dependency
        return loader
    return tqdm(loader, desc="prototypes", leave=False)  # type: ignore[no-any-return]
