"""Reading what named modules put out, without touching the model; finding feature pyramids."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPER_ATTRIBUTES = ("module", "_orig_mod")  # DataParallel, DDP; torch.compile


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside ``DataParallel``, DDP and ``torch.compile`` wrappers."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


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
    """A hook of which a copied or pickled model takes along only an inert shell."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return (_Hook, ())


class _Enough(Exception):
    """All taps have fired: the rest of the forward pass is not needed."""


class FeatureTap:
    """Records the outputs of named modules while the model runs.

    Only what happens inside a forward call of ``model`` is recorded, and each call starts afresh:
    recomputation during the backward pass of activation checkpointing is not seen. Copies of the
    model (EMA) and pickles carry no hook and no tensor. With ``torch.compile``, attach first, then
    compile.

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
        self._records: dict[str, list[Any]] = {name: [] for name in self.paths}
        self._recording = self._stopping = False
        modules = {name: resolve(model, path) for name, path in self.paths.items()}
        self._model: nn.Module | None = unwrap(model)
        self._handles = [
            self._model.register_forward_pre_hook(_Hook(self._start)),
            *(
                module.register_forward_hook(_Hook(self._recorder(name)))
                for name, module in modules.items()
            ),
            self._model.register_forward_hook(_Hook(self._stop), always_call=True),
        ]

    def _start(self, *_: Any) -> None:
        for name in self._records:
            self._records[name] = []
        self._recording = True

    def _stop(self, *_: Any) -> None:
        self._recording = False

    def _recorder(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._recording:
                self._records[name].append(args if name in self.inputs else output)
                if self._stopping and all(self._records.values()):
                    raise _Enough

        return record

    def read(self) -> dict[str, Any]:
        """What was recorded in the last forward call; the tap forgets it.

        Raises:
            ValueError: A tap that did not fire, or fired more than once, in that call.
        """
        found = {name: list(values) for name, values in self._records.items()}
        self._records = {name: [] for name in self.paths}
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
        """Run the model only until every tap has fired, and read."""
        if self._model is None:
            raise ValueError("tap: expected an attached tap, but it was removed")
        self._stopping = True
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
        self._records = {name: [] for name in self.paths}

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
        empty: dict[str, list[Any]] = {name: [] for name in self.paths}
        return {
            "paths": self.paths,
            "inputs": self.inputs,
            "_records": empty,
            "_handles": [],
            "_model": None,
            "_recording": False,
            "_stopping": False,
        }


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
    """The 4-D tensors ``(B, C, H, W)`` of a module's output, in its own order.

    Understands a tensor, a list or tuple, a mapping, a data class or any object with a
    ``feature_maps`` attribute.
    """
    if isinstance(output, Tensor):
        return [output] if output.dim() == 4 else []
    if isinstance(output, Mapping):
        output = list(output.values())
    elif not isinstance(output, (list, tuple)):
        if hasattr(output, "feature_maps"):
            output = output.feature_maps
        elif dataclasses.is_dataclass(output):
            output = [getattr(output, field.name) for field in dataclasses.fields(output)]
        else:
            return []
        return feature_maps(output)
    return [x for item in output for x in feature_maps(item)]


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """A module whose output is a feature pyramid.

    Attributes:
        path: Dotted name of the module.
        strides: Pixels of the network input per cell of each level, finest first.
        channels: Of each level.
    """

    path: str
    strides: tuple[float, ...]
    channels: tuple[int, ...]


@torch.no_grad()
def find_pyramids(model: nn.Module, *example_inputs: Any, **example_kwargs: Any) -> list[Pyramid]:
    """Run the model once (in eval mode) and list the modules that put out several scales.

    The network input is the first image-like tensor that any module receives, so images that a
    detector resizes inside are measured as the network sees them. The model's modes, buffers and
    the random state stay as they were.

    Args:
        model: Any detector.
        *example_inputs: What its forward takes in eval mode.
        **example_kwargs: Likewise.

    Returns:
        Most levels first; of equal ones the module that ran last (the neck after the backbone).
        A pyramid has at least two levels, each about half the size of the one before.

    Example:
        >>> import torch
        >>> from global_kd import find_pyramids
        >>> class Neck(torch.nn.Module):
        ...     def forward(self, x):
        ...         return [torch.nn.functional.avg_pool2d(x, s) for s in (4, 8, 16)]
        >>> find_pyramids(
        ...     torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), Neck()), torch.zeros(1, 3, 64, 64)
        ... )
        [Pyramid(path='1', strides=(4.0, 8.0, 16.0), channels=(6, 6, 6))]
    """
    inner = unwrap(model)
    found: list[tuple[int, str, list[Tensor]]] = []
    sizes: list[tuple[int, ...]] = []
    order = 0

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not sizes and module is not inner and not list(module.children()):
            sizes.extend(
                tuple(a.shape[-2:]) for a in args if isinstance(a, Tensor) and a.dim() == 4
            )

    def recorder(path: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal order
            order += 1
            if not isinstance(output, Tensor):
                found.append((order, path, feature_maps(output)))

        return after

    handles = []
    for path, module in inner.named_modules():
        handles.append(module.register_forward_pre_hook(before))
        if path:
            handles.append(module.register_forward_hook(recorder(path)))
    try:
        with evaluating(inner):
            inner(*example_inputs, **example_kwargs)
    finally:
        for handle in handles:
            handle.remove()
    pyramids = []
    for when, path, maps in found:
        levels = sorted(maps, key=lambda x: -x.shape[-1] * x.shape[-2])
        if len(levels) < 2 or not sizes or not _halving(levels):
            continue
        strides = tuple(infer_stride(sizes[0], tuple(x.shape[-2:])) for x in levels)
        pyramids.append((when, Pyramid(path, strides, tuple(x.shape[1] for x in levels))))
    pyramids.sort(key=lambda item: (-len(item[1].strides), -item[0]))
    return [pyramid for _, pyramid in pyramids]


def _halving(levels: Sequence[Tensor]) -> bool:
    """Whether each level is half the one before, give or take a cell of rounding."""
    return all(
        abs(small.shape[d] * 2 - large.shape[d]) <= 2 and small.shape[d] < large.shape[d]
        for large, small in zip(levels, levels[1:], strict=False)
        for d in (-1, -2)
    )


def infer_stride(input_size: Sequence[int], map_size: Sequence[int]) -> float:
    """Pixels of the network input per cell.

    The exact ratio where the map divides the input, the nearest power of two where rounding or
    padding inside the network made it uneven.
    """
    ratios = [i / m for i, m in zip(input_size, map_size, strict=True)]
    if ratios[0] == ratios[1] and ratios[0].is_integer():
        return ratios[0]
    return float(2 ** round(torch.tensor(max(ratios)).log2().item()))


class evaluating:  # noqa: N801 - reads like a statement
    """Context in which models are in eval mode; every module's own mode comes back afterwards."""

    def __init__(self, *models: nn.Module) -> None:
        self._models = models

    def __enter__(self) -> None:
        self._modes = [(m, m.training) for model in self._models for m in model.modules()]
        for model in self._models:
            model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode
