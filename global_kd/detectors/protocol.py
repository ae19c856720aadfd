"""One detector as the :class:`global_kd.Distiller` sees it, and what it tells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..step import Dense, Hidden, Queries, RegionOutputs
from ..targets import Targets
from .pixels import Pixels, View


@dataclass(frozen=True)
class Look:
    """What a detector's backbone made of a view.

    Attributes:
        maps: All levels, ``(B, C, H, W)`` each.
        view: The network input they were made from.
        raw: Whatever the same detector needs to go on from here.
        tapped: What the taps of :meth:`Detector.taps_for` recorded in a student's own training
            forward; ``None``: nothing ran beyond the maps.
    """

    maps: Sequence[Tensor]
    view: View
    raw: Any = None
    tapped: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Sampled:
    """The locations or proposals that the student's own loss trains as objects.

    Attributes:
        logits: Class logits ``(N, K)`` of the student, ``None`` where nobody asked for them.
        box: int64 ``(N,)``, the ground-truth box of each.
        proposals: Their boxes and labels, for two-stage detectors.
        raw: What a teacher of the same :attr:`Detector.kind` needs to find the same rows.
    """

    logits: Tensor | None
    box: Tensor
    proposals: Targets | None = None
    raw: Any = None


@dataclass(frozen=True)
class Seen:
    """A batch with its boxes as the student met it; boxes in pixels of ``look.view``.

    Attributes:
        look: Its maps.
        truth: The ground truth.
        sampled: What its own loss trains as objects, if that was asked for and is known.
        assigned: int64 ``(B, N)`` for the locations of its dense head, likewise: index into
            ``truth``, -1 background, -2 ignored.
        proposals: All proposals that its second stage trains on, and the index of the ground truth
            of each, int64 ``(N,)``, -1 background, -2 ignored; likewise.
    """

    look: Look
    truth: Targets
    sampled: Sampled | None = None
    assigned: Tensor | None = None
    proposals: tuple[Targets, Tensor] | None = None


@dataclass(frozen=True)
class Detections:
    """What a detector finds in one image; boxes in pixels of the view, highest score first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Detector(Protocol):
    """A detector of one framework, in either role.

    Attributes:
        gives: The facts (:data:`global_kd.step.FACTS`) that it can supply, in either role:
            of ``"positives"``, ``"dense"``, ``"boxes"``, ``"bins"``, ``"priors"``, ``"assigned"``,
            ``"regions"``, ``"queries"``, ``"teacher_head"``, ``"split_heads"``, ``"images"``.
        family: ``"two-stage"``, ``"one-stage"`` or ``"query"``: whose published weights fit it;
            ``None``: unknown.
        taps: Paths in the student to record while it trains, by name, whatever is asked for; the
            maps are ``"features"``, or ``"level 0"`` and so on where each is put out by a module of
            its own.
        inputs: Those of the names, here and in :meth:`taps_for`, for which inputs are recorded.
        kind: Detectors of equal kind can compare class logits of positives row by row; ``None``:
            never.
        activation: Of the class logits, ``"softmax"`` or ``"sigmoid"``.
        num_logits: Class logits per row, where known.
        num_classes: Labels lie below it, where known.
        first_label: The lowest label that is no background.
        pixels: Format of the network input; ``None``: unknown.
        divisor: The teacher's input is padded to multiples of this many pixels.
    """

    gives: frozenset[str]
    family: str | None
    taps: dict[str, str]
    inputs: tuple[str, ...]
    kind: str | None
    activation: str
    num_logits: int | None
    num_classes: int | None
    first_label: int
    pixels: Pixels | None
    divisor: int

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        """Paths in the student to record beside :attr:`taps` for these facts."""

    def example(self) -> View:
        """Any network input, for a dry pass."""

    def look(self, view: View) -> Look:
        """Run the network on a view, no further than its maps."""

    def read(
        self, tapped: dict[str, Any], images: Any, targets: Any, facts: frozenset[str]
    ) -> Seen:
        """Read a training step of this student, as far as the facts ask for it."""

    def parts(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """The images and the ground truth among the arguments of this detector's forward call.

        In lists and mappings of tensors, by the names to use in messages; ``None`` where there is
        none. Empty: the form of the arguments is not known.
        """

    def as_call(self, images: Any, targets: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of the forward call that a batch given to the distiller speaks of."""

    def see(self, images: Any) -> View:
        """The network input of a batch, whether or not it has ground truth."""

    def observe(self, images: Any, targets: Any) -> Seen:
        """Run this student on a batch in eval mode; targets are the ground truth."""

    def soft_labels(self, look: Look, sampled: Sampled) -> tuple[Tensor, Tensor | None]:
        """This teacher's class logits for what a student of its kind trains as objects.

        ``(M, K)`` and which ``M`` of the ``N`` rows they belong to, int64; ``None``: all.
        """

    def dense(self, look: Look, facts: frozenset[str] = frozenset()) -> Dense:
        """What the dense head says of a view; boxes, bins and priors where the facts name them.

        Read from what was tapped, where there is something; else the head runs on the maps. The
        boxes are in pixels of the view, decoded as for post-processing but neither clipped nor
        filtered.
        """

    def head(
        self, maps: Sequence[Tensor], look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        """The dense head on other maps, of the sizes that those of ``look`` have."""

    def hidden(self, look: Look, after: int) -> Hidden:
        """What the dense head holds after so many of its convolutions, run on the maps."""

    def tail(
        self, hidden: Hidden, after: int, look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        """The rest of the dense head on such features, of the sizes of ``look``'s maps."""

    def regions(self, look: Look, boxes: Targets) -> RegionOutputs:
        """The second stage on boxes in pixels of the view."""

    def proposals(self, look: Look) -> Targets:
        """What the first stage proposes in eval mode, without labels (0), best first."""

    def queries(self, look: Look) -> Queries:
        """The last decoder layer."""

    def losses(self, images: Any, targets: Any) -> Tensor | None:
        """Sum of the detector's own training losses on a batch, in train mode; ``None``: unknown.

        The call that a user's training loop makes: all taps fire.
        """

    def losses_of(self, view: View, truth: Targets) -> Tensor | None:
        """The same on a view with boxes in its pixels, in the mode that the model is in.

        ``None``: unknown, or the losses need more than boxes.
        """

    def detections(self, view: View) -> list[Detections] | None:
        """What the detector finds in eval mode, one entry per image; ``None``: unknown."""

    def detach(self) -> None:
        """Take off hooks of its own, if any."""


class MapsOnly:
    """What a reader says of facts that its detector does not give: a base to start from."""

    gives: frozenset[str] = frozenset({"images"})
    family: str | None = None
    model: Any

    def _without(self, fact: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self.model).__name__} gives no {fact}")

    def taps_for(self, facts: frozenset[str]) -> dict[str, str]:
        """None."""
        return {}

    def parts(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Not known."""
        return {}

    def as_call(self, images: Any, targets: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Images and targets, or a batch that holds both."""
        return ((images,) if targets is None else (images, targets)), {}

    def losses_of(self, view: View, truth: Targets) -> Tensor | None:
        """Unknown."""
        return None

    def soft_labels(self, look: Look, sampled: Sampled) -> tuple[Tensor, Tensor | None]:
        """Not given."""
        raise self._without("positives")

    def dense(self, look: Look, facts: frozenset[str] = frozenset()) -> Dense:
        """Not given."""
        raise self._without("dense")

    def head(
        self, maps: Sequence[Tensor], look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        """Not given."""
        raise self._without("teacher_head")

    def hidden(self, look: Look, after: int) -> Hidden:
        """Not given."""
        raise self._without("split_heads")

    def tail(
        self, hidden: Hidden, after: int, look: Look, facts: frozenset[str] = frozenset()
    ) -> Dense:
        """Not given."""
        raise self._without("split_heads")

    def regions(self, look: Look, boxes: Targets) -> RegionOutputs:
        """Not given."""
        raise self._without("regions")

    def proposals(self, look: Look) -> Targets:
        """Not given."""
        raise self._without("regions")

    def queries(self, look: Look) -> Queries:
        """Not given."""
        raise self._without("queries")
