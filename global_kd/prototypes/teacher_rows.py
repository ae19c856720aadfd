"""The frozen teacher's rows of the sample, kept from one pass over a data set to the next."""

import torch
from torch import Tensor

from ..instances import pool_levels
from ..targets import Targets
from .generator import PrototypeGenerator

_TOLERANCE = 1e-3  # of rounding: in pixels, and of the largest value
_NONE = torch.zeros(0, dtype=torch.int64, device="cpu")


class Sights:
    """What each instance of a pass looked like: its box, and the colours in it.

    A few numbers that tell a flip, a crop, another scale or other colours from the same image.
    """

    def __init__(self) -> None:
        self._ids: list[Tensor] = []
        self._rows: list[Tensor] = []

    def add(self, ids: Tensor | None, rows: Tensor) -> None:
        """Remember rows ``(R, F)`` of instances."""
        if ids is not None:
            self._ids.append(ids.cpu())
            self._rows.append(rows.cpu())

    def of(self, ids: Tensor) -> Tensor:
        """Rows of these instances, as they were seen last; not a number where never."""
        known = torch.cat([_NONE, *self._ids])
        if not len(known):
            return torch.full((len(ids), 0), torch.nan, device="cpu", dtype=torch.float32)
        order = known.argsort(stable=True)
        place = torch.searchsorted(known[order], ids, right=True) - 1
        at = order[place.clamp(min=0)]
        rows = torch.cat(self._rows)[at]
        return torch.where((known[at] == ids)[:, None], rows, torch.nan)

    def ambiguous(self) -> int:
        """How many ids came more than once, and with boxes that look unlike."""
        known, order = torch.cat([_NONE, *self._ids]).sort(stable=True)
        if len(known) < 2:
            return 0
        rows = torch.cat(self._rows)[order]
        again = (known[1:] == known[:-1]) & ~_alike(rows[1:], rows[:-1], rows)
        return len(known[1:][again].unique())


def _alike(rows: Tensor, before: Tensor, every: Tensor) -> Tensor:
    """Which sights are those of before, up to rounding of the largest of every one."""
    scale = every.abs().nan_to_num(0.0, 0.0).amax(dim=0).clamp(min=1e-6)
    scale[:4] = 1  # boxes, in pixels
    gap = (rows - before).abs().nan_to_num(0.0, torch.inf)  # a row of NaN is not told
    return (gap <= _TOLERANCE * scale).all(dim=1)


def sight_of(targets: Targets, images: Tensor | None) -> Tensor:
    """One row ``(R, F)`` a box: where it lies, and the mean colours of it and of two halves.

    Args:
        targets: The boxes.
        images: The network input ``(B, C, H, W)``, if known.
    """
    boxes = targets.boxes.float()
    if images is None:
        return boxes
    # The halves tell what is mirrored within a box that stays where it is.
    left, upper = boxes.clone(), boxes.clone()
    left[:, 2] = boxes[:, 0::2].mean(dim=1)
    upper[:, 3] = boxes[:, 1::2].mean(dim=1)
    parts = torch.cat([boxes, left, upper])
    index = targets.image_index.repeat(3)
    (colours,) = pool_levels([images.float()], Targets(parts, index, index), (1.0,))
    parts_of = colours.view(3, len(boxes), colours.shape[1]).transpose(0, 1)
    return torch.cat([boxes, parts_of.flatten(1)], dim=1)


class TeacherRows:
    """What one pass over the data left behind: the teacher's row of every instance in the sample.

    The next pass takes the same sample, so that for it the teacher need not run. Held on the
    processor: at most ``K * max_instances`` rows of ``L * Ct`` float32 numbers.

    Args:
        generator: After the pass, before its reset.
        signature: Of the teacher that made the rows.
        sights: Of the pass.
    """

    def __init__(self, generator: PrototypeGenerator, signature: str, sights: Sights) -> None:
        self._made = signature, generator.turn, generator.seed
        teacher, labels, ids, keys = (x.cpu() for x in generator.sample())
        self._limits = generator.limits(labels, keys)
        known = ids >= 0
        order = ids[known].argsort()
        self._ids, self._rows = ids[known][order], teacher[known][order]
        self._sights = sights.of(self._ids)

    def __len__(self) -> int:
        """Number of instances with an id."""
        return len(self._ids)

    def fits(self, signature: str, generator: PrototypeGenerator) -> bool:
        """Whether they are rows of this teacher, of the sample to come."""
        return self._made == (signature, generator.turn, generator.seed)

    def of(
        self, targets: Targets, sights: Tensor, generator: PrototypeGenerator
    ) -> tuple[Tensor | None, bool]:
        """Rows ``(L, R, Ct)``; not a number where the sample has no use for a box.

        Returns:
            ``None`` in place of the rows: the sample may want a box whose row is not here, or which
            looks otherwise now, so the teacher has to look. And whether some look otherwise.
        """
        if targets.ids is None or len(self) == 0:
            return None, False
        ids, labels = targets.ids.cpu(), targets.labels.cpu()
        place = torch.searchsorted(self._ids, ids).clamp(max=len(self) - 1)
        found = self._ids[place] == ids
        wanted = generator.keys(targets).cpu() <= self._limits[labels]
        otherwise = bool((found & ~self._alike(place, sights.cpu())).any())
        if otherwise or (wanted & ~found).any():
            return None, otherwise
        rows = self._rows.new_full((len(ids), *self._rows.shape[1:]), torch.nan)
        rows[found] = self._rows[place[found]]
        return rows.transpose(0, 1).to(targets.boxes.device), False

    def _alike(self, place: Tensor, sights: Tensor) -> Tensor:
        """Which boxes look as they did, up to rounding."""
        before = self._sights
        if sights.shape[1] != before.shape[1]:
            return torch.zeros_like(place, dtype=torch.bool)
        return _alike(sights, before[place], before)


def network_input(seen: object) -> Tensor | None:
    """What the student's network was given, of an observation that tells."""
    images = getattr(seen, "images", None)
    return images if isinstance(images, Tensor) and images.dim() == 4 else None
