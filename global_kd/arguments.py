"""What a :class:`global_kd.Distiller` is given, and what to type where it is something else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from os import PathLike
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .hooks import exported_in_train_mode, is_average, unwrap
from .losses.base import DistillLoss

_ORDER = "the order is Distiller(student, teacher, losses)"

# Losses and the Distiller that they serve.
_owners: MutableMapping[DistillLoss, ReferenceType[object]] = WeakKeyDictionary()


class Gone:
    """What a copied, pickled or detached Distiller holds in place of what it had on its detectors.

    Args:
        why: What became of it, as in "got a copy".
    """

    def __init__(self, why: str) -> None:
        self._why = why

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError(
            f"kd: expected a Distiller that reads its detectors, but got {self._why}; make a new "
            "one, Distiller(student, teacher, losses), and load this one's state_dict() into it"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling ask for some
            raise AttributeError(name)
        return self._refuse()

    __getitem__ = __iter__ = _refuse


def gone(why: str) -> dict[str, Any]:
    """In place of all that a Distiller has on its detectors."""
    return dict.fromkeys(("_models", "_pair", "_tap", "_passes", "_watch"), Gone(why))


# Detectors --------------------------------------------------------------------------------------


def detectors(student: Any, teacher: Any) -> tuple[nn.Module, nn.Module]:
    """Both models, bare.

    Raises:
        TypeError: What is no detector: a path, a state dictionary, a loss.
        ValueError: One network in both roles, an average in training, two devices, a student with
            nothing to train.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        if (why := _no_detector(role, model)) is not None:
            raise TypeError(f"{role}: expected a detector (nn.Module), but got {why}")
    if is_average(student):
        raise ValueError(
            f"student: expected the detector in training, but got its {type(student).__name__}; "
            "pass the model whose parameters the optimizer holds"
        )
    bare = unwrap(student), unwrap(teacher)
    if next(bare[0].parameters(), None) is None:
        raise ValueError(
            f"student: expected a detector with parameters to train, but {type(bare[0]).__name__} "
            "has none; exported and quantised models can be teachers"
        )
    mine, theirs = ({id(p) for p in model.parameters()} for model in bare)
    if bare[0] is bare[1] or (mine and mine == theirs):
        raise ValueError(
            "teacher: expected another network than the student, but got the student itself or one "
            "that shares all its parameters; pass a trained teacher, or copy.deepcopy(student)"
        )
    if (part := exported_in_train_mode(bare[1])) is not None:
        raise ValueError(
            "teacher: expected what was exported to be in eval mode, but got batch norm or dropout "
            f"in train mode in {part or type(teacher).__name__!r}; call eval() on it before "
            "torch.export.export"
        )
    where = [next((x.device for x in _tensors(model)), None) for model in bare]
    if None not in where and where[0] != where[1]:
        raise ValueError(
            f"teacher: expected the student's device {where[0]}, but got {where[1]}; move it with "
            f'teacher.to("{where[0]}")'
        )
    return bare


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _no_detector(role: str, model: Any) -> str | None:
    """What was given instead of a detector, and what to do."""
    kind = type(model).__name__
    if isinstance(model, type):
        return f"the class {model.__name__}; pass an instance, {model.__name__}(...)"
    if isinstance(model, DistillLoss):
        return f"the loss {kind}; {_ORDER}"
    if isinstance(model, nn.modules.loss._Loss):
        return f"{kind}, a loss; {_ORDER}, with losses of global_kd.losses"
    if isinstance(model, torch.jit.ScriptModule):
        return (
            f"a TorchScript module ({kind}), whose parts cannot be read by hooks; pass the Python "
            "network that it was made from"
        )
    if isinstance(model, nn.Module):
        if hasattr(model, "losses") and hasattr(model, "distil"):
            return f"a {kind}; pass the network itself"
        if isinstance(getattr(model, "ema_model", None), nn.Module):
            return f"{kind}, which holds an average; pass the network in it, {role}.ema_model"
        if next(_tensors(model), None) is None and not model.state_dict():
            return f"{kind}, which has no parameters; {_ORDER}"
        return None
    if isinstance(model, (str, PathLike)):
        return (
            f"the path {str(model)!r}; make the network, load the file into it "
            f"(model.load_state_dict(torch.load({str(model)!r}))), and pass the network"
        )
    if isinstance(model, Mapping):
        return _mapping(role, model)
    for name in ("model", "ema", "ema_model", "module", "net", "network"):
        if isinstance(getattr(model, name, None), nn.Module):
            return f"{kind}; pass the network in it, {role}.{name}"
    if isinstance(model, (list, tuple)):
        return f"a {kind} of {len(model)}; pass one network, and make one Distiller per pair"
    if callable(model):
        return f"{kind} {getattr(model, '__name__', '')!r}; pass the network, an nn.Module"
    return f"{kind}; pass the network, an nn.Module"


