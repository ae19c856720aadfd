"""What is kept of the prototypes: paired rows per level and class."""

import torch
from torch import Tensor, nn


class PrototypeBank(nn.Module):
    """Paired prototypes of every (level, class).

    Buffers: moved by ``.to``, saved by ``state_dict``. All levels and classes have ``M`` slots, of
    which ``valid`` are filled: shapes never change, and a class without prototypes is nothing
    special.

    Args:
        num_levels: ``L``.
        num_classes: ``K``.
        num_prototypes: ``M``, slots per level and class.
        student_channels: ``Cs``, the widest level's.
        teacher_channels: ``Ct``, the widest level's.

    Attributes:
        student: float32 ``(L, K, M, Cs)``, raw (not normalised) pooled student features.
        teacher: float32 ``(L, K, M, Ct)``, those of the same instances in the teacher.
        valid: bool ``(L, K, M)``.
        ids: int64 ``(L, K, M)``, the instance behind each slot
            (:class:`global_kd.Targets` ``ids``); -1 where unknown or empty.
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
    ) -> None:
        super().__init__()
        slots = (num_levels, num_classes, num_prototypes)
        self.register_buffer("student", torch.zeros(*slots, student_channels))
        self.register_buffer("teacher", torch.zeros(*slots, teacher_channels))
        self.register_buffer("valid", torch.zeros(slots, dtype=torch.bool))
        self.register_buffer("ids", torch.full(slots, -1, dtype=torch.int64))

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

    def extra_repr(self) -> str:
        levels, classes, slots = self.valid.shape
        return (
            f"levels={levels}, classes={classes}, slots={slots}, "
            f"student_channels={self.student.shape[-1]}, "
            f"teacher_channels={self.teacher.shape[-1]}, filled={int(self.valid.sum())}"
        )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:  # type: ignore[no-untyped-def]
        for name in ("student", "teacher", "valid", "ids"):
            saved, mine = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape != mine.shape:
                raise ValueError(
                    f"{prefix}{name}: expected a bank of (levels, classes, slots"
                    f"{', channels' if mine.dim() == 4 else ''}) {tuple(mine.shape)}, but the "
                    f"saved one has {tuple(saved.shape)}; it was made for other levels, classes "
                    "or channels"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
