"""Recording what named modules put out while a model runs, without touching it."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .attach import Hook, attach, detach
from .calls import Call
from .modules import WRAPPER_ATTRIBUTES, resolve, runs_whole, unwrap
from .record import Record, record_of


class _Enough(Exception):
    """All taps have fired: the rest of the forward pass is not needed."""


class _Recorder:
    """What the hooks of one :class:`FeatureTap` share.

    The hooks hold this and not the tap, so that a tap that nobody holds takes them along.
    """

    def __init__(self, names: Iterable[str], inputs: frozenset[str], clone: bool | None) -> None:
        self.names, self.inputs, self.clone = tuple(names), inputs, clone
        self.mode = self.recording = self.stopping = False
        self.muted = 0
        self.was_written: dict[tuple[bool, bool, str], bool] = {}  # by mode, whether it stops, name
        self.uncounted: set[tuple[bool, bool, str]] = set()  # where writes pass by the counter
        self.forget()

    def forget(self) -> None:
        """No records: by the model's mode (training or not), then by name."""
        self.records: dict[bool, dict[str, list[Record]]] = {
            mode: {name: [] for name in self.names} for mode in (False, True)
        }
        self.calls: dict[bool, Call | None] = {False: None, True: None}
        # Not a count: under torch.compile each value of a number would be traced anew.
        self.trained = self.trained_again = False

    def start(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.muted or _in_backward():  # checkpointed as a whole, it runs once more
            return
        self.mode, self.recording = model.training, True
        self.calls[self.mode] = Call(args, kwargs)
        for name in self.names:
            self.records[self.mode][name] = []

    def stop(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.recording:
            return
        self.recording = False
        if (call := self.calls[self.mode]) is not None:
            call.ended(output if self.mode else None)
        if output is None:  # it broke off
            return
        if self.mode:
            self.trained, self.trained_again = True, self.trained
        if not torch.compiler.is_compiling():
            for records in self.records[self.mode].values():
                for record in records:
                    # What is not written yet may be by whoever has the model's output.
                    if record.written:
                        self.learn(record)

    def learn(self, record: Record) -> None:
        """Whether this tap has to clone from now on; once it has to, it does so always."""
        if record.where in self.uncounted:
            record.overwritten = True
        elif record.where not in self.was_written and not record.written and record.compare():
            self.uncounted.add(record.where)
        if (written := record.written) is not None:
            known = self.was_written.get(record.where, False)
            self.was_written[record.where] = known or written

    def record(self, name: str, value: Any) -> None:
        if not self.recording:
            return
        records = self.records[self.mode]
        where = (self.mode, self.stopping, name)
        records[name].append(record_of(value, self._clones(where), where))
        if self.stopping and all(records.values()):
            raise _Enough

    def _clones(self, where: tuple[bool, bool, str]) -> bool:
        if self.clone is not None:
            return self.clone
        # A compiler removes copies that it can do without; inference mode counts no writes.
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return True
        return self.was_written.get(where, True)


class _Tap:
    """One module's hook; an object, since a copied model must not take a closure along."""

    def __init__(self, recorder: _Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def entering(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.recorder.record(self.name, args)

    def leaving(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.recorder.record(self.name, output)


@contextmanager
def quiet(model: nn.Module, *, but: object = None) -> Iterator[None]:
    """Context in which a model may run without a record in its taps, save one tap's.

    One model may be a student here and a teacher there: what it is asked as a teacher must not be
    taken for its training forward.
    """
    recorders = {
        recorder
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, Hook)
        and isinstance(recorder := getattr(hook.call, "__self__", None), _Recorder)
        and recorder is not but
    }
    for recorder in recorders:
        recorder.muted += 1
    try:
        yield
    finally:
        for recorder in recorders:
            recorder.muted -= 1


class FeatureTap:
    """Records the outputs of named modules while the model runs.

    Only what happens inside a forward call of ``model`` is recorded, and each call starts afresh:
    recomputation during the backward pass of activation checkpointing is not seen. Calls in train
    and in eval mode are recorded apart, so an evaluation between a training forward and
    :meth:`read` does no harm. Copies of the model (EMA) and pickles carry no hook and no tensor; a
    tap that nobody holds any more takes its hooks off.
    With ``torch.compile``, attach first, then compile.

    A record is what the module put out at that moment. Containers are copied, so a head may
    overwrite the list that it was given. Tensors that a later module writes in place
    (``ReLU(inplace=True)``) are cloned: the first forward in each mode clones and sees which are
    written, later ones clone only those.

    Args:
        model: The detector, bare or wrapped (``DataParallel``, DDP, ``torch.compile``).
        paths: Dotted module names: one, several, or a mapping from names of your own.
        inputs: Those of the names for which the positional *inputs* are recorded instead.
        clone: ``None``: where it is needed, as above; ``True``: always; ``False``: never, and a
            write in place is an error. Compiled models clone (the compiler removes what it can).
        accumulate: Several training forwards before one :meth:`read` are no error; it gives the
            last.

    Raises:
        ValueError: A path that does not exist; a compiled model that has already run.

    Example:
        >>> import torch
        >>> from global_kd import FeatureTap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU())
        >>> with FeatureTap(model, "0") as tap:
        ...     images = torch.zeros(1, 3, 8, 8)
        ...     _ = model(images)
        ...     tap.read(images)["0"].shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        paths: str | Iterable[str] | Mapping[str, str],
        *,
        inputs: Iterable[str] = (),
        clone: bool | None = None,
        accumulate: bool = False,
    ) -> None:
        if isinstance(paths, str):
            paths = [paths]
        if not isinstance(paths, Mapping):
            paths = {path: path for path in paths}
        _refuse_traced(model)
        self.paths = dict(paths)
        self.inputs = frozenset(inputs)
        self.clone, self.accumulate = clone, accumulate
        modules = {name: resolve(model, path) for name, path in self.paths.items()}
        self._recorder = recorder = _Recorder(self.paths, self.inputs, clone)
        self._model: nn.Module | None = unwrap(model)
        handles = [attach(self._model, recorder.start, before=True, with_kwargs=True)]
        for name, module in modules.items():
            tap = _Tap(recorder, name)
            # Inputs before the module runs, which may overwrite what it was given.
            into = name in self.inputs
            handles.append(attach(module, tap.entering if into else tap.leaving, before=into))
        handles.append(attach(self._model, recorder.stop, always_call=True))
        self._tapped = {name: weakref.ref(module) for name, module in modules.items()}
        touched = [weakref.ref(self._model), *self._tapped.values()]
        self._finalizer = weakref.finalize(self, detach, touched, handles)
        self._finalizer.atexit = False

    @property
    def call(self) -> Call | None:
        """The forward call that the next :meth:`read` is about: what it was given."""
        return self._recorder.calls[self._mode()]

    def saw(self, inputs: Any) -> bool | None:
        """Whether the forward call that the next :meth:`read` is about was given these tensors.

        Args:
            inputs: Tensors, or any nesting of containers of tensors.

        Returns:
            ``True``: a tensor here is an argument of that call, or equals one, and none
            contradicts. ``False``: where arguments have the shape, dtype and device of one of
            these, none equals it, or it was written since. ``None``: nothing can be compared (a
            detector that was given a list, and its batch here). An accelerator waits only where
            tensors of the same shape are not the same tensor.
        """
        return None if self.call is None else self.call.had(inputs)

    def read(self, inputs: Any = None) -> dict[str, Any]:
        """What was recorded in the last forward call; the tap forgets it.

        The last call in the mode, train or eval, that the model is in; where there was none, the
        last in the other.

        Args:
            inputs: What that call is believed to have been given; see :meth:`saw`.

        Raises:
            ValueError: A tap that did not fire, or fired more than once, in that call; a call with
                other inputs; more than one training forward since the last reading, unless
                ``inputs`` are seen to be those of the last, or ``accumulate``; what ``clone=False``
                or an earlier forward without writes left in the reach of a write in place.
        """
        mode, recorder = self._mode(), self._recorder
        seen = None if inputs is None else self.saw(inputs)
        again = mode and recorder.trained_again
        found = recorder.records[mode]
        recorder.forget()
        if seen is False:
            raise ValueError(
                "images: expected what the model was given in its last forward, but got other "
                "tensors (or these were written in place since); read right after the forward of "
                "these images"
            )
        if again and not seen and not self.accumulate:
            raise ValueError(
                "tap: expected one training forward between two readings, but got several, and "
                "only the last is recorded; read after each forward, call clear() after those "
                "that do not count, or pass accumulate=True to take the last"
            )
        return self._values(found)

    def clear(self) -> None:
        """Forget what was recorded: a forward that is not to be read."""
        self._recorder.forget()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context in which other forwards are recorded and read; then the present records are back.

        A training forward that still waits to be read is not lost to a look in between, and other
        taps on the model do not take the look for one.
        """
        recorder = self._recorder
        kept = recorder.records, recorder.calls, recorder.trained, recorder.trained_again
        recorder.forget()
        muted = quiet(self._model, but=recorder) if self._model is not None else nullcontext()
        try:
            with muted:
                yield
        finally:
            recorder.records, recorder.calls, recorder.trained, recorder.trained_again = kept

    def run(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run the model only until every tap has fired, and read.

        Other taps on the model record nothing meanwhile, and a record in the other mode (of a
        training forward, while this runs in eval mode) stays.
        Models in FSDP run to the end: a forward that breaks off would leave their parameters
        unsharded.
        """
        if self._model is None:
            raise ValueError("tap: expected an attached tap, but it was removed")
        recorder = self._recorder
        trained = recorder.trained, recorder.trained_again
        muted, recorder.muted = recorder.muted, 0  # this tap's own look is what is wanted
        recorder.stopping = not runs_whole(self._model)
        mode = self._model.training
        try:
            with quiet(self._model, but=recorder):
                self._model(*args, **kwargs)
        except _Enough:
            pass
        finally:
            recorder.recording, recorder.muted = False, muted
            recorder.trained, recorder.trained_again = trained
            found = recorder.records[mode]
            recorder.records[mode] = {name: [] for name in self.paths}
            recorder.calls[mode] = None
            recorder.stopping = False
        return self._values(found)

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        self._finalizer()
        self._model = None
        self._recorder.forget()

    def _mode(self) -> bool:
        """Of the records that the next reading gives."""
        mode = self._model is not None and self._model.training
        return mode if any(self._recorder.records[mode].values()) else not mode

    def _values(self, found: dict[str, list[Record]]) -> dict[str, Any]:
        for name, records in found.items():
            tap = f"tap {self.paths[name]!r}"
            if not records:
                raise ValueError(
                    f"{tap}: expected its module to run once in the model's "
                    f"forward, but it never fired; {self._cure(name)}"
                )
            if len(records) > 1:
                raise ValueError(
                    f"{tap}: expected its module to run once in the model's "
                    f"forward, but it fired {len(records)} times; tap a module that is not shared"
                )
            self._recorder.learn(records[0])
        for name, records in found.items():
            if records[0].written and not records[0].cloned:
                raise ValueError(
                    f"tap {self.paths[name]!r}: expected its tensors as they were recorded, but a "
                    "later operation wrote into them in place (ReLU(inplace=True), say), which it "
                    "had not done before; pass FeatureTap(..., clone=True)"
                )
        return {name: records[0].best for name, records in found.items()}

    def _cure(self, name: str) -> str:
        """Of a tap that did not fire."""
        if self._model is not None:
            kind = type(self._model).__name__
            try:
                now = resolve(self._model, self.paths[name])
            except ValueError:
                now = None
            if now is None or now is not self._tapped[name]():
                return (
                    f"the {kind} has had another module there since it was tapped: tap it anew, "
                    "or make the Distiller after the last change to its detectors"
                )
            model = f"this {kind}"
        else:
            model = "the model"
        return (
            f"run {model} itself first (once per read; a copy has no taps), check that its forward "
            "uses this module, and attach before torch.compile traces it"
        )

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
        return {name: vars(self)[name] for name in ("paths", "inputs", "clone", "accumulate")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model, self._tapped = None, {}
        self._recorder = _Recorder(self.paths, self.inputs, self.clone)
        self._finalizer = weakref.finalize(self, detach, [], [])


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
