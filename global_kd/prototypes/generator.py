"""Prototype generation module (PGM): collects instances as they pass and makes prototypes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..instances import pool_levels
from ..ranks import Ranks
from ..targets import Targets
from .bank import PrototypeBank
from .keys import NEVER, digest, keys_of
from .plain import packed, unpacked
from .sample import Rows, Sample, no_rows
from .select import density_candidates, select_prototypes


class PrototypeGenerator(nn.Module):
    """Collects paired instance rows batch by batch; :meth:`generate` makes the prototypes.

    A fair sample of at most ``max_instances`` instances per class is kept, however long the stream
    and however skewed the classes: every instance has a pseudo-random key, made of the seed, the
    number of resets and its id (without ids: of its box and the teacher's features), and
    the smallest keys of a class stay. So the sample depends on neither the order of the instances
    nor the ranks they were seen on. An instance that is seen again replaces its older row, since
    the student has moved on. Adding rows asks nothing of the device; about every 4096 rows the
    sample is cut back.

    Memory: at most ``1.25 * num_classes * max_instances + 4096`` rows of ``L * (Cs + Ct)`` float32
    numbers, somewhat more than twice that for the moment of a cut; the classes actually seen count.

    Under ``torch.distributed``, :meth:`generate` and :meth:`gather` are collective, unless
    ``distributed`` is off: every rank ends with the prototypes that one rank would have made of all
    rows.

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
        distributed: Put the rows of all ranks together.

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
        distributed: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes),
            ("num_prototypes", num_prototypes),
            ("max_instances", max_instances),
        ):
            _check.count(name, value, or_none=False)
        _check.positive("bandwidth", bandwidth)
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
        self.seed = seed
        self.distributed = distributed
        self.turn = 0
        self.pass_turn = -1  # that of the passes over a loader, once there was one
        self._expected: tuple[int, int, int] | None = None
        self.watching = True  # whether add() counts what it is offered
        self._offers: Tensor | None = None
        self._sample = Sample(num_classes, max_instances)

    @property
    def max_instances(self) -> int:
        """Of each class in the sample."""
        return self._sample.size

    @torch._compile._disable_dynamo
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
        sample = self._sample
        if sample.shape is not None:
            levels, *before = sample.shape
            for name, x, channels in zip(
                ("student", "teacher"), (student, teacher), before, strict=True
            ):
                if (x.shape[0], x.shape[2]) != (levels, channels):
                    raise ValueError(
                        f"{name}: expected ({levels}, R, {channels}) like the rows before, but got "
                        f"{tuple(x.shape)}"
                    )
        sample.calls += 1
        if len(targets) == 0:
            return
        if self.watching:
            self._watch(targets)
        sample.follow(student.device)
        # Copies: a view would keep the rows of every proposal that was pooled beside these alive.
        mine, theirs = (
            x.detach().transpose(0, 1).to(torch.float32, copy=True) for x in (student, teacher)
        )
        ids, identity = targets.ids, None
        if ids is None:
            seen = torch.cat([targets.boxes.float(), theirs.flatten(1)], dim=1)
            identity, ids = digest(seen), torch.full_like(targets.labels, -1)
        finite = [x.flatten(1).isfinite().all(dim=1) for x in (mine, theirs)]
        # A row of such a key is never kept; dropping it here would make the device wait.
        key = torch.where(finite[0] & finite[1], self.keys(targets, identity), NEVER)
        ties = digest(torch.cat([theirs.flatten(1), mine.flatten(1)], dim=1))
        calls = torch.full_like(ids, sample.calls)
        sample.add(Rows(mine, theirs, targets.labels, ids, key, calls, ties))

    def _watch(self, targets: Targets) -> None:
        """Count the boxes and keep the largest of each class; makes no device wait."""
        sides = (targets.boxes[:, 2:] - targets.boxes[:, :2]).amin(dim=1).float()
        if self._offers is None:
            # The outer columns take labels outside [0, K), which nobody checks on an accelerator.
            # Counted on in later steps, which may be outside of inference mode.
            with torch.inference_mode(False):
                self._offers = sides.new_zeros(2, self.num_classes + 2)
        self._offers = self._offers.to(sides.device)
        column = targets.labels.clamp(-1, self.num_classes) + 1
        self._offers[0].index_add_(0, column, torch.ones_like(sides))
        self._offers[1].scatter_reduce_(0, column, sides, "amax")

    def offered(self) -> tuple[Tensor, Tensor]:
        """Since the last reset, of each class: boxes seen, and the shorter side of the largest.

        On this rank, float32 ``(K,)`` each, whether they entered the sample or not.
        """
        if self._offers is None:
            seen, largest = torch.zeros(2, self.num_classes, dtype=torch.float32, device="cpu")
        else:
            seen, largest = self._offers[:, 1:-1].cpu()
        return seen, largest

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

    def keys(self, targets: Targets, identity: Tensor | None = None) -> Tensor:
        """Key of each box, int64 ``(R,)``: ``keys.NEVER`` for one that is too small.

        Args:
            targets: The boxes; with ids, unless ``identity`` stands for them.
            identity: int64 ``(R,)``.
        """
        sides = targets.boxes[:, 2:] - targets.boxes[:, :2]
        identity = targets.ids if identity is None else identity
        assert identity is not None
        key = keys_of(identity, self.seed, self.turn)
        return torch.where((sides > self.min_side).all(dim=1), key, NEVER)

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the instances kept on this rank: teacher rows ``(R, L, Ct)``, labels, ids, keys."""
        rows = self._sample.cut()
        rows = no_rows((1, 1, 1)) if rows is None else rows
        return rows.teacher, rows.labels, rows.ids, rows.keys

    def limits(self, labels: Tensor, key: Tensor) -> Tensor:
        """Largest key of each class that a full sample kept, int64 ``(K,)``; else any but never."""
        return self._sample.limits(labels, key)

    def __len__(self) -> int:
        """Number of instances kept on this rank."""
        return len(self._sample)

    def counts(self) -> Tensor:
        """Instances of each class kept on this rank, int64 ``(K,)``."""
        return self._sample.counts()

    def reset(self, turn: int | None = None) -> None:
        """Forget the rows; the next sample is another one, or that of an earlier ``turn``."""
        self._sample.clear()
        self._offers = None
        self.turn = self.turn + 1 if turn is None else turn

    @torch.no_grad()
    def generate(self) -> PrototypeBank:
        """Prototypes of every level and class from the rows collected so far, on all ranks.

        Classes without instances get none. Takes a density cut and a pursuit per level and class
        seen: on a CPU, some 50 milliseconds for 800 instances of 256 channels. Several ranks divide
        the classes among them; a row is sent once, to the rank that needs it.

        Raises:
            RuntimeError: No row was ever added, so levels and channels are unknown; or another rank
                failed.
        """
        bank = self.generate_if_any()
        if bank is None:
            raise RuntimeError("generate: no instances were added since the last reset")
        return bank

    @torch.no_grad()
    def generate_if_any(self) -> PrototypeBank | None:
        """Like :meth:`generate`, but ``None`` where no rank has a row."""
        ranks = Ranks(self.distributed)
        rows = self._shared(ranks)
        if rows is None:
            return None
        bank, problem = None, None
        try:
            bank = self._pursue(rows)
        except Exception as error:  # the others must not wait for this rank
            problem = error
        ranks.tell(None, problem)
        assert bank is not None
        # What another rank has found is zero here.
        valid, ids = bank.valid.long(), bank.ids + 1
        ranks.add(bank.student, bank.teacher, valid, ids)
        bank.valid.copy_(valid > 0)
        bank.ids.copy_(ids - 1)
        return bank

    def _pursue(self, rows: Rows) -> PrototypeBank:
        _, levels, student_channels = rows.student.shape
        bank = PrototypeBank(
            levels, self.num_classes, self.num_prototypes, student_channels, rows.teacher.shape[2]
        ).to(rows.student.device)
        stop = 0
        for label, count in enumerate(torch.bincount(rows.labels).tolist()):
            start, stop = stop, stop + count
            for level in range(levels if count else 0):
                s, t = rows.student[start:stop, level], rows.teacher[start:stop, level]
                candidates = density_candidates(
                    s, t, bandwidth=self.bandwidth, quantile=self.quantile
                )
                picks = select_prototypes(
                    s, t, self.num_prototypes, alpha=self.alpha, candidates=candidates
                )
                slots = (level, label, slice(len(picks)))
                bank.student[slots] = s[picks]
                bank.teacher[slots] = t[picks]
                bank.ids[slots] = rows.ids[start:stop][picks]
                bank.valid[slots] = True
        return bank

    def _shared(self, ranks: Ranks, owner: int | None = None) -> Rows | None:
        return self._sample.shared(ranks, {"seed": self.seed, "resets": self.turn}, owner)

    def gather(self) -> None:
        """Give every rank the rows of all, so that any rank's ``state_dict`` holds them all.

        Collective; for checkpoints that only rank 0 writes, and for such that all ranks write
        together (``torch.distributed.checkpoint`` keeps what one of them has under a name).
        The next :meth:`generate` gives the same prototypes as without.
        """
        ranks = Ranks(self.distributed)
        rows = self._shared(ranks, owner=0)  # of one device on all ranks, and none on the others
        if rows is not None:
            count = ranks.tell(len(rows.labels))[0]
            if ranks.rank:
                rows = Rows(*(x.new_zeros(count, *x.shape[1:]) for x in rows))
            ranks.same(*rows)
        self._sample.put(rows)

    def expect(self, levels: int, student_channels: int, teacher_channels: int) -> None:
        """Give the state one size from the start, that of a full sample.

        ``torch.distributed.checkpoint`` cannot read a state that is larger than that of the module
        it is read for. Costs ``num_classes * max_instances`` rows in every checkpoint; without
        this a checkpoint holds the rows there are.
        """
        self._expected = levels, student_channels, teacher_channels

    def get_extra_state(self) -> Tensor:
        """The sample of this rank, for ``state_dict``; see :meth:`gather`. uint8 ``(N,)``."""
        rows = self._sample.cut()
        shape = (self._expected or (0, 0, 0)) if rows is None else rows.shape
        counters = (self.seed, self.turn, self._sample.calls, self.pass_turn)
        capacity = self.num_classes * self.max_instances if self._expected else 0
        return packed((*counters, *shape), rows or (), capacity, no_rows(shape))

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`get_extra_state` was taken."""
        if isinstance(state, Tensor):
            counters, tables = unpacked(state, 7, lambda header: no_rows(header[4:]))
            rows = Rows(*tables) if len(tables[2]) else None
        else:  # as states were before
            rows = Rows(**state["rows"]) if state["rows"] else None
            counters = [int(state[x]) for x in ("seed", "turn", "calls")] + [-1]
        if rows is not None and len(rows.labels) and int(rows.labels.max()) >= self.num_classes:
            raise ValueError(
                f"state_dict: expected labels below {self.num_classes}, but the saved sample "
                f"holds {int(rows.labels.max())}; it was made for other classes"
            )
        self._sample.put(rows)
        self.seed, self.turn, self._sample.calls, self.pass_turn = counters[:4]

    def _apply(self, fn: Any, recurse: bool = True) -> "PrototypeGenerator":
        """Rows follow ``.to(device)``; their dtypes stay."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._sample.apply(fn)
        return self

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, num_prototypes={self.num_prototypes}, "
            f"alpha={self.alpha}, min_side={self.min_side}, max_instances={self.max_instances}"
        )
