"""Which modules of a model give a feature pyramid?"""

import dataclasses
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .maps import (
    feature_maps,
    finest_first,
    infer_stride,
    infer_strides,
    level_shapes,
    tensors_in,
    tokens_to_maps,
)
from .modules import evaluating, unwrap
from .tap import quiet


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """Where in a model a feature pyramid is to be had.

    Two are equal if they name the same place and levels, however sure each is.

    Attributes:
        path: Dotted name of the module.
        strides: Pixels of the network input per cell of each level, finest first.
        channels: Of each level.
        source: ``"output"``, the module puts out the maps; ``"input"``, it takes them in, as the
            first positional argument that holds several scales; ``"tokens"``, its first 3-D output
            ``(B, N, C)`` holds them one after another (:func:`tokens_to_maps`), with the shapes
            that the strides tell (:func:`level_shapes`).
        confidence: That this is the pyramid to distil, in [0, 1]; see :func:`find_pyramids`.
        reason: What the confidence is made of.
    """

    path: str
    strides: tuple[float, ...]
    channels: tuple[int, ...]
    source: Literal["output", "input", "tokens"] = "output"
    confidence: float = dataclasses.field(default=1.0, compare=False)
    reason: str = dataclasses.field(default="", compare=False, repr=False)


def pyramid_maps(pyramid: Pyramid, recorded: Any, input_size: Sequence[int]) -> list[Tensor]:
    """The maps of a pyramid, finest first, in what a :class:`FeatureTap` recorded at its path.

    Args:
        pyramid: Of source ``"input"``: then the tap must record inputs.
        recorded: The tap's record.
        input_size: ``(H, W)`` of the network input, which tells the shapes of tokens.

    Raises:
        ValueError: There are no such maps, or tokens of another length.
    """
    if pyramid.source == "tokens":
        for tokens in [x for x in tensors_in(recorded) if x.dim() == 3][:1]:
            return tokens_to_maps(tokens, level_shapes(input_size, pyramid.strides))
    else:
        for value in recorded if pyramid.source == "input" else [recorded]:
            maps = finest_first(feature_maps(value))
            if tuple(x.shape[1] for x in maps) == pyramid.channels:
                return maps
    raise ValueError(
        f"recorded: expected levels of {pyramid.channels} channels in the {pyramid.source} of "
        f"{pyramid.path!r}, but got {[tuple(x.shape) for x in tensors_in(recorded)]}"
    )


