"""Forward hooks of which copies and pickles of a model know nothing."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# Where a module keeps forward hooks and what it knows of each: dictionaries by the hook's number.
_PLACES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Hook:
    """Calls what it is given, and stays behind when its model is copied or pickled.

    :func:`attach` leaves it out of copies altogether. Where somebody copies the hooks one by one,
    a shell remains that does nothing; a pickled one is of the standard library, so that the file
    loads where this package is not.
    """

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if self.call is not None:
            self.call(*args)

    @property
    def __name__(self) -> str:
        """Asked for by ``torch.jit.script`` alone, which would compile every hook of a model."""
        raise AttributeError(
            "model: torch.jit.script expected one without hooks of global_kd; script a copy, "
            "copy.deepcopy(model), which carries none, or take them off with kd.detach()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes any arguments and does nothing


def attach(
    module: nn.Module,
    call: Callable[..., None],
    *,
    before: bool = False,
    with_kwargs: bool = False,
    always_call: bool = False,
) -> RemovableHandle:
    """Register a forward hook, or with ``before`` a pre-hook, that no copy takes along."""
    if before:
        handle = module.register_forward_pre_hook(Hook(call), with_kwargs=with_kwargs)
    else:
        handle = module.register_forward_hook(
            Hook(call), with_kwargs=with_kwargs, always_call=always_call
        )
    hooks: Any = module._forward_pre_hooks if before else module._forward_hooks
    for place in _PLACES:
        entries = getattr(module, place)
        marks = getattr(entries, "__dict__", None)  # an OrderedDict has one
        if marks is not None and handle.id in entries and "__reduce_ex__" not in marks:
            # A dictionary of the module itself cannot be exchanged: the handles of hooks that
            # others have put there point at it. Copying and pickling ask the instance first.
            without = partial(_without_hooks, weakref.ref(entries), weakref.ref(hooks))
            entries.__deepcopy__ = partial(_deepcopied, without)
            entries.__reduce_ex__ = partial(_reduced, without)
    return handle


def detach(modules: Sequence["weakref.ref[nn.Module]"], handles: list[RemovableHandle]) -> None:
    """Take hooks off again; of dictionaries without any of ours the marks, too."""
    while handles:
        handles.pop().remove()
    for reference in modules:
        if (module := reference()) is None:
            continue
        for hooks, places in ((module._forward_hooks, _PLACES[:3]),
                              (module._forward_pre_hooks, _PLACES[3:])):  # fmt: skip
            if any(isinstance(x, Hook) for x in hooks.values()):
                continue
            for place in places:
                marks = getattr(getattr(module, place), "__dict__", {})
                marks.pop("__deepcopy__", None)
                marks.pop("__reduce_ex__", None)


def _without_hooks(
    entries: "weakref.ref[OrderedDict[int, Any]]", hooks: "weakref.ref[OrderedDict[int, Any]]"
) -> "OrderedDict[int, Any]":
    kept, all_hooks = entries(), hooks()
    assert kept is not None and all_hooks is not None  # the copy is under way: they are alive
    return OrderedDict(
        (number, x) for number, x in kept.items() if not isinstance(all_hooks.get(number), Hook)
    )


def _deepcopied(without: Callable[[], "OrderedDict[int, Any]"], memo: dict[int, Any]) -> Any:
    from copy import deepcopy

    return deepcopy(without(), memo)


def _reduced(without: Callable[[], "OrderedDict[int, Any]"], protocol: int) -> Any:
    return without().__reduce_ex__(protocol)
