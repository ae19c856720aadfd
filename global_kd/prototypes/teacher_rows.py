"""The frozen teacher's rows of the sample, kept from one pass over a data set to the next."""

import torch
from torch import Tensor

from ..targets import Targets
from .generator import PrototypeGenerator


class TeacherRows:
    """What one pass over the data left behind: the teacher's row of every instance in the sample.

    The next pass takes the same sample, so that for it the teacher need not run. Held on the
    processor: at most ``K * max_instances`` rows of ``L * Ct`` float32 numbers.

    Args:
        generator: After the pass, before its reset.
        signature: Of the teacher that made the rows.
    """

    def __init__(self, generator: PrototypeGenerator, signature: str) -> None:
        self.signature, self.turn = signature, generator.turn
        teacher, labels, ids, keys = (x.cpu() for x in generator.sample())
        self._limits = generator.limits(labels, keys)
        known = ids >= 0
        order = ids[known].argsort()
        self._ids, self._rows = ids[known][order], teacher[known][order]

    def __len__(self) -> int:
        """Number of instances with an id."""
        return len(self._ids)

    def of(self, targets: Targets, generator: PrototypeGenerator) -> Tensor | None:
        """Rows ``(L, R, Ct)``; not a number where the sample has no use for a box.

        ``None``: the sample may want a box whose row is not here, so the teacher has to look.
        """
        if targets.ids is None or len(self) == 0:
            return None
        ids, labels = targets.ids.cpu(), targets.labels.cpu()
        place = torch.searchsorted(self._ids, ids).clamp(max=len(self) - 1)
        found = self._ids[place] == ids
        wanted = generator.keys(targets).cpu() <= self._limits[labels]
        if (wanted & ~found).any():
            return None
        rows = torch.full((len(ids), *self._rows.shape[1:]), torch.nan)
        rows[found] = self._rows[place[found]]
        return rows.transpose(0, 1).to(targets.boxes.device)
