"""Reading what named modules put out, without touching the model; finding feature pyramids."""

import dataclasses
import difflib
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

_WRAPPERS = ("DataParallel", "DistributedDataParallel")  # and mmengine's MM...
_WRAPPER_ATTRIBUTES = ("module", "_orig_mod")  # DataParallel, DDP; torch.compile


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside ``DataParallel``, DDP and ``torch.compile`` wrappers."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and type(model).__name__.endswith(_WRAPPERS):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


def sharded_modules(model: nn.Module) -> list[Any]:
    """What FSDP2 (``fully_shard``) has taken over in a model, told by its methods."""
    return [m for m in model.modules() if hasattr(m, "reshard") and hasattr(m, "unshard")]


def resolve(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path; wrapper prefixes (``module.``) are ignored.

    Raises:
        ValueError: No such module; the message lists the nearest names.
    """
    names = dict(unwrap(model).named_modules())
    parts = path.split(".")
    while parts[0] in _WRAPPER_ATTRIBUTES and ".".join(parts) not in names:
        parts = parts[1:] or [""]
    if (plain := ".".join(parts)) in names:
        found: nn.Module = names[plain]
        return found
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or list(
        dict(unwrap(model).named_children())
    )
    raise ValueError(
        f"path: expected the name of a module of {type(unwrap(model)).__name__}, but got {path!r}; "
        f"nearest: {', '.join(near)}"
    )


class _Hook:
    """A hook of which a copied or pickled model takes along only an inert shell.

    A pickled one is of the standard library, so that the file loads where this package is not.
    """

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes any arguments and does nothing


class _Enough(Exception):
    """All taps have fired: the rest of the forward pass is not needed."""


class FeatureTap:
    """Records the outputs of named modules while the model runs.

    Only what happens inside a forward call of ``model`` is recorded, and each call starts afresh:
    recomputation during the backward pass of activation checkpointing is not seen. Calls in train
    and in eval mode are recorded apart, so an evaluation between a training forward and
    :meth:`read` does no harm. Copies of the model (EMA) and pickles carry no hook and no tensor.
    With ``torch.compile``, attach first, then compile.

    Args:
        model: The detector, bare or wrapped (``DataParallel``, DDP, ``torch.compile``).
        paths: Dotted module names: one, several, or a mapping from names of your own.
        inputs: Those of the names for which the positional *inputs* are recorded instead.

    Raises:
        ValueError: A path that does not exist; a compiled model that has already run.

    Example:
        >>> import torch
        >>> from global_kd import FeatureTap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU())
        >>> with FeatureTap(model, "0") as tap:
        ...     _ = model(torch.zeros(1, 3, 8, 8))
        ...     tap.read()["0"].shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        paths: str | Iterable[str] | Mapping[str, str],
        *,
        inputs: Iterable[str] = (),
    ) -> None:
        if isinstance(paths, str):
            paths = [paths]
        if not isinstance(paths, Mapping):
            paths = {path: path for path in paths}
        _refuse_traced(model)
        self.paths = dict(paths)
        self.inputs = frozenset(inputs)
        self._records = self._nothing()
        self._mode = self._recording = self._stopping = False
        modules = {name: resolve(model, path) for name, path in self.paths.items()}
        self._model: nn.Module | None = unwrap(model)
        self._handles = [
            self._model.register_forward_pre_hook(_Hook(self._start)),
            *(
                # Before the module runs, which may overwrite what it was given.
                module.register_forward_pre_hook(_Hook(self._recorder(name)))
                if name in self.inputs
                else module.register_forward_hook(_Hook(self._recorder(name)))
                for name, module in modules.items()
            ),
            self._model.register_forward_hook(_Hook(self._stop), always_call=True),
        ]

    def _nothing(self) -> dict[bool, dict[str, list[Any]]]:
        """No records: by the model's mode (training or not), then by name."""
        return {mode: {name: [] for name in self.paths} for mode in (False, True)}

    def _start(self, model: nn.Module, *_: Any) -> None:
        if _in_backward():  # a model that is checkpointed as a whole
            return
        self._mode, self._recording = model.training, True
        for name in self.paths:
            self._records[self._mode][name] = []

    def _stop(self, *_: Any) -> None:
        self._recording = False

    def _recorder(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            if self._recording:
                taken = tuple(list(x) if isinstance(x, list) else x for x in args)
                records = self._records[self._mode]
                records[name].append(taken if name in self.inputs else output)
                if self._stopping and all(records.values()):
                    raise _Enough

        return record

    def read(self) -> dict[str, Any]:
        """What was recorded in the last forward call; the tap forgets it.

        The last call in the mode, train or eval, that the model is in; where there was none, the
        last in the other.

        Raises:
            ValueError: A tap that did not fire, or fired more than once, in that call.
        """
        mode = self._model is not None and self._model.training
        found = self._records[mode if any(self._records[mode].values()) else not mode]
        self._records = self._nothing()
        for name, values in found.items():
            if not values:
                raise ValueError(
                    f"tap {self.paths[name]!r}: expected its module to run once in the model's "
                    "forward, but it never fired; run the model first (once per read), check that "
                    "its forward uses this module, and attach before torch.compile traces it"
                )
            if len(values) > 1:
                raise ValueError(
                    f"tap {self.paths[name]!r}: expected its module to run once in the model's "
                    f"forward, but it fired {len(values)} times; tap a module that is not shared"
                )
        return {name: values[0] for name, values in found.items()}

    def run(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run the model only until every tap has fired, and read.

        Models in FSDP2 (``fully_shard``) run to the end: a forward that breaks off would leave
        their parameters unsharded.
        """
        if self._model is None:
            raise ValueError("tap: expected an attached tap, but it was removed")
        self._stopping = not sharded_modules(self._model)
        try:
            self._model(*args, **kwargs)
        except _Enough:
            pass
        finally:
            self._stopping = self._recording = False
        return self.read()

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._model = [], None
        self._records = self._nothing()

    def __enter__(self) -> "FeatureTap":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled tap is a removed one: it holds neither model nor tensors."""
        return {
            "paths": self.paths,
            "inputs": self.inputs,
            "_records": self._nothing(),
            "_handles": [],
            "_model": None,
            "_mode": False,
            "_recording": False,
            "_stopping": False,
        }


def _in_backward() -> bool:
    """Whether a backward pass is under way, in which checkpointing runs modules once more."""
    if torch.compiler.is_compiling():
        return False
    task = getattr(torch._C, "_current_graph_task_id", None)  # there is no public name
    return task is not None and task() != -1


def _refuse_traced(model: nn.Module) -> None:
    """Hooks put on a model that ``torch.compile`` has already traced would never be called."""
    inner = unwrap(model)
    compiled = inner._compiled_call_impl is not None
    while model is not inner:
        compiled = compiled or "_orig_mod" in model._modules
        model = next(m for m in map(model._modules.get, _WRAPPER_ATTRIBUTES) if m is not None)
    if not compiled:
        return
    try:
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list as traces_of
    except ImportError:  # not a public name: without it the first read finds out
        return
    if traces_of(type(inner).forward.__code__):
        raise ValueError(
            "model: expected a model that torch.compile has not traced yet, but got one that has "
            "already run compiled: hooks added now would not fire. Attach first, then compile (or "
            "call torch.compiler.reset() before attaching)"
        )


def feature_maps(output: Any) -> list[Tensor]:
    """The 4-D tensors ``(B, C, H, W)`` of a module's output, in its own order, each once.

    Understands a tensor, a list or tuple, a mapping, a data class, an object with a
    ``feature_maps`` or ``tensors`` attribute (backbone outputs, nested tensors), and any nesting of
    these, such as lists of pairs of a map and its mask ``(B, H, W)``.
    """
    return [x for x in _tensors(output) if x.dim() == 4]


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers, in order, each once."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif isinstance(value, (type, nn.Module)):
        return []
    elif hasattr(value, "feature_maps"):
        inner = [value.feature_maps]
    elif dataclasses.is_dataclass(value):
        inner = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    elif isinstance(tensors := getattr(value, "tensors", None), Tensor):
        return [tensors]
    else:
        return []
    return list({id(x): x for item in inner for x in _tensors(item)}.values())


def tokens_to_maps(tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Turn the sequence of a multi-scale encoder back into maps.

    Args:
        tokens: ``(B, N, C)``, the cells of all levels one level after another, each row by row.
        shapes: ``(H_l, W_l)`` of each level in that order; ``N`` is the sum of ``H_l * W_l``.

    Returns:
        Views ``(B, C, H_l, W_l)`` into ``tokens``.

    Raises:
        ValueError: The sequence is not as long as the levels together.

    Example:
        >>> import torch
        >>> from global_kd.hooks import level_shapes, tokens_to_maps
        >>> shapes = level_shapes((100, 150), (8.0, 16.0, 32.0))
        >>> [tuple(x.shape) for x in tokens_to_maps(torch.zeros(1, 337, 6), shapes)]
        [(1, 6, 13, 19), (1, 6, 7, 10), (1, 6, 4, 5)]
    """
    cells = [height * width for height, width in shapes]
    if tokens.dim() != 3 or tokens.shape[1] != sum(cells):
        raise ValueError(
            f"tokens: expected (B, {sum(cells)}, C), the cells of levels {list(shapes)}, but got "
            f"{tuple(tokens.shape)}"
        )
    parts = tokens.transpose(1, 2).split(cells, dim=2)
    return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


def level_shapes(input_size: Sequence[int], strides: Sequence[float]) -> list[tuple[int, int]]:
    """``(H_l, W_l) = (⌈H / stride_l⌉, ⌈W / stride_l⌉)`` for a network input of ``(H, W)``."""
    height, width = input_size
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]


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
        for tokens in [x for x in _tensors(recorded) if x.dim() == 3][:1]:
            return tokens_to_maps(tokens, level_shapes(input_size, pyramid.strides))
    else:
        for value in recorded if pyramid.source == "input" else [recorded]:
            maps = _finest_first(feature_maps(value))
            if tuple(x.shape[1] for x in maps) == pyramid.channels:
                return maps
    raise ValueError(
        f"recorded: expected levels of {pyramid.channels} channels in the {pyramid.source} of "
        f"{pyramid.path!r}, but got {[tuple(x.shape) for x in _tensors(recorded)]}"
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
        with evaluating(inner), torch.random.fork_rng(cards):
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
            taken = _tensors((args, kwargs))
            own = [p for p in module._parameters.values() if p is not None]
            self._see_image(taken, first_layer=bool(path and own))
            for arg in args if path else ():
                if not isinstance(arg, Tensor) and self._see_maps(path, "input", feature_maps(arg)):
                    break
            self._see_uses(path, taken, weights)

        def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._clock += 1
            self._calls[path] += 1
            put_out = _tensors(output)
            maps = [x for x in put_out if x.dim() == 4]
            if not path:
                if len(maps) == len(put_out):
                    self._result = tuple(self._serial(x) for x in _finest_first(maps))
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
        levels = _finest_first(maps)
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


def _finest_first(maps: Iterable[Tensor]) -> list[Tensor]:
    return sorted(maps, key=lambda x: -x.shape[-1] * x.shape[-2])


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


def infer_strides(input_size: Sequence[int], sizes: Iterable[tuple[int, int]]) -> tuple[float, ...]:
    """Pixels of the network input per cell of each level, finest first.

    Twice the stride of the level before or the same, if that fits the map's size; small maps alone
    do not tell: 50 and 64 both explain two cells for 100 pixels. Else :func:`infer_stride`.
    """
    strides: list[float] = []
    for size in sizes:
        likely = [factor * stride for stride in strides[-1:] for factor in (2, 1)]
        fitting = [s for s in likely if level_shapes(input_size, [s]) == [size]]
        strides.append(fitting[0] if fitting else infer_stride(input_size, size))
    return tuple(strides)


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


def infer_stride(input_size: Sequence[int], map_size: Sequence[int]) -> float:
    """Pixels of the network input per cell.

    The exact ratio where the map divides the input; else the nearest power of two, if rounding (by
    less than two cells) or padding inside the network (to a multiple of 32, 64 or 128 pixels) made
    it uneven; else the whole number that patches without padding have: 14 for 18 cells of 256
    pixels.
    """
    sides = list(zip(input_size, map_size, strict=True))
    ratios = [i / m for i, m in sides]
    if ratios[0] == ratios[1] and ratios[0].is_integer():
        return ratios[0]
    stride = 2 ** round(math.log2(max(ratios)))
    rounded = all(abs(i / stride - m) < 2 for i, m in sides)
    padded = any(all(-(-i // k) * k == m * stride for i, m in sides) for k in (32, 64, 128))
    if not rounded and not padded:
        patches = [s for s in range(1, math.ceil(min(ratios)) + 1)
                   if all(i // s == m for i, m in sides)]  # fmt: skip
        return float(patches[-1] if patches else stride)
    return float(stride)


class evaluating:  # noqa: N801 - reads like a statement
    """Context in which models are in eval mode; every module's own mode comes back afterwards.

    What ran inside leaves no trace: modules compiled in place (``module.compile()``) run eagerly,
    or they would be traced with the hooks of a look around; and the casts of an autocast region
    that were made without gradient are forgotten, or (torch 2.4) the region's next forward would
    train nothing.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._models = models

    def __enter__(self) -> None:
        modules = [m for model in self._models for m in model.modules()]
        self._modes = [(m, m.training) for m in modules]
        self._compiled = [(m, call) for m in modules if (call := m._compiled_call_impl) is not None]
        for model in self._models:
            model.eval()
        for module, _ in self._compiled:
            module._compiled_call_impl = None

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode
        for module, call in self._compiled:
            module._compiled_call_impl = call
        torch.clear_autocast_cache()
