"""What a module puts out, kept as it was at that moment."""

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping, MutableSequence, ValuesView
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 3  # objects within objects: a configuration that an output points at is not copied
_PLAIN = (str, bytes, int, float, complex, type(None), type, nn.Module, ModuleType, FunctionType)


class _Twins:
    """What was copied already, by identity: what is held twice is copied once."""

    def __init__(self) -> None:
        self._by_id: dict[int, Any] = {}
        self._pairs: list[tuple[Any, Any]] = []  # while torch.compile traces, which knows no id()

    def of(self, value: Any) -> Any:
        """The twin, or ``None``."""
        if not torch.compiler.is_compiling():
            return self._by_id.get(id(value))
        for one, twin in self._pairs:
            if one is value:
                return twin
        return None

    def add(self, value: Any, twin: Any) -> Any:
        """Before the items are copied, since a container may hold itself."""
        if torch.compiler.is_compiling():
            self._pairs.append((value, twin))
        else:
            self._by_id[id(value)] = twin
        return twin


def snapshot(value: Any, tensors: list[Tensor] | None = None, *, clone: bool = False) -> Any:
    """A copy of all containers in a value; the tensors are the same ones, or clones.

    Whoever was given the value may overwrite its lists, tuples in lists, mappings, data classes and
    other objects: the copy stays. Types stay, those of named tuples and subclasses included.

    Args:
        value: Anything that a module takes in or puts out.
        tensors: Filled with the tensors of the value itself, each once.
        clone: Copy the tensors (their gradient flows on).
    """
    return _copied(value, _Twins(), [] if tensors is None else tensors, clone, _DEPTH)


def _copied(value: Any, twins: _Twins, tensors: list[Tensor], clone: bool, depth: int) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if (twin := twins.of(value)) is not None:
        return twin
    if isinstance(value, Tensor):
        tensors.append(value)
        return twins.add(value, value.clone() if clone else value)

    # No closure: torch.compile of 2.4 traces none that calls itself.
    rest = (twins, tensors, clone, depth)
    if type(value) is list:
        items = twins.add(value, [])
        for x in value:
            items.append(_copied(x, *rest))
        return items
    if type(value) is dict:
        entries = twins.add(value, {})
        for key, x in value.items():
            entries[key] = _copied(x, *rest)
        return entries
    if isinstance(value, tuple):
        parts = []
        for x in value:
            parts.append(_copied(x, *rest))
        if type(value) is tuple:
            return tuple(parts)
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*parts)
        return value if isinstance(value, torch.Size) else tuple(parts)
    if isinstance(value, ValuesView):  # it shows what its mapping holds by then
        return [_copied(x, *rest) for x in value]
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return {key: _copied(x, *rest) for key, x in value.items()}
    if isinstance(value, (MutableSequence, Mapping)):  # a deque is one, too
        twin = twins.add(value, copy.copy(value))
        for key, x in list(value.items() if isinstance(value, Mapping) else enumerate(value)):
            if (new := _copied(x, *rest)) is not x:
                twin[key] = new
        return twin
    return _copied_object(value, twins, tensors, clone, depth - 1) if depth else value


def _copied_object(
    value: Any, twins: _Twins, tensors: list[Tensor], clone: bool, depth: int
) -> Any:
    """A twin of an object with attributes; where it can be, no code of its class runs."""
    kind: Any = type(value)
    held = attributes_of(value)
    if not held:
        return value
    if kind.__new__ is object.__new__:
        twin = object.__new__(kind)
    else:
        try:
            twin = copy.copy(value)  # SimpleNamespace
        except Exception:
            return value
        if twin is value:  # a member of an enumeration
            return value
    twins.add(value, twin)
    for name, x in held.items():
        x = _copied(x, twins, tensors, clone, depth)
        if name in getattr(value, "__dict__", {}):
            twin.__dict__[name] = x  # also where a class refuses to be assigned to
        else:
            object.__setattr__(twin, name, x)
    return twin


def attributes_of(value: Any) -> dict[str, Any]:
    """What an object holds, in its dictionary and in slots; no code of its class runs."""
    names = [*getattr(value, "__dict__", ()), *(n for c in type(value).__mro__ for n in _slots(c))]
    held = {}
    for name in names:
        try:  # torch.compile of 2.4 does not trace contextlib.suppress
            held[name] = object.__getattribute__(value, name)
        except AttributeError:  # a slot that holds nothing
            continue
    return held


def _slots(kind: type) -> tuple[str, ...]:
    names = kind.__dict__.get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(n for n in names if n not in ("__dict__", "__weakref__"))


def version_of(x: Tensor) -> int | None:
    """How often a tensor was written in place; ``None`` where nobody counts."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


@dataclasses.dataclass
class Record:
    """A value as a module put it out, and what tells whether somebody wrote into it afterwards.

    Attributes:
        value: Containers copied; tensors cloned where ``cloned``.
        plain: Containers copied; the module's own tensors.
        tensors: The module's own tensors.
        versions: Of each at that moment.
        where: The tap: the model's mode, whether the run stops at the last tap, and the name.
        cloned: Whether ``value`` is out of reach of whoever writes into the module's tensors.
        overwritten: Whether clones tell of a write that nobody counted; see :meth:`compare`.
    """

    value: Any
    plain: Any
    tensors: list[Tensor]
    versions: list[int | None]
    cloned: bool
    where: tuple[bool, bool, str]
    overwritten: bool = False

    def compare(self) -> bool:
        """Whether something wrote past the counter (``x.data``, NumPy); an accelerator waits."""
        clones: list[Tensor] = []
        snapshot(self.value, clones)
        self.overwritten = self.cloned and not all(map(_equal, clones, self.tensors))
        return self.overwritten

    @property
    def written(self) -> bool | None:
        """Whether a tensor of the module was written in place since; ``None``: nobody counts."""
        if self.overwritten:
            return True
        if any(v is None for v in self.versions):
            return None
        return [version_of(x) for x in self.tensors] != self.versions

    @property
    def best(self) -> Any:
        """The module's own tensors where nobody wrote into them, else the clones.

        A clone has the same values, but another place in the graph: gradients would be added up in
        another order, and a training would depend on when its first forward was.
        """
        return self.plain if self.written is False else self.value


def _equal(x: Tensor, y: Tensor) -> bool:
    try:
        return torch.equal(x, y)
    except (NotImplementedError, RuntimeError):  # of tensors that nobody can look into
        return True


def record_of(value: Any, clone: bool, where: tuple[bool, bool, str]) -> Record:
    """Keep a value as it is now."""
    tensors: list[Tensor] = []
    kept = plain = snapshot(value, tensors, clone=clone)
    if clone and not torch.compiler.is_compiling():
        plain = snapshot(value)
    return Record(kept, plain, tensors, [version_of(x) for x in tensors], clone, where)
