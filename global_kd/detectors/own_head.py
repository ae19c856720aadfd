"""The dense head of a detector of one's own, read by a function that its author writes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import FeatureTap, evaluating, feature_maps, resolve
from ..step import Dense

ReadHead = Callable[[Any, tuple[int, int]], Dense]


class OwnHead:
    """A head by its module, and how to read what it puts out.

    Args:
        model: The detector.
        path: The head's module. Where its first argument is the pyramid, as a list, tuple or
            mapping, the head can be run on other maps, too.
        read: Called with the module's output and ``(H, W)`` of the network input; gives
            :class:`global_kd.step.Dense`, without detaching anything.
        example: What the model's forward takes in eval mode.
        size: ``(H, W)`` of the network input therein.
        maps: The pyramid that comes of it.
        argument: The name to use in messages.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        read: ReadHead,
        example: Sequence[Any],
        size: tuple[int, int],
        maps: Sequence[Tensor],
        argument: str,
    ) -> None:
        self.path, self._read = path, read
        self._module = resolve(model, path)
        tap = FeatureTap(model, {"in": path, "out": path}, inputs=("in",))
        with tap, torch.no_grad(), evaluating(model):
            tapped = tap.run(*example)
        dense = self.read(tapped["out"], size)
        if not isinstance(dense, Dense):
            raise TypeError(
                f"{argument}: expected a function that gives a global_kd.step.Dense, but got "
                f"{type(dense).__name__}"
            )
        self._template, self._places = _template(tapped["in"], maps)
        given = {"dense"}
        for fact, x in (("boxes", dense.boxes), ("bins", dense.bins), ("priors", dense.priors)):
            if x is not None:
                given.add(fact)
        if self._template is not None:
            given.add("teacher_head")
        self.gives = frozenset(given)
        self.activation = dense.activation

    def read(self, output: Any, size: tuple[int, int]) -> Dense:
        """What the head says, in the author's words."""
        return self._read(output, size)

    def run(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Dense:
        """The head on other maps, finest first as the reader gives them."""
        ordered = [maps[i] for i in self._places]
        if isinstance(self._template, Mapping):
            argument: Any = dict(zip(self._template, ordered, strict=True))
        else:
            argument = type(self._template)(ordered) if self._template is not None else ordered
        return self.read(self._module(argument), size)


def _template(arguments: Any, maps: Sequence[Tensor]) -> tuple[Any, list[int]]:
    """The container in which the head takes the pyramid, and which level stands where."""
    if not isinstance(arguments, (tuple, list)) or len(arguments) != 1:
        return None, []
    container = arguments[0]
    inside = feature_maps(container)
    if not isinstance(container, (list, tuple, Mapping)) or len(inside) != len(container):
        return None, []
    shapes = [tuple(x.shape) for x in maps]
    places = [shapes.index(tuple(x.shape)) for x in inside if tuple(x.shape) in shapes]
    whole = len(places) == len(inside) == len(maps) and len(set(places)) == len(places)
    return (container, places) if whole else (None, [])
