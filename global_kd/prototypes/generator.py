"""Prototype generation module (PGM): collects instances as they pass and makes prototypes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..instances import pool_levels
from ..targets import Targets
from .bank import PrototypeBank
from .select import density_candidates, select_prototypes

_MIN_PENDING = 4096  # rows that may wait before the sample is cut back


class PrototypeGenerator(nn.Module):
    """Collects paired instance rows batch by batch; :meth:`generate` makes the prototypes.

    A fair sample of at most ``max_instances`` rows per class is kept however long the stream: each
    row draws a key from the generator's own seeded random state, and the smallest keys of a class
    stay. Adding rows asks nothing of the device; about every 4096 rows the sample is cut back.

    Memory: at most ``2 * num_classes * max_instances + 4096`` rows of ``L * (Cs + Ct)`` float32
    numbers; the classes actually seen count.

    Args:
        num_classes: ``K``; labels lie in ``[0, K)``, a background class included or not as the
            detector counts.
        num_prototypes: ``M``, prototypes per level and class.
        alpha: Weight of the agreement between the spaces, see
            :func:`global_kd.functional.select_prototypes`.
        bandwidth: Of the density, see :func:`global_kd.functional.density_candidates`.
        quantile: Of the density cut.
        min_side: Instances are used if width *and* height exceed this many pixels of the network
            input. (The released code takes 30 pixels of the original image.)
        max_instances: Per class (the released code counts images).
        seed: Of the sample.

    Example:
        >>> import torch
        >>> from global_kd import PrototypeGenerator, Targets
        >>> generator = PrototypeGenerator(num_classes=3, num_prototypes=2, min_side=0)
        >>> boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(5, 1)
        >>> targets = Targets(boxes, torch.tensor([1, 1, 1, 2, 1]), torch.zeros(5).long())
        >>> generator.add(torch.randn(1, 5, 4), torch.randn(1, 5, 8), targets)
        >>> generator.counts()
        tensor([0, 4, 1])
        >>> generator.generate().counts()  # class 0 was never seen, class 2 once
        tensor([[0, 2, 1]])
    """

    def __init__(
        self,
        num_classes: int,
        num_prototypes: int = 10,
        *,
        alpha: float = 10.0,
        bandwidth: float = 0.1,
        quantile: float = 0.4,
        min_side: float = 30.0,
        max_instances: int = 800,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes),
            ("num_prototypes", num_prototypes),
            ("bandwidth", bandwidth),
            ("max_instances", max_instances),
        ):
            _check.positive(name, value)
        _check.not_negative("alpha", alpha)
        _check.not_negative("min_side", min_side)
        if not 0 <= quantile < 1:
            raise ValueError(f"quantile: expected a number in [0, 1), but got {quantile!r}")
        self.num_classes = num_classes
        self.num_prototypes = num_prototypes
        self.alpha = alpha
        self.bandwidth = bandwidth
        self.quantile = quantile
        self.min_side = min_side
        self.max_instances = max_instances
        self._random = torch.Generator().manual_seed(seed)
        # Each entry: student (R, L, Cs), teacher (R, L, Ct), labels, ids, keys (R,).
        self._rows: list[tuple[Tensor, ...]] = []
        self._kept = self._pending = 0

    @torch.no_grad()
    def add(self, student: Tensor, teacher: Tensor, targets: Targets) -> None:
        """Offer rows: student ``(L, R, Cs)``, teacher ``(L, R, Ct)`` of the boxes of ``targets``.

        Raises:
            ValueError: Rows that do not fit the targets or earlier rows; on the CPU also a label
                outside ``[0, num_classes)``.
        """
        _check.paired_rows(student, teacher)
        _check.tensor("student", student, 3, "(L, R, Cs)")
        if student.shape[1] != len(targets):
            raise ValueError(
                f"student: expected (L, {len(targets)}, Cs), a row for each box of targets, but "
                f"got {tuple(student.shape)}"
            )
        _check.same_device(student=student, boxes=targets.boxes)
        if student.device.type == "cpu":
            targets.validate(num_classes=self.num_classes)
        for name, x, i in (("student", student, 0), ("teacher", teacher, 1)):
            if self._rows and self._rows[0][i].shape[1:] != (x.shape[0], x.shape[2]):
                levels, channels = self._rows[0][i].shape[1:]
                raise ValueError(
                    f"{name}: expected ({levels}, R, {channels}) like the rows before, but got "
                    f"{tuple(x.shape)}"
                )
        if len(targets) == 0:
            return
        keys = torch.rand(len(targets), generator=self._random).to(student.device)
        sides = targets.boxes[:, 2:] - targets.boxes[:, :2]
        # An infinite key is never kept; dropping the row here would make the device wait.
        usable = (sides > self.min_side).all(dim=1)
        for rows in (student, teacher):
            usable = usable & rows.isfinite().all(dim=2).all(dim=0)
        keys = torch.where(usable, keys, torch.inf)
        ids = torch.full_like(targets.labels, -1) if targets.ids is None else targets.ids
        paired = (x.detach().float().transpose(0, 1) for x in (student, teacher))
        self._rows.append((*paired, targets.labels, ids, keys))
        self._pending += len(targets)
        if self._pending > max(_MIN_PENDING, self._kept):
            self._cut()

    def add_features(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Targets,
        strides: Sequence[float],
    ) -> None:
        """Offer the boxes of ``targets`` on paired levels ``(B, C, H, W)``."""
        with torch.no_grad():
            self.add(
                pool_levels(student, targets, strides),
                pool_levels(teacher, targets, strides),
                targets,
            )

    def _cut(self) -> None:
        """Keep, of every class, the ``max_instances`` rows of smallest key; sorted by class."""
        if not self._pending:
            return
        student, teacher, labels, ids, keys = (torch.cat(x) for x in zip(*self._rows, strict=True))
        order = keys.argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]
        labels, keys = labels[order], keys[order]
        counts = torch.bincount(labels, minlength=self.num_classes)
        rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels]
        keep = (rank < self.max_instances) & keys.isfinite()
        order = order[keep]
        self._rows = [(student[order], teacher[order], labels[keep], ids[order], keys[keep])]
        self._kept, self._pending = len(order), 0

    def __len__(self) -> int:
        """Number of instances kept."""
        self._cut()
        return self._kept

    def counts(self) -> Tensor:
        """Instances kept of each class, int64 ``(K,)``."""
        self._cut()
        if not self._rows:
            return torch.zeros(self.num_classes, dtype=torch.int64)
        return torch.bincount(self._rows[0][2], minlength=self.num_classes)

    def reset(self) -> None:
        """Forget the rows, not the random state."""
        self._rows, self._kept, self._pending = [], 0, 0

    @torch.no_grad()
    def generate(self) -> PrototypeBank:
        """Prototypes of every level and class from the rows collected so far.

        Classes without instances get none. Takes a density cut and a pursuit per level and class
        seen: on a CPU, some 50 milliseconds for 800 instances of 256 channels.

        Raises:
            RuntimeError: No row was ever added, so levels and channels are unknown.
        """
        self._cut()
        if not self._rows:
            raise RuntimeError("generate: no instances were added since the last reset")
        student, teacher, labels, ids, _ = self._rows[0]
        _, levels, student_channels = student.shape
        bank = PrototypeBank(
            levels, self.num_classes, self.num_prototypes, student_channels, teacher.shape[2]
        ).to(student.device)
        stop = 0
        for label, count in enumerate(self.counts().tolist()):
            start, stop = stop, stop + count
            for level in range(levels if count else 0):
                s, t = student[start:stop, level], teacher[start:stop, level]
                candidates = density_candidates(
                    s, t, bandwidth=self.bandwidth, quantile=self.quantile
                )
                picks = select_prototypes(
                    s, t, self.num_prototypes, alpha=self.alpha, candidates=candidates
                )
                slots = (level, label, slice(len(picks)))
                bank.student[slots] = s[picks]
                bank.teacher[slots] = t[picks]
                bank.ids[slots] = ids[start:stop][picks]
                bank.valid[slots] = True
        return bank

    def get_extra_state(self) -> dict[str, Any]:
        """The sample and the random state, for ``state_dict``."""
        self._cut()
        return {
            "rows": list(self._rows[0]) if self._rows else [],
            "random": self._random.get_state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`get_extra_state` was taken."""
        self.reset()
        if state["rows"]:
            labels = state["rows"][2]
            if len(labels) and int(labels.max()) >= self.num_classes:
                raise ValueError(
                    f"state_dict: expected labels below {self.num_classes}, but the saved sample "
                    f"holds {int(labels.max())}; it was made for other classes"
                )
            self._rows = [tuple(state["rows"])]
            self._kept = len(labels)
        self._random.set_state(state["random"].cpu())

    def _apply(self, fn: Any, recurse: bool = True) -> "PrototypeGenerator":
        """Rows follow ``.to(device)``; their dtypes stay."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._rows = [
            tuple(x.to(fn(torch.empty(0, device=x.device)).device) for x in rows)
            for rows in self._rows
        ]
        return self

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, num_prototypes={self.num_prototypes}, "
            f"alpha={self.alpha}, min_side={self.min_side}, max_instances={self.max_instances}"
        )