@torch.no_grad()
def find_pyramids(model: nn.Module, *example_inputs: Any, **example_kwargs: Any) -> list[Pyramid]:
    """Run the model once (in eval mode) and list where it has feature pyramids.

    A pyramid has at least two levels, each about half the size of the one before. Maps that several
    modules hand on are listed once, at the last module that puts them out before another uses them,
    or else at the first that takes them in; a part of a larger pyramid is not listed. A token
    sequence counts if it is as long as maps seen before it have cells, and a module takes it in
    together with another sequence (a decoder with its queries). Modules that run more than once are
    left out, since a :class:`FeatureTap` refuses them.

    The confidence is what can be seen of "the last stage before the heads", a sum of

    - 0.5 times the share of levels that go on into a later module with weights, unchanged or
      flattened into one sequence: features do, predictions do not. Maps that are all that the model
      puts out count half: they may be either.
    - 0.25 for three levels or more.
    - 0.25 for equal channels.

    It is halved while another pyramid goes on into a module with weights after this one is
    finished: this is a stage on the way there, or one of two that the heads use.

    Strides refer to the image as the first layer with weights receives it (as it was before its
    pixels were moved into channels), so images that a detector resizes inside are measured as the
    network sees them. The model's modes, buffers and the random state stay as they were.

    Args:
        model: Any detector.
        *example_inputs: What its forward takes in eval mode.
        **example_kwargs: Likewise.

    Returns:
        Most confident first, of equal ones the last; empty for a detector with a single scale.

    Example:
        >>> import torch
        >>> from global_kd import find_pyramids
        >>> class Neck(torch.nn.Module):
        ...     def forward(self, x):
        ...         return [torch.nn.functional.avg_pool2d(x, s) for s in (4, 8, 16)]
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), Neck())
        >>> find_pyramids(model, torch.zeros(1, 3, 64, 64))  # without heads: half sure
        [Pyramid(path='1', strides=(4.0, 8.0, 16.0), channels=(6, 6, 6), source='output', \
confidence=0.75)]
    """
    inner = unwrap(model)
    trace = _Trace()
    handles = []
    cards = sorted({p.device.index for p in inner.parameters() if p.device.type == "cuda"})
    try:
        for path, module in inner.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            weights = next(module.parameters(), None) is not None
            entering, leaving = trace.hooks(path, weights)
            handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
            handles.append(module.register_forward_hook(leaving))
        with quiet(inner), evaluating(inner), torch.random.fork_rng(cards):
            inner(*example_inputs, **example_kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return trace.pyramids()


@dataclasses.dataclass(frozen=True)
class _Sight:
    """Several scales, seen at one place at one moment."""

    when: int
    path: str
    source: Literal["output", "input", "tokens"]
    tensors: tuple[int, ...]  # serial numbers: of the maps, finest first, or of the sequence
    sizes: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Use:
    """A tensor goes into a module."""

    when: int
    path: str
    counts: bool  # into weights; a sequence: and together with another one


class _Trace:
    """What one forward pass shows: where several scales are seen, and where they go.

    Tensors are known by serial numbers behind weak references: none is kept alive, and an ``id``
    that Python gives a second time is noticed.
    """

    def __init__(self) -> None:
        self._clock = 0
        self._sights: list[_Sight] = []
        self._calls: Counter[str] = Counter()
        self._serials: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._issued = 0
        self._uses: defaultdict[int, list[_Use]] = defaultdict(list)
        self._sequences: dict[tuple[int, int], _Use] = {}  # by length and width: the last use
        self._sizes: set[tuple[int, int]] = set()
        self._result: tuple[int, ...] = ()  # the model's own output, if that is one pyramid
        self._image: tuple[int, ...] = ()  # (C, H, W) of the network input
        self._image_is_final = False

    def hooks(self, path: str, weights: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        """A forward pre-hook and a forward hook for one module."""

        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._clock += 1
            taken = tensors_in((args, kwargs))
            own = [p for p in module._parameters.values() if p is not None]
            self._see_image(taken, first_layer=bool(path and own))
            for arg in args if path else ():
                if not isinstance(arg, Tensor) and self._see_maps(path, "input", feature_maps(arg)):
                    break
            self._see_uses(path, taken, weights)

        def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._clock += 1
            self._calls[path] += 1
            put_out = tensors_in(output)
            maps = [x for x in put_out if x.dim() == 4]
            if not path:
                if len(maps) == len(put_out):
                    self._result = tuple(self._serial(x) for x in finest_first(maps))
                return
            if not isinstance(output, Tensor):
                self._see_maps(path, "output", maps)
            for tokens in [x for x in put_out if x.dim() == 3][:1]:
                self._see_tokens(path, tokens)
            self._sizes |= {_size(x) for x in maps if x.numel()}

        return entering, leaving

    def _see_image(self, taken: Sequence[Tensor], first_layer: bool) -> None:
        if self._image_is_final:
            return
        for image in (x for x in taken if x.dim() == 4):
            if self._image and image.shape[1] != self._image[0]:
                self._image_is_final = True
                return
            self._image = tuple(image.shape[1:])
            self._image_is_final = first_layer

    def _see_maps(
        self, path: str, source: Literal["output", "input"], maps: Sequence[Tensor]
    ) -> bool:
        levels = finest_first(maps)
        if not _is_pyramid(levels):
            return False
        serials = tuple(self._serial(x, new=True) for x in levels)
        channels = tuple(x.shape[1] for x in levels)
        sizes = tuple(_size(x) for x in levels)
        self._sights.append(_Sight(self._clock, path, source, serials, sizes, channels))
        return True

    def _see_tokens(self, path: str, tokens: Tensor) -> None:
        length, width = tokens.shape[1:]
        if levels := _levels_of(length, self._sizes, self._image[1:]):
            serials, channels = (self._serial(tokens, new=True),), (width,) * len(levels)
            self._sights.append(_Sight(self._clock, path, "tokens", serials, levels, channels))

    def _see_uses(self, path: str, taken: Sequence[Tensor], weights: bool) -> None:
        widths = {(x.shape[1], x.shape[2]) for x in taken if x.dim() == 3}
        for x in taken:
            counts = weights
            if x.dim() == 3:
                length, width = x.shape[1:]
                counts = weights and any(w == width and n != length for n, w in widths)
                if weights:
                    self._sequences[length, width] = _Use(self._clock, path, True)
            if serial := self._serial(x):
                self._uses[serial].append(_Use(self._clock, path, counts))

    def _serial(self, tensor: Tensor, new: bool = False) -> int:
        """The number of a tensor; of an unknown one 0, or a new number."""
        reference, serial = self._serials.get(id(tensor), (None, 0))
        if reference is None or reference() is not tensor:
            serial = 0
            if new:
                self._issued += 1
                serial = self._issued
                self._serials[id(tensor)] = (weakref.ref(tensor), serial)
        return serial

    def pyramids(self) -> list[Pyramid]:
        """What was seen, judged as :func:`find_pyramids` says."""
        if not self._image:
            return []
        seen: dict[tuple[int, ...], list[_Sight]] = {}
        for sight in self._sights:
            if self._calls[sight.path] == 1:
                seen.setdefault(sight.tensors, []).append(sight)
        parts = {key for key in seen if any(set(key) < set(other) for other in seen)}
        places = [self._place(sights) for key, sights in seen.items() if key not in parts]
        judged = [(place, *self._goes_on(place)) for place in places]
        judged = [item for item in judged if item[0].source != "tokens" or item[1] > 0]
        found = []
        for place, share, _, why in judged:
            levels, equal = len(place.sizes), len(set(place.channels)) == 1
            confidence = 0.5 * share + 0.25 * (levels >= 3) + 0.25 * equal
            why = f"{levels} levels, {'equal' if equal else 'unequal'} channels, {why}"
            rivals = [p for p, _, u, _ in judged if p is not place and u and u.when >= place.when]
            if rivals:
                confidence /= 2
                why += f"; {rivals[-1].path} ({rivals[-1].source}) goes on after it"
            strides = infer_strides(self._image[1:], place.sizes)
            pyramid = Pyramid(
                place.path, strides, place.channels, place.source, round(confidence, 2), why
            )
            found.append((confidence, place.when, pyramid))
        found.sort(key=lambda item: item[:2], reverse=True)
        return [pyramid for _, _, pyramid in found]

    def _place(self, sights: Sequence[_Sight]) -> _Sight:
        """Of all places of the same tensors the last one before they are used."""
        first = sights[0]
        uses = [use.when for serial in first.tensors for use in self._uses[serial]]
        used = min((when for when in uses if when > first.when), default=self._clock + 1)
        return [s for s in sights if s.source == first.source and s.when < used][-1]

    def _goes_on(self, place: _Sight) -> tuple[float, _Use | None, str]:
        """The share of levels that go on, their last use that counts, and this in words."""
        uses = [[u for u in self._uses[serial] if u.counts] for serial in place.tensors]
        later = [[u for u in level if u.when >= place.when] for level in uses]
        last = max((u for level in uses for u in level), key=lambda u: u.when, default=None)
        if share := sum(map(bool, later)) / len(later):
            user = next(level for level in later if level)[0].path
            return share, last, f"{share:.0%} of them used by {user}"
        length, width = sum(h * w for h, w in place.sizes), place.channels[0]
        use = self._sequences.get((length, width))
        flat = place.source != "tokens" and set(place.channels) == {width}
        if flat and use and use.when > place.when:
            return 1.0, use, f"used as one sequence by {use.path}"
        if place.tensors == self._result:
            return 0.5, last, "the model's own output"
        return 0.0, last, "not used by any later module with weights"


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def _is_pyramid(levels: Sequence[Tensor]) -> bool:
    """Whether each level is half the one before, give or take a cell of rounding.

    Levels of one size (torchvision's MobileNet pyramids) pass if all channels are equal; lists of
    hidden states or of predictions seldom are.
    """
    sizes = [_size(x) for x in levels]
    if len({x.shape[1] for x in levels}) == 1:
        sizes = list(dict.fromkeys(sizes))
    return len(set(sizes)) > 1 and all(
        abs(2 * small[d] - large[d]) <= 2 and (0 < small[d] < large[d] or large[d] == 1)
        for large, small in zip(sizes, sizes[1:], strict=False)
        for d in (0, 1)
    )


def _levels_of(
    cells: int, sizes: set[tuple[int, int]], input_size: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Two or more of the sizes, the stride doubling, that have so many cells together."""
    for finest in sorted(sizes, reverse=True) if input_size else ():
        stride, levels = infer_stride(input_size, finest), [finest]
        while sum(h * w for h, w in levels) < cells:
            stride *= 2
            (level,) = level_shapes(input_size, [stride])
            if level not in sizes or level == levels[-1]:
                break
            levels.append(level)
        # Whoever reads the sequence has only the strides to tell the shapes.
        told = level_shapes(input_size, infer_strides(input_size, levels))
        if len(levels) > 1 and levels == told and sum(h * w for h, w in levels) == cells:
            return tuple(levels)
    return ()
