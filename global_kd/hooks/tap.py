"""Recording what named modules put out while a model runs, without touching it."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .modules import WRAPPER_ATTRIBUTES, resolve, sharded_modules, unwrap


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
        model = next(m for m in map(model._modules.get, WRAPPER_ATTRIBUTES) if m is not None)
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