def _mapping(role: str, found: Mapping[Any, Any]) -> str:
    """A state dictionary, or a checkpoint that holds one or a network."""
    for key, value in found.items():
        if isinstance(value, nn.Module):
            return f"a checkpoint; pass the network in it, {role}[{key!r}]"
    if found and all(isinstance(x, Tensor) for x in found.values()):
        return (
            "a state dictionary; make the network, call model.load_state_dict(...) with it, and "
            "pass the network"
        )
    for key, value in found.items():
        if isinstance(value, Mapping) and any(isinstance(x, Tensor) for x in value.values()):
            return (
                f"a checkpoint; make the network, call model.load_state_dict(checkpoint[{key!r}]), "
                "and pass the network"
            )
    return f"a dictionary with {sorted(map(str, found))}; pass the network, an nn.Module"


# Losses -----------------------------------------------------------------------------------------


def named_losses(losses: Any) -> dict[str, DistillLoss]:
    """One loss or several, by their names.

    Raises:
        TypeError: What is no loss of this package.
        ValueError: None, two of one name, or one that serves another Distiller.
    """
    if isinstance(losses, (Mapping, nn.ModuleDict)):
        raise TypeError(
            f"losses: expected a loss or a list of losses, but got a {type(losses).__name__}; "
            "write list(losses.values()), since losses are named by their methods"
        )
    several = losses
    if isinstance(losses, (nn.Module, str, type)) or not isinstance(losses, Iterable):
        several = losses if isinstance(losses, nn.ModuleList) else [losses]
    named: dict[str, DistillLoss] = {}
    for loss in several:
        if not isinstance(loss, DistillLoss):
            raise TypeError(_no_loss(loss))
        if loss.name in named:
            raise ValueError(
                f"losses: expected one {loss.name!r}, but got two: their terms would have one "
                "name; leave one out, or give each a Distiller of its own"
            )
        owner = _owners.get(loss)
        if owner is not None and owner() is not None:
            raise ValueError(
                f"losses: expected a {type(loss).__name__} of its own for each Distiller, but got "
                "one that serves another: steps, adapters and prototypes would be mixed; make a "
                "new one, or call detach() on the other Distiller first"
            )
        named[loss.name] = loss
    if not named:
        raise ValueError(
            "losses: expected at least one loss, but got none; write GlobalKnowledgeLoss(...)"
        )
    return named


def own(losses: Iterable[DistillLoss], owner: object) -> None:
    """From now on these losses serve a Distiller; :func:`disown` ends it, and so does its end."""
    for loss in losses:
        _owners[loss] = ref(owner)


def disown(losses: Iterable[Any]) -> None:
    """They are free for another Distiller."""
    for loss in losses:
        _owners.pop(loss, None)


def _no_loss(loss: Any) -> str:
    expected = "losses: expected a loss of global_kd, or a list of them, after student and teacher"
    kind = type(loss).__name__
    if isinstance(loss, type) and issubclass(loss, DistillLoss):
        return f"losses: expected a loss, but got its class; write {loss.__name__}(...)"
    if isinstance(loss, str):
        near = next(
            (x for x in all_methods() if loss.lower() in (x.name, x.__name__.lower())), None
        )
        name = "GlobalKnowledgeLoss" if near is None else near.__name__
        return f"{expected}, but got the text {loss!r}; write {name}(...)"
    if isinstance(loss, (list, tuple)):
        return f"{expected}, but got a {kind} in the list; write one flat list of losses"
    if isinstance(loss, nn.Module) and kind == "RobustDistillLoss":
        return (
            f"{expected}, but got RobustDistillLoss, a part of one; write GlobalKnowledgeLoss(...)"
        )
    if isinstance(loss, nn.modules.loss._Loss) or (
        callable(loss) and not isinstance(loss, nn.Module)
    ):
        name = getattr(loss, "__name__", kind)
        return (
            f"{expected}, but got {name}; take one of global_kd.losses, such as PKD(), "
            "or write a DistillLoss of your own"
        )
    if isinstance(loss, nn.Module):
        return f"{expected}, but got {kind}; {_ORDER}"
    return f"{expected}, but got {kind}; write GlobalKnowledgeLoss(...)"


def all_methods(base: type[DistillLoss] = DistillLoss) -> Iterator[type[DistillLoss]]:
    """Every loss that is imported."""
    for method in base.__subclasses__():
        yield method
        yield from all_methods(method)
